"""The method of Suma & Tolias, Large-to-small Image Resolution Asymmetry in Deep Metric Learning, WACV 2023.

    net = EmbeddingNet("resnet50", dim=512)  # images (B,3,H,W) -> unit vectors (B,D)
    loss = distillation_loss(student_views, teacher_views, lambda_ts=0.77, lambda_ss=0.67)

Needs torch, torchvision and numpy only: copy it. B images, A views (augmented copies) of each, D dimensions,
C channels; P positives and M negatives an anchor.
"""
import hashlib
import os
import re
import zipfile
import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
POOLINGS = {"gem": lambda channels: GeM(), "gemmp": lambda channels: GeM(channels=channels),
            "mac": lambda channels: nn.AdaptiveMaxPool2d(1), "spoc": lambda channels: nn.AdaptiveAvgPool2d(1)}
BATCHNORM = nn.modules.batchnorm._BatchNorm  # layers of any kind
HEAD = ("aux1", "aux2", "AuxLogits", "avgpool", "dropout", "fc", "classifier")  # by torchvision's names
RELEASED = [f"{data}-{size}-resnet50-512-gem-w" for data in ("cub", "cars", "sop")
            for size in ("448r", "224r", "S224r-T448r")]
RELEASED_URL = "http://ptak.felk.cvut.cz/personal/sumapave/public/{}.pth"

class GeM(nn.Module):
    """Mean of clamp(x, eps)^p over positions, ^(1/p): (B,C,h,w) -> (B,C). p, one or C of them, is learned."""
    def __init__(self, p=3.0, channels=1, eps=1e-6):
        super().__init__()
        self.p, self.eps = nn.Parameter(torch.full((channels,), float(p))), eps

    def forward(self, x):
        p = self.p.to(x.dtype)
        return x.clamp(min=self.eps).pow(p[:, None, None]).mean((-2, -1)).pow(1 / p)

class EmbeddingNet(nn.Module):
    """Sec. 3.1. Images (B,3,H,W) -> unit vectors (B,D): backbone, pooling, L2, linear whitening, L2.

    arch        a torchvision convolutional classifier, "resnet10" (a basic block a stage), or "timm/NAME"
    pooling     "gem", "gemmp" (one p per channel), "mac" (maximum) or "spoc" (mean)
    dim         D, the output of the whitening layer; 0: no such layer, D is the backbone's C
    pretrained  True: ImageNet weights; False: random; a path: a file of the classifier's weights
    backbone    a module (B,3,H,W) -> (B,C,h,w) instead of `arch`

    Images are ImageNet-normalised. Batch-norm's statistics stand still if weights are pretrained, and in
    layers of `backbone` in eval mode. The head is in float32. ValueError for what is unknown or missing.
    """
    def __init__(self, arch="resnet50", pooling="gem", dim=512, pretrained=True, backbone=None):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}: choose from {', '.join(POOLINGS)}")
        self.arch, self.pooling = arch if backbone is None else "custom", pooling
        self.size, self.teacher, self.options = None, None, {}  # in px; a fingerprint; as saved
        self.frozen_batchnorm = bool(pretrained)
        try:
            self.backbone = _backbone(arch, pretrained) if backbone is None else backbone
            self.frozen_layers = [layer for layer in self.backbone.modules() if not layer.training]
            image = torch.zeros(1, 3, 224, 224)
            _, channels, height, width = self.backbone.eval()(image.to(next(self.parameters(), image))).shape
            assert height == width, "it is (B,h,w,C)"
        except Exception as error:  # libraries and one's own module raise anything
            raise ValueError(f"{self.arch}, {pretrained=}, gives no feature map ({error!r:.200}); timm/NAME: "
                             "pip install timm; no download: --weights FILE; custom: backbone=") from error
        self.pool = POOLINGS[pooling](channels)
        self.whiten = nn.Linear(channels, dim) if dim else nn.Identity()
        self.dim = dim or channels
        self.train()

    def train(self, mode=True, statistics=True):
        """As nn.Module's. statistics False: batch-norm uses its running statistics and leaves them alone."""
        super().train(mode)
        for layer in self.modules() if self.frozen_batchnorm or not statistics else self.frozen_layers:
            if isinstance(layer, BATCHNORM):
                layer.eval()
        return self

    def forward(self, images):
        if self.frozen_batchnorm and self.arch.lower() in ("googlenet", "inception_v3"):
            mean, std = images.new_tensor([MEAN, STD])[:, :, None, None]
            images = (images * std + mean - 0.5) / 0.5  # as they were pretrained
        features = self.backbone(images.to(next(self.backbone.parameters(), images).dtype))  # (B,C,h,w)
        with torch.autocast(features.device.type, enabled=False):
            x = F.normalize(self.pool(features.float()).flatten(1))  # (B,C)
            whitening = [p.float() for p in self.whiten.parameters()]
            return F.normalize(F.linear(x, *whitening) if whitening else x)  # (B,D)

def _backbone(arch, pretrained):  # up to the last feature map, children named as in the authors' checkpoints
    imagenet, models = pretrained is True, torchvision.models
    if arch.startswith("timm/"):
        import timm
        model = timm.create_model(arch[5:], pretrained=imagenet)
    elif arch == "resnet10" and not imagenet:
        model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
    else:
        model = models.get_model(arch, weights="IMAGENET1K_V1" if imagenet else None)
    if not isinstance(pretrained, bool):
        model.load_state_dict(read_checkpoint(pretrained))
    if arch.startswith("timm/"):
        model.reset_classifier(0, "")  # no pooling either
        return model
    if isinstance(model, models.DenseNet):  # whose forward goes on with a ReLU
        model.features.add_module("relu", nn.ReLU(inplace=True))
    layers = [child for name, child in model.named_children() if name not in HEAD]
    return getattr(model, "features", nn.Sequential(*layers))

def distillation_loss(student, teacher, lambda_ts, lambda_ss):
    """Sec. 3.3, Eq. 3-6, summed over images: unit vectors (B,A,D) x2, row b the same A views -> scalar."""
    s, t = student, teacher
    return absolute_term(s, t) + lambda_ts * ts_term(s, t) + lambda_ss * ss_term(s, t)

def absolute_term(s, t):
    """sum_b 1/A sum_i (1 - s_bi.t_bi)^2: each view lands where the teacher puts it. (B,A,D) x2 -> scalar."""
    return (1 - (s * t).sum(-1)).square().mean(1).sum()

def ts_term(s, t):
    """sum_b 1/(A(A-1)) sum_i!=j (s_bi.t_bj - t_bi.t_bj)^2: student to teacher as teacher to teacher."""
    return _off_diagonal_mean((s @ t.mT - t @ t.mT).square()).sum()  # (B,A,D) @ (B,D,A) -> (B,A,A)

def ss_term(s, t):
    """sum_b 1/(A(A-1)) sum_i!=j (s_bi.s_bj - t_bi.t_bj)^2: student to student as teacher to teacher."""
    return _off_diagonal_mean((s @ s.mT - t @ t.mT).square()).sum()  # (B,A,D) @ (B,D,A) -> (B,A,A)

def _off_diagonal_mean(x):  # over i != j of (B,A,A) -> (B,); zero where A is 1
    return (x.sum((1, 2)) - x.diagonal(dim1=1, dim2=2).sum(1)) / max(1, x.shape[1] ** 2 - x.shape[1])

def triplet_loss(anchors, positives, negatives, margin=0.7):
    """Sec. 3.2: sum_b mean_pm max(0, |a-p|^2 - |a-n|^2 + margin) of (B,D), (B,P,D), (B,M,D) -> scalar."""
    to_positives = (anchors[:, None] - positives).square().sum(-1)  # (B,P)
    to_negatives = (anchors[:, None] - negatives).square().sum(-1)  # (B,M)
    return F.relu(to_positives[:, :, None] - to_negatives[:, None] + margin).mean((1, 2)).sum()

def negative_probabilities(anchors, pool, anchor_labels, pool_labels):
    """Distance-weighted sampling (Wu et al., ICCV 2017): (Q,D), (N,D), (Q,), (N,) -> (Q,N), rows sum to 1.
    Weights are 1 / q(d), d >= 0.5, relative to the largest or 1, plus 1e-6; 0 for the anchor's class,
    ValueError if that is all. ln q(d) = (D-2) ln d + (D-3)/2 ln(1 - d^2/4): how common d is on the sphere.
    """
    dim, kind = anchors.shape[1], torch.promote_types(anchors.dtype, torch.float32)
    same = anchor_labels[:, None] == pool_labels  # (Q,N)
    if same.all(1).any():
        raise ValueError("an anchor has no negatives in the pool")
    with torch.autocast(anchors.device.type, enabled=False):
        squared = (2 - 2 * anchors.to(kind) @ pool.to(kind).T).clamp(0.25, 4 - 1e-6)  # (Q,N): d^2, d < 2
    log_q = ((dim / 2 - 1) * squared.log() + (dim - 3) / 2 * (1 - squared / 4).log()).masked_fill_(same, 0)
    weight = (log_q.amin(1, keepdim=True) - log_q).exp_().add_(1e-6).masked_fill_(same, 0)
    return weight.div_(weight.sum(1, keepdim=True))

def draw_negatives(anchors, pool, anchor_labels, pool_labels, count=4, chunk=512, generator=None):
    """Rows (Q,count) of the pool by negative_probabilities, none twice; ValueError where there are fewer."""
    if len(pool_labels) - pool_labels.unique(return_counts=True)[1].max() < count:
        raise ValueError(f"an anchor has fewer than {count} negatives in the pool")
    chunks = zip(anchors.split(chunk), anchor_labels.split(chunk))
    weights = (negative_probabilities(some, pool, labels, pool_labels) for some, labels in chunks)
    return torch.cat([torch.multinomial(weight, count, generator=generator) for weight in weights])

def fingerprint(net):  # 16 hex digits that name a network's weights
    state = sorted(net.state_dict().items())  # as bytes, for numpy has no bfloat16
    octets = [name.encode() + x.cpu().flatten().view(torch.uint8).numpy().tobytes() for name, x in state]
    return hashlib.sha256(b"".join(octets)).hexdigest()[:16]

def save_checkpoint(path, net, **extra):
    """Write the authors' format, atomically; `extra`: more entries, of plain values and tensors."""
    meta = {"architecture": net.arch, "pooling": net.pooling, "outputdim": net.dim, "mean": list(MEAN),
            "std": list(STD), "whitening": getattr(net.whiten, "out_features", 0), "size": net.size,
            "frozen_batchnorm": net.frozen_batchnorm, "teacher": net.teacher}
    write_atomically(path, {"meta": meta, "state_dict": net.state_dict(), **extra})

def write_atomically(path, content):
    """torch.save beside `path`, flush, rename over it. Raises OSError, with `path` untouched."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"{path} could not be written ({error}); a previous one is intact") from error

def read_checkpoint(path):
    """What torch.save wrote, of plain data; no code is run. Raises ValueError for what is not that."""
    scalar, dtypes = np._core.multiarray.scalar, [type(np.dtype(kind)) for kind in ("f4", "f8", "i8")]
    numbers = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]  # numpy 2's, 1's
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals(numbers):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is not a readable checkpoint ({error!r:.200})") from error

def load_checkpoint(path_or_name, backbone=None):
    """The EmbeddingNet, in eval mode, of a file, ours or the authors', or a name in RELEASED, fetched once.
    Its `size` is that of training, if known. A `backbone` of your own is needed again. OSError or ValueError.
    """
    path = str(path_or_name)
    if path in RELEASED:
        url, path = RELEASED_URL.format(path), os.path.join(torch.hub.get_dir(), f"checkpoints/{path}.pth")
        try:
            if not os.path.exists(path):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(url, path)
        except OSError as error:
            raise OSError(f"{url} could not be downloaded ({error}): put it at {path}") from error
    content = read_checkpoint(path)
    try:
        meta, weights = content["meta"], content["state_dict"]
        dim = len(weights.get("whiten.bias", ()))
        net = EmbeddingNet(meta["architecture"], meta["pooling"], dim, pretrained=False, backbone=backbone)
        net.load_state_dict(weights)
        net.size = meta.get("size") or next(map(int, re.findall(r"-S?(\d+)r-", os.path.basename(path))), None)
        net.frozen_batchnorm, net.teacher = meta.get("frozen_batchnorm", True), meta.get("teacher")
        net.options = dict(content.get("options") or {})
    except Exception as error:  # it need not be a dict
        raise ValueError(f"{path} is not a checkpoint of this project ({error!r:.200})") from error
    return net.eval()

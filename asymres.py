"""The method of Suma & Tolias, Large-to-small Image Resolution Asymmetry in Deep Metric Learning, WACV 2023.

    net = EmbeddingNet("resnet50", dim=512)  # images (B,3,H,W) -> unit vectors (B,D)
    loss = distillation_loss(student_views, teacher_views, lambda_ts=0.77, lambda_ss=0.67)

Needs torch, torchvision and numpy only: copy it. Vectors are rows, (N, D). B images, A views (augmented
copies) of each, D dimensions, C channels; P positives and M negatives an anchor.
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
INCEPTIONS = ("googlenet", "inception_v3")  # pretrained on (x - 0.5) / 0.5 of pixels x
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
        self.arch, self.pooling = "custom" if backbone is not None else arch, pooling
        self.size, self.teacher, self.options = None, None, {}  # side in px it is trained at; as files say
        self.backbone = _backbone(arch, pretrained) if backbone is None else backbone
        self.frozen_batchnorm = bool(pretrained)  # and the input as its weights had it
        layers = [module for module in self.backbone.modules() if isinstance(module, BATCHNORM)]
        self.frozen_layers = [layer for layer in layers if not layer.training]
        try:  # C by looking: classifiers' own attributes lie for VGG, DenseNet and MobileNetV3
            image = torch.zeros(1, 3, 224, 224)
            with torch.no_grad():
                features = self.backbone.eval()(image.to(next(self.parameters(), image)))
            _, channels, height, width = features.shape
            assert height == width  # else it is (B,h,w,C)
        except (RuntimeError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise ValueError(f"{self.arch} has no feature map (B,C,h,w): is it convolutional?") from error
        self.pool = POOLINGS[pooling](channels)
        self.whiten = nn.Linear(channels, dim) if dim else nn.Identity()
        self.dim = dim or channels
        self.train()

    def train(self, mode=True, statistics=True):
        """As nn.Module's. statistics False: batch-norm uses its running statistics and leaves them alone."""
        super().train(mode)
        for layer in self.modules():
            if isinstance(layer, BATCHNORM):
                frozen = self.frozen_batchnorm or layer in self.frozen_layers or not statistics
                layer.train(mode and not frozen)
        return self

    def forward(self, images):
        if self.frozen_batchnorm and self.arch.lower() in INCEPTIONS:
            mean, std = images.new_tensor([MEAN, STD])[:, :, None, None]
            images = images * (std / 0.5) + (mean - 0.5) / 0.5
        features = self.backbone(images.to(next(self.backbone.parameters(), images).dtype))  # (B, C, h, w)
        with torch.autocast(features.device.type, enabled=False):
            x = F.normalize(self.pool(features.float()).flatten(1))  # (B, C)
            if isinstance(self.whiten, nn.Linear):
                x = F.linear(x, self.whiten.weight.float(), self.whiten.bias.float())  # (B, D)
            return F.normalize(x)

def _backbone(arch, pretrained):  # up to the last feature map, children named as in the authors' checkpoints
    imagenet, models = pretrained is True, torchvision.models
    try:
        weights = None if isinstance(pretrained, bool) else read_checkpoint(pretrained)
        if arch.startswith("timm/"):
            import timm
            model = timm.create_model(arch[5:], pretrained=imagenet)
        elif arch == "resnet10" and not imagenet:
            model = models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1])
        else:
            model = models.get_model(arch, weights="IMAGENET1K_V1" if imagenet else None)
        if weights:
            model.load_state_dict(weights)
    except (ImportError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        start = {True: "ImageNet", False: "random"}.get(pretrained, pretrained)
        raise ValueError(f"there is no {arch} with {start} weights ({error!r:.200}); timm/NAME needs pip "
                         "install timm, ImageNet weights a download or --weights FILE") from error
    if arch.startswith("timm/"):
        model.reset_classifier(0, "")  # no pooling either
        return model
    if isinstance(model, models.DenseNet):  # whose forward goes on with a ReLU
        model.features.add_module("relu", nn.ReLU(inplace=True))
    if hasattr(model, "features"):
        return model.features
    layers = nn.Sequential()
    for name, child in model.named_children():
        if isinstance(child, (nn.AdaptiveAvgPool2d, nn.Linear)) or name == "classifier":
            break
        if "aux" not in name.lower():  # a side head
            layers.append(child)
    return layers

def distillation_loss(student, teacher, lambda_ts, lambda_ss):
    """Sec. 3.3, Eq. 3-6, summed over images: unit vectors (B,A,D) x2, row b the same A views -> scalar.

    Relations are among views of one image; nothing crosses images and no label is read.
    """
    s, t = student, teacher
    return absolute_term(s, t) + lambda_ts * ts_term(s, t) + lambda_ss * ss_term(s, t)

def absolute_term(s, t):
    """sum_b 1/A sum_i (1 - s_bi.t_bi)^2: each view lands where the teacher puts it. (B,A,D) x2 -> scalar."""
    return (1 - (s * t).sum(-1)).square().mean(1).sum()

def ts_term(s, t):
    """sum_b 1/(A(A-1)) sum_i!=j (s_bi.t_bj - t_bi.t_bj)^2: student to teacher as teacher to teacher."""
    return _off_diagonal_mean((s @ t.mT - t @ t.mT).square()).sum()  # (B, A, D) @ (B, D, A) -> (B, A, A)

def ss_term(s, t):
    """sum_b 1/(A(A-1)) sum_i!=j (s_bi.s_bj - t_bi.t_bj)^2: student to student as teacher to teacher."""
    return _off_diagonal_mean((s @ s.mT - t @ t.mT).square()).sum()  # (B, A, D) @ (B, D, A) -> (B, A, A)

def _off_diagonal_mean(x):  # over i != j of (B,A,A) -> (B,); zero where A is 1
    copies = x.shape[-1]
    return (x.sum((1, 2)) - x.diagonal(dim1=1, dim2=2).sum(1)) / max(1, copies * (copies - 1))

def triplet_loss(anchors, positives, negatives, margin=0.7):
    """Sec. 3.2. (B,D), (B,P,D), (B,M,D) -> scalar: the sum over anchors of the mean over all P*M pairs of
    max(0, |a-p|^2 - |a-n|^2 + margin).
    """
    to_positives = (anchors[:, None] - positives).square().sum(-1)  # (B, P)
    to_negatives = (anchors[:, None] - negatives).square().sum(-1)  # (B, M)
    return F.relu(to_positives[:, :, None] - to_negatives[:, None] + margin).mean((1, 2)).sum()

def negative_probabilities(anchors, pool, anchor_labels, pool_labels):
    """Distance-weighted sampling (Wu et al., ICCV 2017): (Q,D), (N,D), (Q,), (N,) -> (Q,N), rows sum to 1.

    Weights are 1 / q(d) of the distance d >= 0.5, relative to the largest, plus 1e-6 so that there are always
    enough to draw from; ln q(d) = (D-2) ln d + (D-3)/2 ln(1 - d^2/4) is how common d is on the sphere.
    The anchor's class gets 0. Raises ValueError where the pool holds nothing else.
    """
    dim, kind = anchors.shape[1], torch.promote_types(anchors.dtype, torch.float32)
    same = anchor_labels[:, None] == pool_labels  # (Q, N)
    with torch.autocast(anchors.device.type, enabled=False):
        cosine = anchors.to(kind) @ pool.to(kind).T  # (Q, D) @ (D, N) -> (Q, N)
    squared = (2 - 2 * cosine).clamp(0.25, 4 - 1e-6)  # d^2, and d < 2
    log_weight = (1 - dim / 2) * squared.log() - (dim - 3) / 2 * (1 - squared / 4).log()
    log_weight.masked_fill_(same, 0)  # which counts in the maximum, too
    weight = (log_weight - log_weight.amax(1, keepdim=True)).exp_().add_(1e-6).masked_fill_(same, 0)
    total = weight.sum(1, keepdim=True)
    if not (total > 0).all():
        raise ValueError("an anchor has no negatives in the pool")
    return weight.div_(total)

def draw_negatives(anchors, pool, anchor_labels, pool_labels, count=4, chunk=512, generator=None):
    """Rows (Q, count) of the pool by negative_probabilities, none twice; ValueError where there are fewer."""
    if len(pool_labels) - torch.unique(pool_labels, return_counts=True)[1].max() < count:
        raise ValueError(f"an anchor has fewer than {count} negatives in the pool")
    chunks = zip(anchors.split(chunk), anchor_labels.split(chunk))
    weights = (negative_probabilities(some, pool, labels, pool_labels) for some, labels in chunks)
    return torch.cat([torch.multinomial(weight, count, generator=generator) for weight in weights])

def fingerprint(net):
    """16 hex digits that name a network's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        octets = value.cpu().contiguous().reshape(-1).view(torch.uint8)  # numpy has no bfloat16
        digest.update(name.encode() + octets.numpy().tobytes())
    return digest.hexdigest()[:16]

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
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises the latter
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"{path} could not be written ({error}); a previous one is intact") from error

def read_checkpoint(path):
    """What torch.save wrote: tensors, plain values, numpy scalars. No code of the file is run.

    Raises FileNotFoundError, or ValueError for what is damaged or holds anything else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    scalar = np._core.multiarray.scalar
    numbers = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype]  # numpy 2's name, numpy 1's
    numbers += [type(np.dtype(kind)) for kind in ("f4", "f8", "i8")]
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals(numbers):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"{path} is not a readable checkpoint ({error!r:.200})") from error

def load_checkpoint(path_or_name, backbone=None):
    """The EmbeddingNet, in eval mode, of a file, ours or the authors', or a name in RELEASED, fetched once.

    Its `size` is the training resolution where file or name tells. A `backbone` of your own is needed again.
    Raises as read_checkpoint, and OSError where it cannot be fetched.
    """
    path = str(path_or_name)
    if path in RELEASED:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{path}.pth")
        if not os.path.exists(path):
            try:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                torch.hub.download_url_to_file(RELEASED_URL.format(path_or_name), path)
            except OSError as error:
                sentence = f"{path_or_name} could not be downloaded ({error}): put it at {path}"
                raise OSError(sentence) from error
    content = read_checkpoint(path)
    try:
        meta, weights = content["meta"], content["state_dict"]
        if meta["architecture"] == "custom" and backbone is None:
            raise ValueError("its backbone is a module of your own: pass it as backbone=")
        dim = len(weights.get("whiten.bias", ()))
        net = EmbeddingNet(meta["architecture"], meta["pooling"], dim, pretrained=False, backbone=backbone)
        net.load_state_dict(weights)
        in_name = re.search(r"-S?(\d+)r-", os.path.basename(path))  # where the authors keep it
        net.size = meta.get("size") or (int(in_name[1]) if in_name else None)
        net.frozen_batchnorm, net.teacher = meta.get("frozen_batchnorm", True), meta.get("teacher")
        net.options = dict(content.get("options") or {})
    except (LookupError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of this project ({error!r:.200})") from error
    return net.eval()

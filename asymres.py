"""The method of "Large-to-small Image Resolution Asymmetry in Deep Metric Learning" (Suma & Tolias, WACV 2023).

A teacher embeds the database from large images; a student embeds queries from small ones into the same space.
This file holds the network, the losses, the sampling of negatives and the checkpoint format. It needs torch,
torchvision and numpy, nothing else of this project: copy it into yours.

    net = EmbeddingNet("resnet50", dim=512)             # images (B,3,H,W) -> unit vectors (B,D)
    loss = distillation_loss(student_views, teacher_views, lambda_ts=0.77, lambda_ss=0.67)

Vectors are rows throughout: (N, D). B images, A augmented copies (views) per image, D dimensions, C channels,
P positives and M negatives per anchor.
"""
import hashlib
import os
import re
import zipfile
from collections import OrderedDict

import numpy as np
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # ImageNet's, as in every checkpoint
POOLINGS = ("gem", "gemmp", "mac", "spoc")
RELEASED = tuple(f"{data}-{size}-resnet50-512-gem-w" for data in ("cub", "cars", "sop")
                 for size in ("448r", "224r", "S224r-T448r"))
RELEASED_URL = "http://ptak.felk.cvut.cz/personal/sumapave/public/{}.pth"


# ------------------------------------------------------------------------------------------------ network (Sec. 3.1)

class GeM(nn.Module):
    """Generalised-mean pooling: (B,C,h,w) -> (B,C), mean over positions of clamp(x, eps)^p, then ^(1/p).

    `p` is learned: one value (`channels=1`) or one per channel. p=1 is the mean; p towards infinity, the maximum.
    """
    def __init__(self, p=3.0, channels=1, eps=1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.full((channels,), float(p)))
        self.eps = eps

    def forward(self, x):
        p = self.p.to(x.dtype)
        return x.clamp(min=self.eps).pow(p[:, None, None]).mean((-2, -1)).pow(1 / p)


class EmbeddingNet(nn.Module):
    """Images (B,3,H,W), ImageNet-normalised -> unit vectors (B,D): backbone, pooling, L2, linear whitening, L2.

    arch        a torchvision convolutional classifier, "resnet10" (a ResNet with one basic block a stage), or
                "timm/NAME", a convolutional network of timm, which then has to be installed
    pooling     "gem", "gemmp" (one p per channel), "mac" (maximum) or "spoc" (mean)
    dim         D, the output of the whitening layer; 0 leaves the layer out and D is the backbone's C
    pretrained  True: ImageNet weights (torchvision's IMAGENET1K_V1, timm's default); False: random; a path: a file
                of the classifier's weights
    backbone    an nn.Module (B,3,H,W) -> (B,C,h,w) to use instead of `arch`

    Batch-norm statistics stay frozen in training when the weights are pretrained (scale and shift are learned);
    from random weights they train, save in layers of a `backbone` that came in eval mode. `size`, the side in pixels
    that it was trained at, is None until somebody sets it. The head computes in float32, whatever the backbone does.
    Raises ValueError for an unknown architecture or pooling and for weights that cannot be had.
    """
    def __init__(self, arch="resnet50", pooling="gem", dim=512, pretrained=True, backbone=None):
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"unknown pooling {pooling!r}: choose from {', '.join(POOLINGS)}")
        self.arch, self.pooling, self.size = "custom" if backbone else arch, pooling, None
        self.teacher, self.options = None, {}
        self.backbone = backbone or _backbone(arch, pretrained)
        self.frozen_batchnorm = bool(pretrained)
        self.frozen_layers = [m for m in self.backbone.modules() if is_batchnorm(m) and not m.training]
        channels = _channels(self.backbone, self.arch)
        self.pool = {"gem": GeM, "gemmp": lambda: GeM(channels=channels),
                     "mac": lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten()),
                     "spoc": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())}[pooling]()
        self.whiten = nn.Linear(channels, dim) if dim else nn.Identity()
        self.dim = dim or channels

    def train(self, mode=True):
        super().train(mode)
        for layer in self.frozen_layers:
            layer.eval()
        return self.freeze_statistics() if self.frozen_batchnorm else self

    def freeze_statistics(self):
        """Batch-norm uses its running statistics, and leaves them alone, until the next `train()`."""
        for module in filter(is_batchnorm, self.modules()):
            module.eval()
        return self

    def forward(self, images):
        features = self.backbone(images.to(_kind(self.backbone)["dtype"]))          # (B, C, h, w)
        with torch.autocast(features.device.type, enabled=False):                   # the head stays in float32
            pooled = F.normalize(self.pool(features.float()))                       # (B, C)
            if isinstance(self.whiten, nn.Linear):
                pooled = F.linear(pooled, self.whiten.weight.float(), self.whiten.bias.float())     # (B, D)
            return F.normalize(pooled)


def is_batchnorm(module):
    """Whether a module is a batch-norm layer of any kind."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _kind(module):
    """The dtype and device that a module computes in; a new tensor's where it has no parameters."""
    parameter = next(module.parameters(), torch.empty(0))
    return {"dtype": parameter.dtype, "device": parameter.device}


def _backbone(arch, pretrained):
    """A classifier up to its last feature map, with its children's names as the authors' checkpoints have them."""
    model = _classifier(arch, pretrained is True)
    if isinstance(pretrained, (str, os.PathLike)):
        try:
            model.load_state_dict(read_checkpoint(pretrained))
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{pretrained} does not hold weights of {arch}") from error
    if arch.startswith("timm/"):
        model.reset_classifier(0, "")                           # no pooling either: forward gives (B,C,h,w)
        return model
    if hasattr(model, "features"):
        if arch.startswith("densenet"):                         # whose forward ends the features with a ReLU
            model.features.add_module("relu", nn.ReLU(inplace=True))
        return model.features
    layers = []
    for name, child in model.named_children():
        if isinstance(child, (nn.AdaptiveAvgPool2d, nn.Linear)) or name == "classifier":
            break
        if "aux" not in name.lower():                           # Inception's and GoogLeNet's side heads
            layers.append((str(len(layers)), child))
    if hasattr(model, "transform_input"):
        layers.insert(0, ("input", _InputTransform(bool(pretrained))))
    return nn.Sequential(OrderedDict(layers))


def _classifier(arch, pretrained):
    """The whole network of torchvision or timm, with ImageNet weights or random ones."""
    try:
        if arch.startswith("timm/"):
            import timm
            return timm.create_model(arch[5:], pretrained=pretrained)
        if arch == "resnet10" and not pretrained:
            return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
        init = {"init_weights": True} if arch in ("googlenet", "inception_v3") and not pretrained else {}   # or it warns
        return torchvision.models.get_model(arch, weights="IMAGENET1K_V1" if pretrained else None, **init)
    except ImportError as error:
        raise ImportError(f"{arch} needs timm: pip install timm") from error
    except OSError as error:
        raise ValueError(f"the ImageNet weights of {arch} could not be downloaded ({error}): give a file of them with "
                         "--weights FILE, or --weights random") from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"there is no architecture {arch!r}" + " with ImageNet weights" * pretrained) from error


class _InputTransform(nn.Module):
    """GoogLeNet's and Inception's pretrained weights expect (x - 0.5) / 0.5 of pixels x; random ones, nothing."""
    def __init__(self, pretrained):
        super().__init__()
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        self.register_buffer("scale", std / 0.5 if pretrained else torch.ones_like(std))
        self.register_buffer("shift", (mean - 0.5) / 0.5 if pretrained else torch.zeros_like(mean))

    def forward(self, images):
        return images * self.scale + self.shift


@torch.no_grad()
def _channels(backbone, arch):
    """C, found by looking: classifiers' own attributes lie for VGG, DenseNet and MobileNetV3."""
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        features = backbone.eval()(torch.zeros(1, 3, 224, 224, **_kind(backbone)))
        if features.ndim != 4 or features.shape[2] != features.shape[3]:           # (B,h,w,C), tokens, or no map at all
            raise TypeError
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{arch} has no feature map (B,C,h,w): a convolutional network is needed") from error
    for module, training in modes:
        module.training = training
    return features.shape[1]


# ------------------------------------------------------------------------------------- distillation (Sec. 3.3, Eq. 3-6)

def distillation_loss(student, teacher, lambda_ts, lambda_ss):
    """Absolute and relational distillation, summed over images: (B,A,D), (B,A,D) -> scalar.

    Row b holds A views of image b; s and t are student's and teacher's unit vectors of the same views. Relations are
    among views of one image; nothing crosses images and no label is read.
    """
    return absolute_term(student, teacher) + lambda_ts * ts_term(student, teacher) + lambda_ss * ss_term(student, teacher)


def absolute_term(s, t):
    """sum_b 1/A sum_i (1 - s_bi.t_bi)^2: each view lands where the teacher puts it. (B,A,D) x2 -> scalar."""
    return (1 - (s * t).sum(-1)).square().mean(1).sum()


def ts_term(s, t):
    """sum_b 1/(A(A-1)) sum_i!=j (s_bi.t_bj - t_bi.t_bj)^2: student to teacher as teacher to teacher."""
    return _off_diagonal_mean((s @ t.mT - t @ t.mT).square()).sum()             # (B, A, D) @ (B, D, A) -> (B, A, A)


def ss_term(s, t):
    """sum_b 1/(A(A-1)) sum_i!=j (s_bi.s_bj - t_bi.t_bj)^2: student to student as teacher to teacher."""
    return _off_diagonal_mean((s @ s.mT - t @ t.mT).square()).sum()             # (B, A, D) @ (B, D, A) -> (B, A, A)


def _off_diagonal_mean(x):
    """Mean over i != j of (B,A,A) -> (B,); zero where A is 1."""
    copies = x.shape[-1]
    return (x.sum((1, 2)) - x.diagonal(dim1=1, dim2=2).sum(1)) / max(1, copies * (copies - 1))


# ----------------------------------------------------------------------------- metric learning of the teacher (Sec. 3.2)

def triplet_loss(anchors, positives, negatives, margin=0.7):
    """Triplet loss on squared distances: (B,D), (B,P,D), (B,M,D) -> scalar.

    Sum over anchors of the mean over all P*M pairs of max(0, |a-p|^2 - |a-n|^2 + margin).
    """
    to_positives = (anchors[:, None] - positives).square().sum(-1)              # (B, P)
    to_negatives = (anchors[:, None] - negatives).square().sum(-1)              # (B, M)
    return F.relu(to_positives[:, :, None] - to_negatives[:, None] + margin).mean((1, 2)).sum()


def negative_probabilities(anchors, pool, anchor_labels, pool_labels):
    """Distance-weighted sampling (Wu et al., ICCV 2017): (Q,D), (N,D), (Q,), (N,) -> (Q,N), rows sum to 1.

    An image is drawn in inverse proportion to how common its distance d is between random points of the sphere,
    log q(d) = (D-2) ln d + (D-3)/2 ln(1 - d^2/4), with d at least 0.5. Images of the anchor's class get 0;
    every other one 1e-6 more than its share of the largest weight, so that there are always enough to draw from.
    Raises ValueError where the pool holds nothing but an anchor's own class.
    """
    dim, kind = anchors.shape[1], torch.promote_types(anchors.dtype, torch.float32)
    same = anchor_labels[:, None] == pool_labels[None]                          # (Q, N)
    with torch.autocast(anchors.device.type, enabled=False):
        cosine = anchors.to(kind) @ pool.to(kind).T                             # (Q, D) @ (D, N) -> (Q, N)
    squared = (2 - 2 * cosine).clamp(0.25, 4 - 1e-6)                            # d^2, and d < 2
    log_weight = (1 - dim / 2) * squared.log() - (dim - 3) / 2 * (1 - squared / 4).log()
    log_weight.masked_fill_(same, 0)
    weight = (log_weight - log_weight.amax(1, keepdim=True)).exp_().add_(1e-6).masked_fill_(same, 0)
    total = weight.sum(1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError("an anchor has no negatives: the pool holds its class only")
    return weight.div_(total)


def draw_negatives(anchors, pool, anchor_labels, pool_labels, count=4, chunk=512, generator=None):
    """Rows of `pool` drawn for each anchor without replacement by `negative_probabilities`: (Q, count) indices.

    Memory is some chunk x N floats. Raises ValueError where an anchor has fewer than `count` negatives in the pool.
    """
    sizes = torch.unique(pool_labels, return_counts=True)[1]
    if len(pool_labels) - sizes.max() < count:
        raise ValueError(f"fewer than {count} negatives in a pool of {len(pool_labels)} images")
    return torch.cat([torch.multinomial(negative_probabilities(a, pool, labels, pool_labels), count, generator=generator)
                      for a, labels in zip(anchors.split(chunk), anchor_labels.split(chunk))])


# --------------------------------------------------------------------------------------------------------- checkpoints

def fingerprint(net):
    """16 hex digits that name a network's weights: a student keeps its teacher's, an index its database network's."""
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)       # numpy has no bfloat16
        digest.update(name.encode() + numbers.numpy().tobytes())
    return digest.hexdigest()[:16]


def save_checkpoint(path, net, **extra):
    """Write `net` and anything in `extra` (plain values and tensors) to `path`: whole or not at all.

    The file is {"meta", "state_dict", **extra}, the authors' format; it is written beside `path`, flushed, then
    renamed over it. Raises OSError where it cannot be written, with what was at `path` untouched.
    """
    meta = {"architecture": net.arch, "pooling": net.pooling, "outputdim": net.dim, "mean": list(MEAN),
            "std": list(STD), "whitening": 0 if isinstance(net.whiten, nn.Identity) else net.dim, "size": net.size,
            "frozen_batchnorm": net.frozen_batchnorm, "teacher": net.teacher}
    write_atomically(path, {"meta": meta, "state_dict": net.state_dict(), **extra})


def write_atomically(path, content):
    """torch.save to a temporary file beside `path`, flushed to disk, then renamed. Raises OSError, `path` untouched."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:                                    # torch's zip writer raises RuntimeError
        if os.path.exists(temporary):
            os.remove(temporary)
        kept = "; the previous one is intact" if os.path.exists(path) else ""
        raise OSError(f"{path} could not be written ({error}){kept}") from error


def read_checkpoint(path):
    """The content of a file that torch.save wrote. No code of the file is run: tensors, plain values, numpy scalars.

    Raises FileNotFoundError, or ValueError for what is truncated, damaged, or holds anything else.
    """
    scalar, dtypes = np._core.multiarray.scalar, [type(np.dtype(t)) for t in ("f4", "f8", "i8")]
    numbers = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]        # numpy 2's name, numpy 1's
    if not os.path.isfile(path):
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        if zipfile.is_zipfile(path):                                            # every byte is held to its checksum
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
        with torch.serialization.safe_globals(numbers):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                                  # a damaged file can raise anything
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable checkpoint ({reason})") from error


def load_checkpoint(path_or_name, backbone=None):
    """An EmbeddingNet in eval mode from a file of ours or of the authors, or one of the nine names in `RELEASED`.

    A released name is downloaded once through torch.hub. `net.size` is the training resolution where the file or its
    name tells, else None. A network with a `backbone` of its own needs that module again. Raises as read_checkpoint.
    """
    path = str(path_or_name)
    if path in RELEASED:
        path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{path_or_name}.pth")
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                torch.hub.download_url_to_file(RELEASED_URL.format(path_or_name), path)
            except OSError as error:
                raise OSError(f"{path_or_name} could not be downloaded ({error}): put the file at {path}") from error
    return _network_from(read_checkpoint(path), path, backbone)


def _network_from(content, path, backbone=None):
    """The EmbeddingNet, in eval mode, of a checkpoint's content; `path` is what errors and the size are named by."""
    try:
        meta, weights = content["meta"], content["state_dict"]
        dim = int(meta["whitening"] or 0)
        if dim != (weights["whiten.bias"].shape[0] if "whiten.bias" in weights else 0):
            raise ValueError("its whitening layer is of another size than it says")
        if any(abs(a - b) > 1e-6 for key, ours in (("mean", MEAN), ("std", STD)) for a, b in zip(meta[key], ours)):
            raise ValueError("its images were normalised by other means than ImageNet's")
        if meta["architecture"] == "custom" and backbone is None:
            raise ValueError("its backbone is a module of your own: pass it as backbone=")
        net = EmbeddingNet(meta["architecture"], meta["pooling"], dim, pretrained=False, backbone=backbone)
        net.load_state_dict(weights)
        in_name = re.search(r"-S?(\d+)r-", os.path.basename(path))              # the authors keep it in the name
        net.size = meta.get("size") or (int(in_name[1]) if in_name else None)
        net.frozen_batchnorm, net.teacher = meta.get("frozen_batchnorm", True), meta.get("teacher")
        net.options = dict(content.get("options") or {})                        # of the run that trained it, if ours
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise ValueError(f"{path} is not a checkpoint of this project or of the authors ({reason})") from error
    return net.eval()

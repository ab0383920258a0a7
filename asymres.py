"""The method of Suma & Tolias, "Large-to-small Image Resolution Asymmetry in Deep Metric Learning"
(WACV 2023): the embedding network, the losses of teacher and student, and checkpoints.

    net = EmbeddingNet("resnet50", dim=512)             # images (B, 3, H, W) -> unit vectors (B, D)
    loss = distillation_loss(s, t, lambda_ts=0.77, lambda_ss=0.67)     # (B, A, D) twice -> a scalar

This file needs torch, torchvision and numpy, and nothing else of this project: copy it.

Shapes: B images, A augmented views of each, D dimensions of an embedding, C channels of a feature
map of h x w positions, P positives and M negatives per anchor. Vectors are rows: (N, D).
"""

import hashlib
import os
import re
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images
# torchvision's names for the layers after the last feature map
HEAD = ("avgpool", "dropout", "fc", "classifier")

# The authors' checkpoints: teachers of 448 px, networks of 224 px, students of 224 px.
RELEASED = [
    f"{dataset}-{size}-resnet50-512-gem-w"
    for dataset in ("cub", "cars", "sop")
    for size in ("448r", "224r", "S224r-T448r")
]
RELEASED_URL = "http://ptak.felk.cvut.cz/personal/sumapave/public/{}.pth"


class NetworkError(ValueError):
    """A name or a file from which no network can be made; the message says what to do."""


# ------------------------------------------------------------------ the embedding network, Sec. 3.1


class GeM(nn.Module):
    """Generalized-mean pooling: (B, C, h, w) -> (B, C), the mean of x^p over positions, ^(1/p).

    p = 1 is the average; a large p approaches the maximum. It is learned: one p for all channels,
    or channels=C of them. Values below eps are raised to eps.
    """

    def __init__(self, p=3.0, channels=1, eps=1e-6):
        super().__init__()
        self.p = nn.Parameter(torch.full((channels,), float(p)))
        self.eps = eps

    def forward(self, x):
        p = self.p.to(x.dtype)
        mean = x.clamp(min=self.eps).pow(p[:, None, None]).mean((-2, -1))  # (B, C)
        # If eps^p underflows the mean is 0, where the root has no finite slope.
        return mean.clamp(min=torch.finfo(x.dtype).tiny).pow(1 / p)


class EmbeddingNet(nn.Module):
    """Images (B, 3, H, W) of any size, ImageNet-normalised -> unit vectors (B, D).

    Backbone, pooling, L2, whitening (a learned linear layer), L2 (Sec. 3.1). Views (B, A, 3, H, W)
    give (B, A, D).

    arch        a convolutional classifier of torchvision, "timm/NAME" (needs timm), or "resnet10",
                with one basic block per stage ("resnet10-narrow": half as wide)
    pooling     "gem", "gemmp" (one p per channel), "mac" (maximum) or "spoc" (mean)
    dim         D; 0: no whitening, so that D is the number C of the backbone's channels
    pretrained  True: ImageNet weights; False: random weights; a path: a file of weights for `arch`
    backbone    a module of your own, (B, 3, H, W) -> (B, C, h, w), in place of `arch`

    With pretrained weights the batch-norm layers stay in eval mode during training: their
    statistics are kept, their scale and shift are learned. For a `backbone` of your own this is all
    that `pretrained` decides: give True if its weights are pretrained, else False.

    Images are renormalised for a pretrained network that expects another mean and std. `size` is
    the side in px at which the network embeds: training sets it, evaluation reads it. Raises
    NetworkError if `arch` or its weights are not available.
    """

    def __init__(self, arch="resnet50", pooling="gem", dim=512, pretrained=True, backbone=None):
        super().__init__()
        self.arch = arch if backbone is None else "custom"
        self.pooling = pooling
        self.size = None
        self.frozen_batchnorm = bool(pretrained)
        mean, std = MEAN, STD
        if backbone is None:
            backbone, mean, std = build_backbone(arch, pretrained)
        self.backbone = backbone
        channels = count_channels(backbone, self.arch)
        if pooling not in ("gem", "gemmp", "mac", "spoc"):
            raise NetworkError(f"unknown pooling {pooling!r}: choose gem, gemmp, mac or spoc")
        if pooling == "mac":
            self.pool = nn.AdaptiveMaxPool2d(1)
        elif pooling == "spoc":
            self.pool = nn.AdaptiveAvgPool2d(1)
        else:
            self.pool = GeM(channels=channels if pooling == "gemmp" else 1)
        self.whiten = nn.Linear(channels, dim) if dim else nn.Identity()
        self.whitening = dim  # of the whitening layer; 0 where there is none
        self.dim = dim or channels
        self.expect_normalisation(mean, std)
        self.train()

    def expect_normalisation(self, mean, std):
        """Let the backbone see images of this mean and std instead of ImageNet's."""
        self.mean, self.std = tuple(mean), tuple(std)
        scale = torch.tensor(STD) / torch.tensor(self.std)
        shift = (torch.tensor(MEAN) - torch.tensor(self.mean)) / torch.tensor(self.std)
        device = next(self.parameters(), scale).device
        self.register_buffer("scale", scale[:, None, None].to(device), persistent=False)
        self.register_buffer("shift", shift[:, None, None].to(device), persistent=False)

    def train(self, mode=True):
        """As nn.Module's, but the batch-norm layers of a pretrained network stay in eval mode."""
        super().train(mode)
        if self.frozen_batchnorm:
            for layer in self.backbone.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                    layer.eval()
        return self

    def forward(self, images):
        if images.ndim < 4 or not images.is_floating_point():
            raise ValueError(
                f"float images (B, 3, H, W) are needed, not {tuple(images.shape)} {images.dtype}"
            )
        x = images.reshape(-1, *images.shape[-3:])  # (..., 3, H, W) -> (N, 3, H, W)
        if (self.mean, self.std) != (MEAN, STD):
            x = x * self.scale + self.shift
        features = self.backbone(x)  # (N, C, h, w)
        with torch.autocast(features.device.type, enabled=False):
            # The head is float32, also under autocast. (`to` is for a network after net.half().)
            x = F.normalize(self.pool(features.float()).flatten(1))  # (N, C)
            x = self.whiten(x.to(images.dtype))
            x = F.normalize(x.float())  # (N, D)
        return x.unflatten(0, images.shape[:-3])  # (..., D)


# ------------------------------------------------------- the student's loss: distillation, Sec. 3.3


def distillation_loss(s, t, lambda_ts, lambda_ss):
    """The loss of the student (Eq. 6), summed over images: unit vectors (B, A, D) twice -> scalar.

    s[b, i] and t[b, i] are the student's and the teacher's embeddings of view i of image b. Views
    are compared only with views of the same image, and no label is needed. t needs no gradient.
    Raises ValueError if shapes differ.
    """
    if s.ndim != 3 or s.shape != t.shape:
        raise ValueError(f"(B, A, D) twice is needed, not {tuple(s.shape)} and {tuple(t.shape)}")
    return absolute_term(s, t) + lambda_ts * ts_term(s, t) + lambda_ss * ss_term(s, t)


def absolute_term(s, t):
    """Eq. 3: sum_b 1/A sum_i (1 - s_bi . t_bi)^2. Both networks put a view in the same place."""
    return (1 - (s * t).sum(-1)).square().mean(1).sum()


def ts_term(s, t):
    """Eq. 4: sum_b 1/(A(A-1)) sum_{i != j} (s_bi . t_bj - t_bi . t_bj)^2, student to teacher."""
    difference = s @ t.mT - t @ t.mT  # (B, A, D) @ (B, D, A) -> (B, A, A)
    return mean_over_pairs(difference.square()).sum()


def ss_term(s, t):
    """Eq. 5: sum_b 1/(A(A-1)) sum_{i != j} (s_bi . s_bj - t_bi . t_bj)^2, student to student."""
    difference = s @ s.mT - t @ t.mT  # (B, A, D) @ (B, D, A) -> (B, A, A)
    return mean_over_pairs(difference.square()).sum()


def mean_over_pairs(x):
    """The mean over i != j: (B, A, A) -> (B,). It is 0 if A is 1, when there are no pairs."""
    views = x.shape[1]
    diagonal = x.diagonal(dim1=1, dim2=2)  # (B, A)
    return (x.sum((1, 2)) - diagonal.sum(1)) / max(1, views * (views - 1))


# ----------------------------------------------------------- the teacher's loss: triplets, Sec. 3.2


def triplet_loss(anchors, positives, negatives, margin=0.7):
    """Sum over anchors of the mean over P x M pairs of max(0, |a - p|^2 - |a - n|^2 + margin).

    anchors (B, D), positives (B, P, D) and negatives (B, M, D) -> scalar (Sec. 3.2).
    """
    to_positives = (anchors[:, None] - positives).square().sum(-1)  # (B, P)
    to_negatives = (anchors[:, None] - negatives).square().sum(-1)  # (B, M)
    losses = F.relu(to_positives[:, :, None] - to_negatives[:, None, :] + margin)  # (B, P, M)
    return losses.mean((1, 2)).sum()


def negative_probabilities(anchors, pool, anchor_labels, pool_labels):
    """Distance-weighted sampling (Wu et al., ICCV 2017): the probability of each negative.

    Unit vectors (Q, D) and (N, D), labels (Q,) and (N,) -> (Q, N), rows sum to 1, with 0 for the
    anchor's own class. For points uniform on the sphere, the distance d to the anchor has density
    q(d) ~ d^(D-2) (1 - d^2/4)^((D-3)/2). The weight 1/q(d), with d at least 0.5, makes all
    distances equally likely; adding 1e-6 keeps several negatives possible if one weight dominates.
    Raises ValueError if an anchor has no negative.
    """
    dim = anchors.shape[1]
    own_class = anchor_labels[:, None] == pool_labels  # (Q, N)
    if own_class.all(1).any():
        raise ValueError("an anchor has no negatives in the pool")
    # At d = 2 the weight would be infinite.
    d_squared = (2 - 2 * anchors @ pool.T).clamp(0.5**2, 4 - 1e-6)  # (Q, N)
    log_weight = (2 - dim) / 2 * d_squared.log() - (dim - 3) / 2 * (1 - d_squared / 4).log()
    # Weights are divided by the largest, or by 1 if all are smaller: the authors give the own class
    # a weight of 1 here.
    largest = log_weight.masked_fill(own_class, 0).amax(1, keepdim=True)  # (Q, 1)
    weight = (log_weight - largest).exp() + 1e-6
    weight = weight.masked_fill(own_class, 0)
    return weight / weight.sum(1, keepdim=True)


def draw_negatives(anchors, pool, anchor_labels, pool_labels, count=4, generator=None):
    """Draw pool rows (Q, count) by `negative_probabilities`, without repetition for an anchor.

    Raises ValueError if an anchor has fewer negatives than `count`.
    """
    largest_class = pool_labels.unique(return_counts=True)[1].max()
    if len(pool_labels) - largest_class < count:
        raise ValueError(f"an anchor has fewer than {count} negatives in the pool")
    rows = []
    for batch, labels in zip(anchors.split(512), anchor_labels.split(512), strict=True):
        probabilities = negative_probabilities(batch, pool, labels, pool_labels)  # (512, N)
        rows.append(torch.multinomial(probabilities, count, generator=generator))
    return torch.cat(rows)


# ----------------------------------------------------- backbones, and where their weights come from


def build_backbone(arch, pretrained):
    """The layers of `arch` up to its last feature map, and the mean and std that it expects.

    Their names are those of the authors' checkpoints: `0.weight` is ResNet's conv1.
    """
    from_imagenet = pretrained is True
    if arch in ("googlenet", "inception_v3"):
        raise NetworkError(f"{arch} normalises in its own forward pass, which is not supported")
    if arch in ("resnet10", "resnet10-narrow") and from_imagenet:
        raise NetworkError(f"{arch} has no ImageNet weights: --weights random, or a file")
    mean, std = MEAN, STD
    try:  # model: the whole classifier; backbone: those of its layers that are kept
        if arch.startswith("timm/"):
            import timm

            model = timm.create_model(arch.removeprefix("timm/"), pretrained=from_imagenet)
            if from_imagenet:
                mean, std = model.pretrained_cfg["mean"], model.pretrained_cfg["std"]
            model.reset_classifier(0, "")  # neither classifier nor pooling
            backbone = model
        elif arch in ("resnet10", "resnet10-narrow"):
            model = resnet10(width=64 if arch == "resnet10" else 32)
            backbone = nn.Sequential(*model.children())
        else:
            weights = "IMAGENET1K_V1" if from_imagenet else None
            model = torchvision.models.get_model(arch, weights=weights)
            if hasattr(model, "features"):
                backbone = model.features
            else:
                layers = [layer for name, layer in model.named_children() if name not in HEAD]
                backbone = nn.Sequential(*layers)
            if isinstance(model, torchvision.models.DenseNet):  # its forward adds a ReLU
                backbone.add_module("relu", nn.ReLU(inplace=True))
    except Exception as error:  # an unknown name, no timm, no download: many kinds
        raise NetworkError(
            f"{arch} with {'ImageNet' if from_imagenet else 'random'} weights is not available "
            f"({error!r:.200})"
            + ("; timm/NAME needs pip install timm" if isinstance(error, ImportError) else "")
            + ("; offline: --weights FILE" if from_imagenet else "")
        ) from error
    if not isinstance(pretrained, bool):
        mean, std = load_weights(model, backbone, pretrained)
    return backbone, mean, std


def resnet10(width):
    """A ResNet with one basic block per stage and no head; layers are named as in torchvision.

    width: channels of the first stage, which are 64 in torchvision's networks
    """
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False))
    model.add_module("bn1", nn.BatchNorm2d(width))
    model.add_module("relu", nn.ReLU(inplace=True))
    model.add_module("maxpool", nn.MaxPool2d(3, stride=2, padding=1))
    channels, stride, downsample = width, 1, None
    for stage in range(4):
        out = width * 2**stage
        if stage > 0:
            stride = 2
            shortcut = nn.Conv2d(channels, out, 1, stride, bias=False)
            downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out))
        block = torchvision.models.resnet.BasicBlock(channels, out, stride, downsample)
        model.add_module(f"layer{stage + 1}", nn.Sequential(block))
        channels = out
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return model


def load_weights(model, backbone, path):
    """Load a file of weights, of a classifier or an EmbeddingNet, into the backbone of a model.

    The classifier's own layer may differ or be missing. Returns the mean and std to expect.
    """
    content = read_checkpoint(path)
    meta = content.get("meta", {}) if isinstance(content, dict) else {}
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state, target = without_wrappers(state), model
    if any(name.startswith("backbone.") for name in state):  # of an EmbeddingNet
        state = {name.removeprefix("backbone."): value for name, value in state.items()}
        target = backbone
    whole = target.state_dict()
    fitting = {
        name: value
        for name, value in state.items()
        if name in whole and whole[name].shape == getattr(value, "shape", None)
    }
    missing = [
        name
        for name in whole
        if name not in fitting
        and name.split(".")[0] not in HEAD
        and not name.endswith("num_batches_tracked")
    ]
    if missing:
        raise NetworkError(
            f"{path} does not hold the weights of this network: {len(missing)} are missing or of "
            f"another shape, {missing[0]} among them"
        )
    whole.update(fitting)
    target.load_state_dict(whole)
    return meta.get("mean", MEAN), meta.get("std", STD)


@torch.no_grad()
def count_channels(backbone, arch):
    """C, by trying it out: no attribute tells it for all networks."""
    training = backbone.training
    image = torch.zeros(1, 3, 224, 224)
    image = image.to(next(backbone.parameters(), image))  # its device and dtype
    try:
        features = backbone.eval()(image)
    except Exception as error:  # layers that cannot simply be chained, as in a transformer
        raise NetworkError(f"{arch} has no convolutional feature map ({error!r:.200})") from error
    backbone.train(training)
    shape = tuple(getattr(features, "shape", ()))
    if len(shape) != 4 or shape[2] != shape[3]:  # (B, h, w, C), tokens, or several outputs
        raise NetworkError(
            f"{arch} gives no feature map (B, C, h, w), but {shape or type(features)}"
        )
    return shape[1]


# -------------------------------------------------------------------------------------- checkpoints
# A file -> read_checkpoint -> a dict -> make_network -> a network; load_checkpoint does both.


def save_checkpoint(path, net, **extra):
    """Write an EmbeddingNet to a file in the authors' format, atomically.

    net may be wrapped by torch.compile or DataParallel. extra: further entries, of plain values and
    tensors. Raises OSError if the file cannot be written; an existing one is then left as it is.
    """
    while not isinstance(net, EmbeddingNet):
        net = net.module if hasattr(net, "module") else net._orig_mod
    meta = {
        "architecture": net.arch,
        "pooling": net.pooling,
        "whitening": net.whitening,
        "outputdim": net.dim,
        "mean": list(net.mean),
        "std": list(net.std),
        "size": net.size,
        "frozen_batchnorm": net.frozen_batchnorm,
    }
    state = without_wrappers(net.state_dict())
    save_atomically(path, {"meta": meta, "state_dict": state, **extra})


def save_atomically(path, content):
    """torch.save to a temporary file, which then replaces `path` in one step."""
    temporary = f"{path}.{os.getpid()}.tmp"  # of this process alone
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch raises if the disk is full
        raise OSError(f"{path} could not be written ({error})") from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def read_checkpoint(path_or_name):
    """The content of a file of torch.save, or of an authors' checkpoint, by its name in RELEASED.

    Only plain data is read, so that a stranger's file runs no code. Raises NetworkError if the file
    is damaged or holds anything else, and OSError if it cannot be downloaded.
    """
    path = str(path_or_name)
    if path in RELEASED:
        path = download_released(path)
    if not os.path.exists(path):
        raise NetworkError(f"there is no file {path}, and no released network of this name")
    # The authors' files hold a numpy float, pickled under its name in numpy 2 or numpy 1.
    scalar, dtypes = np._core.multiarray.scalar, [type(np.dtype(x)) for x in ("f4", "f8", "i8")]
    numbers = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *dtypes]
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError("its checksums are wrong")
        with torch.serialization.safe_globals(numbers):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        raise NetworkError(f"{path} is not a readable checkpoint ({error!r:.200})") from error


def download_released(name):
    """The path of an authors' checkpoint, downloaded into torch.hub's folder if it is not there."""
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path, url = os.path.join(folder, f"{name}.pth"), RELEASED_URL.format(name)
    if not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, path)
        except OSError as error:
            raise OSError(f"no download of {url} ({error}): put the file at {path}") from error
    return path


def load_checkpoint(path_or_name, backbone=None):
    """Load an EmbeddingNet, in eval mode, from our or the authors' file, or by a name in RELEASED.

    Its `size`, the resolution in px at which it was trained, is None if neither the file nor its
    name tells. A network with a backbone of your own needs it as `backbone`. Raises NetworkError.
    """
    return make_network(read_checkpoint(path_or_name), path_or_name, backbone)


def make_network(content, path_or_name, backbone=None):
    """The EmbeddingNet, in eval mode, of what `read_checkpoint` returned."""
    try:
        meta, state = content["meta"], without_wrappers(content["state_dict"])
        if meta["architecture"] == "custom" and backbone is None:
            raise NetworkError(f"{path_or_name} needs its own backbone: load_checkpoint(backbone=)")
        dim = len(state["whiten.bias"]) if "whiten.bias" in state else 0
        arch, pooling = meta["architecture"], meta["pooling"]
        net = EmbeddingNet(arch, pooling, dim, pretrained=False, backbone=backbone)
        net.load_state_dict(state)
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise NetworkError(
            f"{path_or_name} is not a checkpoint of a network: {error!r:.200}"
        ) from error
    net.expect_normalisation(meta.get("mean", MEAN), meta.get("std", STD))
    net.frozen_batchnorm = meta.get("frozen_batchnorm", True)
    size_in_name = re.search(r"-S?(\d+)r-", os.path.basename(str(path_or_name)))
    net.size = meta.get("size") or (int(size_in_name[1]) if size_in_name else None)
    return net.eval()


def without_wrappers(state):
    """A state dict without the prefixes that torch.compile and DataParallel add to names."""
    return {name.replace("_orig_mod.", "").removeprefix("module."): x for name, x in state.items()}


def fingerprint(net):
    """16 hexadecimal digits that identify a network by its weights."""
    digest = hashlib.sha256()
    for value in net.state_dict().values():
        digest.update(value.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

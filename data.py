"""Images: the coupled views of Sec. 3.3, data sets, reading and the evaluation transform.

    python data.py cub --root data      # download, verify and unpack; sop likewise

Worker processes decode images, shrink very large ones and make evaluation crops. Random crops,
colours and mixup are computed on the training device, a micro-batch at a time. This file needs
nothing else of this project: copy it for `DistillationLoader`.

In this order: the coupled views; decoding in worker processes; data sets; reading an image;
download; the drawn eggs.
"""

import argparse
import copy
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import distributed
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as in asymres.py
CROP_RATIO = (3 / 4, 4 / 3)  # width to height of a random crop


class UserError(ValueError):
    """What the user can mend: missing data, an impossible option. Programs end with its message."""


# A program can be several processes, each of which takes its share of an epoch's images. What else
# they need is in evaluate.py: `start_processes`, `add_over_processes`, `broadcast`.


def process_rank():
    """The number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def process_count():
    """How many processes the program has."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def process_rng(seed, epoch):
    """A stream of random numbers for this process alone, as numpy's Generator."""
    # 1 + rank, because default_rng((a, b, 0)) is the same stream as default_rng((a, b)).
    return np.random.default_rng((seed, epoch, 1 + process_rank()))


def say(*lines):
    """Print lines, in process 0."""
    if process_rank() == 0 and lines:
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)  # the line of progress
        print(*lines, sep="\n", flush=True)


# ---------------------------------------------------- coupled augmentation of the student, Sec. 3.3

COLOR_RANGE = ((0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1))  # brightness, contrast, saturation, hue
PARTNER_POOL = 200  # images from which the partners of mixup come


class DistillationLoader:
    """Coupled views of images without labels (Sec. 3.3), in batches for student and teacher.

    dataset     an ImageDataset, or anything with a `len` whose items are PIL images
    views       A, the number of views per image
    mixup       a view becomes w view + (1 - w) partner, w ~ Beta(0.2, 0.2), the same mix for both
                networks; so half of the views are mostly their partner.
                The partner is a view of any other of the 200 images that this process decoded last
                in this epoch, this batch included (the image itself if it is alone).
                View and partner share the random numbers of the crop (not the box, if the images
                differ in height or width), the flip, the colour factors and their order
    min_scale   smallest crop, as a share of the image's area
    epoch_size  maximum number of images per epoch; others are drawn for each epoch

    Yields (student (B, A, 3, s, s), teacher (B, A, 3, t, t)), float and normalised, on `device`:
    the same views at two sizes, s = student_size and t = teacher_size in px. They depend on the
    seed and the epoch: call `set_epoch(epoch)` before each epoch, as with a DistributedSampler.

    The 200 images are kept on `device` as uint8, shrunk only so far that no crop is enlarged: 0.1
    GB for CUB, and at most 2 GB, for photographs above 3 megapixels at 448 px and min_scale 0.08.
    Raises UserError if an image cannot be read.
    """

    def __init__(
        self,
        dataset,
        student_size,
        teacher_size,
        views=8,
        batch_size=8,
        mixup=True,
        workers=0,
        device="cpu",
        seed=1234,
        min_scale=0.08,
        epoch_size=None,
    ):
        self.student_size, self.teacher_size, self.device = student_size, teacher_size, device
        self.views, self.min_scale, self.mixup = views, min_scale, mixup
        self.sampler = EpochSampler(len(dataset), epoch_size, seed)
        batches = BatchSampler(self.sampler, batch_size, drop_last=False)
        max_pixels = most_pixels_needed(max(student_size, teacher_size), min_scale)
        self.batches = decoding_loader(dataset, batches, max_pixels, workers, device)

    def set_epoch(self, epoch):
        self.sampler.set_epoch(epoch)

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        rng = process_rng(self.sampler.seed, self.sampler.epoch)
        pool = []  # for mixup, this batch included; an epoch's first batches have fewer partners
        for packed in self.batches:  # whole images of any shapes, see pack_images
            images = to_images(packed, self.device)
            pool = (pool + images)[-PARTNER_POOL:]
            draws = sample_views(images, pool, self.views, self.min_scale, self.mixup, rng)
            small = render_views(images, draws, self.student_size)
            large = render_views(images, draws, self.teacher_size)
            yield small, large


distillation_loader = DistillationLoader  # this name, too, is part of the public interface


class Draws(NamedTuple):
    """All random choices of the V = B x A views of a batch of images, for any size in px."""

    boxes: list  # V crops of the images: top, left, height, width
    flips: torch.Tensor  # (V,) bool
    factors: torch.Tensor  # (V, 4), one for each colour operation
    order: list  # of the four colour operations, the same for the whole batch
    partners: list  # V images (3, H, W); empty without mixup
    partner_boxes: list  # V crops of the partners
    weights: torch.Tensor  # (V,) of the view itself; its partner has 1 - weight


def sample_views(images, pool, views, min_scale, mixup, rng):
    """Draw `views` views of each of B images (3, H, W).

    A view's partner for mixup is any other image of the pool, see `DistillationLoader`. rng: a
    numpy Generator.
    """
    count = len(images) * views
    attempts = rng.random((len(images), views, 10, 4)).tolist()  # ten per box, see crop_box
    flips = torch.from_numpy(rng.random(count) < 0.5)
    factors = torch.from_numpy(rng.uniform(*COLOR_RANGE, (count, 4))).float()
    order = rng.permutation(4).tolist()
    weights = torch.from_numpy(rng.beta(0.2, 0.2, count)).float()
    boxes, partners, partner_boxes = [], [], []
    for image, numbers in zip(images, attempts, strict=True):
        # Compared by identity, since the pool holds the image itself.
        others = [other for other in pool if other is not image] or [image]
        for view in range(views):
            boxes.append(crop_box(numbers[view], *image.shape[1:], min_scale))
            if mixup:
                partner = others[rng.integers(len(others))]
                partners.append(partner)
                partner_boxes.append(crop_box(numbers[view], *partner.shape[1:], min_scale))
    return Draws(boxes, flips, factors, order, partners, partner_boxes, weights)


def crop_box(attempts, height, width, min_scale):
    """The box of RandomResizedCrop (top, left, height, width), from random numbers in [0, 1).

    The first of the attempts (area, ratio, top, left) that fits into the image is taken; if none
    does, the centre. So images of different shapes may take different attempts.
    """
    low, high = CROP_RATIO
    for u_area, u_ratio, u_top, u_left in attempts:
        area = height * width * (min_scale + (1 - min_scale) * u_area)
        ratio = low * (high / low) ** u_ratio  # uniform in its logarithm
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


def render_views(images, draws, size):
    """The views drawn of B images, at one size: (B, A, 3, size, size), normalised."""
    device, views = images[0].device, len(draws.boxes) // len(images)
    factors = draws.factors.to(device, non_blocking=True)
    own = [image for image in images for _ in range(views)]
    x = crop_and_resize(own, draws.boxes, draws.flips, size)  # (V, 3, size, size) in [0, 1]
    x = color_jitter(x, factors, draws.order)
    if draws.partners:
        partners = crop_and_resize(draws.partners, draws.partner_boxes, draws.flips, size)
        partners = color_jitter(partners, factors, draws.order)
        weights = draws.weights.to(device, non_blocking=True)[:, None, None, None]
        x = torch.lerp(partners, x, weights)
    return normalize(x).unflatten(0, (len(images), views))


def crop_and_resize(images, boxes, flips, size):
    """Crop V uint8 images (3, H, W), resize and flip: (V, 3, size, size) in [0, 1].

    Resizing is bilinear and antialiased, as in torchvision's RandomResizedCrop.
    """
    crops = [
        image[:, top : top + height, left : left + width]
        for image, (top, left, height, width) in zip(images, boxes, strict=True)
    ]
    if crops[0].device.type == "cpu":
        return resize_by_interpolation(crops, flips, size)
    return resize_by_products(crops, flips, size)


def resize_by_interpolation(crops, flips, size):
    """One crop after another, rounded to whole grey levels: the fast way on a CPU."""
    resized = []
    for crop, flip in zip(crops, flips.tolist(), strict=True):
        x = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True)
        resized.append(x.flip(-1) if flip else x)
    return torch.cat(resized) / 255


def resize_by_products(crops, flips, size, dtype=torch.float16, room=768 * 2**20):
    """What `resize_by_interpolation` does, for many crops at once: the fast way on a GPU.

    Resizing is linear along rows and along columns: a crop becomes rows @ crop @ columns^T, where
    each row of these two matrices has the weights of one output pixel. So a GPU starts one small
    copy per crop, into a padded batch, and a few large operations for all of them. By interpolation
    it would start up to three per crop: conversion, resizing and flip. (The gain is not measured.)

    room: roughly the bytes of memory used beside the result; crops are processed in parts that
    fit. With the default, 8 x 8 views of 448 px with mixup stay below 1.5 GiB.
    """
    height, width = (max(crop.shape[side] for crop in crops) for side in (1, 2))
    # Per crop: its channels as uint8 and float16, and the weights and products.
    bytes_per_crop = (3 + 6) * height * width + 12 * size * (height + width + size)
    count = max(1, room // bytes_per_crop)
    result = torch.empty(len(crops), 3, size, size, device=crops[0].device)
    for start in range(0, len(crops), count):
        part = slice(start, start + count)
        padded, sides = pad_crops(crops[part], height, width)  # (v, 3, height, width), (v, 2)
        flip = flips[part].to(padded.device, non_blocking=True)[:, None, None]
        rows = bilinear_weights(sides[:, 0], height, size)  # (v, size, height)
        columns = bilinear_weights(sides[:, 1], width, size)  # (v, size, width)
        columns = torch.where(flip, columns.flip(1), columns)
        rows, columns = rows.to(dtype)[:, None], columns.to(dtype)[:, None]
        # (v, 1, size, height) @ (v, 3, height, width) @ (v, 1, width, size) -> (v, 3, size, size)
        result[part] = rows @ padded.to(dtype) @ columns.mT
    return result.div_(255)


def pad_crops(crops, height, width):
    """v crops, each in the upper left corner of (v, 3, height, width), and their sides (v, 2)."""
    device = crops[0].device
    padded = torch.zeros(len(crops), 3, height, width, dtype=torch.uint8, device=device)
    for place, crop in zip(padded, crops, strict=True):
        place[:, : crop.shape[1], : crop.shape[2]] = crop
    sides = torch.tensor([crop.shape[1:] for crop in crops])
    return padded, sides.to(device, non_blocking=True)


def bilinear_weights(lengths, longest, size):
    """The weights by which v lines of `lengths` px are resized to `size` px: (v, size, longest)."""
    scale = (lengths / size)[:, None, None]
    centre = (torch.arange(size, device=lengths.device)[:, None] + 0.5) * scale  # (v, size, 1)
    pixel = torch.arange(longest, device=lengths.device) + 0.5
    weights = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * (pixel < lengths[:, None, None])
    return weights / weights.sum(-1, keepdim=True)


def color_jitter(x, factors, order):
    """ColorJitter of views (V, 3, H, W) in [0, 1] by factors (V, 4), in one order; in place."""
    adjust = (adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue)
    for i in order:
        adjust[i](x, factors[:, i, None, None, None])
    return x


def adjust_brightness(x, factor):
    """Multiply by the factor, in place."""
    x.mul_(factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    """Scale the distance to the view's mean grey by the factor, in place."""
    mean = to_grey(x).mean((-2, -1), keepdim=True)  # (V, 1, 1, 1)
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(x, factor):
    """Scale the distance to each pixel's own grey by the factor, in place."""
    grey = to_grey(x)
    x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)


def to_grey(x):
    """Luma: (V, 3, H, W) -> (V, 1, H, W)."""
    red, green, blue = x.split(1, dim=1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114)


def adjust_hue(x, shift):
    """Rotate the hue by a share of the circle, in place: to HSV and back, as torchvision does."""
    red, green, blue = x.split(1, dim=1)  # (V, 1, H, W) each
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    divisor = chroma.clamp(min=1e-12)
    # In sixths of the circle: red is 0, green 2 and blue 4.
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue)
    hue = (hue + 6 * shift) % 6
    red.copy_((hue - 3).abs() - 1)  # the pure colour of that hue, once clamped to [0, 1]
    green.copy_(2 - (hue - 2).abs())
    blue.copy_(2 - (hue - 4).abs())
    x.clamp_(0, 1).mul_(chroma).add_(low)


# ------------------------------------------------------------ augmentation of the teacher, Sec. 3.2


def random_crops(dataset, batches, size, min_scale, workers, device, rng):
    """For each list of b indices in `batches`, random crops and flips of these images.

    Yields (b, 3, size, size), normalised, on the device. rng: a numpy Generator.
    """
    max_pixels = most_pixels_needed(size, min_scale)
    for packed in decoding_loader(dataset, batches, max_pixels, workers, device):
        images = to_images(packed, device)
        attempts = rng.random((len(images), 10, 4)).tolist()
        flips = torch.from_numpy(rng.random(len(images)) < 0.5)
        boxes = [
            crop_box(numbers, *image.shape[1:], min_scale)
            for numbers, image in zip(attempts, images, strict=True)
        ]
        yield normalize(crop_and_resize(images, boxes, flips, size))


# ---------------------------------------------------------------- decoding, in the worker processes
#
# A DataLoader's workers decode the images i of a batch: whole ones for training, by `decode`, or
# evaluation crops. Whole images differ in shape: `pack_images` makes one tensor of a batch in the
# worker, and `to_images` a list of images on the training device.


class InWorkers(Dataset):
    """Item i is function(dataset, i), which worker processes compute."""

    def __init__(self, dataset, function):
        self.dataset, self.function = dataset, function

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, i):
        return self.function(self.dataset, i)


def decode(dataset, i, max_pixels):
    """Image i of a data set as uint8 (3, H, W), shrunk to max_pixels if it has more."""
    if isinstance(dataset, ImageDataset):
        return TF.pil_to_tensor(dataset.read(i, max_pixels))
    image = to_rgb(dataset[i])
    return TF.pil_to_tensor(image.resize(size_within(image.size, max_pixels), LANCZOS))


def decode_evaluation_crop(dataset, i, size):
    """The evaluation crop of image i of a data set, uint8 (3, size, size)."""
    return TF.pil_to_tensor(evaluation_crop(to_rgb(dataset[i]), size))


def worker_loader(dataset, function, batches, workers, device="cpu", collate=None):
    """A DataLoader of function(dataset, i) for the indices i in each list of `batches`."""
    return DataLoader(
        InWorkers(dataset, function),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        worker_init_fn=ignore_ctrl_c,
    )


def decoding_loader(dataset, batches, max_pixels, workers, device):
    """A DataLoader of whole images, packed by `pack_images`."""
    decode_one = partial(decode, max_pixels=max_pixels)
    return worker_loader(dataset, decode_one, batches, workers, device, pack_images)


def evaluation_loader(dataset, size, batches, workers, device):
    """A DataLoader of evaluation crops, uint8 (b, 3, size, size)."""
    crop_one = partial(decode_evaluation_crop, size=size)
    return worker_loader(dataset, crop_one, batches, workers, device)


def pack_images(images):
    """Images (3, H, W) of any shapes as one tensor, for one transfer, and their heights and widths.

    Channels come last in memory, as in Pillow, because a CPU resizes that almost twice as fast.
    """
    pixels = torch.cat([image.permute(1, 2, 0).flatten() for image in images])
    return pixels, [tuple(image.shape[1:]) for image in images]


def to_images(packed, device):
    """The images that `pack_images` packed, as a list, on the device."""
    pixels, sizes = packed
    pixels = pixels.to(device, non_blocking=True, copy=True)  # a copy frees shared memory
    parts = pixels.split([3 * height * width for height, width in sizes])
    return [part.view(*size, 3).permute(2, 0, 1) for part, size in zip(parts, sizes, strict=True)]


def ignore_ctrl_c(worker):
    """Let a worker ignore Ctrl-C: it ends with the main process, which answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def most_pixels_needed(size, min_scale):
    """How many pixels an image needs so that its smallest random crop is not enlarged to size px.

    A crop has at least min_scale of the area, and its shorter side squared is 3/4 of that.
    """
    return size**2 / (min_scale * CROP_RATIO[0])


class EpochSampler(Sampler):
    """The images of an epoch: at most epoch_size, drawn anew; each process takes its share."""

    def __init__(self, count, epoch_size=None, seed=1234):
        self.count, self.seed, self.epoch = count, seed, 0
        self.epoch_size = min(count, epoch_size or count)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.epoch_size // process_count()

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        order = order[: len(self) * process_count()]  # equally many for each process
        return iter(order[process_rank() :: process_count()].tolist())


# ---------------------------------------------------------------------------------------- data sets

DOWNLOADS = {  # url, md5
    "cub": (
        "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
        "97eceeb196236b17998738112f37df78",
    ),
    "sop": (
        "http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
        "7f73d41a2f44250d4779881525aea32e",
    ),
}
COUNTS = {  # images of the published split, by which a copy is checked
    "cub": {"train": 5864, "test": 5924},
    "cars": {"train": 8054, "test": 8131},
    "sop": {"train": 59551, "test": 60502},
}
LAST_TRAINING_CLASS = {"cub": 100, "cars": 98, "sop": 11318}  # later ones are test classes
LAYOUTS = {
    "cub": "images.txt and images/<class>/*.jpg",
    "sop": "Ebay_train.txt, Ebay_test.txt and *_final/*.JPG",
    "cars": "cars_annos.mat (needs pip install scipy) and car_ims/*.jpg, or anno_train.csv, "
    "anno_test.csv, names.csv and car_data/car_data/{train,test}/<class name>/*.jpg",
}


class ImageDataset(Dataset):
    """Images with or without labels: dataset[i] is image i, a PIL image in RGB.

    paths             files; [] for drawn images, which are in images, uint8 (N, H, W, 3)
    labels            a list of ints, one per image, or None for images without labels
    training_classes  of a folder of classes, the names of those for training; else []
    """

    def __init__(self, paths=(), labels=None, images=None):
        self.paths = list(paths)
        self.labels = None if labels is None else list(labels)
        self.images = images
        self.training_classes = []

    def __len__(self):
        return len(self.paths) if self.images is None else len(self.images)

    def __getitem__(self, i):
        return self.read(i)

    def read(self, i, max_pixels=None):
        """Image i, shrunk to max_pixels if it has more. Raises UserError if it is not readable."""
        if self.images is not None:
            return Image.fromarray(self.images[i])
        return read_image(self.paths[i], max_pixels)

    def subset(self, rows):
        """The data set of these images only."""
        other = copy.copy(self)
        other.paths = [self.paths[i] for i in rows] if self.paths else []
        other.labels = None if self.labels is None else [self.labels[i] for i in rows]
        other.images = None if self.images is None else self.images[rows]
        return other


def load_dataset(name, root=None, split="train", unlabelled=False, training_classes=None):
    """Load one split of a data set as an ImageDataset.

    name              cub, cars or sop (in `root`), synthetic, or a folder (with or without `root`)
    split             "train" or "test", which have different classes; "fit" or "val", the halves
                      of the training classes, for choosing settings
    unlabelled        True: the folder holds photographs in any arrangement, and every tenth by name
                      is for testing. A folder with images directly in it is always read like this.
                      False: it has a sub-folder for each class
    training_classes  names of the folder's classes for training; all others, including any that are
                      added later, are for testing. By default the first half by name

    Raises UserError, which says what is expected.
    """
    if split not in ("train", "test", "fit", "val"):
        raise UserError(f"there is no split {split!r}: train, test, fit or val")
    published, folder = name.lower(), os.path.join(root or "", name)
    if published == "synthetic":
        dataset = draw_eggs("test" if split == "test" else "train")
    elif published in COUNTS:
        dataset = load_published(published, root or ".", "test" if split == "test" else "train")
    elif unlabelled or has_images_directly(folder):
        dataset = load_photographs(folder, split)
    else:
        dataset = load_class_folders(folder, split, training_classes)
    if split in ("fit", "val"):
        fit = first_half(sorted(set(dataset.labels)))
        dataset = select_classes(dataset, fit, inside=split == "fit")
    if not len(dataset):
        raise UserError(
            f"no {split} images in {folder}: a sub-folder of images for each of at least 2 "
            "classes is expected, or one of the names cub, cars, sop and synthetic"
        )
    return dataset


def settle_dataset(name, root):
    """(name, root) as checkpoints record them: absolute paths. Of a folder the name is the path.

    Raises UserError if there is no such folder.
    """
    if name.lower() in (*COUNTS, "synthetic"):
        return name.lower(), root and absolute(root)
    folder = absolute(os.path.join(root or "", name))
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; data sets are cub, cars, sop and synthetic")
    return folder, None


def absolute(path):
    """The absolute path, with ~ and links followed."""
    return str(Path(path).expanduser().resolve())


def first_half(names):
    """The first half of a list, including the middle of an odd number."""
    return names[: (len(names) + 1) // 2]


def select_classes(dataset, labels, inside):
    """The images of these classes, by label, or of all others."""
    labels = set(labels)
    rows = [i for i, label in enumerate(dataset.labels) if (label in labels) == inside]
    return dataset.subset(rows)


def has_images_directly(folder):
    """Whether images lie in the folder itself, not only in folders below it."""
    return os.path.isdir(folder) and any(is_image(entry.path) for entry in os.scandir(folder))


def load_photographs(folder, split):
    """Images anywhere below a folder, without labels; every tenth by name is for testing."""
    paths = list_images(folder)
    if split not in ("train", "test"):
        raise UserError("validation needs classes: these images have no labels")
    if len(paths) < 20:
        raise UserError(f"{folder} holds {len(paths)} images: at least 20 are needed")
    return ImageDataset(
        [path for i, path in enumerate(paths) if (i % 10 == 0) == (split == "test")]
    )


def load_class_folders(folder, split, training_classes=None):
    """A sub-folder for each class, with images anywhere below it."""
    by_class = {}
    for path in list_images(folder):
        by_class.setdefault(Path(path).relative_to(folder).parts[0], []).append(path)
    names = sorted(by_class)
    paths = [path for name in names for path in by_class[name]]
    labels = [label for label, name in enumerate(names) for _ in by_class[name]]
    training = list(training_classes or first_half(names))
    missing = [name for name in training if name not in names]
    if missing and split != "test":
        raise UserError(f"{folder} has no images of the training classes {', '.join(missing)}")
    dataset = ImageDataset(paths, labels)
    dataset.training_classes = training
    training_labels = [label for label, name in enumerate(names) if name in training]
    return select_classes(dataset, training_labels, inside=split != "test")


def load_published(name, root, split):
    """CUB200, Cars196 or SOP by its published lists. Raises UserError unless it is complete."""
    archive = Path(DOWNLOADS[name][0]).stem if name in DOWNLOADS else ""  # also its top folder
    if archive and os.path.isdir(os.path.join(root, archive)):
        root = os.path.join(root, archive)
    read_lines = {"cub": read_cub, "sop": read_sop, "cars": read_cars}[name]
    try:
        paths, labels = zip(*read_lines(Path(root)), strict=True)
    except Exception as error:  # what is missing or damaged raises many kinds
        raise UserError(
            f"{name} cannot be read in {root} ({error!r:.200}): {LAYOUTS[name]} are expected there"
            + (f"; python data.py {name} --root {root} downloads it" if name in DOWNLOADS else "")
        ) from error
    dataset = ImageDataset([os.path.join(root, path) for path in paths], map(int, labels))
    training = range(LAST_TRAINING_CLASS[name] + 1)
    dataset = select_classes(dataset, training, inside=split == "train")
    missing = [path for path in dataset.paths if not os.path.isfile(path)]
    if missing or len(dataset) != COUNTS[name][split]:
        raise UserError(
            f"{name} in {root}: {len(dataset)} of {COUNTS[name][split]} {split} images are listed, "
            f"{len(missing)} of them are missing {', '.join(missing[:3])}"
        )
    return dataset


def read_cub(root):
    """(path, class) of each image, by images.txt: 1 001.Black_footed_Albatross/x.jpg."""
    lines = (root / "images.txt").read_text().splitlines()
    for path in (line.split(maxsplit=1)[1].strip() for line in lines if line.strip()):
        yield f"images/{path}", path.split(".")[0]


def read_sop(root):
    """(path, class) of each image, by two lists with columns image, class, super-class, path."""
    for file in ("Ebay_train.txt", "Ebay_test.txt"):
        for line in (root / file).read_text().splitlines()[1:]:
            _, label, _, path = line.split(maxsplit=3)
            yield path.strip(), label


def read_cars(root):
    """(path, class) of each image, by cars_annos.mat or by the csv files of a common copy."""
    if not (root / "anno_train.csv").exists():
        if not (root / "cars_annos.mat").exists():
            raise FileNotFoundError("cars_annos.mat")
        from scipy.io import loadmat  # optional

        table = loadmat(root / "cars_annos.mat", squeeze_me=True)["annotations"]
        yield from table[["relative_im_path", "class"]].tolist()
        return
    lines = (root / "names.csv").read_text().splitlines()
    folders = [line.strip().strip('"').replace("/", "-") for line in lines]
    for part in ("train", "test"):
        for line in (root / f"anno_{part}.csv").read_text().splitlines():
            if line.strip():  # file,x1,y1,x2,y2,class
                file, *_, label = line.split(",")
                yield f"car_data/car_data/{part}/{folders[int(label) - 1]}/{file}", label


def load_readable(name, root, split, unlabelled=False, training_classes=None, workers=0):
    """`load_dataset`, without those images of a folder that cannot be read."""
    dataset = load_dataset(name, root, split, unlabelled, training_classes)
    if name in COUNTS or name == "synthetic":
        return dataset
    return keep_readable(dataset, workers)


def keep_readable(dataset, workers=0):
    """The data set without the images that cannot be read, which are named and counted.

    Raises UserError if more than one in ten cannot be read.
    """
    if len(dataset) > 1000:
        say(f"checking that {len(dataset)} images can be read")
    batches = BatchSampler(range(len(dataset)), 64, drop_last=False)
    checks = worker_loader(dataset, find_mistake, batches, workers)
    mistakes = [mistake for batch in checks for mistake in batch]
    rows = [i for i, mistake in enumerate(mistakes) if not mistake]
    unreadable = [mistake for mistake in mistakes if mistake]
    if unreadable:
        say(*unreadable[:1000])
        say(f"{len(unreadable)} of {len(dataset)} images cannot be read and are left out")
    if len(rows) < 0.9 * len(dataset):
        raise UserError(f"only {len(rows)} of {len(dataset)} images can be read")
    return dataset.subset(rows)


def find_mistake(dataset, i):
    """Why image i cannot be read, or "". It is decoded as small as its format allows."""
    try:
        dataset.read(i, max_pixels=1)
    except UserError as error:
        return str(error)
    return ""


# ----------------------------------------------------------------------------------- reading images

LANCZOS = Image.Resampling.LANCZOS
TURNS = {  # for each value of the EXIF tag Orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Formats that Pillow recognises but cannot decode itself
NOT_DRAWN = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


def read_image(path, max_pixels=None):
    """The RGB image as a viewer shows it; with more than max_pixels it is shrunk while decoding.

    Raises UserError, which names the file, if it cannot be read.
    """
    try:
        with Image.open(path) as file:
            turn = TURNS.get(file.getexif().get(0x0112))
            size = size_within(file.size, max_pixels or np.inf)
            if size != file.size:
                file.draft(None, [2 * side for side in size])  # JPEG decodes at 1/2, 1/4 or 1/8
            image = to_rgb(file).resize(size, LANCZOS)
        return image if turn is None else image.transpose(turn)
    except Exception as error:  # Pillow raises many kinds
        raise UserError(f"{path} cannot be read as an image ({error!r:.200})") from error


def size_within(size, max_pixels):
    """(width, height) itself or, if it has more than max_pixels, scaled down to about as many."""
    width, height = size
    scale = min(1, (max_pixels / (width * height)) ** 0.5)
    return max(1, round(width * scale)), max(1, round(height * scale))


def to_rgb(image):
    """A PIL image of any mode as RGB, with transparency on white and deep grey scaled to 8 bits."""
    if image.mode[0] in "IF":
        grey = np.asarray(image, dtype=np.float64)
        if image.mode == "F":
            white = 1 if grey.max() <= 1 else 255
        else:  # "I" also holds 16-bit files
            white = 65535 if grey.max() <= 65535 else 2**31 - 1
        image = Image.fromarray((grey / white * 255).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def list_images(folder):
    """The sorted paths of all images below a folder, except in hidden files and folders."""
    paths = []
    for parent, folders, files in os.walk(folder):  # does not follow links to folders
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [os.path.join(parent, name) for name in files]
    return sorted(path for path in paths if is_image(path))


def is_image(path):
    """Whether a file is named like an image that Pillow reads, and is not hidden."""
    Image.init()
    name, suffix = os.path.basename(path), os.path.splitext(path)[1].lower()
    readable = Image.EXTENSION.get(suffix) in Image.OPEN.keys() - NOT_DRAWN
    return readable and not name.startswith(".") and os.path.isfile(path)


def evaluation_crop(image, size):
    """The centre crop of a PIL image whose shorter side is resized to size * 8/7 px (Sec. 4).

    By Lanczos, as in the authors' code; random crops are bilinear, as theirs are. Both steps are
    done at once, so that an image of 65,000 x 1 px never becomes large.
    """
    scale = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (round((side - size) / 2) for side in (width, height))
    x, y = image.width / width, image.height / height  # px of the image per resized px
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), LANCZOS, box=box)


def evaluation_transform(size):
    """A function from a PIL image of any mode to (3, size, size), ImageNet-normalised (Sec. 4)."""
    return partial(_evaluation_transform, size=size)


def _evaluation_transform(image, size):  # not a lambda, so that it can be pickled for workers
    return normalize(TF.pil_to_tensor(evaluation_crop(to_rgb(image), size)) / 255)


def normalize(images):
    """Normalise (..., 3, H, W) in [0, 1] by ImageNet's mean and deviation, in place."""
    for channel, mean, std in zip(images.unbind(-3), MEAN, STD, strict=True):
        channel.sub_(mean).div_(std)
    return images


# ----------------------------------------------------------------------------------------- download


def download(name, root):
    """Download a published data set into a folder, unpack it and verify that it is complete."""
    if name not in DOWNLOADS:
        raise UserError(
            "cars is no longer offered for download; copies are on Kaggle (Stanford Cars): "
            f"--root is the folder that holds {LAYOUTS['cars']}"
        )
    url, md5 = DOWNLOADS[name]
    try:
        download_and_extract_archive(url, root, md5=md5)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{url} could not be downloaded whole ({error})") from error
    for split in ("train", "test"):
        say(f"{len(load_dataset(name, root, split))} {split} images, all there")


# ---------------------------------------------------------------- the built-in data set: drawn eggs


def draw_eggs(split):
    """Drawn eggs of 80 px: 120 classes of 8 images for "train", 60 others of 16 for "test".

    A class has its own directions and widths of the stripes on shell, white and yolk; at 32 px they
    are about the narrowest that pixels can show. Colours are shared by many classes. Position,
    size, light and background vary between images.
    """
    generator = torch.Generator().manual_seed(0)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator)

    classes = torch.arange(180)
    angles = np.pi * (classes[:, None] * torch.tensor([0.8192, 0.6710, 0.5497]) % 1)  # well spread
    periods = uniform(0.12, 0.15, 180, 3)  # of the stripes; the image is 2 wide
    palettes = uniform(0.05, 0.95, 6, 2, 3)  # six, of a dark and a light colour each
    if split == "train":
        labels = classes[:120].repeat_interleave(8)
    else:
        labels = classes[120:].repeat_interleave(16)
    generator.manual_seed(121 if split == "test" else 1)
    images = torch.cat(
        [
            draw_striped_eggs(angles[batch], periods[batch], palettes[batch % 6], uniform)
            for batch in labels.split(60)
        ]
    )
    return ImageDataset(images=images.numpy(), labels=labels.tolist())


def draw_striped_eggs(angles, periods, palettes, uniform):
    """n eggs, uint8 (n, 80, 80, 3), with stripes (n, 3) on shell, white and yolk.

    palettes (n, 2, 3): a dark and a light colour each.
    """
    n, side = len(angles), 80

    def one_each(low, high):
        return uniform(low, high, n, 1, 1)

    def noise(cells):
        return F.interpolate(uniform(0, 1, n, 3, cells, cells), size=(side, side), mode="bicubic")

    # x and y of each pixel in the egg's own frame: (n, side, side) each.
    axis = 2 * (torch.arange(side) + 0.5) / side - 1
    x, y = axis - one_each(-0.12, 0.12), axis[:, None] - one_each(-0.12, 0.12)
    tilt, scale = one_each(-0.015, 0.015), one_each(0.95, 1.05)
    mirror = torch.where(one_each(0, 1) < 0.5, -1.0, 1.0)
    x, y = x * tilt.cos() + y * tilt.sin(), y * tilt.cos() - x * tilt.sin()
    x, y = mirror * x / scale, y / scale
    radius = ((x / 0.72).square() + (y / 0.88).square()).sqrt()  # 1 on the outline

    stripes = torch.zeros_like(radius)
    for part, edge in enumerate((1.0, 0.72, 0.42)):  # shell, white, yolk: each on the one before
        angle, period = angles[:, part, None, None], periods[:, part, None, None]
        phase = (x * angle.cos() + y * angle.sin()) / period + one_each(0, 1)
        wave = torch.tanh(2.5 * (2 * np.pi * phase).sin()) / 2 + 0.5
        stripes = torch.lerp(stripes, wave, ((edge - radius) * 40).sigmoid())
    stripes = 0.5 + (stripes - 0.5) * one_each(1.5, 1.8)  # bold

    radius, stripes = radius[:, None], stripes[:, None]  # for the 3 channels
    colours = (palettes + uniform(-0.15, 0.15, n, 2, 3)).clamp(0, 1)
    dark, light = colours[..., None, None].unbind(1)
    egg = torch.lerp(0.45 * dark, 0.45 + 0.55 * light, stripes)
    egg = egg * (1.08 - 0.3 * radius.square()).clamp(min=0.2)  # shaded towards the edge
    ground = (noise(5) + noise(11) + noise(40)) / 3
    ground = 0.15 + 0.7 * torch.lerp(ground, ground.mean(1, keepdim=True), 0.4)
    scene = torch.lerp(ground, egg, ((1 - radius) * 40).sigmoid())
    scene = scene * uniform(0.75, 1.2, n, 1, 1, 1) + 0.03 * (uniform(0, 1, n, 3, side, side) - 0.5)
    return (scene.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous()


# -------------------------------------------------------------------------------------- the program


def main():
    parser = argparse.ArgumentParser(
        description=download.__doc__,
        epilog="cars is no longer offered for download: its name says what a copy needs.",
    )
    parser.add_argument("name", choices=("cub", "cars", "sop"))
    parser.add_argument("--root", required=True, help="folder to put it in")
    options = parser.parse_args()
    try:
        download(options.name, options.root)
    except UserError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()

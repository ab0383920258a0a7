"""Images in: the data sets, the evaluation transform, and the coupled augmentation of the student (Sec. 3.3).

    python data.py cub --root DIR       # download, verify, unpack: cub or sop; for cars it says where the copies are

Worker processes decode images and do nothing else (Decoder). Crop, flip, colour, mixup and normalisation run on the
training device, at every size from one draw (Views): uint8 images (3,H,W) become floats (B,A,3,size,size).
"""
import argparse
import csv
import functools
import os
import re
import signal
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # ImageNet's
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
DOWNLOADS = {                                               # URL, md5
    "cub": ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
            "97eceeb196236b17998738112f37df78"),
    "sop": ("http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip", "7f73d41a2f44250d4779881525aea32e")}
COUNTS = {"cub": {"train": 5864, "test": 5924}, "cars": {"train": 8054, "test": 8131},
          "sop": {"train": 59551, "test": 60502}}
LAST_TRAINING = {"cub": 100, "cars": 98, "sop": 11318}      # class ids up to it train, those above it test
TOP = {"cub": "CUB_200_2011", "cars": "", "sop": "Stanford_Online_Products"}    # the archive's own folder
LAYOUTS = {"cub": "images.txt and images/<class>/<file>.jpg (CUB_200_2011.tgz)",
           "cars": "cars_annos.mat and car_ims/<file>.jpg, or anno_train.csv, anno_test.csv, names.csv and "
                   "car_data/car_data/{train,test}/<class name>/<file>.jpg",
           "sop": "Ebay_train.txt, Ebay_test.txt and <super class>_final/<file>.JPG (Stanford_Online_Products.zip)"}


# ------------------------------------------------------------------------------- programs and their processes

PROCESSES = {"rank": 0, "count": 1}     # of a program under torchrun; who imports these functions is always alone


def run_command(main):
    """Run a program's `main`: a mistake of the user, or of the machine, ends in one sentence and exit code 2."""
    PROCESSES.update(rank=int(os.environ.get("RANK", 0)), count=int(os.environ.get("WORLD_SIZE", 1)))
    if PROCESSES["rank"]:
        sys.stdout = open(os.devnull, "w")                  # process 0 speaks for all
    say, code = "", 0
    try:
        main()
    except KeyboardInterrupt as stop:
        say, code = f"\n{stop or 'interrupted'}", 130
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        sentence = (str(error).strip() or type(error).__name__).splitlines()[-1]        # after a worker's traceback
        say, code = f"error: {re.sub(r'^[A-Za-z.]*Error: ', '', sentence)}", 2
    if code and (PROCESSES["rank"] == 0 or distributed.is_initialized()):     # until they meet, all say the same
        print(say, file=sys.stderr, flush=True)
    if code:
        sys.exit(code)
    if distributed.is_initialized():
        distributed.destroy_process_group()


def warn(sentence):
    """One line on stderr for what may be meant, but often is not."""
    if PROCESSES["rank"] == 0:
        print(f"warning: {sentence}", file=sys.stderr)


def add_up(*tensors):
    """Sum each tensor over the processes of a program, in place: the same sum in all. One process has nothing to do."""
    if PROCESSES["count"] == 1:
        return
    try:
        if not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        for tensor in tensors:
            distributed.all_reduce(tensor)
    except RuntimeError as error:
        raise ConnectionError("another process of this program has ended, and so does this one") from error


# ------------------------------------------------------------------------------------------------- one image

def read_image(path, most=None):
    """An RGB PIL image as a viewer shows it: upright by its EXIF tag, and as `as_rgb` has it.

    An image of more than `most` pixels is shrunk to them, a JPEG partly while it is decoded.
    Raises ValueError that names the file for whatever cannot be decoded, decompression bombs included.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if most and file.width * file.height > most:
                    shrink = (most / (file.width * file.height)) ** 0.5
                    file.thumbnail((file.width * shrink, file.height * shrink), Image.LANCZOS)
                return as_rgb(ImageOps.exif_transpose(file))
    except Exception as error:                                                  # Pillow raises a dozen kinds
        raise ValueError(f"{path} cannot be read as an image ({error or type(error).__name__})") from error


def as_rgb(image):
    """A PIL image of any mode as RGB: transparency on white, 16 bit scaled to 8."""
    if image.mode.startswith("I") or image.mode == "F":                         # 16-bit grey, under its several names
        grey = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def evaluation_crop(image, size):
    """Both sides times size*8/7 over the shorter one, rounded (Lanczos), then the centre: a PIL image of size x size."""
    scale = size * 8 / 7 / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.LANCZOS)
    return TF.center_crop(image, [size, size])


def evaluation_transform(size):
    """The transform of Sec. 4: PIL image of any mode -> (3,size,size) float, ImageNet-normalised."""
    return lambda image: normalize(_pixels(evaluation_crop(as_rgb(image), size)).float() / 255)


def _pixels(image):
    """PIL RGB image -> (3,H,W) uint8, a view of the (H,W,3) array."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images):
    """(...,3,H,W) float in [0,1] -> ImageNet-normalised, in place, on the same device."""
    mean, std = _statistics(images.device)
    return images.sub_(mean).div_(std)


@functools.cache
def _statistics(device):
    return [torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD)]


# ------------------------------------------------------------------------------------------------- data sets

class ImageSet:
    """Images with class labels: `.labels` (list of int), `.paths` (list of str; None where drawn), `len`."""
    def __init__(self, labels, paths=None, images=None):
        self.labels, self.paths, self._images = list(labels), paths, images

    def __len__(self):
        return len(self.labels)

    def image(self, i, most=None):
        """Image i, PIL RGB, shrunk to `most` pixels if it has more."""
        return read_image(self.paths[i], most) if self.paths else Image.fromarray(self._images[i])


def load_dataset(name, root=None, split="train", check=True):
    """An ImageSet of "cub", "cars", "sop" (in any case), "synthetic", or of class folders in `root`, or `name`.

    split   "train", "test" (other classes), or a division of the training classes for tuning: "fit" (first half
            of the class ids) and "val" (second half)
    check   hold the number of images of a named set to the published one
    Raises FileNotFoundError with the layout expected where there is none, ValueError where files are damaged.
    """
    if split not in ("train", "test", "fit", "val"):
        raise ValueError(f"unknown split {split!r}: choose from train, test, fit, val")
    part, known = "test" if split == "test" else "train", name.lower()
    if known == "synthetic":
        images, labels = synthetic(part)
        rows = _half(labels, split)
        return ImageSet([labels[i] for i in rows], images=images[rows])
    listed = _named(known, root) if known in COUNTS else _folder(root or name)
    classes = sorted({label for _, label in listed})
    last = LAST_TRAINING.get(known, classes[(len(classes) - 1) // 2] if len(classes) > 1 else -1)
    listed = [(path, label) for path, label in listed if (label > last) == (part == "test")]
    missing = [path for path, _ in listed if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of the {len(listed)} images of {name} are missing in {root}, first "
                                + ", ".join(missing[:3]))
    expected = COUNTS[known][part] if known in COUNTS and check else len(listed)
    if len(listed) != expected:
        raise ValueError(f"{name} lists {len(listed)} images in {root}, {expected} are expected: the annotations are "
                         "not whole")
    if not listed:
        raise FileNotFoundError(f"no {part} images in {root or name}: a folder with one sub-folder of images per "
                                f"class, at least 2, is expected (or one of {', '.join(COUNTS)}, synthetic)")
    rows = _half([label for _, label in listed], split)
    return ImageSet([listed[i][1] for i in rows], [listed[i][0] for i in rows])


def settle_dataset(name, root, inherited):
    """(name, absolute root) of what options name: a known set in lower case, or "folder"; else `inherited`'s."""
    known = name and (name.lower() if name.lower() in (*COUNTS, "synthetic") else "folder")
    if known == "folder":
        root = root or name
    elif known in (None, inherited.get("dataset")):
        known, root = inherited.get("dataset"), root or inherited.get("root")
    return known, root and os.path.abspath(root)


def _half(labels, split):
    """Rows of the classes in a split of the training classes."""
    classes = sorted(set(labels))
    middle = classes[(len(classes) - 1) // 2]
    return [i for i, label in enumerate(labels) if {"fit": label <= middle, "val": label > middle}.get(split, True)]


def _named(name, root):
    """[(path, class id)] of a published set in `root`, or in the archive's own folder there."""
    if not root:
        raise FileNotFoundError(f"{name} needs its folder, --root, which holds {LAYOUTS[name]}")
    for place in (root, os.path.join(root, TOP[name])):
        if any(os.path.isfile(os.path.join(place, file))
               for file in ("images.txt", "Ebay_train.txt", "cars_annos.mat", "anno_train.csv")):
            try:
                return {"cub": _cub, "cars": _cars, "sop": _sop}[name](place)
            except (ValueError, TypeError, KeyError, IndexError) as error:     # what a damaged file leads to
                raise ValueError(f"the annotations of {name} in {place} cannot be read ({error})") from error
    raise FileNotFoundError(f"no {name} in {root}: {LAYOUTS[name]} is expected")


def _lines(*path):
    with open(os.path.join(*path), encoding="utf-8", errors="replace") as file:
        return [line.strip() for line in file if line.strip()]


def _class(text):
    if not re.fullmatch(r"[0-9]{1,9}", str(text).strip()):
        raise ValueError(f"{str(text)[:60]!r} is not a class number")
    return int(text)


def _cub(root):
    paths = [line.split(maxsplit=1)[1] for line in _lines(root, "images.txt")]  # "1 001.Black_footed_Albatross/x.jpg"
    return [(os.path.join(root, "images", path), _class(path.split(".")[0])) for path in paths]


def _sop(root):
    rows = [line.split(maxsplit=3) for part in ("train", "test")               # "image_id class_id super_class_id path"
            for line in _lines(root, f"Ebay_{part}.txt")[1:]]                   # after a header of that
    return [(os.path.join(root, path), _class(label)) for _, label, _, path in rows]


def _cars(root):
    """The published layout (scipy needed), or the copy with csv files: file, x1, y1, x2, y2, class, no header."""
    if os.path.isfile(os.path.join(root, "anno_train.csv")):
        names = [line.strip('"').replace("/", "-") for line in _lines(root, "names.csv")]
        rows = [(part, *row) for part in ("train", "test") for row in csv.reader(_lines(root, f"anno_{part}.csv"))]
        if not all(1 <= _class(row[-1]) <= len(names) for row in rows):
            raise ValueError(f"names.csv has {len(names)} classes only")
        return [(os.path.join(root, "car_data", "car_data", part, names[int(label) - 1], file), int(label))
                for part, file, *_, label in rows]
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("cars_annos.mat needs scipy: pip install scipy (the csv copy does not)") from error
    try:
        rows = loadmat(os.path.join(root, "cars_annos.mat"), squeeze_me=True)["annotations"]
    except Exception as error:                              # what a damaged .mat raises is scipy's affair
        raise ValueError(f"cars_annos.mat: {error}") from error
    return [(os.path.join(root, str(row["relative_im_path"])), _class(row["class"])) for row in rows]


def _folder(root):
    """Class folders in order of name; the image files directly in them."""
    folders = [os.path.join(root, name) for name in sorted(os.listdir(root))] if os.path.isdir(root) else []
    return [(path, label) for label, folder in enumerate(folders) for path in list_images(folder, 1)]


def list_images(root, depth=None):
    """Image files under a folder, sorted; links to folders are not followed, so a loop cannot hang."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(folders) if depth is None else []
        found += [os.path.join(folder, file) for file in sorted(files) if file.lower().endswith(SUFFIXES)]
    return found


# ------------------------------------------------------------------------------------------ the embedded data set

@functools.lru_cache
def synthetic(part, seed=0):
    """Eggs on litter, drawn from a seed: ((N,80,80,3) uint8, labels), 120 classes x 8 to train, 60 others x 16 to test.

    A class is the stripes of its yolk, white and shell, an angle and a period each: plain at 64 px, while at 32 px the
    finer ones are near the limit of what pixels can hold. Colour (6 families) tells little. Images vary in pose, scale,
    side, light, contrast, blotches and background.
    """
    draw = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=draw)
    angles = np.pi * (torch.arange(180)[:, None] * torch.tensor([0.8192, 0.6710, 0.5497]) % 1)      # R3: well spread
    periods = uniform(0.12, 0.15, 180, 3)                                       # of half the side of the image
    families = uniform(0.05, 0.95, 6, 2, 3)                                     # light and dark colour of each
    classes = range(120) if part == "train" else range(120, 180)
    draw.manual_seed(seed + 1 + len(classes))
    labels = [c for c in classes for _ in range(8 if part == "train" else 16)]
    images = np.concatenate([_eggs(torch.tensor(labels[i:i + 60]), angles, periods, families, uniform)
                             for i in range(0, len(labels), 60)])
    return images, labels


def _eggs(labels, angles, periods, families, uniform):
    n, axis = len(labels), (torch.arange(160) + 0.5) / 80 - 1                   # drawn at twice the size, then halved
    halved = lambda field: F.avg_pool2d(field, 2)[:, None]                      # (n, 160, 160) -> (n, 1, 80, 80)
    clouds = lambda *sides: sum(F.interpolate(uniform(0, 1, n, 3, side, side), size=(80, 80), mode="bicubic")
                                for side in sides) / len(sides)
    one = lambda low, high: uniform(low, high, n, 1, 1)
    x, y = axis[None, None, :] - one(-0.12, 0.12), axis[None, :, None] - one(-0.12, 0.12)
    tilt, scale, side = one(-0.015, 0.015), one(0.95, 1.05), torch.where(one(0, 1) < 0.5, -1.0, 1.0)
    x, y = side * (x * tilt.cos() + y * tilt.sin()) / scale, (y * tilt.cos() - x * tilt.sin()) / scale  # (n, 160, 160)
    radius = ((x / 0.72).square() + (y / 0.88).square()).sqrt()                 # 1 on the outline
    stripes = torch.zeros_like(radius)
    for field, edge in enumerate((1.0, 0.72, 0.42)):                            # shell, white, yolk: each over the last
        angle, period = (t[labels, field][:, None, None] for t in (angles, periods))
        phase = (x * angle.cos() + y * angle.sin()) / period + one(0, 1)
        wave = torch.tanh(2.5 * (2 * np.pi * phase).sin()) / 2 + 0.5
        stripes = torch.lerp(stripes, wave, ((edge - radius) * 40).sigmoid())
    stripes = 0.5 + (stripes - 0.5) * one(0.9, 1.8)                             # from soft to bold
    colour = (families[labels % 6] + uniform(-0.15, 0.15, n, 2, 3)).clamp(0, 1)[:, :, :, None, None]
    egg = torch.lerp(0.45 * colour[:, 0], 0.45 + 0.55 * colour[:, 1], halved(stripes))
    egg = egg * (1.08 - 0.3 * halved(radius.square())).clamp(min=0.2) + 0.4 * clouds(5, 11) - 0.2
    litter = clouds(5, 11, 40)
    litter = 0.15 + 0.7 * torch.lerp(litter, litter.mean(1, keepdim=True), 0.4)
    scene = torch.lerp(litter, egg, halved(((1 - radius) * 40).sigmoid())) * uniform(0.75, 1.2, n, 1, 1, 1)
    scene += 0.03 * (uniform(0, 1, n, 3, 80, 80) - 0.5)
    return (scene.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


# ------------------------------------------------------------------------------------------------- decoding

class Decoder:
    """Worker processes that decode images: `decoder(keys)` iterates over uint8 (3,H,W), one a key, in order.

    A key is (i, size): image i of the data set, its evaluation crop of `size` px or, where size is 0, the whole
    image, shrunk to `most` pixels. The workers live as long as the Decoder. lenient: None comes for what cannot
    be read.
    """
    def __init__(self, dataset, workers=0, device="cpu", most=None, lenient=False):
        self.keys = []
        self.loader = DataLoader(_Decoded(dataset, most, lenient), batch_size=None, sampler=self.keys,
                                 num_workers=workers, persistent_workers=workers > 0, worker_init_fn=_ignore_ctrl_c,
                                 pin_memory=torch.device(device).type == "cuda",
                                 generator=torch.Generator())           # it would draw from the global one

    def __call__(self, keys):
        self.keys[:] = keys
        return iter(self.loader)


class _Decoded(Dataset):
    def __init__(self, dataset, most, lenient):
        self.dataset, self.most, self.lenient = dataset, most, lenient

    def __getitem__(self, key):
        try:
            image = self.dataset.image(key[0], None if key[1] else self.most)
            return _pixels(evaluation_crop(image, key[1]) if key[1] else image)
        except ValueError:
            if not self.lenient:
                raise


def _ignore_ctrl_c(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)                        # it is the main process's affair


def evaluation_batches(decoder, rows, parts, size, device):
    """For each slice of the image numbers `rows`: the places of those that can be read, and them, (b,3,size,size)."""
    decoded = decoder([(int(i), size) for part in parts for i in rows[part]])
    for part in parts:
        readable = {i: image for i, image in zip(range(part.start, part.stop), decoded) if image is not None}
        if readable:
            images = torch.stack(list(readable.values())).to(device, non_blocking=True)
            yield list(readable), normalize(images.float().div_(255))


# ------------------------------------------------------------------------------- coupled augmentation (Sec. 3.3)

BLOCK = 200                             # images of an epoch, in order, that are each other's partners in mixup
RATIO = (3 / 4, 4 / 3)                  # of a crop's sides
COLOURS = ((0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1))     # brightness, contrast, saturation, hue: least, most


def seeded(*numbers, device="cpu"):
    """A torch.Generator for a tuple of whole numbers: (seed, epoch, purpose), say."""
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> 1))


class Draws(NamedTuple):
    """What is random in V views, drawn once for all sizes. A view's image is a place in the epoch's order."""
    image: np.ndarray                   # (V,)
    partner: np.ndarray                 # (V,) the other image of mixup, of the same block
    crop: np.ndarray                    # (V, 10, 4) in [0,1): area, ratio, top and left of ten attempts
    flip: np.ndarray                    # (V,) bool
    factors: np.ndarray                 # (V, 4) of the colour operations
    order: np.ndarray                   # (V, 4) in which they are applied
    weight: np.ndarray                  # (V,) lambda ~ Beta(0.2, 0.2), of the image itself


def draw_views(count, copies, *seed):
    """The Draws of an epoch: `copies` views of each of `count` images, block by block, by the seed and nothing else."""
    blocks = []
    for start in range(0, count, BLOCK):
        n, random = min(BLOCK, count - start), np.random.default_rng((*seed, start))
        own = np.arange(n).repeat(copies)
        partner = (own + 1 + random.integers(max(1, n - 1), size=len(own))) % n             # not the image itself
        blocks.append((start + own, start + partner, random.random((len(own), 10, 4)), random.random(len(own)) < 0.5,
                       random.uniform(*COLOURS, (len(own), 4)),
                       random.permuted(np.tile(np.arange(4), (len(own), 1)), axis=1),
                       random.beta(0.2, 0.2, len(own))))
    return Draws(*map(np.concatenate, zip(*blocks)))


def crop_boxes(crop, height, width, least):
    """RandomResizedCrop's boxes (V,4), top, left, height, width, for draws (V,10,4) in frames (V,) by (V,).

    The area is `least` to 1 of the frame. The first attempt that fits counts; if none does, the largest centred box.
    """
    height, width, row = height[:, None], width[:, None], np.arange(len(crop))              # (V, 1)
    area = height * width * (least + (1 - least) * crop[..., 0])                            # (V, 10)
    ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** crop[..., 1]
    w = np.hstack([np.rint(np.sqrt(area * ratio)), np.minimum(width, np.rint(height * RATIO[1]))])     # (V, 11)
    h = np.hstack([np.rint(np.sqrt(area / ratio)), np.minimum(height, np.rint(width / RATIO[0]))])
    first = ((w >= 1) & (h >= 1) & (w <= width) & (h <= height)).argmax(1)
    room = np.stack([height - h, width - w], axis=2)[row, first] + 1                        # (V, 2)
    corner = np.append(crop[..., 2:], np.full((len(row), 1, 2), 0.5), axis=1)[row, first] * room
    return np.column_stack([corner, h[row, first], w[row, first]]).astype(np.int64)


def crop_one_by_one(images, boxes, flip, size):
    """V images uint8 (3,H,W), boxes (V,4), flip (V,) -> (V,3,size,size) float in [0,255]: the fast way on a CPU."""
    crops = torch.stack([TF.resized_crop(image, *box, [size, size], antialias=True)
                         for image, box in zip(images, boxes.tolist())])
    flip = torch.from_numpy(flip)
    crops[flip] = crops[flip].flip(-1)
    return crops.float()


def crop_by_products(images, boxes, flip, size, kind=torch.float32):
    """The same as two batched products, rows @ image @ columns^T, for a GPU; not rounded to whole grey levels.

    `kind` is the type of the products: half precision holds 0..255 exactly and weights to 2^-11.
    """
    device, H, W = images[0].device, max(i.shape[1] for i in images), max(i.shape[2] for i in images)
    stack = torch.zeros(len(images), 3, H, W, dtype=torch.uint8, device=device)
    for room, image in zip(stack, images):
        room[:, :image.shape[1], :image.shape[2]] = image
    top, left, height, width = torch.from_numpy(boxes).to(device, torch.float32, non_blocking=True).unbind(1)
    flip = torch.from_numpy(flip).to(device, non_blocking=True)
    rows = _resampling(top, height, size, H, torch.zeros_like(flip))[:, None].to(kind)      # (V, 1, s, H)
    columns = _resampling(left, width, size, W, flip)[:, None].to(kind)                     # (V, 1, s, W)
    return (rows @ stack.to(kind) @ columns.mT).float()     # (V,1,s,H) @ (V,3,H,W) @ (V,1,W,s) -> (V,3,s,s)


def _resampling(start, length, size, full, flip):
    """Antialiased bilinear weights (V,size,full), from `full` pixels to the `size` of V crops; rows sum to 1."""
    scale = (length / size)[:, None, None]
    place = torch.arange(full, device=start.device) + 0.5 - start[:, None, None]            # (V, 1, full): in the crop
    centre = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale               # (V, size, 1)
    centre = torch.where(flip[:, None, None], centre.flip(1), centre)
    weights = (1 - (place - centre).abs() / scale.clamp(min=1)).clamp(min=0)                # a triangle
    weights = weights * ((place > 0) & (place < length[:, None, None]))
    return weights / weights.sum(2, keepdim=True)


def jitter(x, factors, order):
    """ColorJitter of (V,...,3,h,w) in [0,1], in place: each view with its own (V,4) numpy factors and order."""
    for turn in range(4):
        for operation in range(4):
            rows = np.flatnonzero(order[:, turn] == operation)  # found in host memory: no device is waited for
            if len(rows):
                factor = torch.from_numpy(factors[rows, operation]).to(x, non_blocking=True)
                rows = torch.from_numpy(rows).to(x.device, non_blocking=True)
                some = x.index_select(0, rows)
                (_turn_hue if operation == 3 else _blend)(some, factor.view(-1, *[1] * (x.ndim - 1)), operation)
                x.index_copy_(0, rows, some)
    return x


def _blend(x, factor, operation):
    """Brightness (0), contrast (1) or saturation (2): away from black, the mean grey level, each pixel's own."""
    red, green, blue = x.unbind(-3)
    grey = (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(-3)
    other = [0 * factor, grey.mean((-2, -1), keepdim=True), grey][operation]
    x.mul_(factor).add_(other * (1 - factor)).clamp_(0, 1)


def _turn_hue(x, factor, _):
    """Turn the hue by `factor` of a circle; a channel is low + chroma * ramp(hue), so saturation is not divided out."""
    red, green, blue = x.unbind(-3)
    low, high = torch.minimum(torch.minimum(red, green), blue), torch.maximum(torch.maximum(red, green), blue)
    chroma = high - low
    hue = torch.where(red == high, green - blue, torch.where(green == high, (blue - red).add_(chroma, alpha=2),
                                                             (red - green).add_(chroma, alpha=4)))
    hue = hue.div_(chroma.clamp(min=1e-12)).add_(6 * factor.squeeze(-3))        # in sixths of the circle
    hue -= (hue / 6).floor_().mul_(6)
    torch.addcmul(low, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=red)
    for channel, centre in ((green, 2), (blue, 4)):
        torch.addcmul(low, chroma, (hue - centre).abs_().neg_().add_(2).clamp_(0, 1), out=channel)


class Views:
    """Random views of images: per batch one (B,A,3,size,size) float tensor a size, normalised, on `device`.

    A view is one draw, the same at all `sizes`: a crop of `least` to all of the image's area, a flip and, if asked
    for, jitter of the colours and mixup with another image of its block, put through the same draw. It depends on
    seed, epoch and block alone, not on batches, workers or device (beyond rounding). Each image is decoded once an
    epoch; two blocks of them are held. Iterating gives batches in random order, each time those of the next epoch.
    """
    def __init__(self, dataset, sizes, copies=1, batch_size=8, least=0.08, jitter=False, mixup=False, workers=0,
                 device="cpu", seed=1234, decoder=None):
        self.sizes, self.copies, self.least, self.jitter, self.mixup = sizes, copies, least, jitter, mixup
        self.length, self.batch_size, self.seed, self.next_epoch = len(dataset), batch_size, seed, 0
        self.device = torch.device(device)
        self.decoder = decoder or Decoder(dataset, workers, device, most_pixels(max(sizes), least))
        self.map = map
        if self.device.type == "cpu":                           # small operations: a thread of its own for some views
            self.map = ThreadPoolExecutor(torch.get_num_threads(), "views", torch.set_num_threads, (1,)).map

    def __len__(self):
        return -(-self.length // self.batch_size)

    def __iter__(self):
        number, self.next_epoch = self.next_epoch, self.next_epoch + 1
        order, starts = torch.randperm(self.length, generator=seeded(self.seed, number)), range(0, self.length,
                                                                                               self.batch_size)
        return self.epoch(number, order, [slice(i, min(i + self.batch_size, self.length)) for i in starts])

    def epoch(self, number, order, parts):
        """Views of the images `order` (n,), an epoch's: of one slice of it after another of the ascending `parts`."""
        draws, A = draw_views(len(order), self.copies, self.seed, number), self.copies
        block = BLOCK if self.mixup else 1                      # what has to be decoded around an image
        blocks = dict.fromkeys(i // block for part in parts for i in range(part.start, part.stop))
        places = [i for b in blocks for i in range(b * block, min((b + 1) * block, len(order)))]
        decoded, images, places = self.decoder([(int(order[i]), 0) for i in places]), {}, iter(places)
        for part in parts:
            ahead = part.stop + (BLOCK if self.mixup else 0)    # an even flow, not a block at a time
            while max(images, default=-1) < ahead - 1 and (place := next(places, None)) is not None:
                images[place] = next(decoded).to(self.device, non_blocking=True, copy=True)  # out of shared memory
            some = Draws(*(field[part.start * A:part.stop * A] for field in draws))
            yield tuple(self._render(images, some, size).unflatten(0, (-1, A)) for size in self.sizes)
            images = {i: image for i, image in images.items() if i // block >= part.stop // block}

    def _render(self, images, draws, size):
        """Views (V,3,size,size), a few at a time: in a CPU's cache, or in bounded memory of a GPU."""
        sources = np.stack([draws.image, draws.partner] if self.mixup else [draws.image], axis=1)       # (V, 1 or 2)
        boxes = [crop_boxes(draws.crop, *np.array([images[i].shape[1:] for i in column]).T, self.least)
                 for column in sources.T]
        boxes, flip = np.stack(boxes, axis=1), draws.flip[:, None].repeat(sources.shape[1], 1)         # (V, 1 or 2, 4)
        on_cpu, longest = self.device.type == "cpu", max(max(images[i].shape) for i in sources.flat)
        count = max(1, 2 ** 16 // size ** 2 if on_cpu else 2 ** 26 // longest ** 2)

        def render(rows):
            crop = crop_one_by_one if on_cpu else functools.partial(crop_by_products, kind=torch.float16)
            x = crop([images[i] for i in sources[rows].flat], boxes[rows].reshape(-1, 4), flip[rows].flatten(), size)
            x = x.div_(255).unflatten(0, (-1, sources.shape[1]))                                # (v, 1 or 2, 3, s, s)
            if self.jitter:
                x = jitter(x, draws.factors[rows], draws.order[rows])
            if self.mixup:
                weight = torch.from_numpy(draws.weight[rows]).to(x, non_blocking=True)
                return normalize(torch.lerp(x[:, 1], x[:, 0], weight[:, None, None, None]))
            return normalize(x[:, 0])
        return torch.cat(list(self.map(render, (slice(v, v + count) for v in range(0, len(sources), count)))))


def most_pixels(size, least):
    """From so many pixels on every crop of `least` of the area is shrunk to `size` px: more need not be held."""
    return size ** 2 / (least * RATIO[0])


def distillation_loader(dataset, student_size, teacher_size, copies=8, batch_size=8, mixup=True, workers=0,
                        device="cpu", seed=1234, least=0.08):
    """Coupled views for distillation: iterating yields (student (B,A,3,s,s), teacher (B,A,3,t,t)), an epoch's. See Views."""
    return Views(dataset, (student_size, teacher_size), copies, batch_size, least, True, mixup, workers, device, seed)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Download, verify and unpack a data set.")
    parser.add_argument("name", choices=("cub", "cars", "sop"))
    parser.add_argument("--root", required=True, help="folder to put it in")
    options = parser.parse_args(argv)
    if options.name == "cars":
        raise ValueError("cars has no download of its own any more: copies are on Kaggle (search for Stanford Cars "
                         f"Dataset); --root is the folder that holds {LAYOUTS['cars']}")
    url, md5 = DOWNLOADS[options.name]
    try:
        download_and_extract_archive(url, options.root, md5=md5)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{url} could not be downloaded whole ({error})") from error
    for split in ("train", "test"):
        print(f"{options.name} {split}: {len(load_dataset(options.name, options.root, split))} images, all there")


if __name__ == "__main__":
    run_command(main)

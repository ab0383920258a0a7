"""Images in: the data sets, the evaluation transform, and the coupled augmentation (Sec. 3.3) of the student.

    python data.py cub --root DIR       # download, verify, unpack: cub or sop; for cars it says where the copies are

An image is decoded once per epoch. Its views are cropped from it as uint8 at every size needed, in worker processes;
flip, colour, mixup and normalisation run on the training device, a whole batch at a time.
"""
import argparse
import csv
import functools
import os
import re
import signal
import sys
import warnings

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms import ColorJitter, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # ImageNet's
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
DOWNLOADS = {                                               # URL, md5
    "cub": ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz", "97eceeb196236b17998738112f37df78"),
    "sop": ("http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip", "7f73d41a2f44250d4779881525aea32e")}
COUNTS = {"cub": {"train": 5864, "test": 5924}, "cars": {"train": 8054, "test": 8131},
          "sop": {"train": 59551, "test": 60502}}
LAYOUTS = {"cub": "images.txt and images/<class>/<file>.jpg (CUB_200_2011.tgz)",
           "cars": "cars_annos.mat and car_ims/<file>.jpg, or anno_train.csv, anno_test.csv and "
                   "car_data/car_data/{train,test}/<class name>/<file>.jpg",
           "sop": "Ebay_train.txt, Ebay_test.txt and <super class>_final/<file>.JPG (Stanford_Online_Products.zip)"}


def run_command(main):
    """Run a program's `main`: a mistake of the user, or of the machine, ends in one sentence on stderr and exit code 2."""
    try:
        main()
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'interrupted'}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        sentence = str(error).strip().splitlines()[-1]      # from a worker process the traceback comes first
        print(f"error: {re.sub(r'^[A-Za-z.]*Error: ', '', sentence)}", file=sys.stderr)
        sys.exit(2)


def warn(sentence):
    """One line on stderr for what may be meant, but often is not."""
    print(f"warning: {sentence}", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- one image

def read_image(path):
    """An RGB PIL image as a viewer shows it: upright by its EXIF tag, transparency on white, 16 bit scaled to 8.

    Raises ValueError that names the file for whatever cannot be decoded, decompression bombs included.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I") or image.mode == "F":                     # 16-bit grey, under its several names
            image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:                                                  # Pillow raises a dozen kinds
        raise ValueError(f"{path} cannot be read as an image ({error or type(error).__name__})") from error


def evaluation_crop(image, size):
    """Shorter side to size*8/7 (Lanczos), centre crop: a size x size PIL image."""
    short, (width, height) = round(size * 8 / 7), image.size
    scale = short / min(width, height)
    image = image.resize((max(short, round(width * scale)), max(short, round(height * scale))), Image.LANCZOS)
    return TF.center_crop(image, [size, size])


def evaluation_transform(size):
    """The transform of Sec. 4: PIL image -> (3,size,size) float, ImageNet-normalised."""
    return lambda image: normalize(_pixels(evaluation_crop(image, size))[None])[0]


def _pixels(image):
    """PIL RGB image -> (3,H,W) uint8, a view of the (H,W,3) array."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images):
    """(B,3,H,W) uint8, or float in [0,1] (then in place) -> float, ImageNet-normalised, on the same device."""
    images = images.float().div_(255) if images.dtype == torch.uint8 else images
    mean, std = (torch.tensor(x, device=images.device)[:, None, None] for x in (MEAN, STD))
    return images.sub_(mean).div_(std)


# --------------------------------------------------------------------------------------------------------- data sets

class ImageSet:
    """Images with class labels: `.labels` (list of int), `.paths` (list of str; None where images are drawn), `len`.

    `image(i)` is a PIL RGB image; `describe(i)` a few words that name it.
    """
    def __init__(self, labels, paths=None, images=None):
        self.labels, self.paths, self._images = list(labels), paths, images

    def __len__(self):
        return len(self.labels)

    def image(self, i):
        return read_image(self.paths[i]) if self.paths else Image.fromarray(self._images[i])

    def describe(self, i):
        return os.path.basename(self.paths[i]) if self.paths else f"class {self.labels[i]}"


def load_dataset(name, root=None, split="train", check=True):
    """An ImageSet of "cub", "cars", "sop", "synthetic", or of a folder of class folders, `name` or `root` its path.

    split   "train", "test" (other classes), or a division of the training classes for tuning: "fit" (first half
            of the class ids) and "val" (second half)
    check   hold the number of images of a named set to the published one
    Raises FileNotFoundError with the layout expected where there is none, ValueError where files are missing.
    """
    if split not in ("train", "test", "fit", "val"):
        raise ValueError(f"unknown split {split!r}: choose from train, test, fit, val")
    part = "test" if split == "test" else "train"
    if name == "synthetic":
        images, labels = synthetic(part)
        rows = _half(labels, split)
        return ImageSet([labels[i] for i in rows], images=images[rows])
    if name in COUNTS:
        if not root:
            raise FileNotFoundError(f"{name} needs its folder, which holds {LAYOUTS[name]}")
        paths, labels = {"cub": _cub, "cars": _cars, "sop": _sop}[name](root, part)
        _check_files(name, root, paths, COUNTS[name][part] if check else None)
    else:
        folder = root or name
        paths, labels = _folder(folder, part)
        if not paths:
            raise FileNotFoundError(f"no {part} images in {folder}: a folder with one sub-folder of images per class, "
                                    f"at least 2 of them, is expected (or one of {', '.join(COUNTS)}, synthetic)")
    rows = _half(labels, split)
    return ImageSet([labels[i] for i in rows], [paths[i] for i in rows])


def _half(labels, split):
    """Rows of the classes in a split of the training classes."""
    classes = sorted(set(labels))
    middle = (len(classes) + 1) // 2
    chosen = set({"fit": classes[:middle], "val": classes[middle:]}.get(split, classes))
    return [i for i, label in enumerate(labels) if label in chosen]


def _check_files(name, root, paths, expected):
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of the {len(paths)} images of {name} are missing in {root}, first "
                                + ", ".join(missing[:3]))
    if not paths or expected not in (None, len(paths)):
        raise ValueError(f"{name} lists {len(paths)} images in {root}, {expected or 'some'} are expected: "
                         "the annotations are not whole")


def _find(root, file, name, top=""):
    """The folder that holds `file`: `root`, or the archive's own top folder in it."""
    for folder in (root, os.path.join(root, top)):
        if os.path.isfile(os.path.join(folder, file)):
            return folder
    raise FileNotFoundError(f"no {name} in {root}: {LAYOUTS[name]} is expected")


def _fields(path, count):
    """The lines of an annotation file, split into `count` fields at white space, the last one whole."""
    with open(path, encoding="utf-8", errors="replace") as file:
        rows = [line.split(maxsplit=count - 1) for line in file.read().splitlines() if line.strip()]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise ValueError(f"{path} line {number}: {count} fields are expected, not {' '.join(row)[:60]!r}")
    return rows


def _number(text, path):
    if not re.fullmatch(r"[0-9]{1,9}", str(text).strip()):
        raise ValueError(f"{path}: {str(text)[:60]!r} is not a class number")
    return int(text)


def _cub(root, part):
    root = _find(root, "images.txt", "cub", "CUB_200_2011")
    listed = [(path.strip(), _number(path.split(".")[0], "images.txt"))
              for _, path in _fields(os.path.join(root, "images.txt"), 2)]
    chosen = [(path, label) for path, label in listed if (label <= 100) == (part == "train")]
    return [os.path.join(root, "images", path) for path, _ in chosen], [label for _, label in chosen]


def _sop(root, part):
    root = _find(root, f"Ebay_{part}.txt", "sop", "Stanford_Online_Products")
    file = os.path.join(root, f"Ebay_{part}.txt")
    rows = _fields(file, 4)[1:]                             # the first line is the header
    return [os.path.join(root, path.strip()) for *_, path in rows], [_number(label, file) for _, label, *_ in rows]


def _cars(root, part):
    """The published layout (scipy needed), or the copy with csv files; both hold all classes, in 2 lists or 1."""
    if os.path.isfile(os.path.join(root, "anno_train.csv")):
        listed = [row for division in ("train", "test") for row in _cars_csv(root, division)]
    else:
        listed = _cars_mat(_find(root, "cars_annos.mat", "cars"))
    chosen = [(path, label) for path, label in listed if (label <= 98) == (part == "train")]
    return [path for path, _ in chosen], [label for _, label in chosen]


def _cars_csv(root, division):
    for file in (f"anno_{division}.csv", "names.csv"):
        if not os.path.isfile(os.path.join(root, file)):
            raise FileNotFoundError(f"no {file} in {root}: {LAYOUTS['cars']} is expected")
    file = os.path.join(root, f"anno_{division}.csv")
    with open(os.path.join(root, "names.csv"), encoding="utf-8", errors="replace") as names_file:
        names = [line.strip().strip('"').replace("/", "-") for line in names_file.read().splitlines() if line.strip()]
    with open(file, encoding="utf-8", errors="replace", newline="") as rows:
        for row in csv.reader(rows):
            if len(row) != 6 or not 1 <= _number(row[5], file) <= len(names):
                raise ValueError(f"{file}: file, x1, y1, x2, y2, class are expected, not {','.join(row)[:60]!r}")
            label = int(row[5])
            yield os.path.join(root, "car_data", "car_data", division, names[label - 1], row[0]), label


def _cars_mat(root):
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("cars_annos.mat needs scipy: pip install scipy (the copy with csv files does not)") from error
    file = os.path.join(root, "cars_annos.mat")
    try:
        rows = loadmat(file, squeeze_me=True)["annotations"]
        return [(os.path.join(root, str(row["relative_im_path"])), _number(row["class"], file)) for row in rows]
    except Exception as error:                              # what a damaged .mat raises is scipy's affair
        raise ValueError(f"{file} cannot be read ({error})") from error


def _folder(root, part):
    """Class folders in order of name, the first half for training; image files directly in them."""
    if not os.path.isdir(root):
        return [], []
    classes = sorted(name for name in os.listdir(root) if os.path.isdir(os.path.join(root, name)))
    listed = [(path, label) for label, name in enumerate(classes) for path in list_images(os.path.join(root, name), 1)]
    kept = sorted({label for _, label in listed})           # folders without images are no classes
    if len(kept) < 2:
        return [], []
    middle = kept[(len(kept) - 1) // 2]
    chosen = [(path, label) for path, label in listed if (label <= middle) == (part == "train")]
    return [path for path, _ in chosen], [label for _, label in chosen]


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


# ---------------------------------------------------------------------------------------- coupled augmentation (Sec. 3.3)

def seeded(*numbers, device="cpu"):
    """A torch.Generator for a tuple of whole numbers: (seed, epoch, position), say."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))


JITTER = (0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.1, 0.1)    # brightness, contrast, saturation, hue
MIXUP = torch.distributions.Beta(*torch.full((2,), 0.2, dtype=torch.float64))


def _grey(x):
    """(V,3,h,w) -> (V,1,h,w), the weights of torchvision's rgb_to_grayscale."""
    return (0.2989 * x[:, 0]).add_(x[:, 1], alpha=0.587).add_(x[:, 2], alpha=0.114)[:, None]


def _brightness(x, factor):
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x, factor):
    mean = _grey(x).mean((-2, -1), keepdim=True)
    return x.mul_(factor).add_((1 - factor) * mean).clamp_(0, 1)


def _saturation(x, factor):
    grey = _grey(x).mul_(1 - factor)
    return x.mul_(factor).add_(grey).clamp_(0, 1)


def _hue(x, factor):
    """Turn the hue by `factor` of a circle, value and saturation kept: torchvision's HSV round trip in fewer steps.

    With chroma = max - min, a channel is min + chroma * clamp(ramp(hue), 0, 1), so saturation is never divided out.
    """
    red, green, blue = x.unbind(1)                                              # (V, h, w) each
    low, high = x.amin(1), x.amax(1)
    chroma = high - low
    step = chroma.clamp(min=1e-12).reciprocal_()
    is_red, is_green = (torch.eq(high, channel, out=torch.empty_like(high)) for channel in (red, green))
    hue = torch.lerp((red - green).mul_(step).add_(4), (blue - red).mul_(step).add_(2), is_green)
    hue = hue.lerp_((green - blue).mul_(step), is_red).add_(factor[:, 0] * 6)   # in sixths of the circle
    hue.sub_((hue / 6).floor_().mul_(6))
    torch.addcmul(low, chroma, (hue - 3).abs_().sub_(1).clamp_(0, 1), out=red)
    for channel, centre in ((green, 2), (blue, 4)):
        torch.addcmul(low, chroma, (hue - centre).abs_().neg_().add_(2).clamp_(0, 1), out=channel)
    return x


COLOUR = (_brightness, _contrast, _saturation, _hue)       # in ColorJitter's numbering; each works in place


def render(crops, draws, jitter=True):
    """(V,3,h,w) uint8 and the (V,12) draws of _Views -> flipped, coloured, normalised floats, same device.

    Operations go to the views whose turn it is, in groups; the draws are in host memory, so no device is waited for.
    """
    on_device = functools.partial(torch.Tensor.to, device=crops.device, non_blocking=True)
    factors, order = on_device(draws[:, 1:5, None, None, None].float()), draws[:, 5:9]
    views = crops.float().div_(255)
    steps = [(draws[:, 0] > 0, lambda x, _: x.flip(-1), 0)]
    steps += [(order[:, turn] == op, change, op) for turn in range(4 if jitter else 0) for op, change in enumerate(COLOUR)]
    for chosen, change, op in steps:
        rows = chosen.nonzero()[:, 0]
        if len(rows) == len(views):
            views = change(views, factors[:, op])                               # a single view: no copies
        elif len(rows):
            rows = on_device(rows)
            views[rows] = change(views[rows], factors[rows, op])
    return normalize(views)


class _Views(Dataset):
    """(epoch, position, image index) -> index, one (A,3,size,size) uint8 crop stack per size, and the views' draws.

    Each view is drawn once, by torchvision's own draws, and cropped at every size from the same box. Draws are (A,12):
    flip, factors of the four colour operations, their order, mixup weight, and where to find mixup's partner.
    """
    def __init__(self, dataset, sizes, copies, crop_scale, seed, lenient):
        self.dataset, self.sizes, self.copies, self.crop_scale, self.seed = dataset, sizes, copies, crop_scale, seed
        self.lenient = lenient

    def __getitem__(self, key):
        epoch, position, index = key
        try:
            image = self.dataset.image(index)
        except ValueError:
            if not self.lenient:
                raise
            image, index = Image.new("RGB", (8, 8)), -1 - index
        if self.crop_scale is None:                                             # no augmentation: the evaluation's crop
            return index, [_pixels(evaluation_crop(image, size))[None] for size in self.sizes], torch.zeros(1, 12)
        pixels, state = _pixels(image), torch.get_rng_state()
        torch.set_rng_state(seeded(self.seed, epoch, position).get_state())     # torchvision draws from the global one
        boxes, jitter = zip(*((RandomResizedCrop.get_params(pixels, self.crop_scale, (3 / 4, 4 / 3)),
                               ColorJitter.get_params(*JITTER)) for _ in range(self.copies)))
        flip, image, view = torch.rand(3, self.copies)
        draws = torch.tensor([[*factors, *order] for order, *factors in jitter], dtype=torch.float64)
        draws = torch.cat([(flip < 0.5)[:, None], draws, MIXUP.sample((self.copies, 1)), image[:, None], view[:, None]], 1)
        torch.set_rng_state(state)
        crops = [torch.stack([TF.resized_crop(pixels, *box, [size, size], antialias=True) for box in boxes])
                 for size in self.sizes]
        return index, crops, draws


class ViewLoader:
    """Batches of views: iterating gives, per batch, one (B,A,3,size,size) float tensor per size; see distillation_loader.

    The same seed gives the same views whatever the number of workers. Each `iter()` is the next epoch, in random
    order; `epoch` takes the epoch's number and its batches of image indices, can skip those that were done, and
    gives the indices (B,) before the views. crop_scale None is the evaluation's crop instead of an augmentation.
    lenient: an image that cannot be read does not raise; its index i comes as -1-i, its views are void.
    """
    def __init__(self, dataset, sizes, copies, batch_size=8, crop_scale=(0.08, 1.0), jitter=False, mixup=False,
                 workers=0, device="cpu", seed=1234, lenient=False):
        self.views = _Views(dataset, sizes, copies, crop_scale, seed, lenient)
        self.batch_size, self.jitter, self.mixup, self.seed = batch_size, jitter, mixup, seed
        self.device, self.next_epoch, self._keys = torch.device(device), 0, []
        self.loader = DataLoader(self.views, batch_sampler=_Keys(self), num_workers=workers, collate_fn=self._collate,
                                 persistent_workers=workers > 0, pin_memory=self.device.type == "cuda",
                                 prefetch_factor=4 if workers else None, worker_init_fn=_start_worker,
                                 generator=torch.Generator())           # it would draw from the global one

    def __len__(self):
        return -(-len(self.views.dataset) // self.batch_size)

    def __iter__(self):
        epoch, self.next_epoch = self.next_epoch, self.next_epoch + 1
        order = torch.randperm(len(self.views.dataset), generator=seeded(self.seed, epoch))
        return (views for _, *views in self.epoch(epoch, order.split(self.batch_size)))

    def epoch(self, number, batches, skip=0):
        """One epoch's batches, augmented and on the device; on CUDA the next one is prepared on a stream beside."""
        positions = torch.arange(sum(map(len, batches))).split([len(batch) for batch in batches])
        self._keys = [[(number, p, i) for p, i in zip(position.tolist(), batch.tolist())]
                      for position, batch in zip(positions, batches)][skip:]
        if self.device.type != "cuda":
            yield from map(self._finish, self.loader)
            return
        side, ready = torch.cuda.Stream(self.device), None
        for raw in self.loader:
            with torch.cuda.stream(side):
                batch = self._finish(raw)
            if ready is not None:
                yield self._handed_over(*ready)
            ready = batch, side.record_event()
        if ready is not None:
            yield self._handed_over(*ready)

    def _handed_over(self, batch, event):
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(event)
        for tensor in batch:
            tensor.record_stream(stream)
        return batch

    def _collate(self, samples):
        index, crops, draws = zip(*samples)
        images, (copies, _) = len(draws), draws[0].shape
        draws = torch.cat(draws)                                                # (V, 12), V = B*A views
        partner = (torch.arange(images).repeat_interleave(copies) + 1 + (draws[:, 10] * (images - 1)).long()) % images
        partner = partner * copies + (draws[:, 11] * copies).long()             # a view of another image of the batch
        return torch.tensor(index), [torch.stack(c) for c in zip(*crops)], draws, partner

    def _finish(self, batch):
        """Flip, colour, normalise and mix on the device: all views at once, or on a CPU few enough to stay in its cache."""
        index, crops, draws, partner = batch
        on_device = functools.partial(torch.Tensor.to, device=self.device, non_blocking=True)
        weight, partner, sizes = on_device(draws[:, 9].float()), on_device(partner), []
        for crop in map(on_device, crops):
            flat = crop.flatten(0, 1)                                           # (V, 3, size, size)
            some = max(1, 2 ** 19 // flat[0].numel()) if self.device.type == "cpu" else len(flat)
            views = torch.empty(flat.shape, device=self.device)
            parts = [slice(v, v + some) for v in range(0, len(flat), some)]
            for rows in parts:
                views[rows] = render(flat[rows], draws[rows], self.jitter)
            if self.mixup:                                                      # mean and deviation pass through it
                mixed = torch.empty_like(views)
                for rows in parts:
                    torch.lerp(views[partner[rows]], views[rows], weight[rows, None, None, None], out=mixed[rows])
                views = mixed
            sizes.append(views.unflatten(0, crop.shape[:2]))
        return on_device(index), *sizes


class _Keys:
    """The batch sampler: keys of the loader's current epoch."""
    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader._keys)


def _start_worker(_):
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)                                # Ctrl-C is the main process's affair


def distillation_loader(dataset, student_size, teacher_size, copies=8, batch_size=8, mixup=True, workers=0,
                        device="cpu", seed=1234, crop_scale=(0.08, 1.0)):
    """Coupled views for distillation: iterating yields (student (B,A,3,s,s), teacher (B,A,3,t,t)), one epoch long.

    Each of the A `copies` of an image is one draw (crop box, flip, colour, mixup partner and weight) rendered at both
    sizes; float, ImageNet-normalised, on `device`. Mixup's partner is a view of another image of the batch, so a
    batch of one is not mixed.
    """
    return ViewLoader(dataset, (student_size, teacher_size), copies, batch_size, crop_scale, True, mixup, workers,
                      device, seed)


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

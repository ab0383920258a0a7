"""Images in: data sets, the evaluation transform, the coupled augmentation of the student (Sec. 3.3).

    python data.py cub --root DIR    # download, verify, unpack: cub or sop; for cars it says where copies are

Workers only decode: crop, flip, colour, mixup and normalisation run on the training device.
"""
import argparse
import functools
import math
import os
import re
import signal
import sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import distributed
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2 import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm")
DOWNLOADS = {"cub": ("https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz",
                     "97eceeb196236b17998738112f37df78"),  # md5
             "sop": ("http://ftp.cs.stanford.edu/cs/cvgl/Stanford_Online_Products.zip",
                     "7f73d41a2f44250d4779881525aea32e")}
COUNTS = {"cub": {"train": 5864, "test": 5924}, "cars": {"train": 8054, "test": 8131},  # images
          "sop": {"train": 59551, "test": 60502}}
LAST_TRAINING = {"cub": 100, "cars": 98, "sop": 11318}  # class ids up to it train, those above it test
LAYOUTS = {"cub": "images.txt, images/<class>/*.jpg", "sop": "Ebay_train.txt, Ebay_test.txt, *_final/*.JPG",
           "cars": "cars_annos.mat (needs pip install scipy), car_ims/*.jpg, or anno_train.csv, "
                   "anno_test.csv, names.csv, car_data/car_data/{train,test}/<class name>/*.jpg"}
BLOCK = 200  # images of an epoch, in order, that are each other's partners in mixup
RATIO = (3 / 4, 4 / 3)  # of a crop's sides
COLOURS = ((0.6, 0.6, 0.6, -0.1), (1.4, 1.4, 1.4, 0.1))  # least, most brightness, contrast, saturation, hue
VIEW = np.dtype([("image", int), ("partner", int), ("weight", float),  # of mixup; by place in the epoch
                 ("crop", float, (10, 4)), ("flip", bool),  # area, ratio, top and left of ten attempts
                 ("factors", float, 4), ("order", int, 4)], align=True)  # of the colour operations
PROCESSES = {"rank": 0, "count": 1}  # of a program under torchrun; who imports these functions is alone
WORKERS = max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # one a core

def read_image(path, most=math.inf):
    """An RGB PIL image as a viewer shows it, shrunk to `most` pixels. ValueError names what is none."""
    def sides(image, pixels):
        return [int(side * min(1, (pixels / image.width / image.height) ** 0.5)) for side in image.size]
    try:
        with Image.open(path) as file:
            refuse(math.prod(file.size) > Image.MAX_IMAGE_PIXELS, "a decompression bomb")
            file.draft(None, sides(file, 4 * most))  # a JPEG partly while it is decoded
            image = as_rgb(ImageOps.exif_transpose(file))
            image.thumbnail(sides(image, most), Image.LANCZOS)
            return image
    except Exception as error:  # Pillow raises a dozen kinds
        raise ValueError(f"{path} cannot be read as an image ({error!r:.200})") from error

def as_rgb(image):  # a PIL image of any mode: transparency on white, 16 bit scaled to 8
    if image.mode.startswith("I"):  # 16-bit grey, under its several names
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")

def evaluation_crop(image, size):
    """Both sides times size*8/7 over the shorter one, rounded (Lanczos); the centre of that, size x size."""
    scale = size * 8 / 7 / min(image.size)
    image = image.resize([max(size, round(side * scale)) for side in image.size], Image.LANCZOS)
    return TF.center_crop(image, [size, size])

def evaluation_transform(size):
    """The transform of Sec. 4: PIL image of any mode -> (3,size,size) float, ImageNet-normalised."""
    return lambda image: normalize(TF.pil_to_tensor(evaluation_crop(as_rgb(image), size)) / 255)

def normalize(images):  # (...,3,H,W) float in [0,1] -> ImageNet-normalised, in place
    for channel, mean, std in zip(images.unbind(-3), MEAN, STD):
        channel.sub_(mean).div_(std)
    return images

class ImageSet:
    """Images with class labels: `.labels` (list of int), `.paths` (list of str; None where drawn), `len`."""
    def __init__(self, labels, paths=None, images=None, lenient=False):
        self.labels, self.paths, self._images, self.lenient = list(labels), paths, images, lenient

    def __len__(self):
        return len(self.labels)

    def image(self, i, most=math.inf):
        """Image i, PIL RGB, shrunk to `most` pixels."""
        return read_image(self.paths[i], most) if self.paths else Image.fromarray(self._images[i])

    def __getitem__(self, key):  # of a worker: uint8 (3,H,W), None if unreadable and lenient
        i, most, size = key  # size: of the evaluation crop, 0 for the whole image
        try:
            image = self.image(i, most)
            return TF.pil_to_tensor(evaluation_crop(image, size) if size else image)
        except ValueError:
            if not self.lenient:
                raise

def load_dataset(name, root=None, split="train", check=True):
    """An ImageSet: "cub", "cars", "sop" (in any case), "synthetic", or class folders in `root`, or `name`.
    split: "train", "test" (other classes), "fit" or "val" (halves of the training classes). check: hold their
    number to the published one. Raises ValueError, which says what is expected.
    """
    known, part = name.lower(), {"train": "train", "fit": "train", "val": "train", "test": "test"}[split]
    if known == "synthetic":
        rows = list(zip(*synthetic(part)))  # of images, or else paths, and classes
    elif known in COUNTS:
        rows = _half(_published(known, root or "."), part == "test", LAST_TRAINING[known])
    else:
        folders = enumerate(sorted(Path(root or name).glob("*")))
        rows = [(path, label) for label, folder in folders for path in list_images(folder, "*")]
        rows = _half(rows, part == "test")
    missing = [path for path, _ in rows if known in COUNTS and not os.path.isfile(path)]
    expected = COUNTS[known][part] if check and known in COUNTS else len(rows)
    refuse(missing or len(rows) != expected, f"{name} in {root}: {len(rows)} of {expected} {part} images are "
           f"listed, {len(missing)} of them missing {', '.join(missing[:3])}")
    rows = rows if split == part else _half(rows, split == "val")
    refuse(not rows, f"no {split} images in {root or name}: one sub-folder of images per class, at least 2, "
           "is expected (or the name cub, cars, sop, synthetic)")
    images, labels = map(list, zip(*rows))
    return ImageSet(labels, images=images) if known == "synthetic" else ImageSet(labels, images)

def settle_dataset(name, root, inherited):
    """(name, absolute root): a known set in lower case or "folder"; what is not said is as in `inherited`."""
    if name and name.lower() not in (*COUNTS, "synthetic"):
        name, root = "folder", root or name
    name = (name or inherited.get("dataset") or "").lower()
    refuse(not name, "--dataset is missing: the teacher does not say on which it was trained")
    refuse(root and name == "synthetic", "--root needs --dataset: which one is there?")
    root = root or name == inherited.get("dataset") and inherited.get("root") or None
    return name, root and os.path.abspath(root)

def _half(rows, second, last=None):  # of classes above `last` (else the middle one) if second, else the rest
    last = last or np.median([*{label for _, label in rows}] or [0])
    return [row for row in rows if (row[1] > last) == second]

def _published(name, root):  # rows (path, class) of a published set, as its files in `root` say
    top = os.path.join(root, Path(DOWNLOADS.get(name, ".")[0]).stem)  # the archive's own folder
    root = top if os.path.isdir(top) else root
    def entries(file, pattern):
        return re.findall(pattern, Path(root, file).read_text("utf-8-sig", "replace"), re.MULTILINE)
    try:
        if name == "cub":  # 1 001.Black_footed_Albatross/x.jpg
            rows = [(f"images/{path}", n) for path, n in entries("images.txt", r"^\d+ ((\d+)\..*\S)")]
        elif name == "sop":  # image_id class_id super_class_id path, after a header
            lists = [entries(f"Ebay_{part}.txt", r"^\d+ (\d+) \d+ (.*\S)") for part in ("train", "test")]
            rows = [(path, n) for n, path in sum(lists, [])]
        elif os.path.isfile(os.path.join(root, "anno_train.csv")):  # file,x1,y1,x2,y2,class
            names = ["", *(x.replace("/", "-") for x in entries("names.csv", r'^"?(.*[^"\s])'))]
            rows = [(f"car_data/car_data/{part}/{names[int(n)]}/{file}", n) for part in ("train", "test")
                    for file, n in entries(f"anno_{part}.csv", r"^(.+?),.*,(\d+)")]
        else:
            from scipy.io import loadmat  # optional
            table = loadmat(os.path.join(root, "cars_annos.mat"), squeeze_me=True)["annotations"]
            rows = table[["relative_im_path", "class"]].tolist()
        return [(f"{root}/{path}", int(n)) for path, n in rows]
    except Exception as error:  # a damaged file leads to a dozen kinds
        raise ValueError(f"{name} cannot be read in --root {root} ({error!r:.200}): "
                         f"{LAYOUTS[name]} is expected") from error

def list_images(root, pattern="**/*"):
    """Image files under a folder, sorted; links to folders are not followed, so a loop cannot hang."""
    return sorted(str(path) for path in Path(root).glob(pattern) if path.suffix.lower() in SUFFIXES)

@functools.lru_cache
def synthetic(part):
    """Drawn eggs: (N,80,80,3) uint8 and N labels, 120 classes x 8 ("train") or 60 others x 16 ("test").
    A class is the stripes of its yolk, white and shell, plain at 64 px, while 32 hardly hold the finer ones.
    """
    draw = torch.Generator().manual_seed(0)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=draw)
    angles = np.pi * (torch.arange(180)[:, None] * torch.tensor([0.8192, 0.6710, 0.5497]) % 1)  # well spread
    periods = uniform(0.12, 0.15, 180, 3)  # of half the side of the image
    families = uniform(0.05, 0.95, 6, 2, 3)  # dark and light colour of each
    first, classes, each = (0, 120, 8) if part == "train" else (120, 60, 16)
    labels = torch.arange(first, first + classes).repeat_interleave(each)
    draw.manual_seed(1 + classes)
    images = [_eggs(angles[some], periods[some], families[some % 6], uniform) for some in labels.split(60)]
    return np.concatenate(images), labels.tolist()

def _eggs(angles, periods, colours, uniform):  # (n,80,80,3) of stripes (n,3) in two colours (n,2,3)
    n, axis = len(angles), (torch.arange(160) + 0.5) / 80 - 1  # drawn at twice the size
    one = lambda low, high: uniform(low, high, n, 1, 1)
    noise = lambda side: F.interpolate(uniform(0, 1, n, 3, side, side), size=(80, 80), mode="bicubic")
    halved = lambda field: F.avg_pool2d(field, 2)[:, None]  # (n,160,160) -> (n,1,80,80)
    x, y = axis - one(-0.12, 0.12), axis[:, None] - one(-0.12, 0.12)
    tilt, scale, side = one(-0.015, 0.015), one(0.95, 1.05), torch.where(one(0, 1) < 0.5, -1.0, 1.0)
    x, y = side * (x * tilt.cos() + y * tilt.sin()) / scale, (y * tilt.cos() - x * tilt.sin()) / scale
    radius = ((x / 0.72).square() + (y / 0.88).square()).sqrt()  # (n,160,160), 1 on the outline
    stripes, angles, periods = torch.zeros_like(radius), angles[..., None, None], periods[..., None, None]
    for field, edge in enumerate((1.0, 0.72, 0.42)):  # shell, white, yolk: each over the last
        phase = (x * angles[:, field].cos() + y * angles[:, field].sin()) / periods[:, field] + one(0, 1)
        wave = torch.tanh(2.5 * (2 * np.pi * phase).sin()) / 2 + 0.5
        stripes = torch.lerp(stripes, wave, ((edge - radius) * 40).sigmoid())
    stripes = 0.5 + (stripes - 0.5) * one(0.9, 1.8)  # from soft to bold
    dark, light = (colours + uniform(-0.15, 0.15, n, 2, 3)).clamp(0, 1)[..., None, None].unbind(1)
    egg = torch.lerp(0.45 * dark, 0.45 + 0.55 * light, halved(stripes))
    egg = egg * (1.08 - 0.3 * halved(radius.square())).clamp(min=0.2)  # a shade, and noise
    egg = egg + 0.4 * ((noise(5) + noise(11)) / 2) - 0.2
    litter = (noise(5) + noise(11) + noise(40)) / 3
    litter = 0.15 + 0.7 * torch.lerp(litter, litter.mean(1, keepdim=True), 0.4)
    scene = torch.lerp(litter, egg, halved(((1 - radius) * 40).sigmoid())) * uniform(0.75, 1.2, n, 1, 1, 1)
    scene += 0.03 * (uniform(0, 1, n, 3, 80, 80) - 0.5)
    return (scene.clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).contiguous().numpy()

def decoder(dataset, workers=0, device="cpu"):  # decode(keys): iterates over uint8 images (3,H,W)
    keys = []  # what the workers get
    loader = DataLoader(dataset, batch_size=None, sampler=keys, num_workers=workers,
                        persistent_workers=workers > 0, worker_init_fn=_ignore_ctrl_c,
                        pin_memory=torch.device(device).type == "cuda")
    def decode(wanted):
        keys[:] = wanted
        return iter(loader)
    return decode

def _ignore_ctrl_c(_):  # it is the main process's affair
    signal.signal(signal.SIGINT, signal.SIG_IGN)

def evaluation_batches(decode, rows, parts, size, device):
    """For each slice of image numbers `rows`: the places of the readable ones, and images (b,3,size,size)."""
    decoded = decode([(int(i), math.inf, size) for part in parts for i in rows[part]])
    for part in parts:  # zip asks the range first, so that it takes no image too many
        found = [(i, image) for i, image in zip(range(part.start, part.stop), decoded) if image is not None]
        if found:
            places, images = zip(*found)
            yield list(places), normalize(torch.stack(images).to(device, non_blocking=True) / 255)

def seeded(*numbers, device="cpu"):  # a torch.Generator for (seed, epoch, purpose), say
    seed = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(seed >> 1))

def draw_views(count, copies, *seed):  # what is random in an epoch of images: (count * copies,) records
    draws = np.recarray(count * copies, VIEW)
    for start in range(0, count, BLOCK):
        n, random = min(BLOCK, count - start), np.random.default_rng((*seed, start))
        own, block = np.arange(n).repeat(copies), draws[start * copies:(start + n) * copies]
        block.image = start + own
        block.partner = start + (own + 1 + random.integers(max(1, n - 1), size=own.shape)) % n  # another one
        block.crop = random.random(block.crop.shape)
        block.flip = random.random(own.shape) < 0.5
        block.factors = random.uniform(*COLOURS, block.factors.shape)
        block.order = random.permuted(np.tile(np.arange(4), (len(own), 1)), axis=1)
        block.weight = random.beta(0.2, 0.2, own.shape)
    return draws

def crop_box(attempts, height, width, least):  # RandomResizedCrop's (top, left, height, width) of a frame
    for area, ratio, top, left in attempts:  # the first that fits
        area = height * width * (least + (1 - least) * area)
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if 1 <= h <= height and 1 <= w <= width:
            return int(top * (height - h + 1)), int(left * (width - w + 1)), h, w
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))  # else the centre
    return (height - h) // 2, (width - w) // 2, h, w

def crop_one_by_one(images, boxes, flip, size):
    """V uint8 images (3,H,W), V boxes, flip (V,) -> (V,3,size,size) float in [0,255]: fast on a CPU."""
    parts = [image[None, :, top:top + h, left:left + w] for image, (top, left, h, w) in zip(images, boxes)]
    crops = torch.cat([F.interpolate(part, (size, size), mode="bilinear", antialias=True) for part in parts])
    crops[flip] = crops[flip].flip(-1)
    return crops.float()

def crop_by_products(images, boxes, flip, size, kind=torch.float16):
    """The same for a GPU, not rounded: rows @ image @ columns^T in `kind` (in half, weights to 2^-11)."""
    (H, W), device = (max(image.shape[side] for image in images) for side in (1, 2)), images[0].device
    frames = torch.stack([F.pad(image, (0, W - image.shape[2], 0, H - image.shape[1])) for image in images])
    box = torch.tensor(boxes).T.to(device, torch.float32, non_blocking=True)[..., None, None]
    start, length = box[:2], box[2:]  # (2,V,1,1): of rows, of columns
    place = torch.arange(max(H, W), device=device) + 0.5 - start  # (2,V,1,max(H,W)): in the crop
    centre = (torch.arange(size, device=device)[:, None] + 0.5) * (length / size)  # (2,V,size,1)
    weights = (1 - (place - centre).abs() / (length / size).clamp(min=1)).clamp(min=0)  # a triangle
    weights = weights * ((place > 0) & (place < length))  # antialiased bilinear
    rows, columns = (weights / weights.sum(-1, keepdim=True))[:, :, None].to(kind)  # (V,1,size,...)
    flip = torch.tensor(flip).to(device, non_blocking=True)[:, None, None, None]
    columns = torch.where(flip, columns.flip(2), columns)
    return (rows[..., :H] @ frames.to(kind) @ columns[..., :W].mT).float()

def jitter(x, factors, order):
    """ColorJitter of (V,...,3,h,w) in [0,1]: each view by its own (V,4) numpy factors, in its own order."""
    place = np.arange(len(x))  # which view a row of x is: those of one operation are brought together
    for turn in range(4):
        together = order[place, turn].argsort(kind="stable")
        x, place = x[torch.tensor(together).to(x.device, non_blocking=True)], place[together]
        operations = order[place, turn]
        factor = torch.tensor(factors[place, operations]).to(x, non_blocking=True)
        ends = operations.searchsorted(range(5))  # known on the host: no device is waited for
        for operation, start, stop in zip(range(4), ends, ends[1:]):
            _colour(x[start:stop], factor[start:stop].view(-1, *[1] * (x.ndim - 1)), operation)
    return x[torch.tensor(place.argsort()).to(x.device, non_blocking=True)]

def _colour(x, factor, operation):  # in place: (v,...,3,h,w) in [0,1], (v,...,1,1,1)
    red, green, blue = x.unbind(-3)
    if operation == 0:  # brightness
        x.mul_(factor).clamp_(0, 1)
    elif operation < 3:  # contrast, saturation
        grey = (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).unsqueeze(-3)
        grey = grey.mean((-2, -1), keepdim=True) if operation == 1 else grey
        x.mul_(factor).add_(grey.mul_(1 - factor)).clamp_(0, 1)
    else:  # hue
        low, high = x.amin(-3), x.amax(-3)
        chroma, mask = high - low, torch.empty_like(low)  # of floats: bools take ten times as long
        hue = (red - green).add_(chroma, alpha=4)  # where blue is highest
        hue.lerp_((blue - red).add_(chroma, alpha=2), torch.eq(green, high, out=mask))
        hue.lerp_(green - blue, torch.eq(red, high, out=mask))
        hue.div_(chroma.clamp_(min=1e-12)).add_(6 * factor.squeeze(-3))  # in sixths of the circle
        hue -= (hue / 6).floor_().mul_(6)
        for channel, centre, start, sign in ((red, 3, low, 1), (green, 2, high, -1), (blue, 4, high, -1)):
            ramp = (hue - centre).abs_().sub_(1).clamp_(0, 1)
            torch.addcmul(start, chroma, ramp, value=sign, out=channel)

class Views:
    """Random views of images: per batch one (B,A,3,size,size) float tensor a size, normalised, on `device`.
    A view is one draw, the same at all `sizes`: a crop of `least` to all of the area, a flip and, if asked,
    jitter and mixup with another image of its block, put through the same draw. It depends on seed, epoch
    and block only. Each image is decoded once an epoch. Each iteration is the next epoch.
    """
    def __init__(self, dataset, sizes, copies=1, batch_size=8, least=0.08, jitter=False, mixup=False,
                 workers=0, device="cpu", seed=1234):
        self.sizes, self.copies, self.least, self.jitter, self.K = sizes, copies, least, jitter, 1 + mixup
        self.length, self.batch_size, self.seed, self.next_epoch = len(dataset), batch_size, seed, 0
        self.device, self.decode = torch.device(device), decoder(dataset, workers, device)
        self.most = max(sizes) ** 2 / (least * RATIO[0])  # pixels from which on every crop is shrunk

    def __iter__(self):
        order = torch.randperm(self.length, generator=seeded(self.seed, self.next_epoch))
        self.next_epoch += 1
        parts = [slice(i, i + self.batch_size) for i in range(0, self.length, self.batch_size)]
        return self.epoch(self.next_epoch - 1, order, parts)

    def epoch(self, number, order, parts):
        """Views of an epoch's images, `order` (n,): of one slice of it after another, `parts`, ascending."""
        draws, A = draw_views(len(order), self.copies, self.seed, number), self.copies
        block = BLOCK if self.K > 1 else 1  # what has to be decoded around an image
        blocks = {i // block for part in parts for i in range(part.start, part.stop)}
        places = [i for i in range(len(order)) if i // block in blocks]
        images, decoded = {}, self.decode([(int(order[i]), self.most, 0) for i in places])
        for part in parts:
            images = {i: images[i] for i in images if i // block >= part.start // block}
            while places and places[0] < part.stop + block - 1:  # the part's last block, at an even flow
                images[places.pop(0)] = next(decoded).to(self.device, non_blocking=True, copy=True)
            some = draws[part.start * A:part.stop * A]
            frames = [images[i] for pair in zip(some.image, some.partner) for i in pair[:self.K]]
            crops = zip(some.crop.repeat(self.K, axis=0), frames)
            boxes = [crop_box(crop, *frame.shape[1:], self.least) for crop, frame in crops]
            views = (self._render(some, frames, boxes, size) for size in self.sizes)
            yield tuple(x.unflatten(0, (-1, A)) for x in views)

    def _render(self, draws, frames, boxes, size):  # views (V,3,size,size), made a few at a time
        crop, count, K, views = crop_one_by_one, 2 ** 17 // size ** 2, self.K, []
        if self.device.type != "cpu":
            crop, count = crop_by_products, 2 ** 26 // max(size, *(max(x.shape) for x in frames)) ** 2
        for v in range(0, len(draws), count := max(1, count)):
            some, of = draws[v:v + count], slice(v * K, (v + count) * K)
            x = crop(frames[of], boxes[of], some.flip.repeat(K), size).div_(255).unflatten(0, (-1, K))
            if self.jitter:  # (v,K,3,s,s)
                x = jitter(x, some.factors, some.order)
            if K > 1:
                weight = torch.tensor(some.weight).to(x, non_blocking=True)[:, None, None, None, None]
                x = torch.lerp(x[:, 1:], x[:, :1], weight)
            views.append(normalize(x[:, 0]))
        return torch.cat(views)

def distillation_loader(dataset, student_size, teacher_size, copies=8, batch_size=8, mixup=True, workers=0,
                        device="cpu", seed=1234, least=0.08):
    """Coupled views (see Views): iterating yields (student (B,A,3,s,s), teacher (B,A,3,t,t)) of an epoch."""
    return Views(dataset, (student_size, teacher_size), copies, batch_size, least, True, mixup, workers,
                 device, seed)

def run_command(main):  # a mistake of the user, or of the machine, ends in one sentence and exit code 2
    PROCESSES.update(rank=int(os.environ.get("RANK", 0)), count=int(os.environ.get("WORLD_SIZE", 1)))
    if PROCESSES["rank"]:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks for all
    try:
        main()
        add_up(torch.zeros(1))  # process 0 has its table still to make
        return distributed.is_initialized() and distributed.destroy_process_group()
    except KeyboardInterrupt as stop:
        code, say = 130, f"\n{str(stop) or 'interrupted'}"
    except torch.OutOfMemoryError:
        code, say = 2, "error: out of GPU memory: training goes on with a lower --forward, else --device cpu"
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        sentence = (str(error).strip() or type(error).__name__).splitlines()[-1]  # after a worker's traceback
        code, say = 2, f"error: {re.sub(r'^[A-Za-z.]*Error: ', '', sentence)}"
    if PROCESSES["rank"] == 0 or (code == 2 and distributed.is_initialized()):  # until then all say the same
        print(say, file=sys.stderr, flush=True)
    sys.exit(code)

def refuse(wrong, sentence):  # what is wrong, by a ValueError with the sentence
    if wrong:
        raise ValueError(sentence)

def add_up(*tensors):  # each over the processes of a program, in place: the same sum in all
    if PROCESSES["count"] == 1:
        return
    try:
        if not distributed.is_initialized():
            distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        for tensor in tensors:
            distributed.all_reduce(tensor)
    except RuntimeError as error:
        raise ConnectionError("another process of this program has ended, and so does this one") from error

def main(argv=None):
    parser = argparse.ArgumentParser(description="Download, verify and unpack a data set.")
    parser.add_argument("name", choices=COUNTS)
    parser.add_argument("--root", required=True, help="folder to put it in")
    options = parser.parse_args(argv)
    refuse(options.name == "cars", "cars has no download of its own any more: copies are on Kaggle (Stanford "
           f"Cars); --root is the folder that holds {LAYOUTS['cars']}")
    url, md5 = DOWNLOADS[options.name]
    try:
        download_and_extract_archive(url, options.root, md5=md5)
    except (OSError, RuntimeError) as error:
        raise OSError(f"{url} could not be downloaded whole ({error})") from error
    counts = (len(load_dataset(options.name, options.root, split)) for split in ("train", "test"))
    print("{} images for training, {} for testing, all there".format(*counts))

if __name__ == "__main__":
    run_command(main)

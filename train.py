"""The teacher: metric learning with labels at one resolution (Sec. 3.2). At a small one it is the student's baseline.

    python train.py --dataset cub --root DIR --size 448 --out runs/cub-448      # 200 epochs, ResNet50, 512-D
    python train.py --dataset cub --root DIR --size 224 --out runs/cub-224      # the baseline
    python train.py                                                             # the embedded data set: a minute on a CPU

This file also holds what every run shares: the recipes, the options, and `fit`, the loop that survives being killed.
"""
import argparse
import functools
import json
import math
import os
import platform
import signal
import sys
import time

import numpy as np
import torch
import torchvision

from asymres import EmbeddingNet, draw_negatives, read_checkpoint, save_checkpoint, triplet_loss
from data import ViewLoader, load_dataset, run_command, seeded
from evaluate import extract, find_device, print_table, symmetric

# The students' rows are the published ones: lr and lambdas were tuned by the authors on validation classes. They do not
# publish the teacher's learning rate and batch; ours are a choice. batch: images (for the teacher, anchors) to an
# optimizer step; forward: how many of them go through the network at once; crop: the least share of an image in a view.
PAPER = dict(arch="resnet50", dim=512, weights="imagenet", large=448, small=224)
TEACHER = dict(epochs=200, lr=1e-5, batch=40, forward=8, crop=0.08)
STUDENT = dict(epochs=200, batch=200, forward=8, crop=0.08, copies=8)
RECIPES = {
    "cub": dict(PAPER, teacher=TEACHER, student=dict(STUDENT, lr=1.4025e-4, lambda_ts=0.7718, lambda_ss=0.6684)),
    "cars": dict(PAPER, teacher=TEACHER, student=dict(STUDENT, lr=1.1692e-4, lambda_ts=0.6371, lambda_ss=0.7731)),
    "sop": dict(PAPER, teacher=TEACHER, student=dict(STUDENT, lr=1.7579e-4, lambda_ts=0.7482, lambda_ss=0.6778)),
    "synthetic": dict(arch="resnet10", dim=64, weights="random", large=64, small=32,
                      teacher=dict(epochs=6, lr=2e-3, batch=16, forward=16, crop=0.85),
                      student=dict(epochs=10, lr=4e-3, batch=8, forward=8, crop=0.5, copies=8, lambda_ts=0.75,
                                   lambda_ss=0.75)),
}
RECIPES["a folder"] = RECIPES["cub"]
NEGATIVES, POOL, MARGIN = 4, 20_000, 0.7
SETTLED = 0.7   # of the epochs; then batch-norm statistics stand still, so that a network ends trained as it is used
MOVABLE = ("out", "root", "device", "workers", "minutes")                      # may change when a run is continued


# -------------------------------------------------------------------------------------------------------------- options

def recipe(dataset, role):
    """The defaults of `role` ("teacher" or "student") on a data set, as one dict."""
    chosen = RECIPES.get(dataset, RECIPES["a folder"])
    return {k: v for k, v in chosen.items() if not isinstance(v, dict)} | chosen[role]


def recipe_table(role):
    """The recipes as text, for --help."""
    columns = list(recipe("cub", role))
    rows = [["recipe", *columns]] + [[name, *(str(recipe(name, role)[c]) for c in columns)] for name in RECIPES]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def common_options(role, description, dataset):
    """A parser with what teacher and student share; defaults are the data set's recipe, and --help shows them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_Help, allow_abbrev=False,
                                     epilog=f"defaults by data set:\n{recipe_table(role)}")
    add, default = parser.add_argument, recipe(dataset, role)
    add("--dataset", default=dataset, help="cub, cars, sop, synthetic, or a folder of class folders")
    add("--root", help="where the data set is")
    add("--out", help="folder of this run; by default named by data set, size and seed, under runs/")
    add("--arch", default=default["arch"], help="a torchvision convolutional classifier, or resnet10")
    add("--dim", type=int, default=default["dim"], help="dimensions of the embedding, 0: the backbone's own")
    add("--weights", default=default["weights"], help="where to start: imagenet, random, a file of torchvision's weights"
                                                      + ", or teacher" * (role == "student"))
    add("--epochs", type=int, default=default["epochs"], help="passes over the training set")
    add("--lr", type=float, default=default["lr"], help="peak learning rate of the one-cycle schedule")
    add("--batch", type=int, default=default["batch"], help="images to an optimizer step (for the teacher: anchors)")
    add("--forward", type=int, default=default["forward"], help="of those, images through the network at once: lower it "
                                                                "where memory runs out")
    add("--crop", type=float, default=default["crop"], help="least share of the image in a random crop")
    add("--validation", action="store_true", help="tune: train on the first half of the training classes, test on the rest")
    add("--seed", type=int, default=1234, help="of weights, order, views and negatives")
    add("--precision", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: bfloat16 on CUDA")
    add("--device", help="cuda or cpu; by default CUDA where there is one")
    add("--workers", type=int, default=0 if dataset == "synthetic" else os.cpu_count(), help="processes that load images")
    add("--minutes", type=float, default=10, help="between checkpoints inside an epoch; one is written after each epoch")
    return parser


def named_dataset(argv, default="synthetic"):
    """The data set that a command line names, before the rest of it is read."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", default=default)
    return first.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].dataset


def check_options(options):
    """Finish the options (device, precision) and refuse what cannot work. Raises ValueError, one sentence."""
    options.device = str(find_device(options.device))
    if options.precision == "auto":
        options.precision = "bfloat16" if options.device.startswith("cuda") else "float32"
    for name in ("epochs", "batch", "forward", "lr"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name} must be above 0, not {getattr(options, name)}")
    if not 0 < options.crop <= 1:
        raise ValueError(f"--crop is a share of the image, above 0 and at most 1, not {options.crop}")
    if options.dim < 0 or options.workers < 0:
        raise ValueError("--dim and --workers cannot be negative")


def new_network(options, pooling, size):
    """The EmbeddingNet that a run starts from, held to the size it will see."""
    torch.manual_seed(options.seed)
    pretrained = {"imagenet": True, "random": False}.get(options.weights, options.weights)
    net = EmbeddingNet(options.arch, pooling, options.dim, pretrained)
    net.size = size
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        raise ValueError(f"{size} px is too small for {options.arch}") from error
    return net


# ----------------------------------------------------------------------------------------------- a run that survives

def fit(net, loader, rows_for, losses, options):
    """Train `net` in the folder `options.out`, from its checkpoint if there is one; returns `net` in eval mode.

    rows_for(epoch)        (R, w) image indices, R the same each epoch; `options.batch` rows are an optimizer step
    losses(index, *views)  named terms, each a sum over the images of one forward pass (`options.forward` rows), so that
                           gradients add up to the same step however it is divided

    Written to the folder: model.pt (atomically, after every epoch and every `options.minutes`), log.jsonl, and
    options.json with the versions. On a CPU a run that was killed and started again ends with the same weights to the
    bit. Raises ValueError if the folder holds a run with other options, FloatingPointError at a loss that is not finite.
    """
    run = _Run(net, options)
    if run.finished:
        return net.eval()
    if run.rows is None:
        run.rows = rows_for(run.epoch)
    run.start(len(divide(run.rows, options.batch, options.forward)))
    try:
        while run.epoch < options.epochs:
            if run.rows is None:
                run.rows = rows_for(run.epoch)
            steps = divide(run.rows, options.batch, options.forward)
            net.train()
            if run.epoch >= SETTLED * options.epochs:
                net.freeze_statistics()
            done = sum(map(len, steps[:run.step]))
            batches = loader.epoch(run.epoch, [part.flatten() for step in steps for part in step], skip=done)
            for step in steps[run.step:]:
                run.take_step(step, batches, losses)
            run.end_epoch()
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"out of GPU memory: lower --forward (now {options.forward}) and run the same command "
                          "again") from error
    finally:
        run.close()
    return net.eval()


def divide(rows, batch, forward):
    """Rows of an epoch -> its steps, each a list of parts that go through the network together."""
    return [_split(step, forward) for step in _split(rows, batch)]


def _split(rows, size):
    """Pieces of `size` rows, the last one smaller, but a lone row joins the piece before: batch-norm needs two."""
    ends = list(range(size, len(rows) - 1, size)) + [len(rows)]
    return [rows[start:end] for start, end in zip([0, *ends], ends)]


class _Run:
    """State of a run and its folder: position, optimizer, schedule, checkpoint, log, progress line, Ctrl-C."""

    def __init__(self, net, options):
        self.net, self.options, self.path = net, options, os.path.join(options.out, "model.pt")
        self.kept = {k: v for k, v in vars(options).items() if k not in MOVABLE}
        self.epoch, self.step, self.rows, self.finished, self.saved = 0, 0, None, False, None
        if os.path.exists(self.path):
            self.saved = read_checkpoint(self.path)
            _same_options(self.saved.get("options"), self.kept, options.out)
            net.load_state_dict(self.saved["state_dict"])
            self.finished = "training" not in self.saved
            if not self.finished:
                self.epoch, self.step, self.rows = (self.saved["training"][k] for k in ("epoch", "step", "rows"))
        net.to(options.device, memory_format=torch.channels_last)

    def start(self, steps):
        """Optimizer and schedule for `steps` per epoch, the saved state on top; the folder's files; signals."""
        options, device = self.options, torch.device(self.options.device)
        self.steps, self.total = steps, options.epochs * steps
        named = list(self.net.named_parameters())
        groups = [{"params": [p for name, p in named if name != "pool.p"], "weight_decay": 1e-6},
                  {"params": [p for name, p in named if name == "pool.p"], "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=options.lr,
                                           fused=device.type == "cuda")
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, options.lr, total_steps=self.total,
                                                            div_factor=10)
        self.unread, self.lag = [], 1 if device.type == "cuda" else 0
        os.makedirs(options.out, exist_ok=True)
        self.log = open(os.path.join(options.out, "log.jsonl"), "a")
        if self.saved:
            self._restore(self.saved["training"])
        else:
            self.log.truncate(0)
            versions = {"python": platform.python_version(), "torch": torch.__version__,
                        "torchvision": torchvision.__version__, "numpy": np.__version__}
            with open(os.path.join(options.out, "options.json"), "w") as file:
                json.dump({"command": sys.argv, "options": vars(options), "versions": versions}, file, indent=1)
        self.interrupted = False
        self.handlers = {s: signal.signal(s, self._interrupt) for s in (signal.SIGINT, signal.SIGTERM)}
        self._new_window()
        self.saved_at = self.began = time.time()
        self.began_at = self.epoch * steps + self.step
        if not self.saved:
            self.save()
        self.saved = None

    def _restore(self, training):
        self.optimizer.load_state_dict(training["optimizer"])
        self.schedule.load_state_dict(training["schedule"])
        torch.set_rng_state(training["random"])
        if training["cuda_random"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(training["cuda_random"])
        self.log.truncate(training["log_bytes"])

    def save(self):
        """The checkpoint; the log up to it is on disk first, and no loss is left unlooked at."""
        self._read_losses(0)
        self.log.flush()
        state = {}
        if self.epoch < self.options.epochs:
            cuda_random = torch.cuda.get_rng_state() if self.options.device.startswith("cuda") else None
            state["training"] = {
                "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict(), "epoch": self.epoch,
                "step": self.step, "rows": self.rows, "random": torch.get_rng_state(), "cuda_random": cuda_random,
                "log_bytes": os.fstat(self.log.fileno()).st_size}
        save_checkpoint(self.path, self.net, options=self.kept, **state)
        self.saved_at = time.time()

    def take_step(self, parts, batches, losses):
        """One optimizer step over the parts' summed gradients. On CUDA nothing here waits for the device."""
        sums, waited = [], time.time()
        for part in parts:
            asked = time.time()
            index, *views = next(batches)
            self.waited += time.time() - asked
            terms = losses(index, *views)
            sum(terms.values()).backward()
            sums.append(torch.stack([term.detach() for term in terms.values()]))
        self.names, images = list(terms), sum(map(len, parts))
        self.unread.append((self.epoch, self.step + 1, images, torch.stack(sums).sum(0)))
        self._read_losses(self.lag)                         # on CUDA the step before: this one is still being computed
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr = self.schedule.get_last_lr()[0]
        self.schedule.step()
        self.step += 1
        self._progress()
        if self.interrupted or (time.time() - self.saved_at > 60 * self.options.minutes and self.step < self.steps):
            self.save()
        if self.interrupted:
            raise KeyboardInterrupt(f"stopped after epoch {self.epoch}, step {self.step}; {self.path} is saved, and the "
                                    "same command continues")

    def end_epoch(self):
        self._read_losses(0)
        self._write_log()
        self.epoch, self.step, self.rows = self.epoch + 1, 0, None
        self.save()

    def _read_losses(self, keep):
        """Fetch the losses of all steps but the last `keep`, and stop at one that is not finite."""
        while len(self.unread) > keep:
            epoch, step, images, values = self.unread.pop(0)
            values = values.tolist()
            if not all(map(math.isfinite, values)):
                terms = ", ".join(f"{name} {value}" for name, value in zip(self.names, values))
                raise FloatingPointError(f"the loss is not finite at epoch {epoch}, step {step} ({terms}): stopped; "
                                         f"{self.path} is the last good checkpoint")
            self.images += images
            self.sums = [a + b for a, b in zip(self.sums or [0] * len(values), values)]

    def _new_window(self):
        self.images, self.sums, self.waited, self.window = 0, None, 0.0, time.time()

    def _write_log(self):
        if not self.images:
            return
        entry = {"epoch": self.epoch, "step": self.step, "lr": self.lr, "images_per_s": round(self._rate(), 2),
                 "data_wait": round(self.waited / (time.time() - self.window), 4),
                 **{name: value / self.images for name, value in zip(self.names, self.sums)}}
        if self.options.device.startswith("cuda"):
            entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
        self.log.write(json.dumps(entry) + "\n")
        self._new_window()

    def _rate(self):
        return self.images / (time.time() - self.window)

    def _progress(self):
        done = self.epoch * self.steps + self.step
        if self.images and (sys.stderr.isatty() or done % 50 == 0):
            terms = "  ".join(f"{name} {value / self.images:.4f}" for name, value in zip(self.names, self.sums))
            left = (time.time() - self.began) / (done - self.began_at) * (self.total - done)
            line = (f"{self.options.out}  step {done}/{self.total}  {terms}  lr {self.lr:.1e}  {self._rate():.0f} images/s"
                    f"  {int(left // 60)}:{int(left % 60):02d} left")
            print(line, end="\033[K\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        if self.step % 50 == 0:
            self._write_log()

    def _interrupt(self, *_):
        if self.interrupted:
            raise KeyboardInterrupt("stopped without saving")
        self.interrupted = True

    def close(self):
        self.log.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        if sys.stderr.isatty():
            print(file=sys.stderr)


def _same_options(saved, asked, out):
    if not isinstance(saved, dict):
        raise ValueError(f"{out} holds a model.pt that is not a run of this program: give another --out")
    different = [key for key in sorted(saved.keys() | asked.keys()) if saved.get(key) != asked.get(key)]
    if different:
        key = different[0]
        raise ValueError(f"{out} belongs to another run: its --{key.replace('_', '-')} is {saved.get(key)}, not "
                         f"{asked.get(key)}; give another --out, or the same options to continue it")


def embed(net, views, precision):
    """(B,A,3,s,s) -> (B,A,D), through the network in one go."""
    images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (B*A, 3, s, s)
    with torch.autocast(views.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return net(images).unflatten(0, views.shape[:2])


# -------------------------------------------------------------------------------------------------------- the teacher

def draw_groups(labels, generator):
    """An epoch's anchors (R,): from every class with 4 images or more equally many, in groups of 4, groups shuffled."""
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    members = [m for m in members if len(m) >= 4]
    count = min(map(len, members)) // 4 * 4
    groups = torch.cat([m[torch.randperm(len(m), generator=generator)[:count]].view(-1, 4) for m in members])
    return groups[torch.randperm(len(groups), generator=generator)].flatten()


def mine(net, dataset, epoch, options):
    """An epoch's rows (R, 1+M): an anchor and its negatives, drawn by what the network makes of a random pool now."""
    draw, labels = seeded(options.seed, epoch, 0), torch.tensor(dataset.labels)
    anchors = draw_groups(labels, draw)
    pool = torch.randperm(len(labels), generator=draw)[:POOL]
    needed, row = torch.cat([anchors, pool]).unique(return_inverse=True)
    embeddings = extract(net, dataset, options.size, device=options.device, workers=options.workers, rows=needed,
                         precision=options.precision)
    on = functools.partial(torch.Tensor.to, device=options.device)
    drawn = draw_negatives(on(embeddings[row[:len(anchors)]]), on(embeddings[row[len(anchors):]]), on(labels[anchors]),
                           on(labels[pool]), NEGATIVES, generator=seeded(options.seed, epoch, 1, device=options.device))
    return torch.cat([anchors[:, None], pool[drawn.cpu()]], dim=1)


OTHERS = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])            # of a group of 4, the positives of each


def teacher_losses(net, precision):
    """For `fit`: the triplet loss of rows of an anchor and its negatives; positives are the rest of its group of 4."""
    def losses(index, views):
        e = embed(net, views.unflatten(0, (-1, 1 + NEGATIVES)).flatten(1, 2), precision)    # (B, 1+M, D)
        anchors = e[:, 0]                                                                   # (B, D)
        positives = anchors.unflatten(0, (-1, 4))[:, OTHERS.to(e.device)].flatten(0, 1)     # (B, 3, D)
        return {"triplet": triplet_loss(anchors, positives, e[:, 1:], MARGIN)}
    return losses


def parse(argv):
    """The options of a command line; defaults by data set."""
    dataset = named_dataset(argv)
    parser = common_options("teacher", __doc__.split("\n\n")[0], dataset)
    parser.add_argument("--size", type=int, default=recipe(dataset, "teacher")["large"], help="side of the images in px")
    parser.add_argument("--pooling", default="gem", help="gem, gemmp, mac or spoc")
    options = parser.parse_args(argv)
    options.out = options.out or f"runs/{os.path.basename(os.path.normpath(dataset))}-{options.size}-seed{options.seed}"
    return options


def train(options):
    """Train the network that `options` describe, or continue, or load it if done. -> EmbeddingNet in eval mode."""
    check_options(options)
    if options.batch < 8 or options.batch % 4 or options.forward % 4:
        raise ValueError(f"--batch {options.batch} --forward {options.forward}: anchors come in groups of 4, a batch has "
                         "at least two groups and both are multiples of 4")
    dataset = load_dataset(options.dataset, options.root, "fit" if options.validation else "train")
    sizes = torch.tensor(dataset.labels).unique(return_counts=True)[1]
    if len(sizes) < 2 or sizes.max() < 4:
        raise ValueError(f"{options.dataset} has {len(sizes)} training classes, the largest of {sizes.max()} images: "
                         "triplets need 2 classes, and one with 4 images")
    net = new_network(options, options.pooling, options.size)
    loader = ViewLoader(dataset, [options.size], 1, crop_scale=(options.crop, 1.0), workers=options.workers,
                        device=options.device, seed=options.seed)
    return fit(net, loader, lambda epoch: mine(net, dataset, epoch, options), teacher_losses(net, options.precision), options)


def main(argv=None):
    options = parse(sys.argv[1:] if argv is None else argv)
    net = train(options)
    test = load_dataset(options.dataset, options.root, "val" if options.validation else "test")
    print_table([symmetric(options.out, net, options.size, test, workers=options.workers, precision=options.precision)])


if __name__ == "__main__":
    run_command(main)

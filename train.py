"""Train a teacher (Sec. 3.2): metric learning with labels, at the large resolution.

    python train.py --dataset cub --root data --size 448      # the teacher: ResNet50, 512-D
    python train.py --dataset cub --root data --size 224      # the small baseline with labels

The first makes the network that distill.py needs as --teacher.
"""

# This file also holds what train.py and distill.py share: options, optimizer, schedule, checkpoints
# and the log. What evaluate.py shares with them is there: device, processes, progress, mistakes.

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch

from asymres import (
    EmbeddingNet,
    draw_negatives,
    read_checkpoint,
    save_checkpoint,
    triplet_loss,
)
from data import (
    UserError,
    load_dataset,
    load_readable,
    process_count,
    process_rank,
    process_rng,
    random_crops,
    say,
    settle_dataset,
)
from evaluate import (
    PRECISIONS,
    Progress,
    add_over_processes,
    autocast,
    broadcast,
    compare,
    default_workers,
    extract,
    find_device,
    new_parser,
    note_other_photographs,
    number,
    run_program,
)

# All of these are as in the authors' code.
GROUP = 4  # anchors of one class that stay together: for each, the other three are its positives
NEGATIVES = 4  # per anchor
NEGATIVE_POOL = 20_000  # images from which an epoch's negatives are drawn
MARGIN = 0.7  # of the triplet loss
WEIGHT_DECAY = 1e-6  # of AdamW; none for GeM's p
DIV_FACTOR = 10  # of the one-cycle schedule: the learning rate starts at lr / 10

# The defaults that depend on the data set; "folder" is any other one. For CUB, Cars and SOP the
# image size, the network and the number of epochs are the paper's. The learning rate and batch size
# of its teachers were not published: ours are untested.
BENCHMARK = dict(
    size=448,
    arch="resnet50",
    weights="imagenet",
    dim=512,
    epochs=200,
    batch_size=40,
    micro_batch=8,
    lr=1e-5,
    min_scale=0.08,
)
EGGS = dict(
    size=64,
    arch="resnet10-narrow",
    weights="random",
    dim=64,
    epochs=8,
    batch_size=16,
    micro_batch=16,
    lr=1e-3,
    min_scale=0.85,
)
# The learning rate and batch size were tried on rendered products, with a smaller network.
FOLDER = BENCHMARK | dict(epochs=10, batch_size=32, lr=1e-4)
RECIPES = {"cub": BENCHMARK, "cars": BENCHMARK, "sop": BENCHMARK}
RECIPES |= {"folder": FOLDER, "synthetic": EGGS}

# --------------------------------------------------------------------------- the teacher's training


def train(dataset, options, net=None, progress=None):
    """Train a network with labels, or resume its run. Returns the network, in eval mode.

    dataset   an ImageDataset with labels; classes of fewer than 4 images are not used
    options   see `parse_options`
    net       an EmbeddingNet; by default the one that the options describe
    """
    if dataset.labels is None:
        raise UserError(
            f"{options.dataset} has images directly in it: labels come from sub-folders"
        )
    if net is None:
        net = new_network(options, options.pooling, options.size)
    net.size = options.size
    options.arch, options.dim, options.pooling = net.arch, net.whitening, net.pooling
    classes = usable_classes(dataset.labels)
    _, groups = count_groups(classes, options.epoch_size)
    anchors_per_epoch = GROUP * (groups // process_count())  # in this process
    run = Run(net, options, anchors_per_epoch, group=GROUP, progress=progress)
    run.resume()
    for epoch in range(run.first_epoch, options.epochs):
        run.begin_epoch()
        rows = mine(net, dataset, classes, epoch, options)
        train_one_epoch(net, dataset, rows, epoch, run, options)
        run.end_epoch()
    return net.eval()


def train_one_epoch(net, dataset, rows, epoch, run, options):
    """One epoch over rows (R, 1 + M): anchors, in groups of 4 of a class, and their negatives."""
    rng = process_rng(options.seed, epoch)
    batches = [batch.flatten().tolist() for batch in rows.split(run.micro_batch)]
    crops = random_crops(
        dataset, batches, options.size, options.min_scale, options.workers, run.device, rng
    )
    net.train()
    for i, images in enumerate(crops, start=1):  # (b (1 + M), 3, H, W)
        with autocast(run.device, options.precision):
            embeddings = net(images).view(-1, 1 + NEGATIVES, net.dim)  # (b, 1 + M, D)
        anchors, negatives = embeddings[:, 0], embeddings[:, 1:]
        positives = others_of_group(anchors)  # (b, 3, D)
        loss = triplet_loss(anchors, positives, negatives, MARGIN)
        loss.backward()
        run.add(loss)
        if run.step_is_due(i, len(batches)):
            run.step()  # AdamW and its schedule; gradients are zeroed


def others_of_group(anchors):
    """The positives of each anchor, the other three of its group of 4: (b, D) -> (b, 3, D)."""
    others = torch.tensor([[j for j in range(GROUP) if j != i] for i in range(GROUP)])
    return anchors.unflatten(0, (-1, GROUP))[:, others].flatten(0, 1)


def usable_classes(labels):
    """For each class of at least 4 images, their indices; other classes are not used (Sec. 3.2).

    Raises UserError if there are fewer than two such classes.
    """
    labels = np.asarray(labels)
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    classes = [images for images in classes if len(images) >= GROUP]
    if len(classes) < 2:
        raise UserError(
            f"{len(classes)} training classes have 4 images: triplets need two such ones"
        )
    return classes


def count_groups(classes, epoch_size):
    """(groups per class, groups per epoch): each class has as many as the smallest class allows."""
    per_class = min(map(len, classes)) // GROUP
    return per_class, max(1, min(per_class * len(classes), epoch_size // GROUP))


def draw_groups(classes, epoch_size, rng):
    """An epoch's anchors (G, 4), groups of one class in random order. rng: a numpy Generator."""
    per_class, per_epoch = count_groups(classes, epoch_size)
    groups = [rng.permutation(images)[: per_class * GROUP] for images in classes]
    groups = rng.permutation(np.concatenate(groups).reshape(-1, GROUP))
    return groups[:per_epoch]


def mine(net, dataset, classes, epoch, options):
    """This process's share of an epoch's rows (R, 1 + M): anchors and their negatives (Sec. 3.2).

    Rows hold indices of images. Negatives are drawn from a random pool of images, as the network
    embeds them at this point.
    """
    rng = np.random.default_rng((options.seed, epoch))
    anchors = draw_groups(classes, options.epoch_size, rng).flatten()
    pool = rng.permutation(np.concatenate(classes))[:NEGATIVE_POOL]

    device = find_device(options.device)
    labels = torch.tensor(dataset.labels, device=device)
    embedded = torch.zeros(len(dataset), net.dim, device=device)  # only of the images in use
    used = np.union1d(anchors, pool)
    embedded[used] = extract(
        net,
        dataset.subset(used),
        options.size,
        device=device,
        workers=options.workers,
        precision=options.precision,
    ).to(device)
    negatives = draw_negatives(
        embedded[anchors],
        embedded[pool],
        labels[anchors],
        labels[pool],
        NEGATIVES,
        torch.Generator(device).manual_seed(options.seed + epoch),
    )
    rows = np.concatenate([anchors[:, None], pool[negatives.cpu().numpy()]], axis=1)
    return share_of_process(torch.from_numpy(rows))


def share_of_process(rows):
    """Whole groups of rows (R, 1 + M), equally many for each process."""
    rows = broadcast(rows)  # of process 0, since GPUs may round differently
    groups = rows.view(-1, GROUP, 1 + NEGATIVES)
    share = len(groups) // process_count()
    return groups[process_rank() :: process_count()][:share].flatten(0, 1)


# -------------------------------------------------------------- what teacher and student runs share


class Run:
    """What surrounds a training loop: optimizer and schedule, resuming, the log and checkpoints.

    options               all are recorded, and compared when a run is resumed; only out, seed,
                          device, epochs, batch_size, micro_batch and lr are used here
    count                 images (in train.py anchors) per epoch in this process
    group                 how many of them must stay together in a micro-batch
    teacher_fingerprint   of a student's teacher
    progress              a Progress that is shared with other runs

    The loop calls `add()` with the loss of each micro-batch, and `step()` after `accumulate` of
    them, when `step_is_due()`. `end_epoch()` writes the checkpoint from which `resume()` continues.

    Losses are sums over images, and so are their gradients: with the same views and frozen batch
    norm, a step does not depend on how it is divided into micro-batches. (AdamW does not mind that
    a sum is larger than a mean.) The last step of an epoch may have fewer images.
    """

    def __init__(self, net, options, count, group=1, teacher_fingerprint=None, progress=None):
        if not count:
            raise UserError("an epoch has fewer images than there are processes")
        self.options, self.images_per_epoch = options, count
        self.teacher_fingerprint = teacher_fingerprint
        self.device = find_device(options.device)
        self.net = net.to(self.device, memory_format=torch.channels_last)
        self.micro_batch, self.accumulate = divide_batch(options, group)
        self.steps = math.ceil(count / (self.micro_batch * self.accumulate))  # per epoch
        for tensor in net.state_dict().values():  # all processes start with process 0's weights
            broadcast(tensor)
        self.optimizer = make_optimizer(net, options.lr)
        self.schedule = make_schedule(self.optimizer, options, self.steps)
        self.loss = torch.zeros((), device=self.device)  # of the epoch so far, in this process
        self.log = []  # one entry per finished epoch
        self.first_epoch = 0
        self.steps_taken = 0  # in this epoch
        self.says_epochs = progress is None  # runs that share a progress line print nothing else
        self.progress = progress or Progress(options.out)
        self.path = Path(options.out, "model.pt")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.says_epochs:
            say(
                f"{options.out}: {options.epochs} epochs of {count * process_count()} images "
                f"in {self.steps} steps, on {self.device}"
            )

    def resume(self):
        """Continue after the last finished epoch, if the folder holds this run.

        Do nothing if it holds none. Raises UserError if it holds another one.
        """
        if not self.path.exists():
            return
        saved = read_checkpoint(self.path)
        refuse_other_run(saved, self.options, self.teacher_fingerprint)
        try:
            self.net.load_state_dict(saved["state_dict"])
        except RuntimeError as error:
            raise UserError(f"{self.path} is of another network ({error!r:.200})") from error
        self.optimizer.load_state_dict(saved["training"]["optimizer"])
        self.log = saved["training"]["log"]
        self.first_epoch = len(self.log)
        self.schedule = make_schedule(self.optimizer, self.options, self.steps, self.first_epoch)
        self.progress.skip(self.first_epoch / self.options.epochs)
        if self.says_epochs:
            say(f"{self.path}: {self.first_epoch} of {self.options.epochs} epochs are done")

    def begin_epoch(self):
        """Start the epoch's loss, clock and random numbers."""
        self.loss.zero_()
        self.steps_taken = 0
        torch.manual_seed(self.options.seed + len(self.log))  # for dropout, also after a resume
        self.began = time.time()

    def add(self, loss):
        """Add a micro-batch's loss to that of the epoch, for the log."""
        self.loss += loss.detach()

    def step_is_due(self, i, total):
        """After micro-batch i = 1, ..., total of an epoch; its last step may have fewer images."""
        return i % self.accumulate == 0 or i == total

    def step(self):
        """One step of the optimizer and its schedule, with gradients summed over processes."""
        # Not by DistributedDataParallel, which averages, and wraps the network.
        add_over_processes([p.grad for p in self.net.parameters() if p.grad is not None])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.lr = self.schedule.get_last_lr()[0]  # of this step, for the log
        self.schedule.step()
        self.steps_taken += 1
        self.progress.advance(1 / (self.steps * self.options.epochs), self.describe_epoch)

    def describe_epoch(self):
        """The epoch and its loss so far, for the progress line."""
        seen = min(self.images_per_epoch, self.steps_taken * self.micro_batch * self.accumulate)
        epoch = f"epoch {len(self.log) + 1} of {self.options.epochs}"
        return f", {epoch}, loss {self.loss.item() / seen:.4g}"

    def end_epoch(self):
        """Log the epoch and save the run."""
        add_over_processes([self.loss])
        average_statistics(self.net)
        epoch, seconds = len(self.log), time.time() - self.began
        images = self.images_per_epoch * process_count()
        loss = self.loss.item() / images
        if not math.isfinite(loss):
            raise UserError(f"the loss is not finite in epoch {epoch + 1}: take a smaller --lr")
        entry = {"epoch": epoch, "loss": loss, "lr": self.lr}
        entry |= {"seconds": seconds, "images_per_s": images / seconds}
        if self.device.type == "cuda":
            entry["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.log.append(entry)
        if process_rank() == 0:
            self.save()
        if self.says_epochs:
            say(f"epoch {epoch + 1} of {self.options.epochs}: loss {loss:.4g}, {seconds:.0f} s")

    def save(self):
        """Write options.json, log.jsonl and model.pt, the last of which is what `resume` reads."""
        options = vars(self.options)
        versions = {name: sys.modules[name].__version__ for name in ("torch", "numpy", "PIL")}
        about = {"command": sys.argv, "options": options, "versions": versions}
        self.path.with_name("options.json").write_text(json.dumps(about, indent=1))
        lines = [json.dumps(entry) + "\n" for entry in self.log]
        self.path.with_name("log.jsonl").write_text("".join(lines))
        training = {"epochs": len(self.log), "log": self.log}
        training["optimizer"] = self.optimizer.state_dict()
        save_checkpoint(
            self.path,
            self.net,
            options=options,
            teacher=self.teacher_fingerprint,
            training=training,
        )


def make_optimizer(net, lr):
    """AdamW, without weight decay on GeM's p."""
    learned = [*net.backbone.parameters(), *net.whiten.parameters()]
    groups = [{"params": learned}, {"params": net.pool.parameters(), "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr, weight_decay=WEIGHT_DECAY)


def make_schedule(optimizer, options, steps, epochs_done=0):
    """One cycle over a run of `steps` per epoch: the rate rises to lr and falls to almost 0.

    AdamW's beta1 moves along, from 0.95 to 0.85 and back.
    """
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=options.lr,
        total_steps=options.epochs * steps,
        div_factor=DIV_FACTOR,
        last_epoch=epochs_done * steps - 1,  # torch's name for the last step taken
    )


def average_statistics(net):
    """Where batch norm trains, its statistics differ between processes: average them, in place."""
    if not net.frozen_batchnorm:
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                add_over_processes([buffer])
                buffer /= process_count()


# Options that may differ when a run is resumed. The teacher's file may move, but is recognised.
MAY_CHANGE = {"out", "root", "device", "workers", "micro_batch", "teacher", "photographs"}


def refuse_other_run(saved, options, teacher_fingerprint):
    """Raise UserError if a checkpoint is of a run with other options or of another teacher."""
    changed = [
        f"--{name.replace('_', '-')} {value}, now {getattr(options, name)}"
        for name, value in saved.get("options", {}).items()
        if name not in MAY_CHANGE and hasattr(options, name) and value != getattr(options, name)
    ]
    if saved.get("teacher") != teacher_fingerprint:
        changed.append("another --teacher")
    if changed:
        changed = "; ".join(changed)
        raise UserError(
            f"{options.out} holds another run ({changed}), which cannot be changed or prolonged: "
            "give another --out"
        )


def divide_batch(options, group):
    """(images per micro-batch, micro-batches per step) in each process; groups stay together.

    Every process takes an equal share of a step, in micro-batches of one size: the largest from
    --micro-batch down to half of it that divides the share. If none does, --micro-batch it is, and
    a step is the nearest number of images that it divides. For example, --batch-size 200 and
    --micro-batch 8 are 25 x 8 in one process, 5 x 5 in each of 8, and 8 x 8 (192) in each of 3;
    25 and 4 are 6 x 4 (24) in one.
    """
    if options.micro_batch < group:
        raise UserError(f"--micro-batch {options.micro_batch} must be at least {group}")
    share = group * max(1, round(options.batch_size / (group * process_count())))
    largest = min(options.micro_batch // group * group, share)
    sizes = range(largest, (largest + 1) // 2 - 1, -1)
    even = [n for n in sizes if n % group == 0 and share % n == 0]
    micro_batch = even[0] if even else largest
    count = round(share / micro_batch)
    step = micro_batch * count * process_count()
    if step != options.batch_size or micro_batch < min(options.micro_batch, share):
        say(f"note: a step is {step} images, in each process {count} x {micro_batch}")
    return micro_batch, count


def new_network(options, pooling, size, weights=None):
    """The network that a run starts from. Raises UserError if images of `size` px are too small.

    weights: initial weights, in the place of --weights
    """
    torch.manual_seed(options.seed)
    weights = weights or options.weights
    pretrained = {"imagenet": True, "random": False}.get(weights, weights)
    net = EmbeddingNet(options.arch, pooling, options.dim, pretrained)
    net.size = size
    try:
        net.eval()(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        raise UserError(f"{size} px is too small for {options.arch} ({error!r:.100})") from error
    return net


def find_images(options):
    """Raise UserError if the data set is not there, before weights are downloaded."""
    if options.dataset != "synthetic":
        load_dataset(options.dataset, options.root, unlabelled=options.unlabelled)


def load_images(options):
    """(training images, test images), without those that cannot be read.

    For the checkpoint to record, sets options.classes to the training classes of a folder, and
    options.photographs to the number of images without labels.
    """
    begun = options_of_run(options)
    options.classes = options.classes or begun.get("classes", [])
    splits = ("fit", "val") if options.validation else ("train", "test")
    training, test = (
        load_readable(
            options.dataset,
            options.root,
            split,
            options.unlabelled,
            options.classes,
            options.workers,
        )
        for split in splits
    )
    options.classes = training.training_classes
    if options.unlabelled:
        options.photographs = len(training) + len(test)
        note_other_photographs(begun, options.photographs)
    if test.labels is not None and len(set(test.labels)) == len(test.labels):
        raise UserError(f"no test class of {options.dataset} has two images to find each other")
    return training, test


def options_of_run(options):
    """The options of the run in --out, if it is on this data set: its folder may differ by now."""
    path = Path(options.out, "model.pt")
    trained = read_checkpoint(path).get("options", {}) if path.exists() else {}
    return trained if trained.get("dataset") == options.dataset else {}


# ----------------------------------------------------------------------------- options, the program


def add_common_options(parser):
    """Add the options of both scripts. (*): the default depends on the data set."""
    add = parser.add_argument_group("network, training and machine").add_argument
    add("--out", metavar="FOLDER", help="folder of the run (runs/DATASET-SIZES-seedN)")
    add("--arch", metavar="NAME", help="backbone: a torchvision name, timm/NAME or resnet10 (*)")
    add(
        "--dim",
        type=number(int, 0),
        metavar="D",
        help="embedding dimension D; 0: no whitening layer (*)",
    )
    add("--epochs", type=number(int, 1), metavar="N", help="number of epochs (*)")
    add(
        "--epoch-size",
        type=number(int, 1),
        metavar="N",
        default=8000,
        help="maximum images (or anchors) per epoch (8000)",
    )
    add(
        "--batch-size",
        type=number(int, 1),
        metavar="N",
        help="images (or anchors) per optimizer step (*)",
    )
    add(
        "--micro-batch",
        type=number(int, 1),
        metavar="N",
        help="images (or anchors) per forward pass: lower it if memory runs out (*)",
    )
    add("--lr", type=number(float, 1e-12), metavar="X", help="peak learning rate (*)")
    add(
        "--min-scale",
        type=number(float, 1e-3, 1),
        metavar="X",
        help="smallest crop, as a share of the image (*)",
    )
    add(
        "--validation",
        action="store_true",
        default=None,  # so that a student can take its teacher's
        help="train on half of the training classes, test on the other half",
    )
    add(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="training classes of a folder (the first half by name)",
    )
    add("--seed", type=number(int, 0), default=1234, metavar="N", help="random seed (1234)")
    add(
        "--workers",
        type=number(int, 0),
        metavar="N",
        help="processes that decode images (one per core; 0 for synthetic)",
    )
    add("--device", metavar="NAME", help="cuda, cuda:1 or cpu (cuda if there is a GPU)")
    add(
        "--precision",
        choices=PRECISIONS,
        default="auto",
        metavar="NAME",
        help="auto, bfloat16 or float32; auto: bfloat16 on GPUs that have it (auto)",
    )


def describe_recipes(recipes):
    """The defaults that depend on the data set, as a table for --help."""
    lines = ["Defaults are in parentheses. Those marked (*) depend on the data set:"]
    lines.append(" " * 15 + "".join(f"{dataset:>17}" for dataset in recipes))
    for name in next(iter(recipes.values())):
        values = "".join(f"{recipe[name]!s:>17}" for recipe in recipes.values())
        lines.append(f"--{name.replace('_', '-'):13}{values}")
    return "\n".join(lines)


def parse_options(argv=None):
    """Parse the command line; what it leaves open is filled in from the data set's recipe."""
    parser = new_parser(__doc__, describe_recipes(RECIPES))
    add = parser.add_argument
    add("--dataset", metavar="NAME", help="cub, cars, sop, synthetic or a folder (synthetic)")
    add("--root", metavar="FOLDER", help="folder that holds the data set (the current one)")
    add("--size", type=number(int, 1), metavar="PX", help="image size (*)")
    add("--weights", metavar="NAME", help="initial weights: imagenet, random or a file (*)")
    add(
        "--pooling",
        choices=("gem", "gemmp", "mac", "spoc"),
        default="gem",
        help="GeM, GeM with one p per channel, maximum or mean (gem)",
    )
    add_common_options(parser)
    options = parser.parse_args(argv)
    if options.dataset is None:
        say("no --dataset: images are drawn eggs")
    name = options.dataset or "synthetic"
    options.dataset, options.root = settle_dataset(name, options.root)
    options.unlabelled = False
    fill_in_defaults(options, RECIPES)
    options.out = run_folder(options, options.size)
    return options


def fill_in_defaults(options, recipes):
    """Fill in the options that are still open, by the data set's recipe or the same for all."""
    fill_in(options, recipes.get(options.dataset, recipes["folder"]))
    workers = 0 if options.dataset == "synthetic" else default_workers()
    fill_in(options, dict(unlabelled=False, validation=False, classes=[], workers=workers))


def fill_in(options, defaults):
    """Give the options that are still open, None, the values in a dict."""
    for name, value in defaults.items():
        if getattr(options, name, None) is None:
            setattr(options, name, value)


def run_folder(options, sizes):
    """The folder of the run: --out, or runs/ and a name."""
    default = f"runs/{Path(options.dataset).name}-{sizes}-seed{options.seed}"
    return str(Path(options.out or default).expanduser())


def main():
    options = parse_options()
    find_device(options.device)  # an impossible --device ends the program before it reads files
    find_images(options)
    # Before images are read, so that its mistake comes first.
    net = new_network(options, options.pooling, options.size)
    training, test = load_images(options)
    net = train(training, options, net)
    compare(net, [], test, device=options.device, workers=options.workers)
    say(f"network: {options.out}/model.pt")


if __name__ == "__main__":
    run_program(main)

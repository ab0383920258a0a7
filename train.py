"""The teacher: metric learning with labels at one resolution (Sec. 3.2). At a small one it is the student's baseline.

    python train.py --dataset cub --root DIR --size 448 --out runs/cub-448      # 200 epochs, ResNet50, 512-D
    python train.py --dataset cub --root DIR --size 224 --out runs/cub-224      # the baseline
    python train.py                                                             # the embedded data set: a minute on a CPU

This file also holds what every run shares: the recipes, the options, and `fit`, the loop that survives being killed.
"""
import argparse
import contextlib
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

from asymres import EmbeddingNet, draw_negatives, is_batchnorm, read_checkpoint, save_checkpoint, triplet_loss
from data import PROCESSES, Decoder, Views, add_up, load_dataset, most_pixels, run_command, seeded, settle_dataset
from evaluate import embed, extract, find_device, held_back, print_table, set_precision, trade_off

# The students' lr and lambdas are the published ones, tuned by the authors on validation classes. They do not publish
# the teacher's learning rate; ours, and its batch, are a choice. images: at most so many (teacher: anchors) an epoch,
# drawn anew; batch: so many to an optimizer step; forward: so many through the network at once; crop: the least share
# of an image in a view.
TEACHER = dict(arch="resnet50", dim=512, weights="imagenet", size=448, epochs=200, images=8000, lr=1e-5, batch=40,
               forward=8, crop=0.08)
STUDENT = dict(arch="resnet50", dim=512, weights="imagenet", teacher_size=448, student_size=224, epochs=200,
               images=8000, batch=200, forward=8, crop=0.08, copies=8)
EGGS = dict(arch="resnet10", dim=64, weights="random", images=8000)
RECIPES = {
    "teacher": {
        "cub": TEACHER, "cars": TEACHER, "sop": TEACHER, "folder": TEACHER,
        "synthetic": dict(EGGS, size=64, epochs=6, lr=2e-3, batch=16, forward=16, crop=0.85)},
    "student": {
        "cub": dict(STUDENT, lr=1.4025e-4, lambda_ts=0.7718, lambda_ss=0.6684),
        "cars": dict(STUDENT, lr=1.1692e-4, lambda_ts=0.6371, lambda_ss=0.7731),
        "sop": dict(STUDENT, lr=1.7579e-4, lambda_ts=0.7482, lambda_ss=0.6778),
        "folder": dict(STUDENT, lr=1.4025e-4, lambda_ts=0.7718, lambda_ss=0.6684),
        "synthetic": dict(EGGS, teacher_size=64, student_size=32, epochs=10, lr=4e-3, batch=8, forward=8, crop=0.5,
                          copies=8, lambda_ts=0.75, lambda_ss=0.75)}}
NEGATIVES, POOL, MARGIN = 4, 20_000, 0.7
SETTLED = 0.7   # of the epochs; then batch-norm statistics stand still, so that a network ends trained as it is used
MOVABLE = ("out", "root", "device", "workers", "forward", "teacher")            # may change when a run is continued
MINUTES = 10    # between checkpoints inside an epoch


# -------------------------------------------------------------------------------------------------------------- options

def parser(role, description):
    """The options that teacher and student share. A default is None until the recipe of the data set fills it."""
    rows = [["recipe", *RECIPES[role]["cub"]]] + [[name, *map(str, r.values())] for name, r in RECIPES[role].items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    table = "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False, epilog=f"defaults by data set:\n{table}")
    add = result.add_argument
    add("--dataset", help="cub, cars, sop, synthetic (default), or a folder of class folders")
    add("--root", help="where the data set is")
    add("--out", help="folder of this run; by default named by data set, size and seed, under runs/")
    add("--arch", help="a torchvision convolutional classifier, resnet10, or timm/NAME")
    add("--dim", type=int, help="dimensions of the embedding, 0: the backbone's own")
    add("--weights", help="where to start: imagenet, random, a file of weights" + ", teacher" * (role == "student"))
    add("--epochs", type=int, help="how many; see --images")
    add("--images", type=int, help="at most so many images (teacher: anchors) are an epoch, drawn anew")
    add("--lr", type=float, help="peak learning rate of the one-cycle schedule")
    add("--batch", type=int, help="images to an optimizer step (teacher: anchors)")
    add("--forward", type=int, help="of those, images through the network at once: lower it where memory runs out")
    add("--crop", type=float, help="least share of the image in a random crop")
    add("--validation", action=argparse.BooleanOptionalAction,
        help="tune: train on the first half of the training classes, test on the second")
    add("--seed", type=int, default=1234, help="of weights, order, views and negatives (%(default)s)")
    add("--precision", default="auto", choices=("auto", "bfloat16", "float32"), help="auto: bfloat16 where a GPU has it")
    add("--device", help="cuda or cpu; by default CUDA where there is one")
    add("--workers", type=int, help="processes that decode images; by default one a core, for synthetic none")
    return result


def settle(options, role, inherited=None, *networks):
    """Fill what was not given: from `inherited`, then from the data set's recipe. Raises ValueError for what cannot work."""
    inherited = inherited or {"dataset": "synthetic"}
    options.dataset, options.root = settle_dataset(options.dataset, options.root, inherited)
    if not options.dataset:
        raise ValueError("the teacher's file does not say which data set it was trained on: --dataset is missing")
    own = {"workers": 0 if options.dataset == "synthetic" else os.cpu_count()}
    for name in [name for name, value in vars(options).items() if value is None and name not in ("root", "out")]:
        sources = (inherited, RECIPES[role][options.dataset], own)
        setattr(options, name, next((s[name] for s in sources if s.get(name) is not None), None))
    device = find_device(options.device)
    options.device, options.precision = str(device), set_precision(options.precision, device)
    options.validation = held_back(options.validation, options.dataset, *networks)
    for name in {"epochs", "images", "batch", "forward", "lr", "copies", "size", "student_size", "teacher_size"} & vars(
            options).keys():
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, not {getattr(options, name)}")
    if not 0 < options.crop <= 1:
        raise ValueError(f"--crop is a share of the image, above 0 and at most 1, not {options.crop}")
    if options.dim < 0 or options.workers < 0:
        raise ValueError("--dim and --workers cannot be negative")
    return options


def free_folder(options, name):
    """runs/NAME, or with a number behind it where that is the folder of a run with other options."""
    source = options.dataset if options.dataset != "folder" else os.path.basename(options.root)
    number = 1
    while True:
        out = f"runs/{source}-{name}-seed{options.seed}" + f"-{number}" * (number > 1)
        if not os.path.exists(os.path.join(out, "model.pt")) or not other_options(out, options):
            return out
        number += 1


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

def fit(net, rows_for, batches, losses, names, options):
    """Train `net` in the folder `options.out`, from its checkpoint if there is one; returns `net` in eval mode.

    rows_for(epoch)               (R, ...) image indices, R the same each epoch; `options.batch` rows are an optimizer step
    batches(epoch, rows, parts)   the views, a tuple, of one slice of the rows after another, each of `options.forward`
                                  rows; under torchrun the slices of a step are shared among the processes
    losses(rows, *views)          the loss terms (T,) of a slice, `names` theirs; each a sum over its rows, so gradients
                                  add up to the same step however it is divided

    Written: model.pt (atomically, after every epoch and every ten minutes), log.jsonl, options.json with the versions. On
    a CPU a run that was killed and started again ends with the same weights to the bit. Raises ValueError if the folder
    holds a run with other options or is in use, FloatingPointError at a loss that is not finite.
    """
    log, path = open_run(options), os.path.join(options.out, "model.pt")
    saved = read_checkpoint(path) if os.path.exists(path) else {}
    add_up(torch.zeros(1))                                      # all have read before process 0 writes
    if saved:
        net.load_state_dict(saved["state_dict"])
    net.to(options.device, memory_format=torch.channels_last)
    if saved and "training" not in saved:
        return net.eval()
    state = saved.get("training") or {"epoch": 0, "step": 0, "rows": None, "sums": [0.0] * len(names), "log": []}
    if state["rows"] is None:
        state["rows"] = rows_for(state["epoch"])
    planned = len(divide(state["rows"], options))               # steps an epoch
    optimizer, schedule = optimization(net, options, options.epochs * planned, state)
    report, saved_at = reporter(state, planned, names, options), 0
    with interruptible(options) as stop:
        while state["epoch"] < options.epochs:
            if state["rows"] is None:
                state["rows"] = rows_for(state["epoch"])
            steps = divide(state["rows"], options)[state["step"]:]
            net.train()
            if state["epoch"] >= SETTLED * options.epochs:
                net.freeze_statistics()
            views = batches(state["epoch"], state["rows"], [part for step in steps for part in step])
            for step in steps:
                if time.time() - saved_at > 60 * MINUTES:       # before the first step, too: a full disk shows now
                    saved_at = save(path, net, state, optimizer, schedule, options)
                take_step(net, optimizer, schedule, step, views, losses, state, stop)
                entry = report(schedule)
                if not math.isfinite(sum(state["sums"])):
                    raise FloatingPointError(f"the loss is not finite at epoch {state['epoch']}, step {state['step']} "
                                             f"({entry}): stopped; {path} is the last good checkpoint")
                if stop:
                    save(path, net, state, optimizer, schedule, options)
                    raise KeyboardInterrupt(f"stopped after epoch {state['epoch']}, step {state['step']}; {path} is "
                                            "saved, and the same command continues")
            state.update(epoch=state["epoch"] + 1, step=0, rows=None, sums=[0.0] * len(names), log=state["log"] + [entry])
            saved_at = save(path, net, state, optimizer, schedule, options, log)
    return net.eval()


def divide(rows, options):
    """An epoch's optimizer steps, each the slices of its rows that this process passes through the network, in turn."""
    return [cut(step.start, step.stop, options.forward)[PROCESSES["rank"]::PROCESSES["count"]]
            for step in cut(0, len(rows), options.batch)]


def cut(start, stop, size):
    """Slices of `size`, the last one smaller, but a lone row joins the slice before it: batch-norm needs two."""
    ends = [*range(start + size, stop - 1, size), stop]
    return list(map(slice, [start, *ends], ends))


def take_step(net, optimizer, schedule, parts, views, losses, state, stop):
    """One optimizer step over the summed gradients of the parts; their losses are added to the state's.

    Under torchrun gradients, losses and the wish to stop are summed over the processes, and running statistics of
    batch-norm that trains are averaged over them after each step.
    """
    sums = torch.zeros(len(state["sums"]) + 1, device=next(net.parameters()).device)
    sums[-1] = len(stop)
    for part in parts:
        terms = losses(state["rows"][part], *next(views))
        terms.sum().backward()
        sums[:-1] += terms.detach()
    add_up(sums, *(p.grad for p in net.parameters() if p.requires_grad))
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    schedule.step()
    for layer in (m for m in net.modules() if is_batchnorm(m) and m.training and PROCESSES["count"] > 1):
        add_up(layer.running_mean, layer.running_var)
        layer.running_mean /= PROCESSES["count"]
        layer.running_var /= PROCESSES["count"]
    *values, wishes = sums.tolist()                             # the one wait for the device
    stop += [True] * (wishes > len(stop))                       # another process's
    state.update(step=state["step"] + 1, sums=[total + value for total, value in zip(state["sums"], values)])


def optimization(net, options, total, state):
    """AdamW and the one-cycle schedule of `total` steps, and random numbers, where the state left them."""
    named, cuda = [(n, p) for n, p in net.named_parameters() if p.requires_grad], options.device.startswith("cuda")
    groups = [{"params": [p for name, p in named if name != "pool.p"], "weight_decay": 1e-6},
              {"params": [p for name, p in named if name == "pool.p"], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=options.lr, fused=cuda)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total, div_factor=10)
    for _, parameter in named:
        parameter.grad = torch.zeros_like(parameter)            # a process without a part in a step adds nothing
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"])
        if cuda and state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"])
    return optimizer, schedule


def save(path, net, state, optimizer, schedule, options, log=None):
    """The checkpoint, by process 0: with the state to go on from, until the run is finished; its log. -> the time."""
    if PROCESSES["rank"] == 0:
        state.update(optimizer=optimizer.state_dict(), schedule=schedule.state_dict(), random=torch.get_rng_state(),
                     cuda_random=torch.cuda.get_rng_state() if options.device.startswith("cuda") else None)
        save_checkpoint(path, net, options=vars(options), **({"training": state} if state["epoch"] < options.epochs else {}))
    if log:
        log.truncate(0)
        log.writelines(json.dumps(entry) + "\n" for entry in state["log"])
        log.flush()
    return time.time()


def reporter(state, planned, names, options):
    """A function that prints the progress line after a step and returns the epoch's log entry so far."""
    began, first = time.time(), state["epoch"] * planned + state["step"]

    def report(schedule):
        done, total, seconds = state["epoch"] * planned + state["step"], options.epochs * planned, time.time() - began
        rows = len(state["rows"])
        entry = {"epoch": state["epoch"], "step": done, "lr": schedule.get_last_lr()[0],
                 "images_per_s": round(rows / planned * (done - first) / seconds, 2),
                 **{name: value / min(state["step"] * options.batch, rows) for name, value in zip(names, state["sums"])}}
        if options.device.startswith("cuda"):
            entry["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
        terminal, left = sys.stderr.isatty(), seconds / (done - first) * (total - done)
        if PROCESSES["rank"] == 0 and (terminal or done % 50 == 0 or done == total):
            terms = "  ".join(f"{name} {entry[name]:.4f}" for name in names)
            print(f"{options.out}  step {done}/{total}  {terms}  lr {entry['lr']:.1e}  {entry['images_per_s']:.0f} images/s  "
                  f"{int(left // 60)}:{int(left % 60):02d} left", end="\033[K\r" if terminal and done < total else "\n",
                  file=sys.stderr, flush=True)
        return entry
    return report


@contextlib.contextmanager
def interruptible(options):
    """A list that Ctrl-C or SIGTERM put something into, so that a step is finished first; twice, and it ends at once."""
    stop = []

    def on_signal(*_):
        if stop:
            raise KeyboardInterrupt("stopped without saving")
        stop.append(True)
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except torch.OutOfMemoryError as error:
        raise MemoryError(f"out of GPU memory: lower --forward (now {options.forward}) and run the same command again, it "
                          "continues; where it is at its least, 1 or for a teacher 4, lower the size") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_run(options):
    """Make the run's folder this process's own and write its options. -> its log, locked; None where it is not process 0.

    Raises ValueError where the folder holds a run with other options, or another program is at work in it.
    """
    if PROCESSES["rank"]:
        return None
    os.makedirs(options.out, exist_ok=True)
    log = open(os.path.join(options.out, "log.jsonl"), "a")
    try:
        import fcntl                                            # which Windows does not have
        fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)         # until this process ends, however it does
    except ImportError:
        pass
    except OSError as error:
        raise ValueError(f"another program is at work in {options.out}: give another --out, or wait") from error
    difference = other_options(options.out, options)
    if difference:
        raise ValueError(f"{options.out} belongs to another run: {difference}; give another --out, or the same options to "
                         "continue it")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
                "numpy": np.__version__}
    temporary = os.path.join(options.out, "options.json.tmp")
    with open(temporary, "w") as file:
        json.dump({"command": sys.argv, "options": vars(options), "versions": versions}, file, indent=1)
    os.replace(temporary, temporary.removesuffix(".tmp"))
    return log


def other_options(out, options):
    """In words, in what the run that a folder holds differs from these options; None where it does not."""
    if not os.path.exists(os.path.join(out, "model.pt")):
        return None
    try:
        with open(os.path.join(out, "options.json")) as file:
            theirs = json.load(file)["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its options.json cannot be read"
    for name, ours in sorted(vars(options).items()):
        if name not in MOVABLE and theirs.get(name) != ours:
            return f"its --{name.replace('_', '-')} is {theirs.get(name)}, not {ours}"
    return None


# -------------------------------------------------------------------------------------------------------- the teacher

def draw_groups(labels, most, generator):
    """An epoch's anchors (R,), at most `most`: equally many of every class with 4 images, in groups of 4, shuffled."""
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    members = [m for m in members if len(m) >= 4]
    count = min(map(len, members)) // 4 * 4
    groups = torch.cat([m[torch.randperm(len(m), generator=generator)[:count]].view(-1, 4) for m in members])
    return groups[torch.randperm(len(groups), generator=generator)][:most // 4].flatten()


def mine(net, dataset, decoder, epoch, options):
    """An epoch's rows (R, 1+M): an anchor and its negatives, drawn by what the network makes of a random pool now.

    Classes with fewer than 4 images take no part, neither as anchors nor in the pool.
    """
    draw, labels = seeded(options.seed, epoch, 0), torch.tensor(dataset.labels)
    _, number, sizes = labels.unique(return_inverse=True, return_counts=True)
    taking_part = (sizes[number] >= 4).nonzero()[:, 0]
    anchors = draw_groups(labels, options.images, draw)
    pool = taking_part[torch.randperm(len(taking_part), generator=draw)[:POOL]]
    needed, row = torch.cat([anchors, pool]).unique(return_inverse=True)
    embeddings = extract(net, dataset, options.size, options.device, precision=options.precision, rows=needed,
                         decoder=decoder).to(options.device)
    own, others = embeddings[row[:len(anchors)]], embeddings[row[len(anchors):]]
    drawn = draw_negatives(own, others, labels[anchors].to(own.device), labels[pool].to(own.device), NEGATIVES,
                           generator=seeded(options.seed, epoch, 1, device=options.device))
    return torch.cat([anchors[:, None], pool[drawn.cpu()]], dim=1)


def train(options):
    """Train the network that `options` describe, or continue, or load it if done. -> EmbeddingNet in eval mode."""
    if options.batch < 8 or options.batch % 4 or options.forward % 4:
        raise ValueError(f"--batch {options.batch} --forward {options.forward}: anchors come in groups of 4, a batch has "
                         "at least two groups and both are multiples of 4")
    dataset = load_dataset(options.dataset, options.root, "fit" if options.validation else "train")
    sizes = torch.tensor(dataset.labels).unique(return_counts=True)[1]
    if (sizes >= 4).sum() < 2:
        raise ValueError(f"{options.root or options.dataset} has {len(sizes)} training classes, {(sizes >= 4).sum()} of "
                         "them with 4 images or more: triplets need two such classes")
    net = new_network(options, options.pooling, options.size)
    decoder = Decoder(dataset, options.workers, options.device, most_pixels(options.size, options.crop))
    views = Views(dataset, [options.size], least=options.crop, device=options.device, seed=options.seed, decoder=decoder)
    each, others = 1 + NEGATIVES, torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]], device=options.device)

    def batches(epoch, rows, parts):
        return views.epoch(epoch, rows.flatten(), [slice(part.start * each, part.stop * each) for part in parts])

    def losses(rows, images):                                                       # (R*(1+M), 1, 3, s, s)
        e = embed(net, images, options.precision).view(len(rows), each, -1)         # (R, 1+M, D)
        anchors = e[:, 0]                                                           # (R, D)
        positives = anchors.unflatten(0, (-1, 4))[:, others].flatten(0, 1)          # (R, 3, D): the rest of its group
        return triplet_loss(anchors, positives, e[:, 1:], MARGIN)[None]
    return fit(net, lambda epoch: mine(net, dataset, decoder, epoch, options), batches, losses, ["triplet"], options)


def parse(argv=None):
    """The options of a command line, whole and checked."""
    command = parser("teacher", __doc__.split("\n\n")[0])
    command.add_argument("--size", type=int, help="side of the images in px")
    command.add_argument("--pooling", default="gem", help="gem (%(default)s), gemmp, mac or spoc")
    options = settle(command.parse_args(argv), "teacher")
    options.out = options.out or free_folder(options, options.size)
    return options


def main(argv=None):
    options = parse(argv)
    net = train(options)
    test = load_dataset(options.dataset, options.root, "val" if options.validation else "test")
    print_table(trade_off(net, [], test, device=options.device, workers=options.workers, precision=options.precision)[0])


if __name__ == "__main__":
    run_command(main)

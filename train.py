"""The teacher: metric learning with labels at one resolution (Sec. 3.2). At a small one it is the baseline.

    python train.py --dataset cub --root DIR --size 448 --out runs/cub-448      # 200 epochs, ResNet50, 512-D
    python train.py                                     # the embedded data set: a minute on a CPU

Here, too, is what every run shares: recipes, options, and `fit`, the loop that survives being killed.
"""
import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torchvision

from asymres import (BATCHNORM, EmbeddingNet, draw_negatives, load_checkpoint, read_checkpoint,
                     save_checkpoint, triplet_loss)
from data import PROCESSES, WORKERS, Views, add_up, load_dataset, refuse, run_command, seeded, settle_dataset
from evaluate import embed, extract, find_device, held_back, set_precision, trade_off

# The students' lr and lambdas are the published ones. The teacher's lr and batch are our choice.
SHARED = dict(arch="resnet50", dim=512, weights="imagenet", epochs=200, images=8000, forward=8, crop=0.08)
TEACHER = dict(SHARED, pooling="gem", size=448, batch=40, lr=1e-5)
STUDENT = dict(SHARED, teacher_size=448, student_size=224, copies=8, mixup=True, regression=False, batch=200)
EGGS = dict(arch="resnet10", dim=64, weights="random", images=8000, epochs=6)
RECIPES = {
    "teacher": {
        "cub": TEACHER, "cars": TEACHER, "sop": TEACHER, "folder": TEACHER,
        "synthetic": dict(TEACHER, **EGGS, forward=16, crop=0.85, size=64, batch=16, lr=2e-3)},
    "student": {
        "cub": dict(STUDENT, lr=1.4025e-4, lambda_ts=0.7718, lambda_ss=0.6684),
        "cars": dict(STUDENT, lr=1.1692e-4, lambda_ts=0.6371, lambda_ss=0.7731),
        "sop": dict(STUDENT, lr=1.7579e-4, lambda_ts=0.7482, lambda_ss=0.6778),
        "folder": dict(STUDENT, lr=1.4025e-4, lambda_ts=0.7718, lambda_ss=0.6684),
        "synthetic": dict(STUDENT, **EGGS, crop=0.5, teacher_size=64, student_size=32, batch=8, lr=4e-3,
                          lambda_ts=0.75, lambda_ss=0.75)}}
HELP = dict(
    arch="a torchvision convolutional classifier, resnet10, or timm/NAME",
    dim="dimensions of the embedding, 0: the backbone's own", pooling="gem, gemmp, mac or spoc",
    weights="where to start: imagenet, random, a file; a student also: teacher",
    epochs="how many; see --images", images="at most so many (teacher: anchors) are an epoch, drawn anew",
    batch="images to an optimizer step (teacher: anchors)", lr="peak learning rate of the one-cycle schedule",
    forward="of a batch, through the network at once: lower it where memory runs out",
    crop="least share of the image in a random crop", size="side of the images in px",
    teacher_size="side of the teacher's images in px", student_size="side of the student's images in px",
    copies="A, the views of an image", mixup="mix views with other images'",
    regression="no augmentation, absolute term only", lambda_ts="weight of the teacher-student relations",
    lambda_ss="weight of the student-student relations")
NEGATIVES, POOL, MARGIN = 4, 20_000, 0.7
SETTLED = 0.7  # of the epochs; then batch-norm statistics stand still: a network ends trained as it is used
MINUTES = 10  # between checkpoints inside an epoch
MOVABLE = ("out", "root", "device", "workers", "forward", "teacher")  # may change when a run is continued
MAY_BE_0 = ("dim", "workers", "seed", "lambda_ts", "lambda_ss")

def parser(role, description):
    """The options of train.py ("teacher") or distill.py ("student"); `parse` fills those that are None."""
    recipes = "\n".join(f"{name}: {recipe}" for name, recipe in RECIPES[role].items()).replace("'", "")
    result = argparse.ArgumentParser(description=description, epilog=f"defaults by data set\n{recipes}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add, either = result.add_argument, argparse.BooleanOptionalAction
    add("--dataset", help="cub, cars, sop, synthetic or a folder of class folders; default: as the teacher")
    add("--root", help="where the data set is")
    add("--out", help="folder of this run; by default under runs/, named by data set, size and seed")
    if role == "student":
        add("--teacher", help="checkpoint or released name; without it one is trained")
    for name, value in RECIPES[role]["cub"].items():
        kind = {"action": either} if isinstance(value, bool) else {"type": type(value)}
        add(f"--{name.replace('_', '-')}", help=HELP[name], **kind)
    add("--validation", action=either, help="test on half of the training classes")
    add("--seed", type=int, default=1234, help="of weights, order, views and negatives (%(default)s)")
    add("--precision", default="auto", choices=("auto", "bfloat16", "float32"), help="by the GPU")
    add("--device", help="cuda or cpu; by default CUDA where there is one")
    add("--workers", type=int, help="processes that decode; by default one a core, for synthetic none")
    return result

def parse(role, description, argv):
    """(options, teacher if given) of a command line: filled from teacher and recipe, checked."""
    options = parser(role, description).parse_args(argv)
    teacher, inherited = None, {"dataset": "synthetic"}
    if role == "student" and options.teacher:
        teacher = load_checkpoint(options.teacher)
        inherited = {name: teacher.options.get(name) for name in ("dataset", "root", "weights")}
        inherited |= {"arch": teacher.arch, "dim": getattr(teacher.whiten, "out_features", 0),
                      "teacher_size": teacher.size}
        if options.arch not in (None, teacher.arch) or inherited["weights"] == "teacher":
            del inherited["weights"]
    options.dataset, options.root = settle_dataset(options.dataset, options.root, inherited)
    defaults = {"workers": WORKERS * (options.dataset != "synthetic"), **RECIPES[role][options.dataset]}
    defaults |= {name: value for name, value in inherited.items() if value is not None}
    for name, value in vars(options).items():
        value = defaults.get(name) if value is None and name != "root" else value  # root is settled
        bad = type(value) in (int, float) and (value < 0 or value == 0 and name not in MAY_BE_0)
        refuse(bad or name == "crop" and value > 1, f"--{name.replace('_', '-')} cannot be {value}")
        setattr(options, name, value)
    device = find_device(options.device)
    options.device, options.precision = str(device), set_precision(options.precision, device)
    nets = [teacher] if teacher else []
    options.validation = held_back(options.validation, options.dataset, options.root, *nets)
    load_split(options, "test")  # it is whole, or there is no run
    options.training_images = len(load_split(options))
    return options, teacher

def load_split(options, part="train"):  # the images of a run's training, or of its test
    split = {"train": "fit", "test": "val"}[part] if options.validation else part
    return load_dataset(options.dataset, options.root, split)

def new_network(options, pooling, size):
    """The EmbeddingNet that a run starts from, held to the size it will see."""
    torch.manual_seed(options.seed)
    weights = {"imagenet": True, "random": False, "teacher": False}.get(options.weights, options.weights)
    net = EmbeddingNet(options.arch, pooling, options.dim, weights)
    net.size = size
    try:
        net.eval()(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        raise ValueError(f"{size} px is too small for {options.arch}") from error
    return net

def free_folder(options, name, parts=()):
    """runs/NAME, with a number behind it where that is another run's; `parts`: (sub-folder, its options)."""
    source = Path(options.root).name if options.dataset == "folder" else options.dataset
    stem = out = f"runs/{source}-{name}-seed{options.seed}"
    while any(other_options(Path(out, part), theirs) for part, theirs in [("", options), *parts]):
        out = f"{stem}-{int(out[len(stem) + 1:] or 1) + 1}"
    return out

def other_options(out, options):
    """In words, how the options of the run in a folder differ; None where they do not, or there is no run."""
    with contextlib.suppress(FileNotFoundError):
        theirs = read_checkpoint(Path(out, "model.pt")).get("options", {})
        for name, ours in vars(options).items():
            if name not in MOVABLE and theirs.get(name) != ours:
                return f"its {name.replace('_', ' ')} is {theirs.get(name)}, not {ours}"

def fit(net, rows_for, batches, losses, names, options):
    """Train `net` in the folder `options.out`, from its checkpoint if there is one; returns it in eval mode.

    rows_for(epoch)              (R, ...) image indices, R the same each epoch; `options.batch` of them a step
    batches(epoch, rows, parts)  the views, a tuple, of one slice of the rows after another
    losses(rows, *views)         the terms (T,) of a slice, `names` theirs: sums over its rows, so that slices
                                 and processes add up to the same step
    Killed and started again, on a CPU, it ends with the same weights to the bit. Raises ValueError where the
    folder is another run's or in use, FloatingPointError at a loss that is not finite.
    """
    with running(options) as (log, wishes):
        path = Path(options.out, "model.pt")
        saved = read_checkpoint(path) if path.exists() else {}
        add_up(torch.zeros(1))  # all processes have read before process 0 writes
        if saved:
            net.load_state_dict(saved["state_dict"])
        net.to(options.device, memory_format=torch.channels_last)
        if saved and "training" not in saved:
            return net.eval()
        state = saved.get("training") or {"epoch": 0, "step": 0, "rows": rows_for(0), "log": {},
                                          "sums": [0.0] * (len(names) + 1)}  # of the epoch: terms, rows
        optimizer, schedule = optimization(net, options, state)
        began, saved_at = (time.time(), schedule.last_epoch), 0
        while state["epoch"] < options.epochs:
            net.train(statistics=state["epoch"] < SETTLED * options.epochs)
            steps = divide(state["rows"], options)[state["step"]:]
            views = batches(state["epoch"], state["rows"], [part for step in steps for part in step])
            for step in steps:
                if time.time() - saved_at > 60 * MINUTES:  # before the first one, too: a full disk shows now
                    saved_at = save(path, net, state, optimizer, schedule, options, log)
                torch.manual_seed(options.seed + schedule.last_epoch)  # dropout's, the same after a resume
                *sums, stop = take_step(net, optimizer, step, views, losses, state, wishes)
                schedule.step()
                state.update(step=state["step"] + 1, sums=[a + b for a, b in zip(state["sums"], sums)])
                report(state, names, schedule, began, options)
                if stop:
                    save(path, net, state, optimizer, schedule, options, log)
                    raise KeyboardInterrupt(f"stopped after epoch {state['epoch']}, step {state['step']}; "
                                            f"{path} is saved, and the same command continues")
            state.update(epoch=state["epoch"] + 1, step=0, sums=[0.0] * len(state["sums"]))
            state["rows"] = rows_for(state["epoch"]) if state["epoch"] < options.epochs else None
            saved_at = save(path, net, state, optimizer, schedule, options, log)
        return net.eval()

def divide(rows, options):
    """An epoch's optimizer steps, each the slices of rows that this process passes through the network."""
    def cut(start, stop, size):  # 0, 9, 4 -> 0:4, 4:9: batch-norm needs two rows, so a lone one joins
        ends = [*range(start + size, stop - 1, size), stop]
        return list(map(slice, [start, *ends], ends))
    shared = slice(PROCESSES["rank"], None, PROCESSES["count"])
    return [cut(step.start, step.stop, options.forward)[shared] for step in cut(0, len(rows), options.batch)]

def optimization(net, options, state):
    """AdamW and the one-cycle schedule of the whole run, where the state left them."""
    gem = [p for name, p in net.named_parameters() if name == "pool.p"]
    others = [p for name, p in net.named_parameters() if name != "pool.p"]
    optimizer = torch.optim.AdamW([{"params": others, "weight_decay": 1e-6},
                                   {"params": gem, "weight_decay": 0.0}], lr=options.lr)
    total = options.epochs * len(divide(state["rows"], options))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=total, div_factor=10)
    for name, part in (("optimizer", optimizer), ("schedule", schedule)):
        part.load_state_dict(state.get(name, part.state_dict()))
    return optimizer, schedule

def take_step(net, optimizer, parts, views, losses, state, wishes):
    """One optimizer step. -> sums over its parts, of all processes: each loss term, rows, wishes to stop."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # a process without a part adds nothing
    sums = torch.zeros(len(state["sums"]) + 1, device=parameters[0].device)
    for part in parts:
        terms = losses(state["rows"][part], *next(views))
        terms.sum().backward()
        sums[:-2] += terms.detach()
        sums[-2] += part.stop - part.start
    sums[-1] = len(wishes)
    training = [layer for layer in net.modules() if isinstance(layer, BATCHNORM) and layer.training]
    statistics = [value for layer in training for value in (layer.running_mean, layer.running_var)]
    gradients = [parameter.grad for parameter in parameters]
    add_up(sums, *statistics, *gradients)
    sums[0] += 0 * torch.nn.utils.get_total_norm(gradients)  # if they are not finite, nor is the loss
    for value in statistics:  # of batch-norm that trains: their mean over the processes
        value /= PROCESSES["count"]
    optimizer.step()
    return sums.tolist()  # the one wait for the device

def save(path, net, state, optimizer, schedule, options, log):
    """Process 0 writes the run's folder, with the state to go on from until it is done. -> the time."""
    state.update(optimizer=optimizer.state_dict(), schedule=schedule.state_dict())
    if PROCESSES["rank"] == 0:
        versions = {"python": sys.version, "torch": torch.__version__, "torchvision": torchvision.__version__}
        about = {"command": sys.argv, "options": vars(options), "versions": versions}
        path.with_name("options.json").write_text(json.dumps(about, indent=1))
        log.truncate(0)
        log.writelines(json.dumps(entry) + "\n" for entry in state["log"].values())
        log.flush()
        training = {"training": state} if state["epoch"] < options.epochs else {}
        save_checkpoint(path, net, options=vars(options), **training)
    return time.time()

def report(state, names, schedule, began, options):
    """Log the epoch so far, and print it with the time left at the pace since `began`: (time, steps done)."""
    *sums, seen = state["sums"]
    done, total, means = schedule.last_epoch, schedule.total_steps, [value / seen for value in sums]
    pace = (time.time() - began[0]) / (done - began[1])  # seconds a step
    images = state["rows"].numel() * options.epochs / total / pace  # a second
    terms = "  ".join(f"{name} {mean:.4f}" for name, mean in zip(names, means))
    if not math.isfinite(sum(sums)):
        raise FloatingPointError(f"the loss is not finite at epoch {state['epoch']}, step {state['step']} "
                                 f"({terms}): stopped; {options.out}/model.pt is the last good checkpoint")
    rate, peak = schedule.get_last_lr()[0], torch.cuda.max_memory_allocated() / 2 ** 30  # 0 without a GPU
    state["log"][state["epoch"]] = dict(zip(names, means), epoch=state["epoch"], step=done, lr=rate,
                                        images_per_s=round(images, 2), peak_gib=round(peak, 2))
    terminal, left = sys.stderr.isatty(), timedelta(seconds=round(pace * (total - done)))
    if PROCESSES["rank"] == 0 and (terminal or done % 50 == 0 or done == total):
        print(f"{options.out}  step {done}/{total}  {terms}  {images:.0f} images/s  {left} left",
              end="\033[K\r" if terminal and done < total else "\n", file=sys.stderr, flush=True)

@contextlib.contextmanager
def running(options):
    """Own the run's folder, or raise ValueError: yields its log, locked, and a list that Ctrl-C adds to."""
    os.makedirs(options.out, exist_ok=True)
    log, wishes = open(Path(options.out, "log.jsonl"), "a"), []
    try:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl
            if PROCESSES["rank"] == 0:  # until the process ends, however it does; workers do not inherit it
                fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"another program is at work in {options.out}: give another --out") from error
    difference = other_options(options.out, options)
    refuse(difference, f"{options.out} belongs to another run: {difference}; give another --out")
    def on_signal(number, _):
        wishes.append(number)
        signal.signal(number, signal.default_int_handler)  # the next one does not wait for the step
    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield log, wishes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

def draw_groups(labels, most, generator):
    """An epoch's anchors (R,), R <= `most`, groups of 4: equally many of each class that has 4, shuffled."""
    members = [(labels == label).nonzero()[:, 0] for label in labels.unique()]
    members = [m for m in members if len(m) >= 4]
    count = min(map(len, members)) // 4 * 4
    groups = torch.cat([m[torch.randperm(len(m), generator=generator)[:count]].view(-1, 4) for m in members])
    return groups[torch.randperm(len(groups), generator=generator)][:most // 4].flatten()

def mine(net, dataset, decode, epoch, options):
    """An epoch's rows (R, 1+M): anchors and negatives, by what the network makes of a pool of images now."""
    draw, labels, device = seeded(options.seed, epoch, 0), torch.tensor(dataset.labels), options.device
    _, number, sizes = labels.unique(return_inverse=True, return_counts=True)
    large = (sizes[number] >= 4).nonzero()[:, 0]  # images of smaller classes take no part
    anchors = draw_groups(labels, options.images, draw)
    pool = large[torch.randperm(len(large), generator=draw)[:POOL]]
    rows, place = torch.cat([anchors, pool]).unique(return_inverse=True)
    e = extract(net, dataset, options.size, device, options.forward * (1 + NEGATIVES),
                precision=options.precision, rows=rows, decode=decode)
    own, others = e.to(device)[place].split([len(anchors), len(pool)])  # (R, D), (N, D)
    drawn = draw_negatives(own, others, labels[anchors].to(device), labels[pool].to(device), NEGATIVES,
                           generator=seeded(options.seed, epoch, 1, device=device))
    rows = torch.cat([anchors[:, None], pool[drawn.cpu()]], dim=1)
    add_up(rows.mul_(PROCESSES["rank"] == 0))  # another card may draw otherwise
    return rows

def train(options):
    """Train the network that `options` describe, or continue, or load it. -> EmbeddingNet in eval mode."""
    refuse(options.batch < 8 or options.batch % 4 or options.forward % 4 or options.images < 4,
           "--batch and --forward are multiples of 4, a batch has at least two groups of 4, --images one")
    dataset, each = load_split(options), 1 + NEGATIVES
    sizes = torch.tensor(dataset.labels).unique(return_counts=True)[1]
    refuse((sizes >= 4).sum() < 2, f"{options.root or options.dataset} has {len(sizes)} training classes, "
           f"{(sizes >= 4).sum()} of them with 4 images or more: triplets need two such classes")
    net = new_network(options, options.pooling, options.size)
    views = Views(dataset, [options.size], least=options.crop, seed=options.seed, device=options.device,
                  workers=options.workers)
    the_rest = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]], device=options.device)  # of a group

    def batches(epoch, rows, parts):
        return views.epoch(epoch, rows.flatten(), [slice(each * p.start, each * p.stop) for p in parts])

    def losses(rows, images):  # (R*(1+M), 1, 3, s, s)
        e = embed(net, images, options.precision).view(len(rows), each, -1)  # (R, 1+M, D)
        anchors = e[:, 0]  # (R, D)
        positives = anchors.unflatten(0, (-1, 4))[:, the_rest].flatten(0, 1)  # (R, 3, D)
        return triplet_loss(anchors, positives, e[:, 1:], MARGIN)[None]
    rows_for = lambda epoch: mine(net, dataset, views.decode, epoch, options)
    return fit(net, rows_for, batches, losses, ["triplet"], options)

def table(options, teacher, students=(), baselines=(), figure=None):
    """Print what a run's networks make of its test images; `figure`: draw what the first student finds."""
    trade_off(teacher, students, load_split(options, "test"), baselines, figure=figure, device=options.device,
              workers=options.workers, precision=options.precision)

def main(argv=None):
    options, _ = parse("teacher", __doc__.split("\n\n")[0], argv)
    options.out = options.out or free_folder(options, options.size)
    table(options, train(options))

if __name__ == "__main__":
    run_command(main)

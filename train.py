"""The teacher: metric learning with labels at one resolution (Sec. 3.2). At a small one it is the baseline.
Here, too, is what every run shares: recipes, options, and `fit`, the loop that survives being killed.

    python train.py --dataset cub --root DIR --size 448 --out runs/cub-448      # 200 epochs, ResNet50, 512-D
    python train.py                                     # the embedded data set: a minute on a CPU
"""
import argparse
import contextlib
import itertools
import json
import signal
import sys
import time
from pathlib import Path
import torch
from asymres import (BATCHNORM, EmbeddingNet, draw_negatives, load_checkpoint, read_checkpoint,
                     save_checkpoint, triplet_loss)
from data import PROCESSES, WORKERS, Views, add_up, load_dataset, refuse, run_command, seeded, settle_dataset
from evaluate import embed, extract, find_device, held_back, set_precision, trade_off

# The students' lr and lambdas are the published ones. The teacher's lr and batch are our choice.
SHARED = dict(arch="resnet50", dim=512, weights="imagenet", epochs=200, images=8000, forward=8, crop=0.08,
              seed=1234, workers=WORKERS, device="", precision="auto")
TEACHER = dict(SHARED, pooling="gem", size=448, batch=40, lr=1e-5)
CUB = dict(SHARED, teacher="", teacher_size=448, student_size=224, copies=8, mixup=True, regression=False,
           batch=200, lr=1.4025e-4, lambda_ts=0.7718, lambda_ss=0.6684)
EGGS = dict(arch="resnet10", dim=64, weights="random", epochs=6, workers=0)
RECIPES = {
    "teacher": dict(cub=TEACHER, cars=TEACHER, sop=TEACHER, folder=TEACHER,
                    synthetic=dict(TEACHER, **EGGS, size=64, forward=16, crop=0.85, batch=16, lr=2e-3)),
    "student": dict(cub=CUB, cars=dict(CUB, lr=1.1692e-4, lambda_ts=0.6371, lambda_ss=0.7731), folder=CUB,
                    sop=dict(CUB, lr=1.7579e-4, lambda_ts=0.7482, lambda_ss=0.6778),
                    synthetic=dict(CUB, **EGGS, teacher_size=64, student_size=32, crop=0.5, batch=8, lr=4e-3,
                                   lambda_ts=0.75, lambda_ss=0.75))}
HELP = dict(
    root="where the data set is", out="a run's folder; default: a free one in runs/", size="side in px",
    dataset="cub, cars, sop, synthetic or a folder of class folders", pooling="gem, gemmp, mac or spoc",
    teacher="file or released name; without it one is trained", arch="of torchvision, resnet10, timm/NAME",
    weights="imagenet, random, a file; of a student: teacher", crop="least share of an image in a crop",
    images="an epoch, at most (teacher: anchors)", batch="images a step (teacher: anchors)", lr="at its peak",
    forward="images at once: lower it where memory runs out", copies="views of an image", dim="0: unwhitened",
    regression="no augmentation, absolute term only", validation="test on half of the training classes")
NEGATIVES, POOL, MARGIN = 4, 20_000, 0.7
SETTLED = 0.7  # of the epochs; then batch-norm statistics stand still: a network ends trained as it is used
MINUTES = 10  # between checkpoints inside an epoch
MOVABLE = ("out", "root", "device", "workers", "forward", "teacher")  # may change when a run is continued
MAY_BE_0 = ("dim", "workers", "seed", "lambda_ts", "lambda_ss")

def parse(role, description, argv):
    """(options, [teacher if given]) of train.py ("teacher") or distill.py ("student"), filled and checked."""
    defaults = "\n".join(f"{name}: {recipe}" for name, recipe in RECIPES[role].items())
    parser = argparse.ArgumentParser(description=description, epilog=f"defaults by data set\n{defaults}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, kind in dict(dataset="", root="", out="", validation=False, **RECIPES[role]["cub"]).items():
        how = {"type": type(kind), "choices": {"precision": ("auto", "bfloat16", "float32")}.get(name)}
        how = {"action": argparse.BooleanOptionalAction} if isinstance(kind, bool) else how
        parser.add_argument(f"--{name.replace('_', '-')}", help=HELP.get(name), **how)
    options = parser.parse_args(argv)
    nets, inherited = [], {"dataset": "synthetic"}
    if role == "student" and options.teacher:
        nets = [load_checkpoint(options.teacher)]
        said = {"dim": nets[0].dim, **nets[0].options, "arch": nets[0].arch, "teacher_size": nets[0].size}
        inherited = {key: said.get(key) for key in "dataset root weights arch dim teacher_size".split()}
        if options.arch not in (None, nets[0].arch) or inherited["weights"] == "teacher":
            del inherited["weights"]
    options.dataset, options.root = settle_dataset(options.dataset, options.root, inherited)
    for name, default in RECIPES[role][options.dataset].items():
        value = next(x for x in (getattr(options, name), inherited.get(name), default) if x is not None)
        low = type(value) in (int, float) and (value < 0 or value == 0 and name not in MAY_BE_0)
        refuse(low or name == "crop" and value > 1, f"--{name.replace('_', '-')} cannot be {value}")
        setattr(options, name, value)
    device = find_device(options.device)
    options.device, options.precision = str(device), set_precision(options.precision, device)
    options.validation = held_back(options.validation, options.dataset, options.root, *nets)
    options.training_images, _ = (len(load_split(options, part)) for part in ("train", "test"))  # both whole
    return options, nets

def load_split(options, part="train"):  # the images of a run's training, or of its test
    split = {"train": "fit", "test": "val"}[part] if options.validation else part
    return load_dataset(options.dataset, options.root, split)

def new_network(options, pooling, size):  # that a run starts from, held to the size it will see
    torch.manual_seed(options.seed)
    weights = {"imagenet": True, "random": False, "teacher": False}.get(options.weights, options.weights)
    net = EmbeddingNet(options.arch, pooling, options.dim, weights)
    net.size = size
    try:
        net.eval()(torch.zeros(1, 3, size, size))
    except RuntimeError as error:
        raise ValueError(f"{size} px is too small for {options.arch}") from error
    return net

def find_run(options):
    """The checkpoint, or {}, in `options.out`, by default the first of runs/NAME, NAME-2, ... not taken."""
    source = Path(options.root).name if options.dataset == "folder" else options.dataset
    sizes = options.size if "size" in options else f"{options.teacher_size}to{options.student_size}"
    asked, stem = options.out, f"runs/{source}-{sizes}-seed{options.seed}"
    ours = {name: value for name, value in vars(options).items() if name not in MOVABLE}.items()
    for number in itertools.count(1):
        options.out = asked or f"{stem}-{number}".removesuffix("-1")
        path = Path(options.out, "model.pt")
        saved = read_checkpoint(path) if path.exists() else {}
        theirs = saved.get("options", {}).items()
        if not saved or ours <= theirs:
            return saved
        refuse(asked, f"{asked} belongs to another run, not with {dict(ours - theirs)}: give another --out")

@contextlib.contextmanager
def running(options):
    """Own the run's folder, or raise ValueError: its checkpoint, its log, and a list of wishes to stop."""
    saved, wishes = find_run(options), []
    Path(options.out).mkdir(parents=True, exist_ok=True)
    log = open(Path(options.out, "log.jsonl"), "a")
    try:
        with contextlib.suppress(ImportError):  # Windows has no such locks
            import fcntl  # a lock lasts until the process ends, however it does; workers do not inherit it
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, PROCESSES["rank"])  # of a byte each
    except (BlockingIOError, PermissionError) as error:
        raise ValueError(f"another program is at work in {options.out}: give another --out") from error
    add_up(torch.zeros(1))  # all processes have read before process 0 writes
    wish = lambda number, _: wishes.append(signal.signal(number, signal.default_int_handler))
    with contextlib.ExitStack() as stack:  # Ctrl-C is a wish, the second one does not wait for the step
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, wish))
        yield saved, log, wishes

def fit(net, count, rows_for, batches, losses, names, options):
    """Train `net` in `options.out`, or continue, on a CPU to the same bits, or load it. -> it in eval mode.

    rows_for(epoch)              image indices (count, ...); `options.batch` of these rows are a step
    batches(epoch, rows, parts)  the views, a tuple, of one slice of the rows, flat, after another
    losses(*views)               the terms (T,) of a slice, `names` theirs: sums over rows, so slices add up
    """
    with running(options) as (saved, log, wishes):
        net.load_state_dict(saved.get("state_dict", net.state_dict()))
        net.to(options.device, memory_format=torch.channels_last)
        if saved and not saved.get("training"):
            return net.eval()
        state = saved.get("training", {"step": 0})
        steps = [cut(step, options.forward) for step in cut(slice(0, count), options.batch)]
        own = slice(PROCESSES["rank"], None, PROCESSES["count"])  # of the slices of a step
        groups = [{"params": [*net.backbone.parameters(), *net.whiten.parameters()]},
                  {"params": net.pool.parameters(), "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, options.lr, weight_decay=1e-6)
        optimizer.load_state_dict(state.get("optimizer", optimizer.state_dict()))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, options.epochs * len(steps),
                                                       div_factor=10, last_epoch=state["step"] - 1)
        began = time.time(), state["step"]
        saved_at = save(net, optimizer, schedule, state, options)  # now a full disk shows
        while schedule.last_epoch < schedule.total_steps:
            epoch, first = divmod(schedule.last_epoch, len(steps))
            if first == 0:
                state.update(epoch=epoch, rows=rows_for(epoch), sums=torch.zeros(len(names)))
            net.train(statistics=epoch < SETTLED * options.epochs)
            rows, each = state["rows"].flatten(), state["rows"][0].numel()
            parts = [slice(each * p.start, each * p.stop) for step in steps[first:] for p in step[own]]
            terms = itertools.starmap(losses, batches(epoch, rows, parts))
            for step in steps[first:]:
                torch.manual_seed(options.seed + schedule.last_epoch)  # dropout's, the same after a resume
                sums = torch.tensor([0.0] * len(names) + [len(wishes)], device=options.device)
                sums = take_step(net, optimizer, itertools.islice(terms, len(step[own])), sums)
                schedule.step()
                state["sums"] += sums[:-1]
                report(state, names, step[-1].stop, schedule, began, log, options)
                if sums[-1] or step is steps[-1] or time.time() - saved_at > 60 * MINUTES:
                    saved_at = save(net, optimizer, schedule, state, options)
                if sums[-1]:
                    raise KeyboardInterrupt(f"saved after step {state['step']}: the same command continues")
        return net.eval()

def cut(rows, size):  # 0:9 by 4 is 0:4, 4:9: batch-norm needs two rows, so a lone one joins
    ends = [*range(rows.start + size, rows.stop - 1, size), rows.stop]
    return list(map(slice, [rows.start, *ends], ends))

def take_step(net, optimizer, terms, sums):
    """One optimizer step on the terms (T,) of some slices. -> `sums` (T+1,) with theirs, of all processes."""
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)  # a process without a slice adds nothing
    for values in terms:
        values.sum().backward()
        sums[:-1] += values.detach()
    statistics = [value for layer in net.modules() if isinstance(layer, BATCHNORM) and layer.training
                  for value in (layer.running_mean, layer.running_var)]
    gradients = [parameter.grad for parameter in net.parameters()]
    add_up(sums, *statistics, *gradients)
    for value in statistics:  # of batch-norm that trains: their mean over the processes
        value /= PROCESSES["count"]
    sums[0] += 0 * torch.nn.utils.get_total_norm(gradients)  # if they are not finite, nor is the loss
    optimizer.step()
    return sums.cpu()  # the one wait for the device

def save(net, optimizer, schedule, state, options):
    """Process 0 writes the run's folder, with the state to go on from until it is done. -> the time."""
    state.update(step=schedule.last_epoch, optimizer=optimizer.state_dict())
    if PROCESSES["rank"] == 0:
        versions = {name: sys.modules[name].__version__ for name in ("torch", "torchvision", "numpy", "PIL")}
        about = {"command": sys.argv, "options": vars(options), "python": sys.version, **versions}
        Path(options.out, "options.json").write_text(json.dumps(about, indent=1))
        training = state if state["step"] < schedule.total_steps else None
        save_checkpoint(Path(options.out, "model.pt"), net, options=vars(options), training=training)
    return time.time()

def report(state, names, seen, schedule, began, log, options):
    """Log an epoch at its end; print it so far, and the time left at the pace since `began`: (time, step)."""
    done, total = schedule.last_epoch, schedule.total_steps
    pace = (time.time() - began[0]) / (done - began[1])  # seconds a step
    entry = {"epoch": state["epoch"], "step": done, **dict(zip(names, (state["sums"] / seen).tolist())),
             "lr": schedule.get_last_lr()[0], "peak_gib": torch.cuda.max_memory_allocated() / 2 ** 30,
             "images_per_s": state["rows"].numel() * options.epochs / total / pace,
             "minutes_left": pace * (total - done) / 60}
    line = f"{options.out} {done}/{total}: " + ", ".join(f"{name} {x:.6g}" for name, x in entry.items())
    refuse(not state["sums"].isfinite().all(), f"the loss is not finite: {line}; model.pt is from before")
    if PROCESSES["rank"] == 0 and seen == len(state["rows"]):
        print(json.dumps(entry), file=log, flush=True)
    end = "\n" if done % 50 == 0 or done == total else "\033[K\r"
    if PROCESSES["rank"] == 0 and (end == "\n" or sys.stderr.isatty()):
        print(line, end=end, file=sys.stderr, flush=True)

def draw_groups(dataset, most, generator):
    """An epoch's anchors (R,), R <= `most`: groups of 4 of a class, shuffled; all images of such classes."""
    labels = torch.tensor(dataset.labels)
    classes = labels.argsort(stable=True).split(labels.unique(return_counts=True)[1].tolist())
    large = [images for images in classes if len(images) >= 4]
    refuse(len(large) < 2, f"{len(large)} training classes have 4 images: triplets need two such classes")
    count = min(map(len, large)) // 4 * 4
    groups = torch.cat([m[torch.randperm(len(m), generator=generator)[:count]].view(-1, 4) for m in large])
    groups = groups[torch.randperm(len(groups), generator=generator)]
    return groups[:most // 4].flatten(), torch.cat(large).sort().values

def mine(net, dataset, decode, epoch, options):
    """An epoch's rows (R, 1+M): anchors and negatives, by what the network makes of a pool of images now."""
    draw, device = seeded(options.seed, epoch, 0), options.device
    anchors, large = draw_groups(dataset, options.images, draw)
    pool = large[torch.randperm(len(large), generator=draw)[:POOL]]
    rows, place = torch.cat([anchors, pool]).unique(return_inverse=True)
    e = extract(net, dataset, options.size, device, options.forward * (1 + NEGATIVES),
                precision=options.precision, rows=rows, decode=decode)
    own, others = e.to(device)[place].split([len(anchors), len(pool)])  # (R, D), (N, D)
    labels = torch.tensor(dataset.labels, device=device)
    drawn = draw_negatives(own, others, labels[anchors], labels[pool], NEGATIVES,
                           generator=seeded(options.seed, epoch, 1, device=device))
    rows = torch.cat([anchors[:, None], pool[drawn.cpu()]], dim=1)
    add_up(rows.mul_(PROCESSES["rank"] == 0))  # another card may draw otherwise
    return rows

def train(options):
    """Train the network that `options` describe, or continue, or load it. -> EmbeddingNet in eval mode."""
    refuse(options.batch < 8 or options.batch % 4 or options.forward % 4 or options.images < 4,
           "--batch and --forward are multiples of 4, a batch has at least two groups of 4, --images one")
    dataset = load_split(options)
    anchors, _ = draw_groups(dataset, options.images, seeded(0))
    net = new_network(options, options.pooling, options.size)
    views = Views(dataset, [options.size], least=options.crop, seed=options.seed, device=options.device,
                  workers=options.workers)
    others = torch.tensor([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]], device=options.device)  # of a group
    rows_for = lambda epoch: mine(net, dataset, views.decode, epoch, options)

    def losses(images):  # (R*(1+M), 1, 3, s, s)
        e = embed(net, images, options.precision).view(-1, 1 + NEGATIVES, net.dim)  # (R, 1+M, D)
        anchors = e[:, 0]  # (R, D)
        positives = anchors.unflatten(0, (-1, 4))[:, others].flatten(0, 1)  # (R, 3, D)
        return triplet_loss(anchors, positives, e[:, 1:], MARGIN)[None]
    return fit(net, len(anchors), rows_for, views.epoch, losses, ["triplet"], options)

def main(argv=None):
    options, _ = parse("teacher", __doc__.split("\n\n")[0], argv)
    trade_off(train(options), [], load_split(options, "test"), device=options.device,
              workers=options.workers, precision=options.precision)

if __name__ == "__main__":
    run_command(main)

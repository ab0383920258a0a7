"""The student (Sec. 3.3): distillation, without labels, from large images to small ones.

    python distill.py                                                   # the paper in miniature
    python distill.py --teacher runs/cub-448-seed1234/model.pt --student-size 224      # the paper
    python distill.py --dataset PHOTOS --unlabelled --student-size 112  # any folder of photographs

The first command needs no data: it draws some, trains a teacher and a baseline with labels, and
distils a student in a few minutes on a CPU. In the last one an ImageNet network is the teacher.
"""

import argparse
import copy
from pathlib import Path

import torch

import train
from asymres import NetworkError, absolute_term, distillation_loss, fingerprint, save_checkpoint
from data import (
    EpochSampler,
    Progress,
    UserError,
    distillation_loader,
    find_device,
    has_images_directly,
    keep_readable,
    normalize,
    process_count,
    process_rank,
    run_program,
    say,
)
from evaluate import (
    compare,
    compare_unlabelled,
    evaluation_loader,
    extract,
    load_network,
    load_split,
    query_cost,
)
from train import Run, new_network, positive_int

# What differs by data set; "folder" is any other. The rates and lambdas are the authors'.
PAPER = dict(teacher_size=448, student_size=224, arch="resnet50", weights="imagenet", dim=512)
PAPER |= dict(epochs=200, batch_size=200, micro_batch=8, views=8, min_scale=0.08)
CUB = PAPER | dict(lr=1.4025e-4, lambda_ts=0.7718, lambda_ss=0.6684)
CARS = PAPER | dict(lr=1.1692e-4, lambda_ts=0.6371, lambda_ss=0.7731)
SOP = PAPER | dict(lr=1.7579e-4, lambda_ts=0.7482, lambda_ss=0.6778)
EGGS = dict(teacher_size=64, student_size=32, arch="resnet10-narrow", weights="random", dim=64)
EGGS |= dict(epochs=6, batch_size=8, micro_batch=8, views=8, min_scale=0.5)
EGGS |= dict(lr=4e-3, lambda_ts=0.75, lambda_ss=0.75)
RECIPES = {"cub": CUB, "cars": CARS, "sop": SOP, "folder": CUB, "synthetic": EGGS}

# --------------------------------------------------------------------------------- distillation


def distill(teacher, options, progress=None, step_cost=1):
    """Distil a student of the teacher, or go on with it. Returns it, in eval mode."""
    dataset = train.load_training_images(options)
    student = new_student(teacher, options)
    images = min(options.epoch_size, len(dataset)) // process_count()
    how = {"teacher": fingerprint(teacher), "progress": progress, "step_cost": step_cost}
    run = Run(student, options, images, **how)
    teacher.to(run.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if options.regression:
        regress(teacher, student, dataset, run, options)
        return student.eval()
    loader = distillation_loader(
        dataset,
        options.student_size,
        options.teacher_size,
        views=options.views,
        batch_size=run.micro_batch,
        mixup=not options.no_mixup,
        workers=options.workers,
        device=run.device,
        seed=options.seed,
        min_scale=options.min_scale,
        epoch_size=options.epoch_size,
    )
    for epoch in range(run.first_epoch, options.epochs):
        loader.set_epoch(epoch)
        distill_one_epoch(teacher, student, loader, run, options)
        run.end_epoch(epoch)
    return student.eval()


def distill_one_epoch(teacher, student, loader, run, options):
    """The student learns to embed small views as the teacher embeds the same views when large."""
    student.train()
    for i, (small, large) in enumerate(loader, start=1):  # (B, A, 3, s, s), (B, A, 3, t, t)
        with run.autocast():
            with torch.no_grad():
                t = teacher(large)  # (B, A, D)
            s = student(small)  # (B, A, D)
        loss = distillation_loss(s, t, options.lambda_ts, options.lambda_ss)
        loss.backward()
        run.add_loss(loss)
        if i % run.accumulate == 0 or i == len(loader):
            run.step()


def regress(teacher, student, dataset, run, options):
    """The ablation without augmentation: the absolute term alone, of one evaluation crop an image.

    The teacher embeds all images once.
    """
    how = {"workers": options.workers, "precision": options.precision}
    targets = extract(teacher, dataset, options.teacher_size, run.device, **how).to(run.device)
    sampler = EpochSampler(len(dataset), options.epoch_size, options.seed)
    for epoch in range(run.first_epoch, options.epochs):
        sampler.set_epoch(epoch)
        batches = torch.tensor(list(sampler)).split(run.micro_batch)
        batches = [rows.tolist() for rows in batches]
        crops = evaluation_loader(
            dataset, options.student_size, batches, options.workers, run.device
        )
        student.train()
        for i, (rows, images) in enumerate(zip(batches, crops, strict=True), start=1):
            images = normalize(images.to(run.device) / 255)  # (B, 3, s, s)
            with run.autocast():
                s = student(images)  # (B, D)
            loss = absolute_term(s[:, None], targets[rows][:, None])  # A = 1
            loss.backward()
            run.add_loss(loss)
            if i % run.accumulate == 0 or i == len(batches):
                run.step()
        run.end_epoch(epoch)


def new_student(teacher, options):
    """The network that a student starts from: ImageNet's weights, a file's, or the teacher's."""
    if options.weights == "teacher":
        if options.arch != teacher.arch:
            raise UserError(f"--weights teacher: the teacher is {teacher.arch}, not {options.arch}")
        student = copy.deepcopy(teacher)
        student.size = options.student_size
    else:
        student = new_network(options, teacher.pooling, options.student_size)
    if student.dim != teacher.dim:
        raise UserError(
            f"--dim {student.dim}: the teacher's embeddings have {teacher.dim} dimensions"
        )
    return student


# ------------------------------------------------------------------------- the paper in miniature


def miniature(options):
    """Labels at the small size, the teacher, the student, and the table of all, on drawn eggs."""
    common = ["--dataset", "synthetic", "--seed", options.seed, "--arch", options.arch]
    common += ["--dim", options.dim, "--workers", options.workers, "--precision", options.precision]
    common += ["--device", options.device] if options.device else []

    def labelled(name, size):
        argv = [*common, "--size", size, "--out", f"{options.out}/{name}"]
        return train.parse_options([str(word) for word in argv])

    teacher_options = labelled("teacher", options.teacher_size)
    labels_options = labelled("labels", options.student_size)
    images = len(train.load_training_images(options))  # all of them are anchors, and of an epoch
    passes = images * options.views * options.epochs
    labels_options.epochs = round(passes / (images * (1 + train.NEGATIVES)))

    # The cost of a step in GFLOPs, for the time left; a backward pass costs two forward ones.
    device, network = find_device(options.device), new_network(options, "gem", 64)
    large, small = (
        query_cost(network.to(device).eval(), size, device, options.precision)[0]
        for size in (options.teacher_size, options.student_size)
    )
    view_cost = 3 * small + large
    step_costs = {
        "labels": 3 * small * labels_options.batch_size * (1 + train.NEGATIVES),
        "teacher": 3 * large * teacher_options.batch_size * (1 + train.NEGATIVES),
        "student": view_cost * options.batch_size * options.views,
    }
    total = step_costs["labels"] / labels_options.batch_size * images * labels_options.epochs
    total += step_costs["teacher"] / teacher_options.batch_size * images * teacher_options.epochs
    total += view_cost * passes
    progress = Progress("", total, announce=True)

    t, s = options.teacher_size, options.student_size
    say(
        f"The paper in miniature, on {images} drawn eggs of 120 classes, with a network that costs "
        f"{large:.3f} GFLOPs at {t} px and {small:.3f} at {s} px:",
        f"  1. labels at {s} px: the baseline, trained for as many image passes as the student",
        f"  2. the teacher: trained with labels at {t} px",
        f"  3. the student: learns without labels to embed at {s} px as the teacher does at {t} px",
        "Then all images of 60 other classes are searched for each other.",
    )
    progress.title = f"1. labels, {s} px"
    labels = train.train(labels_options, progress, step_costs["labels"])
    progress.title = f"2. teacher, {t} px"
    teacher = train.train(teacher_options, progress, step_costs["teacher"])
    progress.title = f"3. student, {s} px"
    student = distill(teacher, options, progress, step_costs["student"])
    finish(teacher, student, options, [labels])
    say(
        "",
        f"teacher, symmetric    queries and database at {t} px: what there is to reach",
        f"no distillation       the teacher's own embedding of {s} px queries in that database",
        f"labels, symmetric     trained with labels at {s} px, in a database of its own",
        f"student, asymmetric   {s} px queries in the teacher's {t} px database: the paper's claim",
        f"student, symmetric    {s} px queries in a {s} px database of the student's own",
    )


def finish(teacher, student, options, supervised=()):
    """The closing table and picture of a student."""
    how = {"workers": options.workers, "device": options.device, "precision": options.precision}
    how["figure"] = f"{options.out}/queries.png"
    test, rest = "test", "train"
    if options.validation:
        test, rest = "val", "fit"
    where = (options.unlabelled, options.classes)
    images = keep_readable(load_split(options.dataset, options.root, test, *where), options.workers)
    if options.unlabelled:
        others = load_split(options.dataset, options.root, rest, *where)
        others = keep_readable(others, options.workers)
        compare_unlabelled(teacher, student, images, others, **how)
    else:
        compare(teacher, [student], images, supervised, **how)
    say(f"student: {options.out}/model.pt    picture: {options.out}/queries.png")


# --------------------------------------------------------------------------- options, the program


def parse_options(argv=None):
    """The options, and the teacher that they name, or None."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=train.describe_recipes(RECIPES),
        formatter_class=train.HELP_FORMAT,
        usage="%(prog)s [options]",
    )
    train.add_common_options(parser)
    add = parser.add_argument
    add("--teacher", help="checkpoint or released name (default: by data set, see above)")
    add("--teacher-size", type=positive_int, help="side in px of the teacher's images (*)")
    add("--student-size", type=positive_int, help="side in px of the student's images (*)")
    add("--unlabelled", action="store_true", help="a folder in any arrangement, without labels")
    add("--views", type=positive_int, help="A, augmented views of an image (*)")
    add("--no-mixup", action="store_true", help="views are not mixed with those of other images")
    add(
        "--regression", action="store_true", help="no augmentation, absolute term only: an ablation"
    )
    add("--lambda-ts", type=float, help="weight of the teacher-student term (*)")
    add("--lambda-ss", type=float, help="weight of the student-student term (*)")
    options = parser.parse_args(argv)
    options.classes, teacher = {}, None
    if options.teacher:
        teacher, content = load_network(options.teacher)
        inherit_from_teacher(options, teacher, content.get("options", {}))
    options.dataset = options.dataset or "synthetic"
    if options.dataset not in RECIPES and has_images_directly(options.root or options.dataset):
        options.unlabelled = True
    if options.unlabelled and teacher is None:
        if options.dim:
            raise UserError(
                "--dim needs --teacher: an ImageNet network as the teacher is unwhitened"
            )
        options.dim = 0
    train.fill_in(options, RECIPES)
    name = Path(options.dataset).name
    sizes = f"{options.teacher_size}to{options.student_size}"
    options.out = options.out or f"runs/{name}-{sizes}-seed{options.seed}"
    options.out = str(Path(options.out).expanduser())
    train.settle_classes(options)
    return options, teacher


def inherit_from_teacher(options, teacher, saved):
    """What the command line leaves open is as its checkpoint's options say of the teacher."""
    options.arch = options.arch or teacher.arch
    options.dim = teacher.dim if options.dim is None else options.dim
    options.teacher_size = options.teacher_size or teacher.size
    if options.arch == teacher.arch:
        options.weights = options.weights or saved.get("weights")
    if options.dataset is None:
        if "dataset" not in saved:
            raise UserError("--dataset is needed: the teacher's checkpoint does not name one")
        options.dataset = saved["dataset"]
        options.root = options.root or saved["root"]
    if options.dataset == saved.get("dataset"):
        options.validation = options.validation or saved.get("validation", False)
    options.classes = saved.get("classes", {})


def imagenet_teacher(options):
    """The teacher of those without labels: the network as it comes, unwhitened; saved, too."""
    teacher = new_network(options, "gem", options.teacher_size).eval()
    Path(options.out).mkdir(parents=True, exist_ok=True)
    if process_rank() == 0:
        save_checkpoint(f"{options.out}/teacher.pt", teacher, options=vars(options))
    return teacher


def main():
    options, teacher = parse_options()
    if teacher is None and options.dataset == "synthetic":
        return miniature(options)
    if teacher is None and not options.unlabelled:
        raise UserError("--teacher is needed: train.py makes one; --unlabelled does without")
    if teacher is None:
        teacher = imagenet_teacher(options)
    student = distill(teacher, options)
    finish(teacher, student, options)


if __name__ == "__main__":
    run_program(main, mistakes=(NetworkError,))

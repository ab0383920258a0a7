"""The student (Sec. 3.3): distillation, without labels, from large images to small ones.

    python distill.py                                                   # the paper in miniature
    python distill.py --teacher runs/cub-448-seed1234/model.pt --student-size 224      # the paper
    python distill.py --dataset PHOTOS --unlabelled --student-size 112  # any folder of photographs

The first command needs no data: it draws some, trains a teacher and a baseline with labels, and
distils a student in a few minutes on a CPU. In the last one an ImageNet network is the teacher.
"""

import argparse
import copy

import torch

import train
from asymres import NetworkError, absolute_term, distillation_loss, fingerprint, save_checkpoint
from data import (
    EpochSampler,
    Progress,
    UserError,
    default_workers,
    distillation_loader,
    find_device,
    has_images_directly,
    normalize,
    positive_int,
    process_count,
    process_rank,
    run_program,
    say,
    settle_dataset,
)
from evaluate import (
    compare,
    compare_unlabelled,
    evaluation_loader,
    extract,
    load_network,
)

# What differs by data set; "folder" is any other. The values for CUB, Cars and SOP are the paper's.
CUB = dict(
    teacher_size=448,
    student_size=224,
    arch="resnet50",
    weights="imagenet",
    dim=512,
    epochs=200,
    batch_size=200,
    micro_batch=8,
    views=8,
    min_scale=0.08,
    workers=default_workers(),
    lr=1.4025e-4,
    lambda_ts=0.7718,
    lambda_ss=0.6684,
)
CARS = CUB | dict(lr=1.1692e-4, lambda_ts=0.6371, lambda_ss=0.7731)
SOP = CUB | dict(lr=1.7579e-4, lambda_ts=0.7482, lambda_ss=0.6778)
EGGS = dict(
    teacher_size=64,
    student_size=32,
    arch="resnet10-narrow",
    weights="random",
    dim=64,
    epochs=4,
    batch_size=8,
    micro_batch=8,
    views=8,
    min_scale=0.5,
    workers=0,
    lr=6e-3,
    lambda_ts=0.75,
    lambda_ss=0.75,
)
RECIPES = {"cub": CUB, "cars": CARS, "sop": SOP, "folder": CUB, "synthetic": EGGS}

# --------------------------------------------------------------------------------- distillation


def distill(teacher, dataset, options, student=None, progress=None):
    """Distil a student, by default that of the options, or resume it. Returns it, in eval mode."""
    device = find_device(options.device)
    student = student or new_student(teacher, options)
    student.size, teacher.size = options.student_size, options.teacher_size
    if student.dim != teacher.dim:
        raise UserError(
            f"--dim {student.dim}: the teacher's embeddings have {teacher.dim} dimensions"
        )
    teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if options.regression:
        return regress(teacher, dataset, options, student, progress)
    run = student_run(student, teacher, dataset, options, progress)
    loader = distillation_loader(
        dataset,
        options.student_size,
        options.teacher_size,
        views=options.views,
        batch_size=run.micro_batch,
        mixup=not options.no_mixup,
        workers=options.workers,
        device=device,
        seed=options.seed,
        min_scale=options.min_scale,
        epoch_size=options.epoch_size,
    )
    for epoch in range(run.first_epoch, options.epochs):
        loader.set_epoch(epoch)
        distill_one_epoch(teacher, student, loader, run, options)
        run.end_epoch(epoch)
    return student.eval()


def student_run(student, teacher, dataset, options, progress):
    """The run of a student, for which an epoch is this process's share of the images."""
    images = min(options.epoch_size, len(dataset)) // process_count()
    return train.Run(student, options, images, teacher=fingerprint(teacher), progress=progress)


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


def regress(teacher, dataset, options, student, progress):
    """The ablation without augmentation: the absolute term alone, of an image's evaluation crop.

    The teacher embeds all images once.
    """
    device, workers = find_device(options.device), options.workers
    targets = extract(teacher, dataset, options.teacher_size, device, workers=workers)
    targets = targets.to(device)  # (N, D)
    run = student_run(student, teacher, dataset, options, progress)
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
    return student.eval()


def new_student(teacher, options):
    """The network that a student starts from: ImageNet's weights, a file's, or the teacher's."""
    if options.weights != "teacher":
        return train.new_network(options, teacher.pooling, options.student_size)
    if options.arch != teacher.arch:
        raise UserError(f"--weights teacher: the teacher is {teacher.arch}, not {options.arch}")
    return copy.deepcopy(teacher).requires_grad_(True)


# ------------------------------------------------------------------------- the paper in miniature


def miniature(options):
    """Labels at the small size, the teacher, the student, and the table of all, on drawn eggs."""
    t, s = options.teacher_size, options.student_size
    training, test = train.load_images(options)
    teacher_options = labelled_options(options, "teacher", t)
    labels_options = labelled_options(options, "labels", s)
    # As many image passes as the student: an anchor takes 1 + NEGATIVES, an image `views` of them.
    passes = options.epochs * options.views / (1 + train.NEGATIVES)
    labels_options.epochs = max(1, round(passes))
    classes, others = len(set(training.labels)), len(set(test.labels))
    say(
        f"The paper in miniature, on {len(training)} drawn eggs of {classes} classes:",
        f"  1. labels at {s} px: the baseline, trained for as many image passes as the student",
        f"  2. the teacher: trained with labels at {t} px",
        f"  3. the student: learns without labels to embed at {s} px as the teacher does at {t} px",
        f"Then {len(test)} images of {others} other classes are searched for each other.",
    )
    progress = Progress("", announce=True)
    labels_time, teacher_time, student_time = 0.15, 0.45, 0.4  # shares, as measured on a CPU
    progress.stage(f"1. labels, {s} px", labels_time)
    labels = train.train(training, labels_options, progress=progress)
    progress.stage(f"2. teacher, {t} px", teacher_time)
    teacher = train.train(training, teacher_options, progress=progress)
    progress.stage(f"3. student, {s} px", student_time)
    student = distill(teacher, training, options, progress=progress)
    finish(teacher, student, training, test, options, [labels])
    say(
        f"  teacher, symmetric    queries and database at {t} px: what there is to reach",
        f"  no distillation       the teacher's own embedding of {s} px queries in that database",
        f"  labels, symmetric     trained with labels at {s} px, in a database of its own",
        f"  student, asymmetric   {s} px queries in the teacher's database: the paper's claim",
        f"  student, symmetric    {s} px queries in a {s} px database of the student's own",
    )


def labelled_options(options, name, size):
    """train.py's options for the teacher or the baseline of the miniature."""
    argv = ["--dataset", "synthetic", "--size", size, "--out", f"{options.out}/{name}"]
    argv += ["--arch", options.arch, "--dim", options.dim, "--seed", options.seed]
    argv += ["--workers", options.workers, "--precision", options.precision]
    argv += ["--device", options.device] if options.device else []
    argv += ["--validation"] if options.validation else []
    return train.settle(train.parse_options([str(word) for word in argv]))


def finish(teacher, student, training, test, options, supervised=()):
    """The closing table and picture of a student."""
    figure = f"{options.out}/queries.png"
    hardware = {"device": options.device, "workers": options.workers}
    if test.labels is None:
        compare_unlabelled(teacher, student, test, training, figure=figure, **hardware)
    else:
        compare(teacher, [student], test, supervised, figure=figure, **hardware)
    say(f"student: {options.out}/model.pt    picture: {figure}")


# --------------------------------------------------------------------------- options, the program


def parse_options(argv=None):
    """The command line, and nothing else."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog=train.describe_recipes(RECIPES),
        formatter_class=train.HELP_FORMAT,
        usage="%(prog)s [options]",
    )
    train.add_common_options(parser)
    add = parser.add_argument
    add("--teacher", help="checkpoint or released name; needed but for synthetic and --unlabelled")
    add("--teacher-size", type=positive_int, help="side in px of the teacher's images (*)")
    add("--student-size", type=positive_int, help="side in px of the student's images (*)")
    add("--unlabelled", action="store_true", help="a folder in any arrangement, without labels")
    add("--views", type=positive_int, help="A, augmented views of an image (*)")
    add("--no-mixup", action="store_true", help="views are not mixed with those of other images")
    add("--regression", action="store_true", help="no augmentation, absolute term: an ablation")
    add("--lambda-ts", type=float, help="weight of the teacher-student term (*)")
    add("--lambda-ss", type=float, help="weight of the student-student term (*)")
    return parser.parse_args(argv)


def settle(options):
    """Fill in what the command line leaves open.

    The command line counts before the teacher's checkpoint (architecture, size, dimensions,
    weights, data set, classes, validation), and that before the data set's recipe.

    Returns the teacher, or None where no --teacher is given.
    """
    options.classes, teacher = {}, None
    if options.teacher:
        teacher, content = load_network(options.teacher)
        inherit_from_teacher(options, teacher, content.get("options", {}))
    options.dataset = options.dataset or "synthetic"
    options.dataset, options.root = settle_dataset(options.dataset, options.root)
    if options.dataset in RECIPES and options.unlabelled:
        raise UserError("--unlabelled needs a folder of images as --dataset")
    folder = options.root or options.dataset
    if options.dataset not in RECIPES and not options.unlabelled and has_images_directly(folder):
        say(f"note: images directly in {folder}: taken as without labels")
        options.unlabelled = True
    if options.unlabelled and teacher is None:
        if options.dim:
            raise UserError("--dim needs a --teacher: an ImageNet network itself is unwhitened")
        options.dim = 0
    train.fill_in(options, RECIPES)
    train.name_run(options, f"{options.teacher_size}to{options.student_size}")
    train.settle_classes(options)
    return teacher


def inherit_from_teacher(options, teacher, saved):
    """Take what the command line leaves open from the teacher's checkpoint."""
    options.arch = options.arch or teacher.arch
    options.teacher_size = options.teacher_size or teacher.size
    # Of an unwhitened teacher the same backbone has its D already; another one needs a layer to D.
    if options.dim is None:
        whitened = isinstance(teacher.whiten, torch.nn.Linear)
        options.dim = teacher.dim if whitened or options.arch != teacher.arch else 0
    if options.arch == teacher.arch:
        options.weights = options.weights or saved.get("weights")
    if options.dataset is None:
        if "dataset" not in saved:
            raise UserError("--dataset is needed: the teacher's checkpoint does not name one")
        options.dataset, options.root = saved["dataset"], options.root or saved["root"]
        options.unlabelled = options.unlabelled or saved["unlabelled"]
    name, _ = settle_dataset(options.dataset, options.root)
    if name == saved.get("dataset"):
        options.classes = saved["classes"]
        if options.validation and not saved["validation"]:
            raise UserError("--validation: the teacher was trained on the validation classes, too")
        options.validation = saved["validation"]


def imagenet_teacher(options):
    """An ImageNet network as it comes, unwhitened, as the teacher of images without labels."""
    return train.new_network(options, "gem", options.teacher_size).eval()


def main():
    options = parse_options()
    teacher = settle(options)
    if teacher is None and options.dataset == "synthetic":
        return miniature(options)
    training, test = train.load_images(options)
    if teacher is None:
        if not options.unlabelled:
            raise UserError("--teacher is needed: train.py makes one; --unlabelled does without")
        teacher = imagenet_teacher(options)
    student = distill(teacher, training, options)
    if options.teacher is None and process_rank() == 0:  # to index and search with
        save_checkpoint(f"{options.out}/teacher.pt", teacher, options=vars(options))
    finish(teacher, student, training, test, options)


if __name__ == "__main__":
    run_program(main, mistakes=(NetworkError,))

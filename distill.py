"""Distil a student (Sec. 3.3), without labels: small images, embedded as the teacher's large ones.

    python distill.py                                                   # the paper in miniature
    python distill.py --teacher runs/cub-448-seed1234/model.pt --student-size 224      # the paper
    python distill.py --dataset PHOTOS --unlabelled --student-size 224  # any folder of photographs

The first command needs no data: it draws some, trains a baseline with labels and a teacher, and
distils a student, in a few minutes on a CPU. In the last one the teacher has --weights, too.
"""

import copy
from pathlib import Path

import torch
from torch.utils.data import BatchSampler

import train
from asymres import (
    absolute_term,
    distillation_loss,
    fingerprint,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from data import (
    DistillationLoader,
    EpochSampler,
    UserError,
    evaluation_loader,
    has_images_directly,
    normalize,
    process_rank,
    say,
    settle_dataset,
)
from evaluate import (
    Progress,
    autocast,
    compare,
    compare_unlabelled,
    extract,
    find_device,
    load_network,
    new_parser,
    number,
    run_program,
    trained_on,
)

# The defaults that depend on the data set; "folder" is any other one. Those for CUB, Cars and SOP
# are the paper's.
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
    epochs=3,
    batch_size=8,
    micro_batch=8,
    views=8,
    min_scale=0.7,
    lr=6e-3,
    lambda_ts=0.75,
    lambda_ss=0.75,
)
# The learning rate and batch size were tried on rendered products, with a smaller network.
FOLDER = CUB | dict(epochs=5, batch_size=16, lr=3e-4)
RECIPES = {"cub": CUB, "cars": CARS, "sop": SOP, "folder": FOLDER, "synthetic": EGGS}

# ------------------------------------------------------------------------------------- distillation


def distill(teacher, dataset, options, student=None, progress=None):
    """Distil a student, or resume its run. Returns the student, in eval mode.

    teacher   an EmbeddingNet, which is then frozen
    dataset   an ImageDataset, whose labels are not read
    options   see `parse_options` and `complete_options`
    student   an EmbeddingNet; by default the one that the options describe
    """
    prepare_teacher(teacher, options)
    student, run = start_run(teacher, dataset, options, student, progress)
    loader = DistillationLoader(
        dataset,
        options.student_size,
        options.teacher_size,
        views=options.views,
        batch_size=run.micro_batch,  # run.accumulate of these make a step
        mixup=not options.no_mixup,
        workers=options.workers,
        device=run.device,
        seed=options.seed,
        min_scale=options.min_scale,
        epoch_size=options.epoch_size,
    )
    for epoch in range(run.first_epoch, options.epochs):
        run.begin_epoch()
        loader.set_epoch(epoch)
        distill_one_epoch(teacher, student, loader, run, options)
        run.end_epoch()
    return student.eval()


def distill_one_epoch(teacher, student, loader, run, options):
    """The student learns to embed small views as the teacher embeds the same views, large."""
    student.train()
    for i, (small, large) in enumerate(loader, start=1):  # views (B, A, 3, H, W) at two sizes
        with autocast(run.device, options.precision):
            with torch.no_grad():
                t = teacher(large)  # (B, A, D)
            s = student(small)  # (B, A, D)
        loss = distillation_loss(s, t, options.lambda_ts, options.lambda_ss)
        loss.backward()
        run.add(loss)
        if run.step_is_due(i, len(loader)):
            run.step()  # AdamW and its schedule; gradients are zeroed


def prepare_teacher(teacher, options):
    """Freeze the teacher, in eval mode, on the device; it sees images of teacher_size px."""
    teacher.to(find_device(options.device), memory_format=torch.channels_last)
    teacher.eval().requires_grad_(False)
    teacher.size = options.teacher_size


def start_run(teacher, dataset, options, student=None, progress=None):
    """(student, its run), new or resumed. Raises UserError if their dimensions differ."""
    if student is None:
        student = new_student(teacher, options)
    student.size = options.student_size
    options.arch, options.dim = student.arch, student.whitening
    if student.dim != teacher.dim:
        raise UserError(
            f"the student has {student.dim} dimensions and the teacher {teacher.dim}: give --dim "
            f"{teacher.dim}"
        )
    count = len(EpochSampler(len(dataset), options.epoch_size))  # images per epoch and process
    run = train.Run(
        student,
        options,
        count,
        teacher_fingerprint=fingerprint(teacher),
        progress=progress,
    )
    run.resume()
    return student, run


def new_student(teacher, options):
    """The student before its training, with weights of ImageNet, a file or the teacher."""
    if options.weights != "teacher":
        return train.new_network(options, teacher.pooling, options.student_size)
    if options.arch != teacher.arch:
        raise UserError(f"--weights teacher: the teacher is {teacher.arch}, not {options.arch}")
    return copy.deepcopy(teacher).requires_grad_(True)


# ----------------------------------------------------- an ablation: regression without augmentation


def regress(teacher, dataset, options, student=None, progress=None):
    """The ablation without augmentation, in place of `distill`: only the absolute term (Eq. 3).

    Images are evaluation crops, which the teacher embeds once, in float32.
    """
    prepare_teacher(teacher, options)
    targets = extract(
        teacher, dataset, options.teacher_size, options.device, workers=options.workers
    )  # (N, D)
    student, run = start_run(teacher, dataset, options, student, progress)
    targets = targets.to(run.device)
    sampler = EpochSampler(len(dataset), options.epoch_size, options.seed)
    for epoch in range(run.first_epoch, options.epochs):
        run.begin_epoch()
        sampler.set_epoch(epoch)
        batches = list(BatchSampler(sampler, run.micro_batch, drop_last=False))
        crops = evaluation_loader(
            dataset, options.student_size, batches, options.workers, run.device
        )
        student.train()
        for i, (rows, images) in enumerate(zip(batches, crops, strict=True), start=1):
            images = normalize(images.to(run.device) / 255)  # (B, 3, s, s)
            with autocast(run.device, options.precision):
                s = student(images)  # (B, D)
            loss = absolute_term(s[:, None], targets[rows][:, None])  # A = 1
            loss.backward()
            run.add(loss)
            if run.step_is_due(i, len(batches)):
                run.step()
        run.end_epoch()
    return student.eval()


# --------------------------------------------------------------------------- the paper in miniature


def miniature(options):
    """On drawn eggs: the baseline with labels, the teacher, the student, and a table of them."""
    training, test = train.load_images(options)
    teacher_options = labelled_options(options, "teacher", options.teacher_size)
    baseline_options = labelled_options(options, "labels", options.student_size)
    # As many image passes as the student has; an anchor takes 1 + NEGATIVES of them.
    passes = options.epochs * (1 if options.regression else options.views)
    baseline_options.epochs = max(1, round(passes / (1 + train.NEGATIVES)))
    train_classes, test_classes = len(set(training.labels)), len(set(test.labels))
    large, small = f"{options.teacher_size} px", f"{options.student_size} px"
    say(
        f"The paper in miniature, on {len(training)} drawn eggs of {train_classes} classes:",
        f"  1. labels at {small}: the baseline, trained for as many image passes as the student",
        f"  2. the teacher: trained with labels at {large}",
        f"  3. the student: learns without labels to embed at {small} as the teacher does at "
        f"{large}",
        f"Then {len(test)} images of {test_classes} other classes are searched for each other.",
    )
    progress = Progress("", announce=True)
    baseline_time, teacher_time, student_time = 0.14, 0.57, 0.29  # shares, measured on a CPU
    progress.stage(f"1. labels, {small}", baseline_time)
    baseline = train.train(training, baseline_options, progress=progress)
    progress.stage(f"2. teacher, {large}", teacher_time)
    teacher = train.train(training, teacher_options, progress=progress)
    progress.stage(f"3. student, {small}", student_time)
    learn = regress if options.regression else distill
    student = learn(teacher, training, options, progress=progress)
    finish(teacher, student, training, test, options, [baseline])
    say(
        f"  teacher, symmetric    queries and database at {large}: the goal",
        f"  no distillation       {small} queries in that database, but embedded by the teacher",
        f"  labels, symmetric     trained with labels at {small}, in a database of its own",
        f"  student, asymmetric   {small} queries in the teacher's database: the paper's claim",
        f"  student, symmetric    {small} queries in a {small} database of the student's own",
    )


OF_ALL_THREE = ("arch", "dim", "seed", "validation", "workers", "device", "precision")


def labelled_options(options, name, size):
    """train.py's options for the miniature's teacher or baseline.

    Options of all three networks are the student's; the others have train.py's defaults.
    """
    argv = ["--dataset", "synthetic", "--size", str(size), "--out", f"{options.out}/{name}"]
    labelled = train.parse_options(argv)
    for option in OF_ALL_THREE:
        setattr(labelled, option, getattr(options, option))
    return labelled


def finish(teacher, student, training, test, options, supervised=()):
    """Print and draw what the student finds, in float32 whatever the precision of training."""
    where = {"device": options.device, "workers": options.workers}
    figure = f"{options.out}/queries.png"
    if test.labels is None:
        compare_unlabelled(teacher, student, test, training, figure=figure, **where)
    else:
        compare(teacher, [student], test, supervised, figure=figure, **where)
    say(f"student: {options.out}/model.pt    picture: {figure}")


# ----------------------------------------------------------------------------- options, the program
#
# An option is None until it is settled. In this order: the command line; --dataset and --root
# (`settle_dataset`); the teacher's checkpoint (`options_of_teacher`); the recipe of the data set
# (`train.fill_in_defaults`); --out (`train.run_folder`); --classes (`train.load_images`).


def parse_options(argv=None):
    """Parse the command line; what it leaves open is None until `complete_options`."""
    epilog = (
        train.describe_recipes(RECIPES)
        + "\nA --teacher's size, network and --dim replace these; --unlabelled alone has --dim 0."
        "\nIn the miniature --epochs, --batch-size, --lr and --min-scale are the student's."
    )
    parser = new_parser(__doc__, epilog)
    add = parser.add_argument
    add(
        "--teacher",
        metavar="FILE",
        help="checkpoint or released name; not needed for synthetic and --unlabelled",
    )
    add(
        "--dataset",
        metavar="NAME",
        help="cub, cars, sop, synthetic or a folder (the teacher's, or synthetic)",
    )
    add("--root", metavar="FOLDER", help="folder that holds the data set (the teacher's)")
    add(
        "--unlabelled",
        action="store_true",
        default=None,  # so that a student can take its teacher's
        help="the data set is any folder of images, without labels",
    )
    add("--teacher-size", type=number(int, 1), metavar="PX", help="image size of the teacher (*)")
    add("--student-size", type=number(int, 1), metavar="PX", help="image size of the student (*)")
    add(
        "--weights",
        metavar="NAME",
        help="initial weights: imagenet, random, teacher or a file (*)",
    )
    add("--views", type=number(int, 1), metavar="A", help="augmented views per image (*)")
    add("--no-mixup", action="store_true", help="do not mix views with those of other images")
    add("--regression", action="store_true", help="ablation: no augmentation, only absolute term")
    add(
        "--lambda-ts",
        type=number(float, 0),
        metavar="X",
        help="weight of the teacher-student term (*)",
    )
    add(
        "--lambda-ss",
        type=number(float, 0),
        metavar="X",
        help="weight of the student-student term (*)",
    )
    train.add_common_options(parser)
    return parser.parse_args(argv)


def load_teacher(options):
    """(the network of --teacher, the options of its training); (None, {}) if there is none."""
    if not options.teacher:
        return None, {}
    teacher, about = load_network(options.teacher)
    return teacher, about.options


def complete_options(options, teacher=None, trained=None):
    """Fill in what the command line leaves open: from the teacher, or else from the recipe.

    trained: the options of the teacher's training, from `load_teacher`; {} if they are not known.
    Raises UserError if options contradict each other.
    """
    trained = trained or {}
    name = options.dataset or trained.get("dataset")
    if name is None and teacher is not None:
        raise UserError("--dataset is needed: the teacher's checkpoint does not name one")
    options.dataset, options.root = settle_dataset(name or "synthetic", options.root)
    trained = trained_on(options.dataset, trained)
    folder = options.dataset not in RECIPES
    if folder and not options.unlabelled and has_images_directly(options.dataset):
        say(f"{options.dataset} has images directly in it: it is taken without labels")
        options.unlabelled = True

    train.fill_in(options, options_of_teacher(options, teacher, trained))
    train.fill_in_defaults(options, RECIPES)
    options.out = train.run_folder(options, f"{options.teacher_size}to{options.student_size}")
    check_options(options, teacher, trained)


def options_of_teacher(options, teacher, trained):
    """The options that a student takes from its teacher; trained: {} if it saw other images."""
    taken = {}
    if teacher is not None:
        taken |= {"arch": teacher.arch, "teacher_size": teacher.size}
        if options.arch in (None, teacher.arch):
            taken["dim"] = teacher.whitening  # the same layers: 0 where the teacher has none
        else:
            taken["dim"] = teacher.dim  # another backbone needs a layer to have as many
    elif options.unlabelled:
        taken["dim"] = 0  # as the plain ImageNet network that will be the teacher
    if trained:
        names = ("root", "unlabelled", "validation", "classes")
        taken |= {name: trained.get(name) for name in names}
    return taken


def check_options(options, teacher, trained):
    """Raise UserError if options contradict each other or the teacher's training."""
    if options.regression and options.no_mixup:
        raise UserError("--no-mixup: --regression has no mixup")
    if options.student_size > options.teacher_size:
        say("note: the student's images are larger than the teacher's")
    if options.unlabelled and options.dataset in RECIPES:
        raise UserError("--unlabelled needs a folder of images as --dataset")
    if teacher is None and options.dataset != "synthetic" and not options.unlabelled:
        without = "" if options.dataset in RECIPES else "; --unlabelled does without"
        raise UserError(
            f"--teacher is needed: train.py --dataset {options.dataset} makes one{without}"
        )
    if options.validation and trained and not trained.get("validation"):
        raise UserError("--validation: the teacher was trained on the validation classes, too")


def imagenet_teacher(options):
    """A plain ImageNet network, or one of --weights, as the teacher of images without labels.

    It has no whitening layer.
    """
    if options.dim:
        raise UserError("--dim needs a --teacher: a plain ImageNet network has no whitening layer")
    weights = options.weights
    if weights == "teacher":  # about the student, which copies this plain network
        weights = "imagenet"
    if weights == "random":
        say("note: --weights random: the teacher is untrained")
    return train.new_network(options, "gem", options.teacher_size, weights).eval()


def keep_teacher(teacher, options):
    """Save an ImageNet teacher beside the student, for evaluate.py, unless --out holds another run.

    Raises UserError if it does.
    """
    run, path = Path(options.out, "model.pt"), Path(options.out, "teacher.pt")
    if run.exists():
        train.refuse_other_run(read_checkpoint(run), options, fingerprint(teacher))
    if path.exists() and fingerprint(load_checkpoint(path)) != fingerprint(teacher):
        raise UserError(f"{path} is another teacher: give another --out")
    if process_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, teacher, options=vars(options))


def main():
    options = parse_options()
    find_device(options.device)  # an impossible --device ends the program before it reads files
    teacher, trained = load_teacher(options)
    complete_options(options, teacher, trained)
    if teacher is None and options.dataset == "synthetic":
        return miniature(options)
    train.find_images(options)
    plain = teacher is None
    if plain:
        teacher = imagenet_teacher(options)
    student = new_student(teacher, options)  # or its mistake, before files are read or written
    training, test = train.load_images(options)
    if plain:
        keep_teacher(teacher, options)
    learn = regress if options.regression else distill
    student = learn(teacher, training, options, student)
    finish(teacher, student, training, test, options)


if __name__ == "__main__":
    run_program(main)

"""The student: distillation without labels from large to small resolution (Sec. 3.3), and the paper in miniature.

    python distill.py                                                   # the embedded data set: minutes on two cores
    python distill.py --teacher runs/cub-448/model.pt --student-size 224            # the paper's setting, one GPU

Without --teacher, the teacher and a baseline with labels at the small size, which sees as many images as the student,
are trained first, by train.py's code, in folders of this run's own. The run ends with a table of what small queries
find in the database of large images.
"""
import argparse
import os

import torch

from asymres import absolute_term, fingerprint, load_checkpoint, ss_term, ts_term
from data import Decoder, Views, evaluation_batches, load_dataset, run_command, seeded, warn
from evaluate import draw_queries, embed, extract, print_table, trade_off
from train import NEGATIVES, RECIPES, draw_groups, fit, free_folder, new_network, parser, settle, train

TERMS = ["absolute", "teacher-student", "student-student"]


def parse(argv):
    """The options of a command line and the teacher, if one is given, whose data set, network and start are inherited."""
    command = parser("student", __doc__.split("\n\n")[0])
    add = command.add_argument
    add("--teacher", help="its checkpoint or the name of a released one; without it a teacher is trained")
    add("--teacher-size", type=int, help="side of the teacher's images in px")
    add("--student-size", type=int, help="side of the student's images in px")
    add("--copies", type=int, help="A, the views of an image")
    add("--mixup", action=argparse.BooleanOptionalAction, default=True, help="mix each view with one of another image")
    add("--lambda-ts", type=float, help="weight of the teacher-student relations")
    add("--lambda-ss", type=float, help="weight of the student-student relations")
    add("--regression", action="store_true", help="no augmentation: absolute term only, on fixed teacher embeddings")
    options = command.parse_args(argv)
    if not options.teacher:
        return settle(options, "student"), None
    teacher = load_checkpoint(options.teacher)
    inherited = {name: teacher.options.get(name) for name in ("dataset", "root")}
    inherited |= {"arch": teacher.arch, "dim": 0 if isinstance(teacher.whiten, torch.nn.Identity) else teacher.dim, "teacher_size": teacher.size}
    if options.arch in (None, teacher.arch) and teacher.options.get("weights") != "teacher":
        inherited["weights"] = teacher.options.get("weights")
    return settle(options, "student", inherited, teacher), teacher


def distill(teacher, options):
    """Distil a student of `teacher` as `options` say, or continue, or load it if done. -> EmbeddingNet in eval mode."""
    if teacher.size not in (None, options.teacher_size):
        warn(f"the teacher was trained at {teacher.size} px and is used at {options.teacher_size}")
    if options.student_size > options.teacher_size:
        warn(f"the student's images ({options.student_size} px) are larger than the teacher's ({options.teacher_size})")
    options.teacher_weights = fingerprint(teacher)
    options.out = options.out or free_folder(options, f"{options.teacher_size}to{options.student_size}")
    dataset = load_dataset(options.dataset, options.root, "fit" if options.validation else "train")
    teacher.to(options.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    student = first_student(teacher, options)
    how = dict(device=options.device, workers=options.workers)
    if options.regression:
        batches, losses = regression(student, teacher, dataset, options, how)
    else:
        views = Views(dataset, (options.student_size, options.teacher_size), options.copies, least=options.crop, jitter=True,
                      mixup=options.mixup, seed=options.seed, **how)
        batches = views.epoch

        def losses(rows, small, large):                                             # (B,A,3,s,s), (B,A,3,t,t)
            s = embed(student, small, options.precision)                            # (B, A, D)
            with torch.no_grad():
                t = embed(teacher, large, options.precision)                        # (B, A, D)
            return torch.stack([absolute_term(s, t), options.lambda_ts * ts_term(s, t), options.lambda_ss * ss_term(s, t)])
    order = lambda epoch: torch.randperm(len(dataset), generator=seeded(options.seed, epoch, 0))[:options.images]
    return fit(student, order, batches, losses, TERMS[:1] if options.regression else TERMS, options)


def regression(student, teacher, dataset, options, how):
    """What `fit` needs for the ablation without augmentation: A = 1, evaluation transform, teacher embedded once."""
    targets = extract(teacher, dataset, options.teacher_size, precision=options.precision, **how).to(options.device)
    decoder = Decoder(dataset, **how)

    def batches(_, rows, parts):
        return ((images[:, None],) for _, images in evaluation_batches(decoder, rows, parts, options.student_size,
                                                                       options.device))

    def losses(rows, images):                                                       # (B, 1, 3, s, s)
        return absolute_term(embed(student, images, options.precision), targets[rows][:, None])[None]
    return batches, losses


def first_student(teacher, options):
    """The student before its first step: weights as `options.weights` says, with its own whitening layer."""
    if options.weights == "teacher" and options.arch != teacher.arch:
        raise ValueError(f"--weights teacher: the student is a {options.arch}, the teacher a {teacher.arch}")
    student = new_network(options, teacher.pooling, options.student_size)
    if options.weights == "teacher":
        student.load_state_dict(teacher.state_dict())
        student.frozen_batchnorm = teacher.frozen_batchnorm
    if student.dim != teacher.dim:
        raise ValueError(f"--dim {options.dim}: the teacher has {teacher.dim} dimensions, the student {student.dim}, and they "
                         "share one space")
    student.teacher = options.teacher_weights
    return student


def labelled(options, size, name, **changes):
    """The options of train.py's function for the teacher (large) or the baseline (small) of this run, in its folder."""
    shared = ("dataset", "root", "arch", "dim", "weights", "validation", "seed", "precision", "device", "workers")
    shared = {key: getattr(options, key) for key in shared}
    if options.weights == "teacher":
        del shared["weights"]
    recipe = {**RECIPES["teacher"][options.dataset], "pooling": "gem", "out": os.path.join(options.out, name)}
    return argparse.Namespace(**{**recipe, **shared, **changes, "size": size})


def fair_epochs(options):
    """Epochs in which a network that is trained with labels sees as many images as the student."""
    labels = torch.tensor(load_dataset(options.dataset, options.root, "fit" if options.validation else "train").labels)
    anchors = len(draw_groups(labels, options.images, seeded(0)))
    views = min(options.images, len(labels)) * (1 if options.regression else options.copies)
    return max(1, round(options.epochs * views / (anchors * (1 + NEGATIVES))))


def main(argv=None):
    options, teacher = parse(argv)
    baselines = []
    if not teacher:
        options.out = options.out or free_folder(options, f"{options.teacher_size}to{options.student_size}")
        teacher = train(labelled(options, options.teacher_size, "teacher"))
        baselines = [train(labelled(options, options.student_size, "baseline", epochs=fair_epochs(options)))]
    student = distill(teacher, options)
    test = load_dataset(options.dataset, options.root, "val" if options.validation else "test")
    rows, found = trade_off(teacher, [student], test, baselines, options.teacher_size, device=options.device,
                            workers=options.workers, precision=options.precision)
    print_table(rows)
    if rows:
        draw_queries(os.path.join(options.out, "queries.png"), test, found, seed=options.seed)
    print(f"student: {options.out}/model.pt   picture: {options.out}/queries.png")


if __name__ == "__main__":
    run_command(main)

"""The student: distillation without labels from large to small resolution (Sec. 3.3), and the paper in miniature.

    python distill.py                                                   # the embedded data set: 4 minutes on two cores
    python distill.py --teacher runs/cub-448/model.pt --student-size 224            # the paper's setting, one GPU

Without --teacher, the teacher and the baseline with labels at the small size are trained first, by train.py's code,
or taken from runs/ where they are. The run ends with a table of what small queries find in the database of large images.
Expect R@1 (seeds 1-3): teacher 94-97, its own small queries 2-3, labels at the small size 11-42, student 81-94.
"""
import argparse
import os
import sys

import torch

import train
from asymres import absolute_term, fingerprint, load_checkpoint, ss_term, ts_term
from data import ViewLoader, load_dataset, run_command, seeded, warn
from evaluate import draw_figure, extract, print_table, trade_off
from train import check_options, common_options, embed, fit, named_dataset, new_network, recipe


def parse(argv):
    """The options of a command line; defaults by data set, which the teacher's checkpoint tells if nobody else does."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--teacher")
    path = first.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].teacher
    teacher = load_checkpoint(path) if path else None
    theirs = teacher.options if teacher else {}
    dataset = named_dataset(argv, theirs.get("dataset", "synthetic"))
    default = recipe(dataset, "student")
    parser = common_options("student", __doc__.split("\n\n")[0], dataset)
    add = parser.add_argument
    add("--teacher", help="its checkpoint or the name of a released one; without it a teacher is trained")
    add("--teacher-size", type=int, default=default["large"], help="side of the teacher's images in px")
    add("--student-size", type=int, default=default["small"], help="side of the student's images in px")
    add("--copies", type=int, default=default["copies"], help="A, the views of an image")
    add("--mixup", action=argparse.BooleanOptionalAction, default=True, help="mix each view with one of another image")
    add("--lambda-ts", type=float, default=default["lambda_ts"], help="weight of the teacher-student relations")
    add("--lambda-ss", type=float, default=default["lambda_ss"], help="weight of the student-student relations")
    add("--regression", action="store_true", help="no augmentation: absolute term only, on fixed teacher embeddings")
    if teacher:
        parser.set_defaults(dim=teacher.dim, arch=teacher.arch, teacher_size=teacher.size or default["large"],
                            root=theirs.get("root"), weights=theirs.get("weights", default["weights"]))
    options = parser.parse_args(argv)
    name = os.path.basename(os.path.normpath(dataset))
    options.out = options.out or f"runs/{name}-{options.teacher_size}to{options.student_size}-seed{options.seed}"
    return options, teacher


def distill(teacher, options):
    """Distil a student of `teacher` as `options` say, or continue, or load it if done. -> EmbeddingNet in eval mode."""
    check_options(options)
    if teacher.dim != options.dim:
        raise ValueError(f"--dim {options.dim}: the teacher has {teacher.dim} dimensions, and the student shares its space")
    if teacher.size not in (None, options.teacher_size):
        warn(f"the teacher was trained at {teacher.size} px and is used at {options.teacher_size}")
    if options.student_size > options.teacher_size:
        warn(f"the student's images ({options.student_size} px) are larger than the teacher's ({options.teacher_size})")
    dataset = load_dataset(options.dataset, options.root, "fit" if options.validation else "train")
    freeze(teacher.to(options.device, memory_format=torch.channels_last))
    options.teacher_weights = fingerprint(teacher)
    student = first_student(teacher, options)
    sizes, copies, crop = (options.student_size, options.teacher_size), options.copies, (options.crop, 1.0)
    targets = None
    if options.regression:
        sizes, copies, crop = sizes[:1], 1, None
        targets = extract(teacher, dataset, options.teacher_size, device=options.device, workers=options.workers,
                          precision=options.precision).to(options.device)
    loader = ViewLoader(dataset, sizes, copies, crop_scale=crop, jitter=not options.regression, workers=options.workers,
                        mixup=options.mixup and not options.regression, device=options.device, seed=options.seed)
    order = lambda epoch: torch.randperm(len(dataset), generator=seeded(options.seed, epoch, 0))[:, None]
    return fit(student, loader, order, student_losses(student, teacher, targets, options), options)


def student_losses(student, teacher, targets, options):
    """For `train.fit`: the terms of asymres.distillation_loss; in regression mode the absolute one on fixed `targets`."""
    def losses(index, small, large=None):                                       # (B,A,3,s,s), (B,A,3,t,t)
        s = embed(student, small, options.precision)                            # (B, A, D)
        if options.regression:
            return {"absolute": absolute_term(s, targets[index][:, None])}
        with torch.no_grad():
            t = embed(teacher, large, options.precision)                        # (B, A, D)
        return {"absolute": absolute_term(s, t), "teacher-student": options.lambda_ts * ts_term(s, t),
                "student-student": options.lambda_ss * ss_term(s, t)}
    return losses


def freeze(teacher):
    """Nothing of the teacher moves: no batch-norm statistics, no gradients (and its forward passes record none)."""
    return teacher.eval().requires_grad_(False)


def first_student(teacher, options):
    """The student before its first step: weights as `options.weights` says, with its own whitening layer."""
    if options.weights == "teacher":
        if options.arch != teacher.arch:
            raise ValueError(f"--weights teacher: the student is a {options.arch}, the teacher a {teacher.arch}")
        options.weights = "random"
        student = new_network(options, teacher.pooling, options.student_size)
        student.load_state_dict(teacher.state_dict())
        student.frozen_batchnorm, options.weights = teacher.frozen_batchnorm, "teacher"
    else:
        student = new_network(options, teacher.pooling, options.student_size)
    student.teacher = options.teacher_weights
    return student


def labelled(options, size):
    """The options of train.py for the teacher (large) or the baseline (small) of this run."""
    shared = {name: getattr(options, name) for name in ("dataset", "root", "seed", "precision", "device", "workers")}
    argv = [part for name, value in shared.items() if value is not None for part in (f"--{name}", str(value))]
    return train.parse([*argv, "--size", str(size), "--dim", str(options.dim)] + ["--validation"] * options.validation)


def main(argv=None):
    options, teacher = parse(sys.argv[1:] if argv is None else argv)
    baseline = None
    if not teacher:
        check_options(options)
        teacher = train.train(labelled(options, options.teacher_size))
        baseline = train.train(labelled(options, options.student_size))
    student = distill(teacher, options)
    test = load_dataset(options.dataset, options.root, "val" if options.validation else "test")
    rows, embeddings = trade_off(teacher, [student], test, supervised=[baseline] if baseline else [],
                                 teacher_size=options.teacher_size, workers=options.workers, device=options.device)
    print_table(rows)
    picture = os.path.join(options.out, "queries.png")
    draw_figure(picture, test, embeddings, seed=options.seed)
    print(f"student: {options.out}/model.pt   picture: {picture}")


if __name__ == "__main__":
    run_command(main)

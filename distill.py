"""The student (Sec. 3.3): distillation without labels from large to small images. And the paper in miniature.

    python distill.py  # the embedded data set: minutes on two cores
    python distill.py --teacher runs/cub-448/model.pt --student-size 224  # the paper's setting, one GPU

Without --teacher one is trained first, and a baseline with labels at the small size that sees as many images,
both by train.py's recipe.
The table at the end: what small queries find in a database of large images.
"""
import argparse

import torch

from asymres import absolute_term, fingerprint, ss_term, ts_term
from data import Views, decoder, evaluation_batches, refuse, run_command, seeded
from evaluate import embed, extract
from train import (NEGATIVES, RECIPES, draw_groups, fit, free_folder, load_split, new_network, parse, table,
                   train)

def distill(teacher, options):
    """Distil a student of `teacher`, or continue, or load it if done. -> EmbeddingNet in eval mode."""
    small, large = options.student_size, options.teacher_size
    device, precision = options.device, options.precision
    options.teacher_weights = getattr(options, "teacher_weights", None) or fingerprint(teacher)
    options.out = options.out or free_folder(options, f"{large}to{small}")
    dataset, student = load_split(options), first_student(teacher, options)
    teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    terms = ["absolute", "teacher-student", "student-student"][:1 if options.regression else 3]
    if options.regression:  # A = 1: evaluation crops, and the teacher embeds them once
        decode = decoder(dataset, options.workers, device)
        targets = extract(teacher, dataset, large, device, precision=precision, decode=decode).to(device)
        crops = lambda rows, parts: evaluation_batches(decode, rows, parts, small, device)
        batches = lambda epoch, rows, parts: ((x[:, None], None) for _, x in crops(rows, parts))
    else:
        batches = Views(dataset, (small, large), options.copies, least=options.crop, jitter=True,
                        mixup=options.mixup, workers=options.workers, device=device, seed=options.seed).epoch
    order = lambda epoch: torch.randperm(len(dataset), generator=seeded(options.seed, epoch, 0))

    def losses(rows, x, y):  # (B, A, 3, s, s), (B, A, 3, t, t)
        with torch.no_grad():
            t = targets[rows][:, None] if options.regression else embed(teacher, y, precision)  # (B, A, D)
        s = embed(student, x, precision)  # (B, A, D)
        values = absolute_term(s, t), options.lambda_ts * ts_term(s, t), options.lambda_ss * ss_term(s, t)
        return torch.stack(values[:len(terms)])
    return fit(student, lambda epoch: order(epoch)[:options.images], batches, losses, terms, options)

def first_student(teacher, options):
    """The student before its first step, with the weights that options say."""
    copied = options.weights == "teacher"
    refuse(copied and options.arch != teacher.arch,
           f"--weights teacher: the student is a {options.arch}, the teacher a {teacher.arch}")
    student = new_network(options, teacher.pooling, options.student_size)
    refuse(student.dim != teacher.dim,
           f"--dim {options.dim}: the teacher has {teacher.dim} dimensions, not {student.dim}")
    if copied:
        student.load_state_dict(teacher.state_dict())
        student.frozen_batchnorm = teacher.frozen_batchnorm
    student.teacher, teacher.size = fingerprint(teacher), options.teacher_size
    return student

def with_labels(options, size, fair=False):
    """train.py's options for the teacher of a run, or for a baseline that sees as many images."""
    recipe = {**RECIPES["teacher"][options.dataset], "size": size}
    if options.forward < RECIPES["student"][options.dataset]["forward"]:  # lowered, for want of memory
        recipe["forward"] = max(4, options.forward // 4 * 4)
    shared = ["dataset", "root", "training_images", "validation", "arch", "dim", "seed", "precision",
              "device", "workers"] + ["weights"] * (options.weights != "teacher")
    if fair:
        dataset = load_split(options)
        anchors = len(draw_groups(torch.tensor(dataset.labels), recipe["images"], seeded(0)))
        views = min(options.images, len(dataset)) * (1 if options.regression else options.copies)
        recipe["epochs"] = max(1, round(options.epochs * views / (anchors * (1 + NEGATIVES))))
    return argparse.Namespace(**recipe | {key: getattr(options, key) for key in shared})

def main(argv=None):
    options, teacher = parse("student", __doc__.split("\n\n")[0], argv)
    baselines, large, small = [], options.teacher_size, options.student_size
    if not teacher:
        options.teacher_weights = "its own"  # not trained yet; the same options train the same one
        parts = {"baseline": with_labels(options, small, fair=True), "teacher": with_labels(options, large)}
        options.out = options.out or free_folder(options, f"{large}to{small}", parts.items())
        for part, own in parts.items():
            own.out = f"{options.out}/{part}"
        *baselines, teacher = map(train, parts.values())  # a size that is too small shows at once
    student = distill(teacher, options)
    table(options, teacher, [student], baselines, f"{options.out}/queries.png")
    print(f"student: {options.out}/model.pt   picture: {options.out}/queries.png")

if __name__ == "__main__":
    run_command(main)

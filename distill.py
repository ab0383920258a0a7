"""The student (Sec. 3.3): distillation without labels from large to small images. And the paper in miniature:
without --teacher one is trained first, and a baseline with labels at the small size that sees as many images.

    python distill.py  # the embedded data set: minutes on two cores
    python distill.py --teacher runs/cub-448/model.pt --student-size 224  # the paper's setting, one GPU
"""
import torch
from asymres import absolute_term, fingerprint, ss_term, ts_term
from data import Views, evaluation_batches, refuse, run_command, seeded
from evaluate import embed, extract, trade_off
from train import NEGATIVES, RECIPES, draw_groups, fit, load_split, new_network, parse, train

def distill(teacher, options):
    """Distil a student of `teacher`, or continue, or load it if done. -> EmbeddingNet in eval mode."""
    small, large, device, how = options.student_size, options.teacher_size, options.device, options.precision
    dataset, student = load_split(options), new_network(options, teacher.pooling, small)
    refuse(student.dim != teacher.dim or options.weights == "teacher" and options.arch != teacher.arch,
           f"--arch {options.arch} --dim {options.dim} --weights {options.weights}: the teacher, another, is "
           f"{teacher.arch} with {teacher.dim} dimensions")
    if options.weights == "teacher":
        student.load_state_dict(teacher.state_dict())
        student.frozen_batchnorm = teacher.frozen_batchnorm
    options.teacher_weights = student.teacher = fingerprint(teacher)
    teacher.size = large
    teacher.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    views = Views(dataset, (small, large), options.copies, least=options.crop, jitter=True,
                  mixup=options.mixup, workers=options.workers, device=device, seed=options.seed)
    order = lambda epoch: torch.randperm(len(dataset), generator=seeded(options.seed, epoch, 0))
    batches = views.epoch
    if options.regression:  # A = 1: evaluation crops, and the teacher embeds them once
        targets = extract(teacher, dataset, large, device, precision=how, decode=views.decode).to(device)
        crops = lambda rows, parts: evaluation_batches(views.decode, rows, parts, small, device)
        batches = lambda _, rows, parts: ((x[:, None], targets[rows[i], None]) for i, x in crops(rows, parts))

    def losses(x, y):  # (B, A, 3, s, s), (B, A, 3, t, t)
        with torch.no_grad():
            t = y if options.regression else embed(teacher, y, how)  # (B, A, D)
        s = embed(student, x, how)  # (B, A, D)
        return torch.stack([absolute_term(s, t), options.lambda_ts * ts_term(s, t),
                            options.lambda_ss * ss_term(s, t)])
    return fit(student, min(options.images, len(dataset)), lambda epoch: order(epoch)[:options.images],
               batches, losses, ["absolute", "teacher-student", "student-student"], options)

def with_labels(options, part):
    """train.py's options for the "teacher" of a run, or for a "baseline" that sees as many images."""
    names = ["dataset", "root", "training_images", "validation", "arch", "dim", "seed", "precision", "device",
             "workers"] + ["weights"] * (options.weights != "teacher")
    own = RECIPES["teacher"][options.dataset] | {name: getattr(options, name) for name in names}
    own.update(size=options.teacher_size, out=options.out and f"{options.out}/{part}")
    if options.forward < RECIPES["student"][options.dataset]["forward"]:  # lowered, for want of memory
        own["forward"] = max(4, options.forward // 4 * 4)
    if part == "baseline":
        views = min(options.images, options.training_images) * (1 if options.regression else options.copies)
        passes = len(draw_groups(load_split(options), own["images"], seeded(0))[0]) * (1 + NEGATIVES)
        own.update(size=options.student_size, epochs=max(1, round(options.epochs * views / passes)))
    return type(options)(**own)

def main(argv=None):
    options, nets = parse("student", __doc__.split("\n\n")[0], argv)
    *baselines, teacher = nets or [train(with_labels(options, part)) for part in ("baseline", "teacher")]
    student = distill(teacher, options)
    trade_off(teacher, [student], load_split(options, "test"), baselines, device=options.device,
              figure=f"{options.out}/queries.png", workers=options.workers, precision=options.precision)
    print(f"student: {options.out}/model.pt   picture: {options.out}/queries.png")

if __name__ == "__main__":
    run_command(main)

"""Evaluation (Sec. 4): exact retrieval metrics, accuracy against the cost of a query, and search.

    python evaluate.py --teacher T.pt --student S.pt --json table.json --figure queries.png
    python evaluate.py --teacher T.pt --database FOLDER --index photos.pt  # embed a folder, once, large
    python evaluate.py --student S.pt --index photos.pt --query IMAGE ...  # search it with small queries
"""
import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.flop_counter import FlopCounterMode

from asymres import fingerprint, load_checkpoint, read_checkpoint, write_atomically
from data import (PROCESSES, WORKERS, ImageSet, add_up, decoder, evaluation_batches, evaluation_crop,
                  list_images, load_dataset, refuse, run_command, settle_dataset)

FEW = 128  # correct images of a query: for more, its scores are sorted

@torch.no_grad()
def knn(queries, database, k, same_images=False, chunk=2 ** 26):
    """Scores and rows (Q, k) of the k best of (N, D) for each of (Q, D), best first; ties in any order."""
    refuse(k < 1, f"k must be a positive integer, not {k}")
    (database, room), k = _room(queries, database, chunk), min(k, len(database) - same_images)
    parts = torch.arange(len(queries)).split(len(room))
    found = [_scores(queries, database, rows, same_images, room).topk(k) for rows in parts]
    return tuple(map(torch.cat, zip(*found)))

@torch.no_grad()
def retrieval_metrics(queries, database, query_labels, database_labels, ks=(1, 2, 4, 8), same_images=True,
                      chunk=2 ** 26):
    """{metric: mean over queries, in [0, 1]} of queries (Q, D), database (N, D), integer labels (Q,), (N,).

    The n images with a query's label are correct, the j-th best of them has rank r, both from 0; at equal
    scores wrong images rank first. A query with n = 0 is left out, its image stays in the database.
    same_images: query i and row i are one image, no answer to itself. chunk: scores held at a time.

      R@k          1 if a correct image has rank < k
      P@k          share of correct images among the first min(k, 1 + rank of the last correct one)
      mAP          mean of (j/r + (j+1)/(r+1)) / 2, the trapezoid, where j/r is 1 if r = 0
      mAP@k        the same, summed over ranks < k, divided by min(n, k)
      R-Precision  share of correct images among the first n (Musgrave et al., 2020)
      MAP@R        (j+1)/(r+1), summed over ranks < n, divided by n (the same)

    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])  # 0 and 1 find each other behind 2: r = 1
    >>> retrieval_metrics(x, x, [7, 7, -1], [7, 7, -1], ks=(2,))
    {'mAP': 0.25, 'R-Precision': 0.0, 'MAP@R': 0.0, 'R@2': 1.0, 'P@2': 0.5, 'mAP@2': 0.25}
    """
    labels = [torch.as_tensor(x, device="cpu") for x in (query_labels, database_labels)]
    _check(queries, database, *labels, ks, same_images)
    (database, room), found = _room(queries, database, chunk), []
    longest = [x.to(room.dtype).norm(dim=1).max().item() for x in (queries, database)]
    rounding = 4 * torch.finfo(room.dtype).eps * longest[0] * longest[1]  # within it, scores are equal
    for rows, correct in _by_class_size(*labels, same_images, chunk):  # (q,), (q, n)
        correct, scores = correct.to(room.device), _scores(queries, database, rows, same_images, room)
        best = scores.gather(1, correct).sort(descending=True).values[:, :correct.shape[1] - same_images]
        wrong = scores.scatter_(1, correct, -torch.inf)
        before = _reaching(wrong, best - rounding)  # (q, n) wrong images before each correct one
        found.append(_metrics(before.double() + torch.arange(best.shape[1]).to(best), ks))
    refuse(not found, "no query has a correct image in the database")
    return {name: torch.cat([part[name] for part in found]).mean().item() for name in found[0]}

def _check(queries, database, query_labels, database_labels, ks, same_images):
    refuse(any(not isinstance(k, int) or k < 1 for k in ks), f"every k must be a positive integer, not {ks}")
    for name, x, labels in (("queries", queries, query_labels), ("database", database, database_labels)):
        refuse(x.ndim != 2 or not x.numel() or len(labels) != len(x),
               f"{name}: at least one row and a label each, not {tuple(x.shape)} and {len(labels)} labels")
        finite = x.isfinite().all(1)
        refuse(not finite.all(), f"{name}: embedding {int(finite.int().argmin())} is not finite")
    refuse(queries.shape[1] != database.shape[1],
           f"queries have {queries.shape[1]} dimensions and the database has {database.shape[1]}")
    refuse(same_images and not torch.equal(query_labels, database_labels),
           "same_images=True says that both sets are the same images, but their labels differ")

def _by_class_size(query_labels, database_labels, same_images, chunk):
    """Some queries (q,) at a time, whose classes have one size n, and the images of these classes (q, n)."""
    ordered, by_class = database_labels.sort()
    first = torch.searchsorted(ordered, query_labels)
    size = torch.searchsorted(ordered, query_labels, right=True) - first
    for n in size[size > same_images].unique().tolist():
        each = len(by_class) * (4 if n > FEW else 1) + 8 * n  # numbers a query; a sort takes more
        for rows in (size == n).nonzero()[:, 0].split(max(1, chunk // each)):
            yield rows, by_class[first[rows, None] + torch.arange(n)]

def _room(queries, database, chunk):  # the database in float32 at least, and room for scores, used again
    database = database.detach().to(torch.promote_types(database.dtype, torch.float32))
    return database, database.new_empty(max(1, min(len(queries), chunk // len(database))), len(database))

def _scores(queries, database, rows, same_images, room):  # (q, N), in `room`; -inf for a query's own image
    some, scores = queries[rows].detach().to(room), room[:len(rows)]
    if room.device.type == "cpu":  # on an AMD EPYC numpy's BLAS takes two thirds of the time of PyTorch's
        np.matmul(some.numpy(), database.numpy().T, out=scores.numpy())
    else:
        torch.mm(some, database.T, out=scores)  # (q, D) @ (D, N) -> (q, N)
    return scores.scatter_(1, rows[:, None].to(room.device), -torch.inf) if same_images else scores

def _reaching(scores, bounds):  # how many of a query's scores (q, N) reach each of its bounds (q, n)
    if bounds.shape[1] > FEW:
        return scores.shape[1] - torch.searchsorted(scores.sort().values, bounds.contiguous())
    total, width = torch.zeros_like(bounds), 512 if scores.device.type == "cpu" else scores.shape[1]
    for tile in scores.split(width, dim=1):  # stays in a CPU's cache for all bounds
        hits = torch.empty_like(tile)  # floats: adding bools is slow
        for p in range(bounds.shape[1]):
            total[:, p] += torch.ge(tile, bounds[:, p, None], out=hits).sum(1)
    return total

def _metrics(ranks, ks):  # {name: (q,)} from the ranks (q, n), ascending, of each query's correct images
    n, j = ranks.shape[1], torch.arange(ranks.shape[1]).to(ranks)
    precision, early = (j + 1) / (ranks + 1), (ranks < n).double()
    trapezoid = (torch.where(ranks > 0, j / ranks, 1) + precision) / 2
    metrics = {"mAP": trapezoid.mean(1), "R-Precision": early.mean(1), "MAP@R": (precision * early).mean(1)}
    for k in ks:
        found = (ranks < k).double()
        metrics |= {f"R@{k}": found.amax(1), f"P@{k}": found.sum(1) / (ranks[:, -1] + 1).clamp(max=k),
                    f"mAP@{k}": (trapezoid * found).sum(1) / min(n, k)}
    return metrics

def find_device(name=None):
    """torch.device of "cuda", "cuda:1" or "cpu"; by default CUDA if it is there, a card to each process."""
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    name += f":{os.environ.get('LOCAL_RANK', 0)}" * (name == "cuda")
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    refuse(name not in there, f"--device {name}: PyTorch finds only {', '.join(there)} here")
    if name != "cpu":
        torch.cuda.set_device(name)
    return torch.device(name)

def set_precision(name, device):
    """"bfloat16", for "auto" where the card has it, or "float32", which then means it: no TF32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    if name == "float32":
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    return name

def embed(net, images, precision="float32"):
    """Normalised images (..., 3, s, s) -> unit vectors (..., D), float32; `precision` is the backbone's."""
    flat = images.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return net(flat).unflatten(0, images.shape[:-3])

@torch.no_grad()
def extract(net, dataset, size, device=None, batch_size=32, workers=0, precision="float32", rows=None,
            decode=None):
    """Embeddings (N, D), float32, on the CPU, of the images `rows` (all by default) at `size` px.

    The network goes to `device`, in eval mode. Raises ValueError for an image that cannot be read; that of a
    lenient dataset becomes zeros. Work is shared under torchrun.
    """
    device, rows = find_device(device), range(len(dataset)) if rows is None else rows
    net, embeddings = net.to(device).eval(), torch.zeros(len(rows), net.dim)
    starts = range(0, len(rows), batch_size)[PROCESSES["rank"]::PROCESSES["count"]]
    parts = [slice(start, min(start + batch_size, len(rows))) for start in starts]
    decode = decode or decoder(dataset, workers, device)
    for places, images in evaluation_batches(decode, rows, parts, size, device):
        embeddings[places] = embed(net, images, precision).cpu()
    add_up(embeddings)
    return embeddings

@torch.no_grad()
def cost(net, size, device=None, precision="float32"):
    """GFLOPs (a multiply-add is 2) and median milliseconds on `device` of a query, pixels to embedding."""
    device = find_device(device)
    net, image, times = net.to(device).eval(), torch.zeros(1, 3, size, size, device=device), []
    with FlopCounterMode(display=False) as counter:
        net(image)
    for _ in range(30):
        started = time.perf_counter()
        embed(net, image, precision).cpu()  # waits for the device
        times.append(time.perf_counter() - started)
    return counter.get_total_flops() / 1e9, sorted(times)[15] * 1e3

def trade_off(teacher, students, dataset, supervised=(), ks=(1, 8), device=None, **how):
    """Accuracy against the cost of a query: rows (dicts) for print_table, embeddings for draw_queries.

    Networks know their `size`; `how` goes to extract. Under torchrun process 0 alone has rows.
    """
    device, large, rows = find_device(device), (teacher, teacher.size), []
    searches = [("teacher, symmetric", large, large)]
    searches += [("no distillation", (teacher, size), large) for size in {net.size: 0 for net in students}]
    searches += [("supervised, symmetric", (net, net.size), (net, net.size)) for net in supervised]
    for small in [(net, net.size) for net in students]:
        searches += [("student, asymmetric", small, large), ("student, symmetric", small, small)]
    sides = dict.fromkeys(side for _, *sides in searches for side in sides)
    found = {(net, size): extract(net, dataset, size, device, **how).to(device) for net, size in sides}
    for name, query, database in searches if PROCESSES["rank"] == 0 else ():
        metrics = retrieval_metrics(found[query], found[database], dataset.labels, dataset.labels, ks)
        gflops, milliseconds = cost(*query, device, how.get("precision"))
        rows.append({"": name, "network": query[0].arch, "query px": query[1], "database px": database[1],
                     **{key: 100 * metrics[key] for key in (*(f"R@{k}" for k in ks), "mAP")},
                     "GFLOPs/query": gflops, "ms/query": milliseconds})
    small = (students[0], students[0].size) if students else large
    return rows, {"database": found[large], "teacher": found[teacher, small[1]], "student": found[small],
                  "sizes": (small[1], large[1])}

def print_table(rows):
    """Rows of `trade_off` as text columns on stdout; recalls and mAP in per cent."""
    lines = [list(row) for row in rows[:1]]
    lines += [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())

def draw_queries(path, dataset, found, queries=6, top=8, seed=0):
    """A PNG of random queries as the student sees them, and what teacher and student find with them."""
    (small, large), labels = found["sizes"], dataset.labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [i for i, _ in zip((i for i in order if labels.count(labels[i]) > 1), range(queries))]
    tile, step, left, height = 132, 142, 424, 304  # px: an answer, and the next; where they begin; a query
    sheet = Image.new("RGB", (left + top * step, 46 + len(chosen) * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    title = f"queries, {small} px, and the nearest images, {large} px; green: same class, red: another"
    pen.text((10, 14), title, "black", font)
    for line, query in enumerate(chosen):
        shown, y = evaluation_crop(dataset.image(query), small), 56 + line * height
        sheet.paste(shown.resize((step + tile, step + tile), Image.NEAREST), (10, y))
        for name, caption in (("teacher", "no\ndistillation"), ("student", "student")):
            pen.text((left - 20, y + tile / 2), caption, "black", font, anchor="rm", align="right")
            nearest = knn(found[name][query:query + 1], found["database"], top + 1)[1][0]
            for place, image in enumerate(nearest[nearest != query][:top].tolist()):
                shown = evaluation_crop(dataset.image(image), large).resize((tile - 12, tile - 12))
                colour = "#1a9850" if labels[image] == labels[query] else "#d73027"
                sheet.paste(ImageOps.expand(shown, 6, colour), (left + place * step, y))
            y += step
    sheet.save(path, "PNG")

def build_index(teacher, folder, path, **how):
    """Write embeddings (N, D) and paths (N) of the images under `folder`. -> (N, unreadable paths)."""
    paths = list_images(folder)
    refuse(not paths, f"no images under {folder}")
    embeddings = extract(teacher, ImageSet([0] * len(paths), paths, lenient=True), teacher.size, **how)
    good = embeddings.any(1)
    kept, unreadable = ([paths[i] for i in rows.nonzero()] for rows in (good, ~good))
    refuse(not kept, f"none of the {len(paths)} images under {folder} can be read")
    if PROCESSES["rank"] == 0:
        index = {"embeddings": embeddings[good], "paths": kept, "network": fingerprint(teacher)}
        write_atomically(path, index)
    return len(kept), unreadable

def search(student, index, images, top=5, **how):
    """[(image, [(score, file), ...]), ...]: the nearest files of an index for every query image."""
    content = read_checkpoint(index)
    try:
        embeddings, paths, network = content["embeddings"], content["paths"], content["network"]
        dim = embeddings.shape[1]
    except (TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{index} is not an index that evaluate.py wrote") from error
    refuse(dim != student.dim, f"the student has {student.dim} dimensions, the index {index} has {dim}")
    ours = student.teacher or student.options  # a student of the authors does not say who its teacher is
    refuse(ours and network not in (student.teacher, fingerprint(student)),
           f"the index {index} was made by another network than the student's teacher")
    queries = extract(student, ImageSet([0] * len(images), images), student.size, **how)
    found = zip(images, *(x.tolist() for x in knn(queries, embeddings, top)))
    return [(image, [(s, paths[row]) for s, row in zip(scores, rows)]) for image, scores, rows in found]

def held_back(asked, dataset, root, *nets):
    """Whether validation classes stand in for test classes: as asked, or as nets trained on this set were."""
    own = [net.options for net in nets if net.options.get("dataset") == dataset]
    said = {bool(o.get("validation")) for o in own if dataset != "folder" or o.get("root") == root}
    said |= {asked} - {None}
    refuse(len(said) > 1, "--validation: networks and command line do not agree on the training classes")
    return True in said

def parse(argv):
    """The options of a command line; what cannot end well is refused before any work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--teacher", help="checkpoint, or name of a released one: the network of the database")
    add("--student", nargs="+", default=[], help="the networks of the queries")
    add("--supervised", nargs="+", default=[], help="networks trained with labels, for their own databases")
    add("--dataset", help="cub, cars, sop, synthetic or a folder; by default the teacher's")
    add("--root", help="where the data set is; by default where the teacher found it")
    add("--validation", action=argparse.BooleanOptionalAction, help="test on half of the training classes")
    add("--ks", type=int, nargs="+", default=[1, 8], help="the K of R@K (%(default)s)")
    add("--json", metavar="FILE", help="write the table for machines")
    add("--figure", metavar="FILE.png", help="draw what the first student's queries find")
    add("--database", metavar="FOLDER", help="embed the images under this folder ...")
    add("--index", metavar="FILE", help="... into this file; or, with --query, search it")
    add("--query", nargs="+", metavar="IMAGE", help="images to search for")
    add("--top", type=int, default=5, help="answers to a query (%(default)s)")
    add("--precision", choices=("auto", "bfloat16", "float32"), default="float32", help="of the backbone")
    add("--device", help="cuda or cpu; by default CUDA where there is one")
    add("--workers", type=int, default=WORKERS, help="processes that load images (%(default)s)")
    options = parser.parse_args(argv)
    query, index, students = options.query, options.index, len(options.student)
    refuse(query and not (index and students == 1), "--query needs an --index FILE and one --student")
    refuse(not query and not options.teacher, "--teacher is needed (or --student, --index and --query)")
    refuse(not query and bool(options.database) != bool(index), "--database and --index FILE go together")
    refuse(min(*options.ks, options.top) < 1 or options.workers < 0, "--ks, --top or --workers is too small")
    refuse(options.figure and not students, "--figure needs a --student")
    for path in filter(None, (options.json, options.figure, not query and index)):
        writable = os.access(os.path.dirname(path) or ".", os.W_OK) and not os.path.isdir(path)
        refuse(not writable, f"{path} cannot be written: a file in a folder that is there is needed")
    return options

def main(argv=None):
    options = parse(argv)
    device = find_device(options.device)
    how = dict(device=device, workers=options.workers, precision=set_precision(options.precision, device))
    paths = options.student if options.query else [options.teacher, *options.student, *options.supervised]
    nets = [load_checkpoint(path) for path in paths]
    for path, net in zip(paths, nets):
        refuse(not net.size, f"{path} does not say at which size it was trained, as cub-448r-... would")
        refuse(net.dim != nets[0].dim and path in options.student,
               f"{path} has {net.dim} dimensions, its teacher {nets[0].dim}")
    if options.query:
        for image, answers in search(*nets, options.index, options.query, options.top, **how):
            print(image, *(f"  {score:.4f}  {name}" for score, name in answers), sep="\n")
    elif options.database:
        count, unreadable = build_index(nets[0], options.database, options.index, **how)
        print(*(f"{name} cannot be read as an image: skipped" for name in unreadable), sep="\n")
        print(f"{count} images in {options.index}, {len(unreadable)} skipped")
    else:
        compare(nets, options, how)

def compare(nets, options, how):
    """The table, and the figure, of a teacher, students and supervised networks."""
    teacher, students = nets[0], nets[1:len(options.student) + 1]
    name, root = settle_dataset(options.dataset, options.root, teacher.options)
    validation = held_back(options.validation, name, root, *nets)
    dataset = load_dataset(name, root, "val" if validation else "test")
    rows, found = trade_off(teacher, students, dataset, nets[len(students) + 1:], options.ks, **how)
    print_table(rows)
    if options.json and rows:
        Path(options.json).write_text(json.dumps(rows, indent=1))
    if options.figure and rows:
        draw_queries(options.figure, dataset, found)

if __name__ == "__main__":
    run_command(main)

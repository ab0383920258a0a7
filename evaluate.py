"""The evaluation of Sec. 4: exact retrieval metrics at any size, the trade-off of accuracy and cost, and search.

    python evaluate.py --teacher T.pt --student S.pt [S2.pt ...] --json table.json --figure queries.png
    python evaluate.py --teacher T.pt --database FOLDER --index photos.pt           # embed a folder at the large size, once
    python evaluate.py --student S.pt --index photos.pt --query IMAGE [IMAGE ...]   # search it with small queries

Embeddings are row vectors (N, D), a score is an inner product. The rank of a correct image is the number of images
before it; scores are made some queries at a time and counted, so no N x N matrix and no sort of the database is held.
"""
import argparse
import functools
import json
import os
import statistics
import time

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

from asymres import fingerprint, load_checkpoint, read_checkpoint, write_atomically
from data import (PROCESSES, Decoder, ImageSet, add_up, evaluation_batches, evaluation_crop, list_images, load_dataset,
                  run_command, settle_dataset, warn)


@torch.no_grad()
def knn(queries, database, k, same_images=False, chunk=2 ** 24):
    """The k best database rows of every query: scores (Q, k), best first, and row numbers (Q, k); ties in any order.

    queries (Q, D), database (N, D); fewer than k columns if N is smaller. same_images=True: query i and row i are one
    image, which is left out of its own answer. chunk: how many scores are held at a time.
    """
    if k < 1:
        raise ValueError(f"k must be a positive integer, not {k}")
    parts = torch.arange(len(queries)).split(max(1, chunk // len(database)))
    found = [_scores(queries, database, rows, same_images).topk(min(k, len(database) - same_images)) for rows in parts]
    return tuple(map(torch.cat, zip(*found)))


@torch.no_grad()
def retrieval_metrics(queries, database, query_labels, database_labels, ks=(1, 2, 4, 8), same_images=True, chunk=2 ** 24):
    """Retrieval metrics as {name: mean over queries, in [0, 1]}.

    queries (Q, D), database (N, D), integer labels (Q,), (N,). An image is correct for a query if it has its label; a
    wrong image with the score of a correct one ranks before it. With n correct images, the j-th of them (from 0) at
    rank r (from 0):

      R@k          1 if an image of rank < k is correct
      P@k          share of correct images among the first min(k, 1 + rank of the last correct image)
      mAP          mean of (j/r + (j+1)/(r+1)) / 2, the trapezoid, where j/r is 1 if r = 0
      mAP@k        the same, summed over the correct images of rank < k, divided by min(n, k)
      R-Precision  share of correct images among the first n (Musgrave et al., 2020)
      MAP@R        (j+1)/(r+1) summed over the correct images of rank < n, divided by n (the same)

    same_images=True: query i and database row i are one image (seen by one network or by two), and this row is removed
    for this query. False: they are different sets. A query without a correct image is left out of the means, but its
    image stays in the database. chunk: how many scores are held at a time. Raises ValueError for what does not fit.

    Three images, two of class 7. Image 0 finds image 1 (score 0.6) behind image 2 (0.8), so r = 1; image 1 finds
    image 0 (0.6) behind image 2 (0.96); image 2 is alone in its class and no query. Both have AP (0/1 + 1/2) / 2.

    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    >>> retrieval_metrics(x, x, [7, 7, -1], [7, 7, -1], ks=(2,))  # doctest: +NORMALIZE_WHITESPACE
    {'mAP': 0.25, 'R-Precision': 0.0, 'MAP@R': 0.0, 'R@2': 1.0, 'P@2': 0.5, 'mAP@2': 0.25}
    """
    query_labels, database_labels = _checked(queries, database, query_labels, database_labels, ks, same_images)
    asked, members, count = _classes(query_labels, database_labels, int(same_images))
    parts, column = [], torch.arange(int(count[0]), device=database.device)
    for rows in asked.split(max(1, chunk // (len(database) + 8 * len(column)))):
        scores = _scores(queries, database, rows, same_images)                  # (q, N)
        correct = members(rows, column)                                         # (q, P), the last one repeated
        absent = column >= count[rows, None]
        score = scores.gather(1, correct).masked_fill_(absent, -torch.inf).sort(dim=1, descending=True).values
        wrong = scores.scatter_(1, correct, -torch.inf)
        ranks = _reaching(wrong, score) + column        # wrong images at least as good as the j-th correct one, plus j
        ranks = ranks.double().masked_fill_(column >= count[rows, None] - int(same_images), torch.inf)
        parts.append(_metrics(ranks[:, :max(1, len(column) - same_images)], ks))
    return {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}


def _checked(queries, database, query_labels, database_labels, ks, same_images):
    labels = [torch.as_tensor(x, device=database.device) for x in (query_labels, database_labels)]
    if any(not isinstance(k, int) or k < 1 for k in ks):
        raise ValueError(f"every k must be a positive integer, not {ks}")
    for name, x, own in (("queries", queries, labels[0]), ("database", database, labels[1])):
        if x.ndim != 2 or not x.numel() or len(own) != len(x):
            raise ValueError(f"{name}: at least one embedding (rows, D) and as many labels are needed, not "
                             f"{tuple(x.shape)} and {len(own)} labels")
        if not x.isfinite().all():
            raise ValueError(f"{name}: embedding {int((~x.isfinite()).any(1).nonzero()[0])} is not finite")
    if queries.shape[1] != database.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions and the database has {database.shape[1]}")
    if same_images and not torch.equal(*labels):
        raise ValueError("same_images=True says that both sets are the same images, but their labels differ")
    return labels


def _classes(query_labels, database_labels, own):
    """Queries to ask, those of large classes first; their classes' rows; how many these are for each query, itself too."""
    ordered, by_class = database_labels.sort(stable=True)
    first = torch.searchsorted(ordered, query_labels)
    count = torch.searchsorted(ordered, query_labels, right=True) - first       # (Q,)
    asked = count.argsort(descending=True, stable=True)                         # equal counts together: little padding
    asked = asked[count[asked] > own]
    if not len(asked):
        raise ValueError("no query has a correct image in the database")
    members = lambda rows, column: by_class[first[rows, None] + column.minimum(count[rows, None] - 1)]
    return asked, members, count


def _scores(queries, database, rows, same_images):
    """Inner products (q, N) of some queries, in float32 at least; a query's own image gets -inf."""
    rows, kind = rows.to(database.device), torch.promote_types(database.dtype, torch.float32)
    scores = queries.to(database.device)[rows].to(kind) @ database.to(kind).T   # (q, D) @ (D, N) -> (q, N)
    return scores.scatter_(1, rows[:, None], -torch.inf) if same_images else scores


def _reaching(scores, bounds, few=128):
    """How many of a query's scores (q, N) reach each of its bounds (q, P): counted, or looked up if P is large."""
    if bounds.shape[1] > few:
        return scores.shape[1] - torch.searchsorted(scores.sort(dim=1).values, bounds)
    width = 512 if scores.device.type == "cpu" else scores.shape[1]             # stays in a CPU's cache for all bounds
    total, hits = torch.zeros_like(bounds), torch.empty_like(scores[:, :width])
    for tile in scores.split(width, dim=1):
        for p in range(bounds.shape[1]):                                        # as floats: adding bools is slow
            total[:, p] += torch.ge(tile, bounds[:, p, None], out=hits[:, :tile.shape[1]]).sum(1)
    return total


def _metrics(ranks, ks):
    """Metrics (q,) by name from ranks (q, P): those of each query's correct images, ascending, inf-padded."""
    j, n = torch.arange(ranks.shape[1]).to(ranks), ranks.isfinite().sum(1)
    last = ranks.masked_fill(ranks.isinf(), 0).amax(1)
    after, early = (j + 1) / (ranks + 1), ranks < n[:, None]
    trapezoid = (torch.where(ranks > 0, j / ranks, 1) + after) / 2
    metrics = {"mAP": trapezoid.sum(1) / n, "R-Precision": early.sum(1) / n, "MAP@R": (after * early).sum(1) / n}
    for k in ks:
        found = ranks < k
        metrics |= {f"R@{k}": found[:, 0].double(), f"P@{k}": found.sum(1) / (last + 1).clamp(max=k),
                    f"mAP@{k}": (trapezoid * found).sum(1) / n.clamp(max=k)}
    return {name: values.double() for name, values in metrics.items()}


# ------------------------------------------------------------------------------------------------------- embedding

def find_device(name=None):
    """torch.device of "cuda", "cuda:1" or "cpu"; by default CUDA, under torchrun this process's, where there is one."""
    number = os.environ.get("LOCAL_RANK", 0) if PROCESSES["count"] > 1 else 0
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"--device {name}: cuda or cpu is expected") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} was asked for, but PyTorch finds no CUDA GPU on this machine")
    if device.type == "cuda":
        device = torch.device("cuda", int(number) if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def set_precision(name, device):
    """ "bfloat16" or "float32": `name`, or for "auto" bfloat16 where the card has it. float32 then means it: no TF32."""
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    if name == "float32":
        torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    return name


def embed(net, images, precision="float32"):
    """Normalised images (...,3,s,s) -> unit vectors (...,D) in float32, the backbone computing in `precision`."""
    flat = images.flatten(0, -4).contiguous(memory_format=torch.channels_last)              # (B*A, 3, s, s)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return net(flat).unflatten(0, images.shape[:-3])


@torch.no_grad()
def extract(net, dataset, size, device=None, batch_size=64, workers=0, precision="float32", rows=None, unreadable=None,
            decoder=None):
    """Embeddings (N, D), float32, on the CPU, of the images `rows` (by default all) at `size` px; `net` in eval mode.

    unreadable: a list that takes the places in `rows` of images that cannot be read, whose embeddings are zero; without
    it they raise ValueError. Where a GPU's memory is too small for a batch, it is halved. Work is shared under torchrun.
    """
    device, rows = find_device(device), range(len(dataset)) if rows is None else rows
    net.to(device).eval()
    decoder = decoder or Decoder(dataset, workers, device, lenient=unreadable is not None)
    embeddings = torch.zeros(len(rows), net.dim)
    parts = [slice(i, min(i + batch_size, len(rows))) for i in range(0, len(rows), batch_size)]
    parts = parts[PROCESSES["rank"]::PROCESSES["count"]]
    for places, images in evaluation_batches(decoder, rows, parts, size, device):
        embeddings[places] = _embed_in_memory(net, images, precision).cpu()
    add_up(embeddings)                                                          # of which each process has its part
    if unreadable is not None:
        unreadable += (embeddings == 0).all(1).nonzero()[:, 0].tolist()
    return embeddings


def _embed_in_memory(net, images, precision):
    try:
        return embed(net, images, precision)
    except torch.OutOfMemoryError as error:
        if len(images) == 1:
            raise MemoryError(f"out of GPU memory with a single image of {images.shape[-1]} px: close other programs on "
                              "the GPU, or use --device cpu") from error
    return torch.cat([_embed_in_memory(net, half, precision) for half in images.chunk(2)])


@torch.no_grad()
def cost(net, size, device=None):
    """What one query costs the network: (GFLOPs, median milliseconds at batch 1 on `device`), image decoding left out."""
    device = find_device(device)
    net, image = net.to(device).eval(), torch.zeros(1, 3, size, size, device=device)
    with FlopCounterMode(display=False) as counter:
        net(image)
    times = []
    for _ in range(30):
        started = time.perf_counter()
        net(image).cpu()                                                        # waits for the device
        times.append(time.perf_counter() - started)
    return counter.get_total_flops() / 1e9, statistics.median(times[5:]) * 1e3


# ------------------------------------------------------------------------------------------------ the trade-off, Sec. 4

def trade_off(teacher, students, dataset, supervised=(), teacher_size=None, ks=(1, 8), device=None, **how):
    """Accuracy against the cost of a query: rows (dicts) for `print_table`, and the embeddings for `draw_queries`.

    For every student: its queries, and the teacher's own of the same small images, in the teacher's database of large
    ones; and the student alone. `supervised` networks search their own databases only. Networks carry their `size`.
    `how` goes to extract. Under torchrun process 0 alone has rows.
    """
    large = (teacher, teacher_size or teacher.size)
    searches = [("teacher, symmetric", large, large)]
    searches += [("no distillation", (teacher, size), large) for size in dict.fromkeys(s.size for s in students)]
    searches += [("supervised, symmetric", (net, net.size), (net, net.size)) for net in supervised]
    for net in students:
        searches += [("student, asymmetric", (net, net.size), large), ("student, symmetric", *[(net, net.size)] * 2)]
    embed_once = functools.cache(lambda net, size: extract(net, dataset, size, device, **how))
    found = {side: embed_once(*side) for _, *sides in searches for side in sides}
    rows = [_row(*search, found, dataset.labels, ks, device) for search in searches if PROCESSES["rank"] == 0]
    first = students[0] if students else teacher
    return rows, {"database": found[large], "teacher": embed_once(teacher, first.size),
                  "student": embed_once(first, first.size), "sizes": (first.size, large[1])}


def _row(name, query, database, found, labels, ks, device):
    device, (net, size) = find_device(device), query
    metrics = retrieval_metrics(found[query].to(device), found[database].to(device), labels, labels, ks)
    gflops, milliseconds = cost(net, size, device)
    return {"": name, "network": net.arch, "query px": size, "database px": database[1],
            **{key: 100 * metrics[key] for key in (*(f"R@{k}" for k in ks), "mAP")},
            "GFLOPs/query": gflops, "ms/query": milliseconds}


def print_table(rows):
    """Rows of `trade_off` as text columns on stdout; recalls and mAP in per cent."""
    text = lambda key, value: f"{value:.{3 if key.startswith('GF') else 2}f}" if isinstance(value, float) else str(value)
    lines = [list(rows[0])] + [[text(*item) for item in row.items()] for row in rows] if rows else []
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(f"{cell:{'<' if i < 2 else '>'}{width}}" for i, (cell, width) in enumerate(zip(line, widths))))


# ------------------------------------------------------------------------------------------------------- the pictures

RIGHT, WRONG = "#1a9850", "#d73027"


def draw_queries(path, dataset, found, queries=6, top=8, seed=0):
    """Write a PNG that lets a person judge what `trade_off` found: queries, drawn at random, and their nearest images.

    A query stands as the student sees it, enlarged; beside it its nearest images of the teacher's database, framed
    green (its class) or red, one row for the undistilled network and one for the student.
    """
    small, large = found["sizes"]
    labels = torch.tensor(dataset.labels)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    _, number, sizes = labels.unique(return_inverse=True, return_counts=True)
    chosen = chosen[sizes[number[chosen]] > 1][:queries]                        # those that have something to find
    tile, gap, caption, head = 132, 10, 140, 56             # px
    block, left = 2 * tile + gap, 2 * tile + 2 * gap + caption        # a query's side; where its answers begin
    sheet = Image.new("RGB", (left + top * (tile + gap), head + len(chosen) * (block + 3 * gap) - gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default
    draw.text((gap, 14), f"query ({small} px)", "black", font(24))
    for word, colour in ((f"nearest in the database ({large} px), best first;", "black"), ("same class", RIGHT),
                         ("another class", WRONG)):
        draw.text((left, 14), word, colour, font(24))
        left += draw.textlength(word + "  ", font(24))
    left = 2 * tile + 2 * gap + caption
    for line, query in enumerate(chosen.tolist()):
        y = head + line * (block + 3 * gap)
        sheet.paste(evaluation_crop(dataset.image(query), small).resize((block, block), Image.NEAREST), (gap, y))
        for name, label in (("teacher", "no\ndistillation"), ("student", "student")):
            draw.multiline_text((left - 2 * gap, y + tile / 2), label, "black", font(22), anchor="rm", align="right")
            nearest = knn(found[name][query:query + 1], found["database"], top + 1)[1][0]
            for place, image in enumerate(nearest[nearest != query][:top].tolist()):
                x = left + place * (tile + gap)
                draw.rectangle((x, y, x + tile - 1, y + tile - 1), RIGHT if labels[image] == labels[query] else WRONG)
                shown = evaluation_crop(dataset.image(image), large).resize((tile - 12, tile - 12), Image.BICUBIC)
                sheet.paste(shown, (x + 6, y + 6))
            y += tile + gap
    sheet.save(path)


# ------------------------------------------------------------------------------------------------ used as a search engine

def build_index(teacher, folder, path, **how):
    """Embed the images under a folder and write them to `path`. -> (number indexed, names left out).

    The file is a dict, as torch.save writes it: `embeddings` (N, D) float32, `paths` (N), `size`, `network`.
    """
    paths, unreadable = list_images(folder), []
    if not paths:
        raise ValueError(f"no images under {folder}")
    embeddings = extract(teacher, ImageSet([0] * len(paths), paths), teacher.size, unreadable=unreadable, **how)
    skipped = set(unreadable)
    kept = [i for i in range(len(paths)) if i not in skipped]
    if not kept:
        raise ValueError(f"none of the {len(paths)} images under {folder} can be read")
    if PROCESSES["rank"] == 0:
        write_atomically(path, {"embeddings": embeddings[kept], "paths": [paths[i] for i in kept], "size": teacher.size,
                                "network": fingerprint(teacher)})
    return len(kept), [paths[i] for i in unreadable]


def read_index(path, net):
    """(embeddings (N,D), N paths) of an index, held to the network that will search it. Raises ValueError."""
    index = read_checkpoint(path)
    try:
        embeddings, paths, network = index["embeddings"], index["paths"], index["network"]
        if embeddings.ndim != 2 or len(embeddings) != len(paths) or not len(paths):
            raise ValueError
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not an index that evaluate.py wrote") from error
    if embeddings.shape[1] != net.dim:
        raise ValueError(f"the student has {net.dim} dimensions, the index {path} has {embeddings.shape[1]}")
    if net.teacher is None and fingerprint(net) != network:
        warn("the student does not say who its teacher is: whether it fits the index cannot be checked")
    elif network not in (net.teacher, fingerprint(net)):
        raise ValueError(f"the index {path} was made by another network than the student's teacher")
    return embeddings, paths


def search(student, index, images, top=5, **how):
    """[(image, [(score, file), ...]), ...]: for every query image the nearest files of an index."""
    embeddings, paths = read_index(index, student)
    queries = extract(student, ImageSet([0] * len(images), images), student.size, **how)
    scores, rows = knn(queries, embeddings, top)
    return [(image, [(score, paths[row]) for score, row in zip(s, r)])
            for image, s, r in zip(images, scores.tolist(), rows.tolist())]


# --------------------------------------------------------------------------------------------------------- command line

def held_back(asked, dataset, *nets):
    """Whether validation classes take the place of test classes: as asked for, or as the networks were trained.

    Raises ValueError where they were trained otherwise: they would be tested on classes that they saw, or not compare.
    """
    said = {net.options["validation"] for net in nets if net.options.get("dataset") == dataset} | {asked} - {None}
    if len(said) > 1:
        raise ValueError("--validation: the networks and the command line do not agree whether the second half of the "
                         "training classes is for training or for testing")
    return bool(said and said.pop())


def load_sized(path):
    """load_checkpoint, of a network that knows its size in px."""
    net = load_checkpoint(path)
    if not net.size:
        raise ValueError(f"{path} does not say at which size it was trained, nor does its name, as in cub-448r-...")
    return net


def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", help="checkpoint, or the name of a released one: the network of the database")
    add("--student", nargs="+", default=[], help="checkpoints or names: the networks of the queries")
    add("--supervised", nargs="+", default=[], help="networks trained with labels, which search their own databases")
    add("--dataset", help="cub, cars, sop, synthetic or a folder; by default the teacher's")
    add("--root", help="where the data set is; by default where the teacher found it")
    add("--validation", action=argparse.BooleanOptionalAction, help="test on the second half of the training classes; by "
                                                                    "default as the teacher was trained")
    add("--ks", type=int, nargs="+", default=[1, 8], help="the K of R@K")
    add("--json", metavar="FILE", help="write the table for machines")
    add("--figure", metavar="FILE.png", help="draw queries and what they find (of the first student)")
    add("--database", metavar="FOLDER", help="embed the images under this folder ...")
    add("--index", metavar="FILE", help="... into this file; or, with --query, search it")
    add("--query", nargs="+", metavar="IMAGE", help="images to search for")
    add("--top", type=int, default=5, help="answers to a query")
    add("--precision", choices=("auto", "bfloat16", "float32"), default="float32", help="of the backbone")
    add("--device", help="cuda or cpu; by default CUDA where there is one")
    add("--workers", type=int, default=os.cpu_count(), help="processes that load images")
    return parser


def _check(options):
    """Refuse, before any work, what cannot end well. Raises ValueError, one sentence."""
    if options.query and not (options.index and len(options.student) == 1):
        raise ValueError("--query needs an --index FILE and one --student")
    if not options.query and not options.teacher:
        raise ValueError("--teacher is needed (or --student, --index and --query)")
    if not options.query and bool(options.database) != bool(options.index):
        raise ValueError("--database FOLDER and --index FILE go together")
    if min(*options.ks, options.top) < 1 or options.workers < 0:
        raise ValueError("--ks and --top must be above 0, and --workers not below")
    if options.figure and not options.student:
        raise ValueError("--figure needs a --student")
    for path in filter(None, (options.json, options.figure, None if options.query else options.index)):
        folder = os.path.dirname(path) or "."
        if os.path.isdir(path) or not os.access(folder, os.W_OK):
            raise ValueError(f"{path} cannot be written: {folder} has to be a folder that can be, {path} not one")


def main(argv=None):
    options = _parser().parse_args(argv)
    _check(options)
    device = find_device(options.device)
    how = dict(device=device, workers=options.workers, precision=set_precision(options.precision, device))
    if options.query:
        for image, answers in search(load_sized(options.student[0]), options.index, options.query, options.top, **how):
            print(image, *(f"  {score:.4f}  {name}" for score, name in answers), sep="\n")
    elif options.database:
        count, unreadable = build_index(load_sized(options.teacher), options.database, options.index, **how)
        for name in unreadable:
            warn(f"{name} cannot be read as an image: skipped")
        print(f"{count} images in {options.index}, {len(unreadable)} skipped")
    else:
        _evaluate(options, how)


def _evaluate(options, how):
    teacher, students, supervised = (list(map(load_sized, paths)) for paths in (
        [options.teacher], options.student, options.supervised))
    teacher, = teacher
    for path, student in zip(options.student, students):
        if student.dim != teacher.dim:
            raise ValueError(f"{path} has {student.dim} dimensions, its teacher {options.teacher} has {teacher.dim}")
        if student.teacher not in (None, fingerprint(teacher)):
            warn(f"{path} was distilled from another teacher than {options.teacher}")
    name, root = settle_dataset(options.dataset, options.root, teacher.options)
    if not name:
        raise ValueError(f"{options.teacher} does not say which data set it was trained on: give --dataset")
    validation = held_back(options.validation, name, teacher, *students, *supervised)
    dataset = load_dataset(name, root, "val" if validation else "test")
    rows, found = trade_off(teacher, students, dataset, supervised, ks=tuple(options.ks), **how)
    print_table(rows)
    if options.json and rows:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    if options.figure and rows:
        draw_queries(options.figure, dataset, found)


if __name__ == "__main__":
    run_command(main)

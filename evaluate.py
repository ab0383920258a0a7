"""The evaluation of Sec. 4: exact retrieval metrics at any size, the trade-off of accuracy and cost, and search.

    python evaluate.py --teacher T.pt --student S.pt [S2.pt ...] --json table.json --figure queries.png
    python evaluate.py --teacher T.pt --database FOLDER --index photos.pt           # embed a folder at the large size, once
    python evaluate.py --student S.pt --index photos.pt --query IMAGE [IMAGE ...]   # search it with small queries

Embeddings are row vectors (N, D), a score is an inner product. The rank of a correct image is the number of better
scores, so scores are counted tile by tile: no N x N matrix, no sort of the database, and the same result for every chunk
size and device, for where float32 rounding leaves a rank in doubt, exact float64 products decide.
"""
import argparse
import contextlib
import functools
import json
import math
import os
import statistics
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from numbers import Integral
from operator import index

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.utils.flop_counter import FlopCounterMode

from asymres import fingerprint, load_checkpoint, multiscale, read_checkpoint, write_atomically
from data import ImageSet, ViewLoader, evaluation_crop, list_images, load_dataset, run_command, warn

TILE = 512  # database rows at a time; with 1024 queries the float32 scores are 2 MiB, which stay in the cache
LIMIT = 2**22  # float64 scores held at a time by a thread: 32 MiB
FEW = 64  # correct images up to which a pass over the scores for each of them is cheaper than sorting each tile


@torch.no_grad()
def knn(queries, database, k, same_images=False, chunk=512):
    """The k best database rows of every query: scores (Q, k), best first, in float64, and row numbers (Q, k).

    queries (Q, D), database (N, D). Equal scores rank in database order. same_images=True: query i and row i are the
    same image, which is left out of its own answer. If fewer than k rows are left, that many columns come back.
    chunk queries at a time (fewer where N is large); it runs on the database's device.
    """
    _check_positive(k)
    queries, database, unit = _on_grid(queries, database, same_images)
    k = min(k, len(database) - same_images)
    chunk = max(1, min(chunk, LIMIT // len(database)))

    def search(start):
        scores = _exact_scores(queries[start:start + chunk], database)  # (q, N)
        if same_images:
            scores.diagonal(start).fill_(-math.inf)
        best, rows = scores.topk(min(k + 1, len(database)))
        rows = rows[:, :k].sort(dim=1).values  # in database order, so that a stable sort keeps ties in it
        top, order = scores.gather(1, rows).sort(dim=1, descending=True, stable=True)
        rows = rows.gather(1, order)
        tied = (best[:, k - 1] == best[:, -1]) & (best.shape[1] > k)  # a tie runs past column k: topk took any of it
        if tied.any():
            top[tied], rows[tied] = (x[:, :k] for x in scores[tied].sort(dim=1, descending=True, stable=True))
        return top, rows

    scores, rows = (torch.cat(parts) for parts in zip(*_map(search, range(0, len(queries), chunk), database.device)))
    return scores.mul_(unit), rows


@torch.no_grad()
def retrieval_metrics(queries, database, query_labels, database_labels, ks=(1, 2, 4, 8), same_images=True, chunk=1024):
    """Retrieval metrics as {name: float in [0, 1]}, each the mean over queries.

    queries (Q, D), database (N, D), labels: Q and N integers of any value. An image is correct for a query if it has
    its label. Scores are inner products and equal scores rank in database order. With ranks counted from 0:

      R@k          1 if an image of rank < k is correct
      P@k          share of correct images among the first k' = min(k, 1 + rank of the last correct image)
      mAP          trapezoidal average precision: for the j-th correct image (j from 0), of rank r, the mean of the
                   precisions before and after it, j/r (1 where r = 0) and (j+1)/(r+1), averaged over correct images
      mAP@k        the same, summed over the correct images of rank < k and divided by min(number of correct, k)
      R-Precision  share of correct images among the first R, R the number of correct images (Musgrave et al., 2020)
      MAP@R        (j+1)/(r+1) summed over the correct images of rank < R, divided by R (the same)

    same_images=True: query i and database row i are the same image (embedded by one network or by two), and this row
    is removed for this query. False: they are different sets. A query with no correct image is left out of the means,
    but its image stays in the database. chunk queries at a time; every chunk gives the same numbers.

    Three images, two of class 7. Image 0 finds image 1 (score 0.6) behind image 2 (0.8), so r = 1; image 1 finds
    image 0 (0.6) behind image 2 (0.96); image 2 is alone in its class and no query. Both have AP (0/1 + 1/2) / 2.

    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])
    >>> retrieval_metrics(x, x, [7, 7, -1], [7, 7, -1], ks=(1, 2))  # doctest: +NORMALIZE_WHITESPACE
    {'R@1': 0.0, 'P@1': 0.0, 'mAP@1': 0.0, 'R@2': 1.0, 'P@2': 0.5, 'mAP@2': 0.25,
     'mAP': 0.25, 'R-Precision': 0.0, 'MAP@R': 0.0}
    """
    _check_positive(*ks)
    queries, database, _ = _on_grid(queries, database, same_images)
    query_labels, database_labels = _as_list(query_labels), _as_list(database_labels)
    for name, labels, rows in (("queries", query_labels, queries), ("database", database_labels, database)):
        if len(labels) != len(rows):
            raise ValueError(f"{name}: {len(rows)} embeddings but {len(labels)} labels")
    if same_images and query_labels != database_labels:
        raise ValueError("same_images=True says that both sets are the same images, but their labels differ")
    asked, place, first, count = (x.to(database.device) for x in _by_class(query_labels, database_labels, same_images))
    if not len(asked):
        raise ValueError("no query has a correct image in the database")
    queries, database = queries[asked], database[place]
    own = asked if same_images else torch.full_like(asked, -1)
    # |float32 product - exact product| <= D * 2^-24 * |query| * |row|; the rest is for rounding in the bound itself
    error = 1.001 * (queries.shape[1] + 8) * 2**-24 * queries.norm(dim=1) * database.norm(dim=1).max()

    def evaluate(part):
        ranks = _ranks(*(x[part] for x in (queries, own, first, count, error)), database, place)
        return _metrics_of_ranks(ranks.cpu(), ks)

    parts, sizes = [slice(0, 0)], count.tolist()
    while parts[-1].stop < len(queries):
        start = parts[-1].stop
        parts.append(slice(start, start + max(1, min(chunk, LIMIT // (8 * sizes[start])))))
    with _real_float32():
        results = _map(evaluate, parts[1:], database.device)
    return {name: torch.cat([result[name] for result in results]).mean().item() for name in results[0]}


def _metrics_of_ranks(ranks, ks):
    """Metrics (q,) by name from ranks (q, P): those of each query's correct images, from 0, ascending, inf-padded."""
    def total(terms):  # (q, P) -> (q,); cumsum adds in one order, whatever the number of columns of padding
        return terms.cumsum(dim=1)[:, -1]

    j = torch.arange(ranks.shape[1], dtype=torch.float64, device="cpu")
    correct = ranks.isfinite().sum(1)
    last = ranks.masked_fill(ranks.isinf(), 0).amax(1)
    after = (j + 1) / (ranks + 1)
    precision = (torch.where(ranks > 0, j / ranks, 1.0) + after) / 2
    metrics = {}
    for k in ks:
        found = ranks < k
        metrics[f"R@{k}"] = found[:, 0].double()
        metrics[f"P@{k}"] = found.sum(1) / (last + 1).clamp(max=k)
        metrics[f"mAP@{k}"] = total(precision * found) / correct.clamp(max=k)
    found = ranks < correct[:, None]
    metrics["mAP"] = total(precision) / correct
    metrics["R-Precision"] = found.sum(1).double() / correct
    metrics["MAP@R"] = total(after * found) / correct
    return metrics


def _ranks(queries, own, first, count, error, database, place):
    """Ranks (q, P) of each query's correct images: from 0, ascending, padded with inf, float64.

    queries (q, D) are sorted by class, database (N, D) too: its row c is the caller's row place[c], and query i's class
    is the count[i] rows from first[i] on, less the caller's row own[i]. error (q,) bounds a float32 product's error.
    """
    own, first, count, error = (x[:, None] for x in (own, first, count, error))
    begin, end = int(first[0]), int(first[-1] + count[-1])
    column = torch.arange(int(count.max()), device=place.device)
    place_of = (first + column).clamp(max=end - 1)  # (q, P)
    score = torch.cat([_exact_scores(q, database[int(c[0, 0]):int(c[-1, -1]) + 1]).gather(1, c - c[0, 0])
                       for q, c in zip(queries.split(64), place_of.split(64))])
    row = place[place_of]
    score, order = score.masked_fill((column >= count) | (row == own), -math.inf).sort(dim=1, descending=True, stable=True)
    most = int(score.isfinite().sum(1).max())
    score, row = score[:, :most].contiguous(), row.gather(1, order[:, :most])
    correct = score.isfinite()
    score.masked_fill_(~correct, math.inf)  # that nothing beats

    better = torch.zeros_like(score)  # how many images of other classes rank before
    low, high = (score - error).float(), (score + error).float()
    few = score.shape[1] <= FEW
    dots, hits = torch.empty(2, len(queries) * few, TILE, device=place.device)
    for c in range(0, len(database), TILE):
        tile = slice(c, min(c + TILE, len(database)))
        column = torch.arange(c, tile.stop, device=place.device)
        correct_here = (column >= first) & (column < first + count) if c < end and begin < tile.stop else None
        if few:
            dot, hit = dots[:, :len(column)], hits[:, :len(column)]
            torch.mm(queries, database[tile].T, out=dot)  # (q, D) @ (D, t) -> (q, t)
            if correct_here is not None:
                dot.masked_fill_(correct_here, -math.inf)
            beats = _count(torch.gt, dot, high, hit)
            doubt = _count(torch.ge, dot, low, hit) - beats  # (q, P), how many scores are too close to tell
        if few and doubt.sum() <= 4 * len(queries):
            i, j = doubt.nonzero(as_tuple=True)
            near = dot[i]
            near, t = ((near >= low[i, j, None]) & (near <= high[i, j, None])).nonzero(as_tuple=True)
            i, j = i[near], j[near]
            exact = (queries[i].double() * database[tile][t].double()).sum(1)
            wins = (exact > score[i, j]) | (exact == score[i, j]) & (place[tile][t] < row[i, j])
            beats.index_put_((i, j), wins.double(), accumulate=True)
        else:
            exact = _exact_scores(queries, database[tile])
            if correct_here is not None:
                exact.masked_fill_(correct_here, -math.inf)
            beats = _count_exactly(exact, place[tile], score, row)
        better += beats
    return (better + torch.arange(score.shape[1], device=place.device)).masked_fill_(~correct, math.inf)


def _count(compare, scores, bounds, hits):  # (q, t), (q, P), workspace (q, t) -> (q, P)
    """How many of a query's scores exceed (torch.gt) or reach (torch.ge) each of its bounds."""
    # 0.0 and 1.0 in a float workspace: on a CPU, bools take ten times longer to add
    return torch.stack([compare(scores, bound, out=hits).sum(1) for bound in bounds.split(1, dim=1)], dim=1).double()


def _count_exactly(scores, rows, bounds, bound_rows):  # (q, t), (t,), (q, P), (q, P) -> (q, P)
    """How many of a query's scores rank before each of its bounds: those above, and those equal but of an earlier row."""
    ordered = scores.sort(dim=1).values
    below, reached = torch.searchsorted(ordered, bounds), torch.searchsorted(ordered, bounds, right=True)
    if (below == reached).all():
        return scores.shape[1] - reached
    # ties: whole numbers that grow with the score (the scores below it plus those it reaches) and then with earlier rows
    keys = (torch.searchsorted(ordered, scores) + torch.searchsorted(ordered, scores, right=True)) * 2**40 - rows
    bounds = (below + reached) * 2**40 - bound_rows
    return scores.shape[1] - torch.searchsorted(keys.sort(dim=1).values, bounds, right=True)


def _exact_scores(queries, database):  # (q, D) @ (D, n) -> (q, n)
    """Inner products without rounding error: float64 products of embeddings that _on_grid made."""
    queries = queries.double()
    scores = queries.new_empty(len(queries), len(database))
    for part, rows in zip(scores.split(TILE, dim=1), database.split(TILE)):
        torch.mm(queries, rows.double().T, out=part)
    return scores


def _on_grid(queries, database, same_images):
    """Checked and rounded: queries (Q, D), database (N, D), float32, and what their products are to be multiplied by.

    A row is divided by a power of two that brings its norm to [1/2, 1) and rounded to a float32 multiple of 2^-26.
    Products of two such numbers are multiples of 2^-52 and no partial sum reaches 2: float64 holds them all.
    Database rows then get their powers of two back, relative to the largest; queries need none to be ranked.
    """
    queries, database = torch.as_tensor(queries), torch.as_tensor(database)
    device = database.device if database.is_cuda else torch.device("cpu")  # others may lack float64
    for name, x in (("queries", queries), ("database", database)):
        if x.ndim != 2 or not x.numel():
            raise ValueError(f"{name}: expected embeddings (rows, D), at least one, got shape {tuple(x.shape)}")
    if queries.shape[1] != database.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} dimensions and the database has {database.shape[1]}")
    if same_images and len(queries) != len(database):
        raise ValueError(f"same_images=True, but there are {len(queries)} queries and {len(database)} database rows")
    queries, scale = _rounded(queries, "queries", device)
    database, database_scale = _rounded(database, "database", device)
    return queries, database.mul_((database_scale / database_scale.max()).float()), scale * database_scale.max()


def _rounded(embeddings, name, device):
    def rounded(start):
        x = embeddings[start:start + TILE].to(device).double()
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        bad = (~norm.isfinite()).nonzero()
        if len(bad):
            raise ValueError(f"{name}: embedding {start + int(bad[0, 0])} is not finite (NaN or infinite)")
        power = torch.where(norm > 0, norm / norm.frexp().mantissa, 1.0)
        return ((x / power * 2**26).round() / 2**26).float(), power

    return (torch.cat(parts) for parts in zip(*_map(rounded, range(0, len(embeddings), TILE), device)))


def _as_list(labels):
    return [index(label) for label in (labels.tolist() if hasattr(labels, "tolist") else labels)]


def _by_class(query_labels, database_labels, same_images):
    """The queries that have correct images, and where these are in a database sorted by class.

    Classes that are asked for come first, the largest first, so that queries done together have neighbouring and about
    equally many correct images. Returns the queries in order of class, asked (A,), the database's rows in that order,
    place (N,), and of each asked query's class the first of its rows there and their count, (A,) and (A,).
    """
    labels = set(query_labels)
    classes = Counter(label for label in database_labels if label in labels).most_common()
    number = {label: i for i, (label, _) in enumerate(classes)}
    size = torch.tensor([n for _, n in classes] + [0], device="cpu")  # the last one is all the other classes
    query_class, database_class = (torch.tensor([number.get(label, len(classes)) for label in labels], device="cpu")
                                   for labels in (query_labels, database_labels))
    asked = query_class.argsort(stable=True)
    asked = asked[size[query_class[asked]] > same_images]
    query_class = query_class[asked]
    return asked, database_class.argsort(stable=True), (size.cumsum(0) - size)[query_class], size[query_class]


def _map(function, items, device):
    """[function(item) for item in items], on a CPU each in a thread of its own with operations that use one thread.

    Small operations on several threads wait for each other, and where another program uses one of the cores, long.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu":
        return [function(item) for item in items]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _real_float32():
    """Float32 products in full, whatever the caller allows: TF32 and bfloat16 exceed the error bound."""
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before):
            switch.fp32_precision = precision


def _check_positive(*ks):
    for k in ks:
        if not isinstance(k, Integral) or k < 1:
            raise ValueError(f"k must be a positive integer, got {k!r}")


# ------------------------------------------------------------------------------------------------------- embedding

def find_device(name=None):
    """torch.device of a name; by default CUDA where there is one. Raises ValueError for CUDA that is not there."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name} was asked for, but PyTorch finds no CUDA GPU on this machine")
    return device


@torch.no_grad()
def extract(net, dataset, size, device=None, batch_size=64, workers=0, precision="float32", rows=None, scales=None,
            unreadable=None):
    """Embeddings (N, D) of an ImageSet at `size` px, float32 on the CPU; the evaluation transform, the net in eval mode.

    rows        the images wanted, all by default
    scales      factors of multi-scale extraction, see asymres.multiscale
    precision   "bfloat16" runs the backbone under autocast
    unreadable  a list: images that cannot be read are left out of the N and their row numbers put there, else they raise
    """
    device = find_device(device)
    net = net.to(device, memory_format=torch.channels_last).eval()
    loader = ViewLoader(dataset, [size], 1, crop_scale=None, workers=workers, device=device, lenient=unreadable is not None)
    parts = []
    for index, views in loader.epoch(0, (torch.arange(len(dataset)) if rows is None else rows).split(batch_size)):
        if unreadable is not None:
            unreadable += (-1 - index[index < 0]).tolist()
            views = views[index >= 0]
        if len(views):
            images = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)  # (B, 3, size, size)
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                parts.append((multiscale(net, images, scales) if scales else net(images)).cpu())
    return torch.cat(parts) if parts else torch.empty(0, net.dim)


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

def symmetric(name, net, size, dataset, ks=(1, 8), device=None, **how):
    """A row of the table: one network at one size for queries and database. `how` goes to extract."""
    return _row(name, net, size, size, *[extract(net, dataset, size, device=device, **how)] * 2, dataset, ks, device)


def _row(name, net, size, database_size, queries, database, dataset, ks, device):
    device = find_device(device)
    metrics = retrieval_metrics(queries.to(device), database.to(device), dataset.labels, dataset.labels, ks)
    gflops, milliseconds = cost(net, size, device)
    return {"": name, "network": net.arch, "query px": size, "database px": database_size,
            **{key: 100 * metrics[key] for key in (*(f"R@{k}" for k in ks), "mAP")},
            "GFLOPs/query": gflops, "ms/query": milliseconds}


def trade_off(teacher, students, dataset, supervised=(), teacher_size=None, ks=(1, 8), device=None, **how):
    """Accuracy against the cost of a query, as rows (dicts) for `print_table`, and the embeddings for `draw_figure`.

    For every student: its queries, and the teacher's own of the same small images, in the teacher's database of large
    ones; and the student alone. `supervised` networks search their own databases only. Networks carry their `size`.
    """
    teacher_size = teacher_size or teacher.size
    embed = functools.cache(lambda net, size: extract(net, dataset, size, device=device, **how))
    row = lambda name, net, size, net_2, size_2: _row(name, net, size, size_2, embed(net, size), embed(net_2, size_2),
                                                      dataset, ks, device)
    rows = [row("teacher, symmetric", teacher, teacher_size, teacher, teacher_size)]
    for size in dict.fromkeys(student.size for student in students):
        rows.append(row("no distillation", teacher, size, teacher, teacher_size))
    for net in supervised:
        rows.append(row("supervised, symmetric", net, net.size, net, net.size))
    for net in students:
        rows.append(row("student, asymmetric", net, net.size, teacher, teacher_size))
        rows.append(row("student, symmetric", net, net.size, net, net.size))
    first = students[0] if students else teacher
    return rows, {"database": embed(teacher, teacher_size), "teacher": embed(teacher, first.size),
                  "student": embed(first, first.size), "sizes": (first.size, teacher_size)}


def print_table(rows):
    """Rows of `trade_off` as text columns on stdout; recalls and mAP in per cent."""
    cells = [list(rows[0])] + [[f"{v:.3f}" if key.startswith("GF") else f"{v:.2f}" if isinstance(v, float) else str(v)
                                for key, v in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))))


# --------------------------------------------------------------------------------------------------------- the picture

RIGHT, WRONG = "#1a9850", "#d73027"


def draw_figure(path, dataset, found, queries=6, top=8, seed=0, by="seed"):
    """Write a PNG that lets a person judge what `trade_off` found: queries and their nearest images.

    A query stands as the student sees it, enlarged; beside it its nearest images of the teacher's database, framed
    green (its class) or red, one row for the undistilled network and one for the student. by="seed" takes queries at
    random, by="disagreement" those whose small image the student puts farthest from where the teacher puts the large.
    """
    small, large = found["sizes"]
    labels = torch.tensor(dataset.labels)
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    if by == "disagreement":
        chosen = (found["database"] * found["student"]).sum(1).argsort()
    _, number, sizes = labels.unique(return_inverse=True, return_counts=True)
    chosen = chosen[sizes[number[chosen]] > 1][:queries]                        # those that have something to find

    tile, gap, caption, head = 132, 10, 140, 56             # px
    block, left = 2 * tile + gap, 2 * tile + 2 * gap + caption        # a query's side; where its answers begin
    sheet = Image.new("RGB", (left + top * (tile + gap), head + len(chosen) * (block + 3 * gap) - gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default
    draw.text((gap, 14), f"query ({small} px)", "black", font(24))
    draw.text((left, 14), f"nearest in the database ({large} px), best first;", "black", font(24))
    edge = draw.textbbox((left, 14), f"nearest in the database ({large} px), best first; ", font(24))[2]
    for word, colour in (("same class", RIGHT), ("another class", WRONG)):
        draw.text((edge, 14), word, colour, font(24))
        edge = draw.textbbox((edge, 14), word + "   ", font(24))[2]
    for line, query in enumerate(chosen.tolist()):
        y = head + line * (block + 3 * gap)
        crop = evaluation_crop(dataset.image(query), small)
        sheet.paste(crop.resize((block, block), Image.NEAREST), (gap, y))
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

def build_index(teacher, folder, path, size, **how):
    """Embed the images under a folder at `size` px and write them to `path`. -> (number indexed, names left out)."""
    paths, unreadable = list_images(folder), []
    if not paths:
        raise ValueError(f"no images under {folder}")
    embeddings = extract(teacher, ImageSet([0] * len(paths), paths), size, unreadable=unreadable, **how)
    if not len(embeddings):
        raise ValueError(f"none of the {len(paths)} images under {folder} can be read")
    kept = [name for i, name in enumerate(paths) if i not in set(unreadable)]
    write_atomically(path, {"embeddings": embeddings, "paths": kept, "size": size, "network": fingerprint(teacher)})
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


def search(student, index, images, top=5, size=None):
    """[(image, [(score, file), ...]), ...]: for every query image the nearest files of an index."""
    embeddings, paths = read_index(index, student)
    queries = extract(student, ImageSet([0] * len(images), images), size or student.size, device="cpu")
    scores, rows = knn(queries, embeddings, top)
    return [(image, [(score, paths[row]) for score, row in zip(s, r)])
            for image, s, r in zip(images, scores.tolist(), rows.tolist())]


# --------------------------------------------------------------------------------------------------------- command line

def _parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", help="checkpoint, or the name of a released one: the network of the database")
    add("--student", nargs="+", default=[], help="checkpoints or names: the networks of the queries")
    add("--supervised", nargs="+", default=[], help="networks trained with labels, which search their own databases")
    add("--dataset", help="cub, cars, sop, synthetic or a folder; by default the teacher's")
    add("--root", help="where the data set is; by default where the teacher found it")
    add("--validation", action="store_true", help="use the second half of the training classes instead of the test classes")
    add("--ks", type=int, nargs="+", default=[1, 8], help="the K of R@K")
    add("--teacher-size", type=int, help="side of the large images in px; by default what the teacher was trained at")
    add("--student-size", type=int, help="side of the small images in px; by default what each student was trained at")
    add("--scales", type=float, nargs="+", help="factors of multi-scale extraction, such as 1 0.7071 0.5")
    add("--json", metavar="FILE", help="write the table for machines")
    add("--figure", metavar="FILE.png", help="draw queries and what they find (of the first student)")
    add("--figure-by", choices=("seed", "disagreement"), default="seed", help="which queries")
    add("--seed", type=int, default=0, help="of the figure's queries")
    add("--database", metavar="FOLDER", help="embed the images under this folder ...")
    add("--index", metavar="FILE", help="... into this file; or, with --query, search it")
    add("--query", nargs="+", metavar="IMAGE", help="images to search for")
    add("--top", type=int, default=5, help="answers to a query")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of the backbone")
    add("--device", help="cuda or cpu; by default CUDA where there is one")
    add("--workers", type=int, default=os.cpu_count(), help="processes that load images")
    return parser


def _load(path, size, flag):
    net = load_checkpoint(path)
    net.size = size or net.size
    if not net.size:
        raise ValueError(f"{path} does not say at which size it was trained: give {flag}")
    return net


def main(argv=None):
    options = _parser().parse_args(argv)
    how = dict(device=str(find_device(options.device)), workers=options.workers, precision=options.precision,
               scales=options.scales)
    students = [_load(path, options.student_size, "--student-size") for path in options.student]
    if options.query:
        if not options.index or len(students) != 1:
            raise ValueError("--query needs an --index FILE and one --student")
        for image, answers in search(students[0], options.index, options.query, options.top):
            print(image, *(f"  {score:.4f}  {name}" for score, name in answers), sep="\n")
        return
    if not options.teacher:
        raise ValueError("--teacher is needed (or --student, --index and --query)")
    teacher = _load(options.teacher, options.teacher_size, "--teacher-size")
    if options.database or options.index:
        if not (options.database and options.index):
            raise ValueError("--database FOLDER and --index FILE go together")
        count, unreadable = build_index(teacher, options.database, options.index, teacher.size, **how)
        for name in unreadable:
            warn(f"{name} cannot be read as an image: skipped")
        print(f"{count} images in {options.index}, {len(unreadable)} skipped")
        return
    _evaluate(options, teacher, students, how)


def _evaluate(options, teacher, students, how):
    for path, student in zip(options.student, students):
        if student.dim != teacher.dim:
            raise ValueError(f"{path} has {student.dim} dimensions, its teacher {options.teacher} has {teacher.dim}")
        if student.teacher not in (None, fingerprint(teacher)):
            warn(f"{path} was distilled from another teacher than {options.teacher}")
    name, root = options.dataset or teacher.options.get("dataset"), options.root or teacher.options.get("root")
    if not name:
        raise ValueError(f"{options.teacher} does not say which data set it was trained on: give --dataset")
    dataset = load_dataset(name, root, "val" if options.validation else "test")
    supervised = [_load(path, None, "another file") for path in options.supervised]
    rows, found = trade_off(teacher, students, dataset, supervised, ks=tuple(options.ks), **how)
    print_table(rows)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(rows, file, indent=1)
    if options.figure:
        if not students:
            raise ValueError("--figure needs a --student")
        draw_figure(options.figure, dataset, found, seed=options.seed, by=options.figure_by)


if __name__ == "__main__":
    run_command(main)

"""Evaluate (Sec. 4): exact retrieval metrics, accuracy against the cost of a query, and search.

    python evaluate.py --teacher T.pt --student S.pt --json table.json --figure queries.png
    python evaluate.py --teacher T.pt --database FOLDER --index photos.pt   # embed large, once
    python evaluate.py --student S.pt --index photos.pt --query IMAGE ...   # search small

The first prints a table, the second embeds a folder into an index, the third searches it.
"""

# In this order: metrics and nearest neighbours; embedding; the table; index and search; pictures;
# and what train.py and distill.py share with this program: device, processes, progress, mistakes.

import argparse
import json
import math
import os
import statistics
import sys
import time
import timeit
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed
from torch.utils.flop_counter import FlopCounterMode

from asymres import (
    NetworkError,
    fingerprint,
    make_network,
    read_checkpoint,
    save_atomically,
)
from data import (
    ImageDataset,
    UserError,
    evaluation_crop,
    evaluation_loader,
    keep_readable,
    list_images,
    load_readable,
    normalize,
    process_count,
    process_rank,
    read_image,
    say,
    settle_dataset,
)

# ------------------------------------------------------------------------------------ the evaluator


@torch.no_grad()
def retrieval_metrics(
    queries,
    database,
    query_labels,
    database_labels,
    ks=(1, 2, 4, 8),
    same_images=True,
    chunk=2**25,
):
    """Search (N, D) for each of (Q, D) by dot product: {metric: mean over queries, in [0, 1]}.

    same_images   True: query i and row i of the database are the same image, which is left out of
                  its own results; False: two sets
    chunk         how many scores are computed at a time; memory holds twice as many

    The n images with the query's label are correct. Sorted by score, correct image j = 0, ...,
    n - 1 has rank r if r images come before it; at equal scores wrong ones come first. A query
    without a correct image does not count; its image stays in the database.

      R@k          1 if a correct image has rank < k
      P@k          share of correct images among the first min(k, 1 + rank of the last correct one),
                   as in the authors' code
      mAP          mean over correct images of (j/r + (j+1)/(r+1)) / 2, where j/r is 1 if r = 0: the
                   trapezoidal rule, as in the authors' code and for the Oxford buildings
      mAP@k        the same, summed over ranks < k, divided by min(n, k)
      R-Precision  share of correct images among the first n (Musgrave et al., 2020)
      MAP@R        (j+1)/(r+1), summed over ranks < n, divided by n (likewise)

    >>> x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, 0.6]])  # 0 and 1 find each other second
    >>> retrieval_metrics(x, x, [7, 7, -1], [7, 7, -1], ks=(2,))
    {'mAP': 0.25, 'R-Precision': 0.0, 'MAP@R': 0.0, 'R@2': 1.0, 'P@2': 0.5, 'mAP@2': 0.25}

    Raises ValueError if an embedding is not finite, or no query has a correct image.
    """
    check_embeddings(queries, database)
    if queries.dtype != torch.float64:
        queries, database = queries.float(), database.float()
    queries = queries.to(database.device)
    query_labels = as_labels(query_labels, queries)
    database_labels = as_labels(database_labels, database)
    if min(ks, default=1) < 1:
        raise ValueError(f"every k of {ks} must be positive")
    if same_images and not torch.equal(query_labels, database_labels):
        raise ValueError(
            "same_images: query i and row i of the database are the same image and need the same "
            "label; for two sets give same_images=False"
        )
    sums, count = {}, 0
    batches = ranks_of_correct_images(
        queries, database, query_labels, database_labels, same_images, chunk
    )
    for ranks, n in batches:  # (q, m), (q,)
        j = torch.arange(ranks.shape[1], device=ranks.device)
        r = ranks.double()
        correct = (j < n[:, None]).double()  # 0 for padding
        precision = (j + 1) / (r + 1) * correct
        before = torch.where(r > 0, j / r.clamp(min=1), 1.0) * correct
        trapezoid = (before + precision) / 2
        last = r.gather(1, n[:, None] - 1)[:, 0]  # rank of the last correct image
        metrics = {
            "mAP": trapezoid.sum(1) / n,
            "R-Precision": ((r < n[:, None]) * correct).sum(1) / n,
            "MAP@R": ((r < n[:, None]) * precision).sum(1) / n,
        }
        for k in ks:
            found = (r < k) * correct
            metrics[f"R@{k}"] = found.amax(1)
            metrics[f"P@{k}"] = found.sum(1) / (last + 1).clamp(max=k)
            metrics[f"mAP@{k}"] = (found * trapezoid).sum(1) / n.clamp(max=k)
        for name, values in metrics.items():
            sums[name] = sums.get(name, 0) + values.sum().item()
        count += len(ranks)
    if not count:
        raise ValueError("no query has a correct image")
    return {name: total / count for name, total in sums.items()}


def ranks_of_correct_images(queries, database, query_labels, database_labels, same_images, chunk):
    """Yield, for q queries at a time, the ranks (q, m) of their n correct images, and n, (q,).

    Without the query's own image, and where no two scores are equal, the ranks of one query are

        order = scores.argsort(descending=True)  # (N,)
        ranks = (database_labels[order] == label).nonzero()

    But N scores take long to sort. The rank of a correct image is also the number of wrong images
    that score at least as high, plus the number of correct ones that score higher. Say that wrong
    images score 9 and 7, and correct ones 8 and 6: wrong ones above these are 1 and 2, correct ones
    0 and 1, so the ranks are 1 and 3. The first number is counted, see `count_at_least`; the second
    is known once the few correct scores are sorted.

    Ranks ascend, and after the first n of a row comes padding. Queries without a correct image are
    left out. The others are sorted by n, so that there is little padding.
    """
    by_label = database_labels.argsort()  # rows of the database, class after class
    sorted_labels = database_labels[by_label]
    # Where a query's class begins, and how many images it has: (Q,) each.
    class_begin = torch.searchsorted(sorted_labels, query_labels)
    class_size = torch.searchsorted(sorted_labels, query_labels, right=True) - class_begin
    n = class_size - int(same_images)
    by_count = n.argsort()
    by_count = by_count[n[by_count] > 0]
    if not len(by_count):
        return
    columns = database.T.contiguous()  # (D, N)
    # All chunks use the same memory, because allocating it anew takes as long as counting.
    at_once = min(len(by_count), max(1, chunk // len(database)))
    memory = database.new_empty(2, at_once, len(database))
    for batch in by_count.split(at_once):  # q queries
        # 1. All scores. The query's own image is no result: -inf.
        scores, buffer = memory[0, : len(batch)], memory[1, : len(batch)]  # (q, N) each
        torch.mm(queries[batch].to(columns), columns, out=scores)  # (q, D) @ (D, N)
        if same_images:
            scores.scatter_(1, batch[:, None], -torch.inf)
        # 2. The scores of the query's class, sorted. Its own image and padding are -inf, so they
        #    come last, after the n correct images.
        class_rows, padding = rows_of_classes(by_label, class_begin[batch], class_size[batch])
        correct_scores = scores.gather(1, class_rows).masked_fill(padding, -torch.inf)
        correct_scores = correct_scores.sort(descending=True).values[:, : int(n[batch].max())]
        # 3. Erase the whole class, whose scores were copied in step 2: only wrong images are left.
        #    (What is counted for padding is not read.)
        scores.scatter_(1, class_rows, -torch.inf)
        wrong_above = count_at_least(scores, correct_scores, buffer)  # (q, m)
        correct_above = torch.arange(correct_scores.shape[1], device=n.device)  # above j: j of them
        yield wrong_above + correct_above, n[batch]


def count_at_least(scores, thresholds, buffer):
    """How many of the scores (q, N) are at least each of the thresholds (q, m): (q, m), int64.

    Up to 100 thresholds, as in data sets of many classes, take a pass over the scores each, which
    is faster than sorting them.
    """
    if thresholds.shape[1] > 100:
        ascending = scores.sort(1).values
        return scores.shape[1] - torch.searchsorted(ascending, thresholds.contiguous())
    counts = []
    for threshold in thresholds.T:  # (q,)
        torch.ge(scores, threshold[:, None], out=buffer)  # 0.0 or 1.0: a CPU sums floats faster
        counts.append(buffer.sum(1))
    return torch.stack(counts, 1).long()


def rows_of_classes(by_label, begin, size):
    """The database rows of q queries' classes, and which of them are padding: (q, m) each.

    by_label: the rows of the database, class after class; those of a query's class start at `begin`
    (q,) and are `size` (q,) many. m is the largest size; smaller classes repeat their last row.
    """
    j = torch.arange(int(size.max()), device=size.device)
    last = size[:, None] - 1
    return by_label[begin[:, None] + torch.minimum(j, last)], j > last


@torch.no_grad()
def knn(queries, database, k, same_images=False, chunk=2**25):
    """The k nearest of (N, D) to each of (Q, D) by dot product: scores and rows (Q, k), best first.

    same_images: query i and row i of the database are the same image, which is left out of its own
    results. By default, unlike in `retrieval_metrics`, they are two sets. A database with fewer
    than k images gives fewer. Raises ValueError if an embedding is not finite or shapes differ.
    """
    check_embeddings(queries, database)
    if k < 1:
        raise ValueError(f"k must be positive, not {k}")
    if same_images and len(queries) > len(database):
        raise ValueError("same_images: query i needs a row i of the database")
    k = min(k, len(database) - int(same_images))
    scores, rows = [], []
    for batch in torch.arange(len(queries)).split(max(1, chunk // len(database))):
        product = queries[batch].to(database) @ database.T  # (q, D) @ (D, N) -> (q, N)
        if same_images:
            product.scatter_(1, batch[:, None].to(product.device), -torch.inf)
        best = product.topk(k)
        scores.append(best.values)
        rows.append(best.indices)
    return torch.cat(scores), torch.cat(rows)


def check_embeddings(queries, database):
    """Raise ValueError if two sets of embeddings cannot be compared."""
    for name, x in (("queries", queries), ("database", database)):
        if x.ndim != 2 or x.shape[1] != queries.shape[-1] or not x.numel():
            raise ValueError(f"{name}: (N, {queries.shape[-1]}) is needed, not {tuple(x.shape)}")
        finite = x.sum(1).isfinite()  # 25 times as fast as x.isfinite()
        if not finite.all():
            raise ValueError(f"{name}: embedding {int(finite.int().argmin())} is not finite")


def as_labels(labels, embeddings):
    """Labels (N,) of N embeddings as int64 on their device, or ValueError."""
    try:
        labels = torch.as_tensor(labels, device=embeddings.device)
    except (TypeError, ValueError) as error:
        raise ValueError(f"labels must be integers ({error})") from error
    if labels.is_floating_point() or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{len(embeddings)} integer labels are needed, not {tuple(labels.shape)} {labels.dtype}"
        )
    return labels.long()


# ---------------------------------------------------------------------------------------- embedding


@torch.no_grad()
def extract(net, dataset, size, device=None, batch_size=32, workers=0, precision="float32"):
    """Embed a data set's evaluation crops of `size` px: (N, D), float32, on the CPU.

    Moves net to the device, in eval mode. Processes share the work. Raises UserError if an image
    cannot be read.
    """
    device = find_device(device)
    net = net.to(device).eval()
    embeddings = torch.zeros(len(dataset), net.dim)
    batches = [rows.tolist() for rows in torch.arange(len(dataset)).split(batch_size)]
    batches = batches[process_rank() :: process_count()]
    progress = Progress(f"{len(dataset)} images, {size} px")
    loader = evaluation_loader(dataset, size, batches, workers, device)
    for rows, crops in zip(batches, loader, strict=True):
        images = normalize(crops.to(device, non_blocking=True) / 255)
        with autocast(device, precision):
            embeddings[rows] = net(images).cpu()
        progress.advance(1 / len(batches))
    add_over_processes([embeddings])  # the rows of others are 0 here
    return embeddings


# ------------------------------------------------------------- accuracy against the cost of a query


def query_cost(net, size, device, precision):
    """GFLOPs (a multiply-add is two) and milliseconds (median of 30) of embedding one query."""
    image = torch.zeros(1, 3, size, size, device=device)

    @torch.no_grad()
    def query():
        with autocast(device, precision):
            return net(image).cpu()  # waits for the device

    with FlopCounterMode(display=False) as counter:
        query()
    seconds = statistics.median(timeit.repeat(query, number=1, repeat=30))
    return counter.get_total_flops() / 1e9, 1e3 * seconds


class Comparison(NamedTuple):
    """A row of the table: whose queries, at which size in px, search whose database."""

    name: str
    net: torch.nn.Module  # embeds the queries
    size: int
    database_net: torch.nn.Module  # embeds the database, at its own size


def compare(
    teacher,
    students,
    dataset,
    supervised=(),
    ks=(1, 8),
    figure=None,
    device=None,
    workers=0,
    precision="float32",
):
    """Print the table of accuracy (%) against the cost of a query.

    Returns its rows as dicts, which have all metrics of `retrieval_metrics`.

    As in the paper, each image of the data set in turn is the query and searches all the others,
    but not itself: queries and database are the same images, embedded by two networks or at two
    sizes. A student's queries search the teacher's database (asymmetric) and its own (symmetric).
    "No distillation" means small queries embedded by the teacher itself. Networks know their
    `size`.

    supervised   networks trained with labels at the small size
    figure       file for a picture of what the first student finds
    device, workers, precision   as for `extract`

    Several networks of one kind are numbered. Raises ValueError if one has no size.
    """
    if not all(net.size for net in (teacher, *students, *supervised)):
        raise ValueError("every network needs its `size` in px")
    device = find_device(device)
    labels, embedded, costs = dataset.labels, {}, {}
    name = "teacher, symmetric" if students or supervised else "symmetric"
    comparisons = [Comparison(name, teacher, teacher.size, teacher)]
    for size in sorted({net.size for net in students}):
        comparisons.append(Comparison("no distillation", teacher, size, teacher))
    for suffix, net in numbered(supervised):
        comparisons.append(Comparison(f"labels{suffix}, symmetric", net, net.size, net))
    for suffix, net in numbered(students):
        comparisons.append(Comparison(f"student{suffix}, asymmetric", net, net.size, teacher))
        comparisons.append(Comparison(f"student{suffix}, symmetric", net, net.size, net))
    for _, net, size, _ in comparisons:
        if (net, size) not in embedded:
            vectors = extract(net, dataset, size, device, workers=workers, precision=precision)
            embedded[net, size] = vectors.to(device)
            costs[net, size] = query_cost(net, size, device, precision)
    rows = []
    for name, net, size, database_net in comparisons:  # each database_net has a symmetric one
        queries, database = embedded[net, size], embedded[database_net, database_net.size]
        metrics = retrieval_metrics(queries, database, labels, labels, ks, same_images=True)
        row = {
            "search": name,
            "network": net.arch,
            "query px": size,
            "database px": database_net.size,
        }
        row |= {metric: 100 * value for metric, value in metrics.items()}
        row |= dict(zip(("GFLOPs/query", "ms/query"), costs[net, size], strict=True))
        rows.append(row)
    say(f"{len(dataset)} images of {len(set(labels))} classes, each once the query for all others:")
    columns = ["search", "network", "query px", "database px", *(f"R@{k}" for k in ks)]
    columns += ["mAP", "GFLOPs/query", "ms/query"]
    print_table([{name: row[name] for name in columns} for row in rows])
    if figure and students and process_rank() == 0:
        small = students[0].size
        captions = {
            "no\ndistillation": embedded[teacher, small],
            "student": embedded[students[0], small],
        }
        database = embedded[teacher, teacher.size]
        draw_queries(figure, dataset, captions, database, small, teacher.size)
    return rows


def numbered(networks):
    """(" 1", network), (" 2", network), ... as on the command line; ("", network) if only one."""
    if len(networks) == 1:
        return [("", networks[0])]
    return [(f" {i}", net) for i, net in enumerate(networks, start=1)]


def compare_unlabelled(
    teacher,
    student,
    dataset,
    photographs,
    figure=None,
    device=None,
    workers=0,
    precision="float32",
):
    """Print what can be measured without labels as a table. Returns its rows, as dicts.

    dataset: the held-back images, which are the queries and the first rows of the database.
    photographs: all others, the rows after them. What is measured is the agreement with the
    teacher's large queries: see `agreement`.
    """
    device = find_device(device)
    how = {"device": device, "workers": workers, "precision": precision}
    everything = ImageDataset(dataset.paths + photographs.paths)
    database = extract(teacher, everything, teacher.size, **how).to(device)
    small_by_teacher = extract(teacher, dataset, student.size, **how).to(device)
    small_by_student = extract(student, dataset, student.size, **how).to(device)
    comparisons = [  # name, the queries' network, size in px and embeddings
        ("teacher", teacher, teacher.size, database[: len(dataset)]),
        ("no distillation", teacher, student.size, small_by_teacher),
        ("student", student, student.size, small_by_student),
    ]
    rows, captions = [], {}
    for name, net, size, queries in comparisons:
        captions[f"{name}\n{size} px"] = queries
        gflops, ms = query_cost(net, size, device, precision)
        row = {"search": name, "network": net.arch, "query px": size, "database px": teacher.size}
        row |= agreement(queries, database)
        rows.append(row | {"GFLOPs/query": gflops, "ms/query": ms})
    say(f"{len(dataset)} queries in {len(everything)} images, compared with the teacher's own:")
    print_table(rows)
    if figure and process_rank() == 0:
        draw_queries(figure, everything, captions, database, student.size, teacher.size)
    return rows


def agreement(queries, database, k=10):
    """Whether queries (Q, D) find in a database (N, D) what its own images find there, in percent.

    Rows 0 to Q - 1 of the database are the same images as the queries, embedded large. Nothing
    finds itself.
    """
    own = database[: len(queries)]
    _, theirs = knn(own, database, k, same_images=True)  # (Q, k)
    _, found = knn(queries, database, k, same_images=True)
    overlap = (theirs[:, :, None] == found[:, None, :]).any(2).double().mean()
    return {
        "top-1 agreement": 100 * (theirs[:, 0] == found[:, 0]).double().mean().item(),
        f"top-{k} overlap": 100 * overlap.item(),
        "cosine": (queries * own).sum(1).mean().item(),
    }


# --------------------------------------------------------------------------------- index and search


def build_index(teacher, folder, path, device=None, workers=0, precision="float32"):
    """Embed all images below a folder and write the index, a dict of plain values and tensors.

    It has embeddings (N, D), N paths relative to the folder, the folder, the teacher's fingerprint,
    network, and its size in px. Images that cannot be read are named, counted and left out.
    """
    found = ImageDataset(list_images(folder))
    if not len(found):
        raise UserError(f"no images below {folder}")
    dataset = keep_readable(found, workers)
    embeddings = extract(
        teacher, dataset, teacher.size, device, workers=workers, precision=precision
    )
    index = {
        "embeddings": embeddings,
        "paths": [os.path.relpath(name, folder) for name in dataset.paths],
        "folder": os.path.abspath(folder),
        "network": fingerprint(teacher),
        "size": teacher.size,
    }
    if process_rank() == 0:
        save_atomically(path, index)
    skipped = len(found) - len(dataset)
    say(f"{len(dataset)} images in {path}, {skipped} that cannot be read left out")


def search(student, about, index_path, query_paths, top=5, figure=None, device=None):
    """Print the `top` nearest images of an index to each query image (paths), and draw them.

    about: what the student's checkpoint says of its teacher, see `load_network`.
    """
    content = read_checkpoint(index_path)
    entries = {"embeddings", "paths", "folder", "network", "size"}
    if not isinstance(content, dict) or not entries <= set(content):
        raise UserError(
            f"{index_path} is not an index: python evaluate.py --database --index makes one"
        )
    if not taught_by(content["network"], student, about):
        raise UserError(f"{index_path} is of another network than the teacher of this student")
    taught_at = about.options.get("teacher_size")
    if content["network"] == about.teacher_fingerprint and content["size"] != taught_at:
        raise UserError(
            f"{index_path} is of {content['size']} px, and the student was taught by {taught_at} px"
        )
    embeddings, paths = content["embeddings"], content["paths"]
    if embeddings.shape[1] != student.dim:
        raise UserError(
            f"{index_path} has {embeddings.shape[1]} dimensions, the student {student.dim}"
        )
    readable = []
    for path in query_paths:
        try:
            read_image(path)
            readable.append(path)
        except UserError as error:
            say(str(error))
    if not readable:
        raise UserError("no query can be read")
    queries = extract(student, ImageDataset(readable), student.size, device)
    rows = []
    best_scores, best_rows = knn(queries, embeddings, top)  # (Q, top) each
    for path, scores, found in zip(readable, best_scores, best_rows, strict=True):
        files = [os.path.join(content["folder"], paths[i]) for i in found.tolist()]
        say(path, *(f"  {score:.4f}  {file}" for score, file in zip(scores, files, strict=True)))
        if figure:
            there = [file for file in files if os.path.exists(file)]
            answers = [(evaluation_crop(read_image(file), 120), None) for file in there]
            rows.append((evaluation_crop(read_image(path), student.size), [("", answers)]))
    if figure:
        draw_answers(
            figure, f"queries, {student.size} px, and the nearest images of {index_path}", rows
        )


def taught_by(network, student, about):
    """Whether a network, by its fingerprint, is the student's teacher or the student itself.

    (A student may also search a database of its own.)
    """
    if not about.options:  # a checkpoint of the authors, which does not say
        return True
    return network in (about.teacher_fingerprint, fingerprint(student))


# ------------------------------------------------------------------------------ tables and pictures


def print_table(rows):
    """Print dicts with the same keys as a table, in process 0."""
    digits = {"GFLOPs/query": 3, "cosine": 3}  # after the point; all others have one
    lines = [["", *list(rows[0])[1:]]]  # the first column has no heading
    for row in rows:
        cells = []
        for name, x in row.items():
            cells.append(f"{x:.{digits.get(name, 1)}f}" if isinstance(x, float) else str(x))
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        say("  ".join(cells).rstrip())


def draw_queries(path, dataset, embeddings, database, query_size, database_size, count=6):
    """Draw some queries and what they find in a database (N, D), for several embeddings of them.

    embeddings: {caption: (Q, D)} of images 0 to Q - 1 of the data set, which do not find
    themselves. A frame is green if the class is right or, without labels, if the first of the
    embeddings finds the same image.
    """
    labels = dataset.labels
    total = len(next(iter(embeddings.values())))
    queries = torch.randperm(total, generator=torch.Generator().manual_seed(0)).tolist()
    if labels is not None:
        sizes = Counter(labels)
        queries = [i for i in queries if sizes[labels[i]] > 1]
    rows = []
    for query in queries[:count]:
        answers, right = [], None
        for caption, vectors in embeddings.items():
            scores = vectors[[query]] @ database.T  # (1, D) @ (D, N) -> (1, N)
            scores[0, query] = -torch.inf
            found = scores.topk(min(8, len(database) - 1)).indices[0].tolist()
            if right is None:
                right = set(found)
            good = [i in right if labels is None else labels[i] == labels[query] for i in found]
            images = [evaluation_crop(dataset[i], database_size) for i in found]
            answers.append((caption, list(zip(images, good, strict=True))))
        rows.append((evaluation_crop(dataset[query], query_size), answers))
    title = f"queries, {query_size} px, and the nearest images, {database_size} px"
    draw_answers(path, title, rows)


def draw_answers(path, title, rows, cell=120):
    """Save a picture: each query image beside rows of a caption and answers (image, right?)."""
    step = cell + 20
    most = max(len(found) for _, answers in rows for _, found in answers)
    height = sum(len(answers) * step + 20 for _, answers in rows)
    sheet = Image.new("RGB", (2 * step + 160 + most * step, 50 + height), "white")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(20), 50
    draw.text((10, 14), title, "black", font)
    for query, answers in rows:
        side = step * min(2, len(answers)) - 20
        sheet.paste(query.resize((side, side), Image.Resampling.NEAREST), (10, y))
        for caption, found in answers:
            right = 2 * step + 140
            draw.text((right, y + step / 2), caption, "black", font, anchor="rm", align="right")
            for place, (image, good) in enumerate(found):
                frame = {True: "#1a9850", False: "#d73027", None: "white"}[good]
                shown = ImageOps.expand(image.resize((cell, cell)), 6, frame)
                sheet.paste(shown, (right + 20 + place * step, y))
            y += step
        y += 20
    sheet.save(path)


# --------------------------------------- what programs share: device, processes, progress, mistakes
#
# Several processes (torchrun --nproc-per-node N): each takes its share of an epoch's images. Losses
# are sums over images, so gradients are summed over processes, not averaged. `process_rank`,
# `process_count` and `say`, which data.py needs as well, are there.


def find_device(name=None):
    """The device "cuda", "cuda:1" or "cpu"; by default this process's GPU, if there is one."""
    if not name and torch.cuda.is_available():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    name, gpus = str(name or "cpu"), torch.cuda.device_count()
    there = ["cpu"] + ["cuda"] * bool(gpus) + [f"cuda:{i}" for i in range(gpus)]
    if name not in there:
        raise UserError(f"--device {name}: PyTorch finds {', '.join(there)}")
    return torch.device(name)


PRECISIONS = ("auto", "bfloat16", "float32")  # auto: bfloat16 on GPUs that have it, else float32


def autocast(device, precision):
    """The context manager of a forward pass in one of these precisions."""
    use = precision == "bfloat16"
    if precision == "auto":
        use = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=use)


def start_processes():
    """Join the other processes if torchrun started this one."""
    if distributed.is_torchelastic_launched() and not distributed.is_initialized():
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def add_over_processes(tensors):
    """Sum tensors of one dtype over all processes, in place and in one message."""
    if process_count() > 1:
        message = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(message)
        parts = message.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))


def broadcast(tensor):
    """The tensor of process 0 in all processes, in place."""
    if process_count() > 1:
        distributed.broadcast(tensor, src=0)
    return tensor


class Progress:
    """A line on the terminal: what is running, how much of it is done, and the time left."""

    def __init__(self, title, announce=False):
        self.title, self.announce = title, announce
        self.share, self.skipped, self.done = 1.0, 0.0, 0.0  # as shares of the whole
        self.began = self.shown = time.time()

    def stage(self, title, share):
        """Begin a stage that is a share of the whole."""
        self.title, self.share = title, share

    def skip(self, part):
        """A part of the stage was done earlier and says nothing about the speed."""
        self.skipped += self.share * part
        self.done += self.share * part

    def advance(self, part, note=None):
        """A part of the stage is done. Without a terminal, print a line every half minute.

        note: a function whose text is added, called only when the line is shown
        """
        self.done += self.share * part
        if process_rank() > 0:
            return
        terminal, now, last = sys.stderr.isatty(), time.time(), self.done > 1 - 1e-9
        elapsed = now - self.began
        left = elapsed / (self.done - self.skipped) * (1 - self.done)
        if self.announce and self.done > 0.03:
            minutes = max(1, round(left / 60))
            say(f"On this machine it will take about {minutes} minute{'s' if minutes > 1 else ''}.")
            self.announce = False
        if now - self.shown < (0.2 if terminal else 30) and not last:
            return
        self.shown = now
        more = note() if note else ""
        whole = " of all" if self.share < 1 else ""
        line = f"{self.title}: {self.done:4.0%}{whole}{more}, {format_time(left)} left"
        if last:  # what took no time needs no line
            title = "all" if self.share < 1 else self.title
            line = f"{title}: done in {format_time(elapsed)}" if elapsed > 5 else ""
        if terminal:
            print(f"\r{line}\033[K", end="\n" * bool(last and line), file=sys.stderr, flush=True)
        elif line:
            print(line, file=sys.stderr, flush=True)


def format_time(seconds):
    """Minutes and seconds, 12:34."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def end(code, sentence):
    """End the program with a sentence on stderr."""
    print(sentence, file=sys.stderr)
    sys.exit(code)


def run_program(main):
    """Run a script's main(). What the user can mend ends in one sentence and exit code 2.

    Any other exception shows its traceback.
    """
    torch.backends.cudnn.allow_tf32 = False  # where float32 is asked for, float32 is used
    sys.stdout.reconfigure(errors="replace")  # for names of files that the terminal cannot show
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    try:
        start_processes()
        main()
    except torch.OutOfMemoryError:
        end(2, "error: out of GPU memory: --device cpu, or in training a smaller --micro-batch")
    except (UserError, NetworkError, OSError) as error:
        # A worker's arrives as "Caught UserError in ... Traceback ... data.UserError: SENTENCE".
        end(2, f"error: {str(error).rpartition('UserError: ')[2].strip()}")
    except KeyboardInterrupt:
        end(130, "\nstopped; a training continues after its last whole epoch by the same command")
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


# ----------------------------------------------------------------------------- options, the program


class About(NamedTuple):
    """What a checkpoint says about the training of its network."""

    options: dict  # {} for the authors' checkpoints, which have none
    teacher_fingerprint: str | None  # of a student's teacher


def load_network(path):
    """(network, About) of a checkpoint, a file or a released name."""
    content = read_checkpoint(path)
    net = make_network(content, path)
    if not net.size:
        raise UserError(f"{path} does not say at which size in px the network was trained")
    about = About(content.get("options", {}), content.get("teacher"))
    epochs, planned = content.get("training", {}).get("epochs"), about.options.get("epochs")
    if epochs and planned and epochs < planned:
        say(f"note: {path} is unfinished, {epochs} of {planned} epochs")
    return net, about


def default_workers():
    """The number of workers that decode images: one per core, divided among the processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def new_parser(description, epilog):
    """The ArgumentParser of a program: texts as they stand, no abbreviated options."""
    return argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=partial(
            argparse.RawDescriptionHelpFormatter, width=100, max_help_position=30
        ),
        usage="%(prog)s [options]",
        allow_abbrev=False,
    )


def number(kind, low, high=math.inf):
    """A type for argparse: an int or a float from low to high."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse: invalid int value
    return parse


def parse_options(argv=None):
    """Parse the command line."""
    parser = new_parser(__doc__, "Defaults are in parentheses.")
    add = parser.add_argument
    add(
        "--teacher",
        metavar="FILE",
        help="the database's network: a checkpoint, or a released name as "
        "cub-448r-resnet50-512-gem-w",
    )
    add(
        "--student",
        nargs="+",
        default=[],
        metavar="FILE",
        help="checkpoints of the queries' networks",
    )
    add(
        "--size",
        type=number(int, 1),
        metavar="PX",
        help="px of the database's images (the teacher's)",
    )
    add("--figure", metavar="FILE.png", help="draw what the first student finds")
    add(
        "--workers",
        type=number(int, 0),
        metavar="N",
        default=default_workers(),
        help="processes that decode images (one per core)",
    )
    add("--device", metavar="NAME", help="cuda, cuda:1 or cpu (cuda if there is a GPU)")
    add(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        metavar="NAME",
        help="auto, bfloat16 or float32; auto: bfloat16 if a GPU has it (float32)",
    )
    add = parser.add_argument_group("the table of a teacher and its students").add_argument
    add(
        "--supervised",
        nargs="+",
        default=[],
        metavar="FILE",
        help="checkpoints of networks trained with labels",
    )
    add("--dataset", metavar="NAME", help="cub, cars, sop, synthetic or a folder (the teacher's)")
    add("--root", metavar="FOLDER", help="folder that holds the data set (the teacher's)")
    add("--unlabelled", action="store_true", help="the data set is any folder, without labels")
    add("--validation", action="store_true", help="test on the second half of the training classes")
    add(
        "--ks",
        type=number(int, 1),
        nargs="+",
        metavar="K",
        default=[1, 8],
        help="the K of R@K (1 8)",
    )
    add("--json", metavar="FILE", help="also write the table as JSON")
    add = parser.add_argument_group("an index, with --teacher").add_argument
    add("--database", metavar="FOLDER", help="embed the images below this folder ...")
    add("--index", metavar="FILE", help="... into this file; with --query: the file to search")
    add = parser.add_argument_group("search in an --index, with one --student").add_argument
    add("--query", nargs="+", metavar="IMAGE", help="images to search for")
    add("--top", type=number(int, 1), metavar="N", default=5, help="results per query (5)")
    return parser.parse_args(argv)


# The options that each of the three commands reads.
OPTIONS_READ = {
    "--query": "student index query top figure device".split(),
    "--database": "teacher size database index workers device precision".split(),
    "the table": "teacher student supervised size dataset root unlabelled validation ks json "
    "figure workers device precision".split(),
}


def main():
    options = parse_options()
    find_device(options.device)  # an impossible --device ends the program before it reads files
    if options.figure and not options.figure.lower().endswith((".png", ".jpg", ".jpeg")):
        raise UserError(f"--figure {options.figure}: a name that ends in .png or .jpg is needed")
    for option in ("figure", "json", "index"):
        path = getattr(options, option)
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(f"--{option} {path}: there is no such folder")
    if options.query:
        refuse_unread(options, "--query")
        command_search(options)
    elif options.database:
        refuse_unread(options, "--database")
        command_index(options)
    else:
        refuse_unread(options, "the table")
        command_table(options)


def refuse_unread(options, command):
    """Raise UserError if an option is given that this command does not read."""
    for name, default in vars(parse_options([])).items():
        if getattr(options, name) != default and name not in OPTIONS_READ[command]:
            others = [other for other, names in OPTIONS_READ.items() if name in names]
            raise UserError(f"--{name} is read by {' and '.join(others)}, not by {command}")


def command_search(options):
    """--query: search an index with a student."""
    if len(options.student) != 1 or not options.index:
        raise UserError("--query needs one --student and an --index FILE")
    student, about = load_network(options.student[0])
    search(
        student,
        about,
        options.index,
        options.query,
        options.top,
        options.figure,
        options.device,
    )


def command_index(options):
    """--database: embed a folder into an index."""
    if not options.teacher or not options.index:
        raise UserError("--database needs a --teacher, and an --index FILE to write")
    teacher, _ = load_network(options.teacher)
    teacher.size = options.size or teacher.size
    build_index(
        teacher,
        options.database,
        options.index,
        options.device,
        options.workers,
        options.precision,
    )


def command_table(options):
    """Neither: the table of a teacher and its students."""
    if not options.teacher:
        raise UserError("--teacher is needed, or --query with --student and --index")
    teacher, about = load_network(options.teacher)
    teacher.size = options.size or teacher.size
    students = [load_student(path, teacher) for path in options.student]
    supervised = [load_network(path)[0] for path in options.supervised]
    if options.figure and not students:
        raise UserError("--figure shows what a --student finds: which one?")
    test, others = load_test_images(options, about.options)
    how = {
        "figure": options.figure,
        "device": options.device,
        "workers": options.workers,
        "precision": options.precision,
    }
    if test.labels is None:
        if len(students) != 1:
            raise UserError("without labels, one --student is compared with its --teacher")
        if supervised or options.ks != [1, 8]:
            raise UserError("--supervised and --ks need labels")
        rows = compare_unlabelled(teacher, students[0], test, others, **how)
    else:
        rows = compare(teacher, students, test, supervised, options.ks, **how)
    if options.json and process_rank() == 0:
        Path(options.json).write_text(json.dumps(rows, indent=1))


def trained_on(dataset, trained):
    """The options of a network's training, `trained`, if it was on this data set; else {}.

    A folder that has all of its training classes is taken for a copy of its data set.
    """
    if dataset == trained.get("dataset"):
        return trained
    classes = trained.get("classes")
    if classes and all(os.path.isdir(os.path.join(dataset, name)) for name in classes):
        say(f"note: {dataset} has the training classes of {trained['dataset']}, as a copy would")
        return trained
    return {}


def note_other_photographs(trained, count):
    """Say that photographs were added or removed since the training: the split is by position."""
    before = trained.get("photographs", count)
    if count != before:
        say(
            f"note: there are {count} images and were {before} in training: those held back now "
            "are others, and may have been trained on"
        )


def load_student(path, teacher):
    """The student of a checkpoint. Raises UserError if this is not its teacher."""
    student, about = load_network(path)
    if not taught_by(fingerprint(teacher), student, about):
        raise UserError(f"{path} was not taught by this --teacher")
    if student.dim != teacher.dim:
        raise UserError(f"{path} has {student.dim} dimensions, the teacher {teacher.dim}")
    taught_at = about.options.get("teacher_size", teacher.size)
    of_teacher = about.teacher_fingerprint == fingerprint(teacher)
    if of_teacher and taught_at != teacher.size:
        raise UserError(f"{path} was taught by images of {taught_at} px: give --size {taught_at}")
    return student


def load_test_images(options, trained):
    """(test images, None), or without labels (those held back, all others).

    By default they are of the teacher's data set; trained: the options of its training.
    """
    name = options.dataset or trained.get("dataset")
    if not name:
        raise UserError("--dataset is needed: the teacher's checkpoint does not name one")
    name, root = settle_dataset(name, options.root)
    if options.unlabelled and not os.path.isabs(name):
        raise UserError("--unlabelled needs a folder of images as --dataset")
    trained = trained_on(name, trained)
    if options.validation and trained and not trained.get("validation"):
        raise UserError("--validation: the teacher was trained on the validation classes, too")
    split = "val" if options.validation or trained.get("validation") else "test"
    unlabelled = options.unlabelled or (not options.dataset and trained.get("unlabelled", False))
    classes, workers = trained.get("classes"), options.workers
    root = root or trained.get("root")
    test = load_readable(name, root, split, unlabelled, classes, workers)
    others = None
    if test.labels is None:
        others = load_readable(name, root, "train", unlabelled=True, workers=workers)
        note_other_photographs(trained, len(test) + len(others))
    return test, others


if __name__ == "__main__":
    run_program(main)

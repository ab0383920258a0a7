"""Evaluation (Sec. 4): exact retrieval metrics, accuracy against the cost of a query, and search.

    python evaluate.py --teacher T.pt --student S.pt --json table.json --figure queries.png
    python evaluate.py --teacher T.pt --database FOLDER --index photos.pt  # embed a folder, once, large
    python evaluate.py --student S.pt --index photos.pt --query IMAGE ...  # search it with small queries
"""
import argparse
import json
import os
import timeit
from pathlib import Path
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.flop_counter import FlopCounterMode
from asymres import fingerprint, load_checkpoint, read_checkpoint, write_atomically
from data import (PROCESSES, WORKERS, ImageSet, add_up, decoder, evaluation_batches, evaluation_crop,
                  list_images, load_dataset, refuse, run_command, settle_dataset)

def knn(queries, database, k, same_images=False, chunk=2 ** 26):
    """Scores and rows (Q, k) of the k best of (N, D) for each of (Q, D), best first; ties in any order."""
    refuse(k < 1, f"k must be positive, not {k}")
    parts = torch.arange(len(queries)).split(max(1, chunk // len(database)))
    k, scores = min(k, len(database) - same_images), _scores(queries, database, parts, same_images)
    return tuple(map(torch.cat, zip(*(some.topk(k) for some in scores))))

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
    labels, others = (torch.as_tensor(x, device="cpu") for x in (query_labels, database_labels))
    refuse(min(ks, default=1) < 1, f"every k must be positive, not {ks}")
    for name, x, y in (("queries", queries, labels), ("database", database, others)):
        refuse(x.ndim != 2 or x.shape[1] != queries.shape[1] or not x.numel() or len(y) != len(x),
               f"{name}: (N, {queries.shape[-1]}) and N labels are needed, not {tuple(x.shape)} and {len(y)}")
        finite = x.isfinite().all(1)
        refuse(not finite.all(), f"{name}: embedding {int(finite.int().argmin())} is not finite")
    refuse(same_images and not torch.equal(labels, others), "same_images: the same images have equal labels")
    ordered, by_class = others.sort()
    first = torch.searchsorted(ordered, labels)
    size = torch.searchsorted(ordered, labels, right=True) - first
    parts = [rows for n in size[size > same_images].unique().tolist()  # whose classes have one size
             for rows in (size == n).nonzero()[:, 0].split(max(1, chunk // (len(others) + 8 * n)))]
    refuse(not parts, "no query has a correct image")
    longest = [x.norm(dim=1).max().item() for x in (queries, database)]
    found = []
    for rows, scores in zip(parts, _scores(queries, database, parts, same_images)):
        correct = by_class[first[rows, None] + torch.arange(size[rows[0]])].to(scores.device)  # (q, n)
        best = scores.gather(1, correct).sort(descending=True).values[:, :correct.shape[1] - same_images]
        rounding = 4 * torch.finfo(best.dtype).eps * longest[0] * longest[1]  # within it, scores are equal
        wrong = scores.scatter_(1, correct, -torch.inf)
        found.append(_metrics(_reaching(wrong, best - rounding).double(), ks))
    return {name: torch.cat([part[name] for part in found]).mean().item() for name in found[0]}

def _scores(queries, database, parts, same_images):  # (q, N) of each part's rows (q,), in one buffer
    database = database.detach().to(torch.promote_types(database.dtype, torch.float32))
    room = database.new_empty(max(map(len, parts)), len(database))
    for rows in parts:
        some, scores = queries[rows].detach().to(room), room[:len(rows)]
        if room.is_cpu:  # numpy's BLAS takes two thirds of PyTorch's time
            np.matmul(some.numpy(), database.numpy().T, out=scores.numpy())
        else:
            torch.mm(some, database.T, out=scores)  # (q, D) @ (D, N) -> (q, N)
        yield scores.scatter_(1, rows[:, None].to(room.device), -torch.inf) if same_images else scores

def _reaching(scores, bounds):  # how many of a query's scores (q, N) reach each of its bounds (q, n)
    if bounds.shape[1] > 256:  # a sort costs less than the passes
        pairs = zip(scores.split(128), bounds.split(128))
        return torch.cat([x.shape[1] - torch.searchsorted(x.sort().values, some) for x, some in pairs])
    if scores.is_cpu:  # numpy counts many times faster
        pairs = zip(scores.numpy(), bounds.numpy())
        return torch.tensor([[np.count_nonzero(x >= bound) for bound in some] for x, some in pairs])
    return torch.stack([(scores >= bound[:, None]).sum(1) for bound in bounds.T], dim=1)

def _metrics(before, ks):  # {name: (q,)} from how many wrong images, (q, n), precede each correct one
    n, j = before.shape[1], torch.arange(before.shape[1]).to(before)
    ranks = before + j
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
    refuse(name not in there, f"--device {name}: PyTorch finds only {', '.join(there)}")
    if name != "cpu":
        torch.cuda.set_device(name)
    return torch.device(name)

def set_precision(name, device):
    """The name asked for, of "auto" the card's best; float32 then means it: no TF32."""
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "ieee"
    best = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
    return best if name == "auto" else name

def embed(net, images, precision="float32"):
    """Normalised images (..., 3, s, s) -> unit vectors (..., D), float32; `precision` is the backbone's."""
    flat = images.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        return net(flat).unflatten(0, images.shape[:-3])

@torch.no_grad()
def extract(net, dataset, size, device=None, batch_size=32, workers=0, precision="float32", rows=None,
            decode=None):
    """Embeddings (N, D), float32, on the CPU, of the images `rows` (all by default) at `size` px.
    `net` goes to `device`, in eval mode. ValueError for an unreadable image; zeros in a lenient dataset.
    """
    device, rows = find_device(device), range(len(dataset)) if rows is None else rows
    net, embeddings = net.to(device).eval(), torch.zeros(len(rows), net.dim)
    starts = range(0, len(rows), batch_size)[PROCESSES["rank"]::PROCESSES["count"]]
    parts = [slice(i, i + batch_size) for i in starts]
    decode = decode or decoder(dataset, workers, device)
    for places, images in evaluation_batches(decode, rows, parts, size, device):
        embeddings[places] = embed(net, images, precision).cpu()
    add_up(embeddings)
    return embeddings

@torch.no_grad()
def trade_off(teacher, students, dataset, supervised=(), ks=(1, 8), device=None, figure=None, **how):
    """Print accuracy (%) against the cost of a query. -> the table's rows (dicts), in process 0.
    Networks know their `size`; `how` goes to extract; figure: a PNG of what the first student finds.
    """
    device, labels, rows = find_device(device), dataset.labels, []
    todo = [("teacher, symmetric", teacher, teacher.size, teacher)]  # queries' network, their px, database's
    todo += [("no distillation", teacher, px, teacher) for px in sorted({net.size for net in students})]
    todo += [("supervised, symmetric", net, net.size, net) for net in supervised]
    for net in students:
        todo += [("student, asymmetric", net, net.size, teacher), ("student, symmetric", net, net.size, net)]
    found = dict.fromkeys((net, px) for _, net, px, _ in todo)
    found = {(net, px): extract(net, dataset, px, device, **how).to(device) for net, px in found}
    for name, net, px, other in todo if PROCESSES["rank"] == 0 else ():
        metrics = retrieval_metrics(found[net, px], found[other, other.size], labels, labels, ks)
        query = lambda: embed(net, torch.zeros(1, 3, px, px, device=device), how.get("precision")).cpu()
        with FlopCounterMode(display=False) as counter:  # a multiply-add is 2
            query()
        rows.append({"": name, "network": net.arch, "query px": px, "database px": other.size,
                     **{key: 100 * metrics[key] for key in (*(f"R@{k}" for k in ks), "mAP")},
                     "GFLOPs/query": counter.get_total_flops() / 1e9,
                     "ms/query": 1e3 * sorted(timeit.repeat(query, number=1, repeat=30))[15]})
    lines = [[f"{x:.3f}" if isinstance(x, float) else str(x) for x in row]
             for row in (*rows[:1], *map(dict.values, rows))]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print(*("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines), sep="\n")
    if figure and rows:
        _draw_queries(figure, dataset, teacher, students[0], found)
    return rows

def _draw_queries(path, dataset, teacher, student, found):  # a PNG of 6 random queries and their answers
    labels, small, large = dataset.labels, student.size, teacher.size
    order = np.random.default_rng(0).permutation(len(labels))
    sheet = Image.new("RGB", (1560, 46 + 6 * 304), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(22)
    title = f"queries, {small} px, and the nearest images, {large} px; green: same class, red: another"
    pen.text((10, 14), title, "black", font)
    for top, query in zip(range(56, sheet.height, 304), (i for i in order if labels.count(labels[i]) > 1)):
        sheet.paste(evaluation_crop(dataset.image(query), small).resize((274, 274), Image.NEAREST), (10, top))
        for y, net, caption in ((top, teacher, "no\ndistillation"), (top + 142, student, "student")):
            pen.text((404, y + 66), caption, "black", font, anchor="rm", align="right")
            nearest = knn(found[net, small][[query]], found[teacher, large], 9)[1][0].tolist()
            for x, image in zip(range(424, sheet.width, 142), (i for i in nearest if i != query)):
                shown = evaluation_crop(dataset.image(image), large).resize((120, 120))
                colour = "#1a9850" if labels[image] == labels[query] else "#d73027"
                sheet.paste(ImageOps.expand(shown, 6, colour), (x, y))
    sheet.save(path, "PNG")

def build_index(teacher, folder, path, **how):
    """Write embeddings (N, D) and paths (N) of the images under a folder; print unreadable ones."""
    paths = list_images(folder)
    embeddings = extract(teacher, ImageSet([0] * len(paths), paths, lenient=True), teacher.size, **how)
    good = embeddings.any(1)
    refuse(not good.any(), f"no images under {folder} that can be read")
    if PROCESSES["rank"] == 0:
        write_atomically(path, {"embeddings": embeddings[good], "paths": [paths[i] for i in good.nonzero()],
                                "network": fingerprint(teacher)})
    print(*(f"{paths[i]} cannot be read: skipped" for i in (~good).nonzero()),
          f"{good.sum()} images in {path}, {(~good).sum()} skipped", sep="\n")

def search(student, index, images, top, **how):
    """Print scores and files of an index's `top` nearest to each of some images (paths)."""
    content = read_checkpoint(index)
    names = "embeddings", "paths", "network"
    refuse(not isinstance(content, dict) or not {*names} <= {*content}, f"{index} is not an index")
    embeddings, paths, network = (content[name] for name in names)
    ours = student.teacher or student.options  # the authors' students do not name their teacher
    stranger = ours and network not in (student.teacher, fingerprint(student))
    refuse(stranger or embeddings.shape[1] != student.dim, f"{index} is of another network than the teacher")
    queries = extract(student, ImageSet([0] * len(images), images), student.size, **how)
    for image, scores, rows in zip(images, *knn(queries, embeddings, top)):
        print(image, *(f"  {score:.4f}  {paths[row]}" for score, row in zip(scores, rows)), sep="\n")

def held_back(asked, dataset, root, *nets):
    """Whether validation classes stand in for test classes: as asked, or as nets trained on this set were."""
    own = [net.options for net in nets if net.options.get("dataset") == dataset]
    said = {bool(o.get("validation")) for o in own if dataset != "folder" or o.get("root") == root} | {asked}
    refuse({True, False} <= said, "--validation: networks and command line disagree on the training classes")
    return True in said

def _parse(argv):  # the options, refused where they cannot end well
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--teacher", help="checkpoint or released name of the database's network")
    add("--student", nargs="+", default=[], help="the networks of the queries")
    add("--supervised", nargs="+", default=[], help="networks trained with labels")
    add("--dataset", help="cub, cars, sop, synthetic or a folder; default: the teacher's")
    add("--root", help="where it is; default: where the teacher found it")
    add("--validation", action=argparse.BooleanOptionalAction, help="test on half of the training classes")
    add("--ks", type=int, nargs="+", default=[1, 8], help="the K of R@K (%(default)s)")
    add("--json", metavar="FILE", help="the table, for machines")
    add("--figure", metavar="FILE.png", help="what the first student finds")
    add("--database", metavar="FOLDER", help="embed the images under it ...")
    add("--index", metavar="FILE", help="... into this file; with --query: search it")
    add("--query", nargs="+", metavar="IMAGE", help="images to search for")
    add("--top", type=int, default=5, help="answers to a query (%(default)s)")
    add("--precision", choices=("auto", "bfloat16", "float32"), default="float32")
    add("--device", help="cuda or cpu; default: cuda if there")
    add("--workers", type=int, default=WORKERS, help="that load images (%(default)s)")
    options = parser.parse_args(argv)
    query, index, students = options.query, options.index, len(options.student)
    refuse(query and not (index and students == 1), "--query needs an --index FILE and one --student")
    refuse(not query and not options.teacher, "--teacher is needed, or --student, --index and --query")
    refuse(not query and bool(options.database) != bool(index), "--database and --index FILE go together")
    refuse(min(*options.ks, options.top) < 1 or options.workers < 0, "--ks, --top or --workers is too small")
    refuse(options.figure and not students, "--figure needs a --student")
    for path in map(Path, filter(None, (options.json, options.figure, not query and index))):
        refuse(path.is_dir() or not os.access(path.parent, os.W_OK), f"{path} cannot be written")
    return options

def main(argv=None):
    options = _parse(argv)
    device = find_device(options.device)
    how = dict(device=device, workers=options.workers, precision=set_precision(options.precision, device))
    paths = options.student if options.query else [options.teacher, *options.student, *options.supervised]
    nets = [load_checkpoint(path) for path in paths]
    for path, net in zip(paths, nets):
        refuse(not net.size, f"{path} does not say its training size")
        refuse(net.dim != nets[0].dim and path in options.student,
               f"{path} has {net.dim} dimensions, its teacher {nets[0].dim}")
    if options.query:
        return search(*nets, options.index, options.query, options.top, **how)
    if options.database:
        return build_index(nets[0], options.database, options.index, **how)
    name, root = settle_dataset(options.dataset, options.root, nets[0].options)
    dataset = load_dataset(name, root, "val" if held_back(options.validation, name, root, *nets) else "test")
    count = 1 + len(options.student)
    rows = trade_off(nets[0], nets[1:count], dataset, nets[count:], options.ks, figure=options.figure, **how)
    if options.json and rows:
        Path(options.json).write_text(json.dumps(rows, indent=1))

if __name__ == "__main__":
    run_command(main)

"""What holds, shown on small cases: python -m pytest. No data, no network, no GPU.

Chapters: losses; metrics; table and picture; network and checkpoints; images; views and loader;
data sets; training, resume and processes; command line and mistakes; README; recorded values.
"""

import argparse
import doctest
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

# No GPU, except in the two tests that run programs of their own on one, see run_on_a_gpu.
os.environ["GPUS_OF_TESTS"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms.v2 import functional as TF

import asymres
import data
import distill
import evaluate
import train
from asymres import EmbeddingNet, GeM, NetworkError, fingerprint, load_checkpoint, save_checkpoint
from data import ImageDataset, UserError, load_dataset, read_image
from evaluate import extract, knn, retrieval_metrics

torch.set_num_threads(1)  # a forked process would lack the others
HERE = Path(__file__).parent


def unit_vectors(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_images(*paths):
    """Write images of 50 x 40 px of noise, which depends on the last two parts of the path."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = list(f"{path.parent.name}/{path.name}".encode())
        Image.fromarray(noise(40, 50, 3, seed=seed)).save(path)


def small_net(arch="resnet10-narrow", pooling="gem", dim=8, pretrained=False, backbone=None):
    return EmbeddingNet(arch, pooling, dim, pretrained, backbone).eval()


@pytest.fixture
def fork():
    """fork(function) starts a process that runs it, without importing everything again."""
    started = []

    def start(function):
        process = multiprocessing.get_context("fork").Process(target=function)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


# ----------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    "case, lambda_ts, lambda_ss, expected",
    [(0, 0, 0, 1.8000209920876884), (1, 0.7718, 0.6684, 4.054649398303912)],
)
def test_the_distillation_loss_is_the_authors(case, lambda_ts, lambda_ss, expected):
    """Value and gradient; theirs adds 1e-6 to each 1 - s.t."""
    student = RECORDED[f"student_{case}"].clone().requires_grad_()
    teacher = RECORDED[f"teacher_{case}"]
    loss = asymres.distillation_loss(student, teacher, lambda_ts, lambda_ss)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=3e-6)
    assert_close(student.grad, RECORDED[f"gradient_{case}"], rtol=0, atol=2e-6)


def test_the_triplet_loss_is_the_authors():
    anchors = RECORDED["anchors"].clone().requires_grad_()
    loss = asymres.triplet_loss(anchors, RECORDED["positives"], RECORDED["negatives"], 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(4.7996729925, abs=1e-9)
    assert_close(anchors.grad, RECORDED["triplet_gradient"], rtol=0, atol=1e-9)


def test_the_distillation_loss_by_hand():
    """The student has swapped two views that the teacher puts at right angles."""
    t, s = torch.eye(2)[None], torch.eye(2).flip(0)[None]
    assert asymres.absolute_term(s, t) == 1  # both views are off by 1; the mean over A = 2
    assert asymres.ts_term(s, t) == 1  # s_i . t_j = 1 where t_i . t_j = 0
    assert asymres.ss_term(s, t) == 0  # among themselves they stand right
    assert asymres.distillation_loss(s, t, lambda_ts=3, lambda_ss=5) == 1 + 3
    assert asymres.distillation_loss(t, t, 3, 5) == 0
    two_images = asymres.distillation_loss(torch.cat([s, t]), torch.cat([t, t]), 3, 5)
    assert two_images == 4, "a sum over images, and nothing crosses them"
    assert asymres.distillation_loss(s[:, :1], t[:, :1], 3, 5) == 1, "one view has no relations"
    for other in (t[0], t[:, :1], torch.cat([t, t])):
        with pytest.raises(ValueError, match="twice is needed"):
            asymres.distillation_loss(s, other, 3, 5)


def test_the_triplet_loss_by_hand():
    anchor, positive = torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]]])
    opposite_and_equal = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])
    loss = asymres.triplet_loss(anchor, positive, opposite_and_equal, margin=0.7)
    assert loss == pytest.approx((0 + 2.7) / 2)  # 2 - 4 + 0.7 is below 0; 2 - 0 + 0.7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_negative_probabilities_follow_the_formula(dtype):
    """Never the own class; finite for copies and opposites of the anchor, too."""
    anchors, labels = unit_vectors(3, 16).to(dtype), torch.arange(46) % 5
    pool = torch.cat([unit_vectors(40, 16, seed=1).to(dtype), anchors, -anchors])
    ours = asymres.negative_probabilities(anchors, pool, labels[1:4], labels)
    own = labels[1:4, None] == labels
    d = (2 - 2 * anchors.double() @ pool.double().T).clamp(0.25, 4 - 1e-6).sqrt()
    log_weight = (2 - 16) * d.log() - (16 - 3) / 2 * (1 - d**2 / 4).log()
    log_weight[own] = 0
    weight = (log_weight - log_weight.amax(1, keepdim=True)).exp() + 1e-6
    weight[own] = 0
    assert_close(ours.double(), weight / weight.sum(1, keepdim=True), rtol=1e-3, atol=1e-9)
    assert (ours[own] == 0).all() and (ours[~own] > 0).all()
    with pytest.raises(ValueError, match="no negatives"):
        asymres.negative_probabilities(anchors, pool, torch.zeros(3), torch.zeros(46))


def test_negative_probabilities_by_hand():
    """D = 4: at squared distances 1 and 2 the weights are 1 / sqrt(3/4) and 1/2 * sqrt(2)."""
    anchor = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    pool = torch.tensor([[0.5, 0.75**0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    own, others = torch.tensor([7]), torch.tensor([1, 2, 7])
    weights = torch.tensor([[1.1547005, 0.7071068, 0.0]])
    probabilities = asymres.negative_probabilities(anchor, pool, own, others)
    assert_close(probabilities, weights / weights.sum(), atol=1e-5, rtol=0)


def test_negatives_are_drawn_with_these_probabilities():
    """A chi-square test; 51.2 is the 0.001 critical value at 24 degrees of freedom."""
    pool, labels, n = unit_vectors(30, 8, seed=3), torch.arange(30) // 6, 20_000
    anchor, own = unit_vectors(1, 8), labels[:1]
    generator = torch.Generator().manual_seed(0)
    drawn = asymres.draw_negatives(anchor.expand(n, -1), pool, own.expand(n), labels, 2, generator)
    assert (drawn[:, 0] != drawn[:, 1]).all() and (labels[drawn] != own).all()
    seen = torch.bincount(drawn[:, 0], minlength=30)[6:]
    expected = n * asymres.negative_probabilities(anchor, pool, own, labels)[0, 6:]
    assert ((seen - expected).square() / expected).sum() < 51.2
    with pytest.raises(ValueError, match="fewer than 25"):
        asymres.draw_negatives(anchor, pool, own, labels, 25)


# ---------------------------------------------------------------------------------------- metrics


@pytest.mark.parametrize(
    "queries, expected",
    [
        (
            "database",
            [0.197619047619, 0, 1 / 9, 6 / 9, 0, 1 / 18, 1 / 6, 0, 1 / 72, 0.045524691358],
        ),
        ("queries", [0.190729717813, 0, 1 / 9, 5 / 9, 0, 1 / 18, 5 / 36, 0, 1 / 72, 1 / 27]),
    ],
)
def test_the_metrics_are_the_authors(queries, expected):
    """Image 9 is alone in its class: no query, but in the database."""
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
    metrics = retrieval_metrics(
        RECORDED[queries], RECORDED["database"], labels, labels, ks=(1, 2, 4)
    )
    names = ("mAP", "R@1", "R@2", "R@4", "P@1", "P@2", "P@4", "mAP@1", "mAP@2", "mAP@4")
    assert [metrics[name] for name in names] == pytest.approx(expected, abs=1e-9)


def test_the_example_in_the_docstring():
    assert doctest.testmod(evaluate) == doctest.TestResults(failed=0, attempted=2)


def metrics_by_sorting(queries, database, query_labels, database_labels, ks, same_images):
    """The definitions, query by query: at equal scores wrong images stand before correct ones."""
    rows = []
    for i, label in enumerate(query_labels):
        correct = database_labels == label
        order = np.lexsort((correct, -(database @ queries[i])))
        hits = correct[order[order != i] if same_images else order]
        ranks, n = np.flatnonzero(hits), int(hits.sum())
        if not n:
            continue
        precisions = [((j / r if r else 1) + (j + 1) / (r + 1)) / 2 for j, r in enumerate(ranks)]
        row = {"mAP": np.mean(precisions), "R-Precision": hits[:n].mean()}
        row["MAP@R"] = sum((j + 1) / (r + 1) for j, r in enumerate(ranks) if r < n) / n
        for k in ks:
            row[f"R@{k}"] = hits[:k].any()
            row[f"P@{k}"] = hits[: min(k, ranks[-1] + 1)].mean()
            found = [p for p, r in zip(precisions, ranks, strict=True) if r < k]
            row[f"mAP@{k}"] = sum(found) / min(n, k)
        rows.append(row)
    return {name: np.mean([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("same_images", [True, False])
def test_metrics_and_knn_are_what_sorting_says(same_images):
    """With many ties: the embeddings are small whole numbers, whose products are exact."""
    rng, ks = np.random.default_rng(same_images), (1, 2, 5, 100)
    for case, (q, n) in enumerate([*rng.integers(3, 30, (12, 2)).tolist(), (20, 300), (60, 60)]):
        q = n if same_images else q
        queries = torch.from_numpy(rng.integers(-1, 2, (q, 3 + case % 5))).double()
        database = torch.from_numpy(rng.integers(-1, 2, (n, 3 + case % 5))).double()
        labels = (rng.integers(0, 1 + n // 4, n) - 1) * 10**15  # any integers
        if n == 300:
            labels = labels // 10**15 % 2  # two classes of more than 100 images
        query_labels = labels if same_images else labels[rng.integers(0, n, q)]
        labels[:2] = query_labels[0] = labels[0]  # one at least is there to be found
        expected = metrics_by_sorting(
            queries.numpy(), database.numpy(), query_labels, labels, ks, same_images
        )
        scores = queries @ database.T - (torch.eye(q, n) * 1e9 if same_images else 0)
        best = scores.topk(min(9, n - same_images)).values
        for chunk, dtype in itertools.product((1, 7 * n, 2**24), (torch.float32, torch.float64)):
            x, y = queries.to(dtype), database.to(dtype)
            ours = retrieval_metrics(x, y, query_labels, labels.tolist(), ks, same_images, chunk)
            assert ours == pytest.approx(expected, abs=1e-6), (case, chunk, dtype)
            found, rows = knn(x, y, 9, same_images, chunk)
            assert torch.equal(found.double(), best)
            assert torch.equal(found.double(), scores.gather(1, rows))
            assert (rows.sort(1).values.diff(dim=1) > 0).all(), "a row is named twice"


def test_metrics_are_those_of_pytorch_metric_learning():
    accuracy = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    pytest.importorskip("faiss")
    names = {"precision_at_1": "R@1", "r_precision": "R-Precision"}
    names |= {"mean_average_precision_at_r": "MAP@R"}
    x, labels = unit_vectors(300, 16), torch.arange(300) * 7 % 40
    calculator = accuracy.AccuracyCalculator(tuple(names), k=299, device=torch.device("cpu"))
    theirs = calculator.get_accuracy(x, labels, x, labels, ref_includes_query=True)
    ours = retrieval_metrics(x, x, labels, labels)
    for name in names:
        assert ours[names[name]] == pytest.approx(theirs[name], abs=1e-6)


GOOD = dict(queries=torch.ones(3, 4), database=torch.ones(3, 4))
INFINITE = torch.tensor([[1.0], [torch.inf], [1.0]]).expand(3, 4)


@pytest.mark.parametrize(
    "sentence, change",
    [
        ("database: embedding 1 is not finite", {"database": INFINITE}),
        ("queries: embedding 0 is not finite", {"queries": torch.full((3, 4), torch.nan)}),
        ("is needed, not .3, 5", {"database": torch.ones(3, 5)}),
        ("is needed, not .4,", {"queries": torch.ones(4)}),
        ("is needed, not .0, 4", {"database": torch.ones(0, 4)}),
    ],
)
def test_metrics_and_knn_refuse(sentence, change):
    embeddings = GOOD | change
    with pytest.raises(ValueError, match=sentence):
        retrieval_metrics(**embeddings, query_labels=[1, 1, 1], database_labels=[1, 1, 1])
    with pytest.raises(ValueError, match=sentence):
        knn(**embeddings, k=1)
    with pytest.raises(ValueError, match="k must be positive"):
        knn(**GOOD, k=0)
    with pytest.raises(ValueError, match="query i needs a row i"):
        knn(torch.ones(3, 4), torch.ones(2, 4), k=1, same_images=True)


@pytest.mark.parametrize(
    "sentence, change",
    [
        ("integer", {"query_labels": ["a", "b", "c"]}),
        ("integer", {"query_labels": [1.0, 1.0, 2.0]}),
        ("3 integer labels", {"database_labels": torch.ones(3, 1, dtype=torch.long)}),
        ("3 integer labels", {"database_labels": [1, 1]}),
        ("positive", {"ks": (1, 0)}),
        ("same label", {"query_labels": [2, 1, 2]}),
        (
            "for two sets give same_images=False",
            dict(query_labels=[1, 1, 1], database=torch.ones(4, 4), database_labels=[1, 1, 1, 1]),
        ),
        ("no query has", {"query_labels": [1, 2, 3], "database_labels": [1, 2, 3]}),
    ],
)
def test_metrics_refuse(sentence, change):
    labels = dict(query_labels=[1, 1, 2], database_labels=[1, 1, 2])
    with pytest.raises(ValueError, match=sentence):
        retrieval_metrics(**GOOD | labels | change)


def test_agreement_by_hand():
    """Of 3 queries on a line two find what the large ones find."""
    database = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])  # 0 and 2 find 1, 1 finds 0
    queries = database[[0, 2, 2]]  # the second one now finds 2
    measured = evaluate.agreement(queries, database, k=1)
    assert measured["top-1 agreement"] == measured["top-1 overlap"] == pytest.approx(200 / 3)
    assert measured["cosine"] == pytest.approx((1 + 0.6 + 1) / 3)


# ----------------------------------------------------------------------------- table and picture


def test_the_rows_of_the_table(photographs):
    """Queries and database are embedded by the networks and at the sizes that a row names."""
    dataset = ImageDataset(load_dataset(str(photographs)).paths, labels=[i % 9 for i in range(36)])
    teacher, labelled, student = small_net(), small_net(), small_net()
    teacher.size, labelled.size, student.size = 48, 32, 24
    rows = evaluate.compare(teacher, [student], dataset, [labelled], ks=(1, 2), device="cpu")
    expected = {  # network and size of the queries, and of the database
        "teacher, symmetric": (teacher, 48, teacher, 48),
        "no distillation": (teacher, 24, teacher, 48),
        "labels, symmetric": (labelled, 32, labelled, 32),
        "student, asymmetric": (student, 24, teacher, 48),
        "student, symmetric": (student, 24, student, 24),
    }
    assert [row["search"] for row in rows] == list(expected)
    assert len({row["mAP"] for row in rows}) == 5, "five searches that can be told apart"
    for row, (net, size, database_net, database_size) in zip(rows, expected.values(), strict=True):
        queries, database = (
            extract(net, dataset, size),
            extract(database_net, dataset, database_size),
        )
        metrics = retrieval_metrics(queries, database, dataset.labels, dataset.labels, (1, 2))
        assert (row["query px"], row["database px"]) == (size, database_size)
        for name in ("R@1", "R@2", "mAP"):
            assert row[name] == pytest.approx(100 * metrics[name]), row["search"]


def test_rows_of_several_students_have_numbers(photographs):
    dataset = ImageDataset(load_dataset(str(photographs)).paths, labels=[i % 9 for i in range(36)])
    teacher, *students = small_net(), small_net(), small_net()
    teacher.size, students[0].size, students[1].size = 48, 32, 24
    rows = evaluate.compare(teacher, students, dataset, students, device="cpu")
    sizes = {row["search"]: row["query px"] for row in rows}
    assert sizes["labels 1, symmetric"] == sizes["student 1, asymmetric"] == 32
    assert sizes["labels 2, symmetric"] == sizes["student 2, symmetric"] == 24


def test_the_cost_of_a_query():
    """A 1 x 1 convolution from 3 to 7 channels at 16 x 16 positions, and GeM without whitening."""
    net = small_net(backbone=nn.Conv2d(3, 7, 1), dim=0)
    gflops, ms = evaluate.query_cost(net, 16, torch.device("cpu"), "float32")
    assert gflops == pytest.approx(2 * 3 * 7 * 16 * 16 / 1e9) and 0 < ms < 1000


def test_the_picture_shows_what_is_found(monkeypatch, tmp_path):
    """Never the query itself; a frame is green around an answer of the query's class."""
    dataset = ImageDataset(images=noise(4, 8, 8, 3), labels=[0, 0, 1, 1])
    angles = torch.tensor([0, 20, 90, 50]).deg2rad()
    embeddings = torch.stack([angles.cos(), angles.sin()], 1)
    nearest = {0: [1, 3, 2], 1: [0, 3, 2], 2: [3, 1, 0], 3: [1, 2, 0]}  # best first
    drawn, draw = [], evaluate.draw_answers

    def noted(path, title, rows):
        drawn.extend(rows)
        draw(path, title, rows, cell=40)

    monkeypatch.setattr(evaluate, "draw_answers", noted)
    evaluate.draw_queries(tmp_path / "f.png", dataset, {"x": embeddings}, embeddings, 8, 8, 4)
    crops = [pixels_of(data.evaluation_crop(dataset[i], 8)) for i in range(4)]
    picture, seen = Image.open(tmp_path / "f.png").convert("RGB"), []
    for row, (query, [(_, answers)]) in enumerate(drawn):
        i = crops.index(pixels_of(query))
        seen.append(i)
        assert [crops.index(pixels_of(image)) for image, _ in answers] == nearest[i]
        for place, j in enumerate(nearest[i]):
            assert answers[place][1] == (dataset.labels[i] == dataset.labels[j])
            red, green, _ = picture.getpixel((300 + 60 * place + 2, 50 + 80 * row + 2))
            assert (green > red) == (dataset.labels[i] == dataset.labels[j])
    assert sorted(seen) == [0, 1, 2, 3]


# ----------------------------------------------------------------------- network and checkpoints


def test_gem_is_between_mean_and_maximum():
    x = torch.rand(2, 3, 5, 5)
    assert_close(GeM(1)(x), x.mean((2, 3)))
    assert_close(GeM(3, channels=3)(x), x.pow(3).mean((2, 3)).pow(1 / 3))
    assert_close(GeM(300)(x), x.amax((2, 3)), rtol=0.03, atol=0)


@pytest.mark.parametrize("p", [1, 3, 8, 30])
def test_gem_has_a_gradient_where_a_channel_is_dead(p):
    x = torch.rand(2, 3, 5, 5)
    x[:, 1] = 0
    pool = GeM(p, channels=3)
    pool(x.requires_grad_()).sum().backward()
    assert x.grad.isfinite().all() and pool.p.grad.isfinite().all()
    assert (x.grad[:, 0] > 0).any()


def test_the_embedding_is_pooled_whitened_and_of_unit_length():
    """Of images and of views; `whiten` is called, so that hooks and adapters on it count."""
    views = torch.randn(2, 3, 3, 64, 64)
    for pooling, dim in (("gem", 8), ("gemmp", 8), ("mac", 8), ("spoc", 0)):
        net = small_net(pooling=pooling, dim=dim)
        embeddings = net(views)
        assert embeddings.shape == (2, 3, net.dim) and net.dim == (dim or 256)
        assert_close(embeddings.norm(dim=-1), torch.ones(2, 3))
        assert_close(net(views[1]), embeddings[1])
        if dim:
            pooled = F.normalize(net.pool(net.backbone(views[0])).flatten(1))
            assert_close(F.normalize(net.whiten(pooled)), embeddings[0])
            net.whiten.register_forward_hook(lambda layer, inputs, output: -output)
            assert_close(net(views), -embeddings)
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\) are needed, not \(3, 32, 32\)"):
        net(torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="torch.uint8"):
        small_net()(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize("arch", ["densenet121", "mobilenet_v3_small", "mnasnet0_5"])
def test_networks_are_torchvisions_up_to_the_pooling(arch, tmp_path):
    """From a file of weights: what its classifier sees before the first linear layer."""
    model = torchvision.models.get_model(arch, num_classes=2).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    linear = next(layer for layer in model.modules() if isinstance(layer, nn.Linear))
    if arch == "mobilenet_v3_small":
        linear = model.classifier[0]  # squeeze and excitation has linear layers, too
    seen, images = [], torch.randn(2, 3, 96, 96)
    linear.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    model(images)
    ours = small_net(arch, "spoc", 0, pretrained=tmp_path / "weights.pth")(images)
    assert_close(ours, F.normalize(seen[0]), rtol=1e-4, atol=1e-6)


def test_networks_that_are_refused():
    for arch, why in (
        ("googlenet", "normalises"),
        ("swin_t", "no feature map"),
        ("vit_b_16", "no convolutional feature map"),
        ("resnet1O", "is not available"),
        ("resnet10", "no ImageNet weights"),
    ):
        with pytest.raises(NetworkError, match=why):
            small_net(arch, pretrained=arch == "resnet10")
    with pytest.raises(NetworkError, match="pooling 'avg'"):
        small_net(pooling="avg")


def test_a_backbone_of_ones_own(tmp_path):
    """It is given again when its checkpoint is loaded."""
    backbone = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU())
    net, images = small_net(backbone=backbone, dim=0), torch.rand(2, 3, 9, 9)
    assert_close(net(images), F.normalize(net.pool(backbone(images))))
    save_checkpoint(tmp_path / "net.pt", net)
    again = nn.Sequential(nn.Conv2d(3, 7, 3), nn.ReLU())
    assert_close(load_checkpoint(tmp_path / "net.pt", again)(images), net(images))


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_statistics_stand_still_in_pretrained_networks(frozen, tmp_path):
    """And when such a network comes from its checkpoint."""
    save_checkpoint(tmp_path / "weights.pt", small_net())
    net = small_net(pretrained=tmp_path / "weights.pt" if frozen else False)
    save_checkpoint(tmp_path / "net.pt", net)
    for trained in (net, load_checkpoint(tmp_path / "net.pt")):
        before = trained.backbone[1].running_mean.clone()
        trained.train()(torch.randn(4, 3, 32, 32)).sum().backward()
        assert torch.equal(trained.backbone[1].running_mean, before) == frozen
        assert trained.backbone[1].weight.grad is not None and trained.training


def test_timm_networks_get_their_own_normalisation(tmp_path, monkeypatch):
    """Through a checkpoint, and when that is a file of weights to start from."""
    timm = pytest.importorskip("timm")
    create, images = timm.create_model, torch.rand(2, 3, 64, 64)
    half = (0.5, 0.5, 0.5)

    def create_without_download(name, pretrained=False):
        model = create(name, pretrained=False)
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": half, "std": half}
        models.append(model)
        return model

    models = []
    monkeypatch.setattr(timm, "create_model", create_without_download)
    net = small_net("timm/lcnet_035", "spoc", 0, pretrained=True)
    expected = models[0]((images - 0.5) / 0.5).mean((2, 3))
    given = data.normalize(images.clone())
    assert_close(net(given), F.normalize(expected), rtol=1e-4, atol=1e-5)
    save_checkpoint(tmp_path / "net.pt", net)
    for again in (
        load_checkpoint(tmp_path / "net.pt"),
        small_net("timm/lcnet_035", "spoc", 0, pretrained=tmp_path / "net.pt"),
    ):
        assert_close(again(given), net(given))
        assert again.mean == half
    assert small_net("timm/lcnet_035").mean == asymres.MEAN, "random weights: nothing else is known"


def test_checkpoints_of_the_authors(tmp_path, monkeypatch):
    """Loaded by name, downloaded once; a numpy float is in them, and the size in px in the name."""
    net, images = small_net(), torch.randn(2, 3, 32, 32)
    meta = {"architecture": net.arch, "pooling": "gem", "whitening": 8, "outputdim": 8}
    meta |= {"mean": list(asymres.MEAN), "std": list(asymres.STD)}
    theirs = {"meta": meta, "state_dict": net.state_dict(), "max_map": np.float64(0.4)}
    fetched = []

    def download(url, path):
        fetched.append(url)
        torch.save(theirs, path)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    names = {"cub-S224r-T448r-resnet50-512-gem-w": 224, "sop-448r-resnet50-512-gem-w": 448}
    for name, size in names.items():
        for _ in range(2):
            loaded = load_checkpoint(name)
            assert torch.equal(loaded(images), net(images)) and loaded.size == size
    folder = "http://ptak.felk.cvut.cz/personal/sumapave/public/"
    assert fetched == [f"{folder}{name}.pth" for name in names]
    assert len(asymres.RELEASED) == 9 and set(names) < set(asymres.RELEASED)


class Malice:
    """Pickled, it is a command that whoever loads it runs."""

    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_strangers_file_runs_no_code(zipped, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stranger = {"meta": Malice(), "state_dict": {}}
    torch.save(stranger, "net.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(NetworkError, match="net.pt is not a readable checkpoint"):
        load_checkpoint("net.pt")
    assert not os.path.exists("was_run")
    torch.load("net.pt", weights_only=False)
    assert os.path.exists("was_run"), "this is what was not done"


def test_wrapped_networks_are_saved_as_what_they_wrap(tmp_path):
    net, images = small_net(pooling="gemmp"), torch.randn(2, 3, 32, 32)
    net.size = 32
    for wrapped in (torch.compile(net), nn.DataParallel(net), torch.compile(nn.DataParallel(net))):
        save_checkpoint(tmp_path / "net.pt", wrapped)
        again = load_checkpoint(tmp_path / "net.pt")
        assert torch.equal(again(images), net(images)) and again.size == 32
        assert fingerprint(again) == fingerprint(net) != fingerprint(small_net())
    before, net.backbone = fingerprint(net), torch.compile(net.backbone)
    save_checkpoint(tmp_path / "net.pt", net)
    assert fingerprint(load_checkpoint(tmp_path / "net.pt")) == before


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_files_of_weights(prefix, tmp_path):
    """As others save them; another classifier, or none, does not matter. Other weights do."""
    model = torchvision.models.resnet18(num_classes=5)
    state = {prefix + name: value for name, value in model.state_dict().items()}
    content = {"state_dict": state, "epoch": 7} if prefix else state
    torch.save(content, tmp_path / "weights.pth")
    net = small_net("resnet18", pretrained=tmp_path / "weights.pth")
    assert torch.equal(net.backbone[0].weight, model.conv1.weight)
    assert torch.equal(net.backbone[7][1].bn2.running_var, model.layer4[1].bn2.running_var)
    with pytest.raises(NetworkError, match="does not hold the weights of this network"):
        small_net("resnet34", pretrained=tmp_path / "weights.pth")


def test_asymres_and_data_are_pieces_to_copy(tmp_path, monkeypatch, fork):
    """Each works in an empty folder, alone."""

    def use(name):
        for module in ("asymres", "data", "evaluate", "train", "distill"):
            del sys.modules[module]
        sys.path[:] = [path for path in sys.path if path and Path(path) != HERE]
        sys.path.insert(0, str(tmp_path / name))
        if name == "asymres":
            from asymres import EmbeddingNet, distillation_loss

            views = EmbeddingNet("resnet10", dim=4, pretrained=False)(torch.randn(2, 3, 3, 32, 32))
            assert distillation_loss(views, views, 1, 1) < 1e-9
        else:
            from data import DistillationLoader, distillation_loader, evaluation_transform

            images = [Image.new("RGB", (40, 30))] * 3
            assert evaluation_transform(8)(images[0]).shape == (3, 8, 8)
            assert distillation_loader is DistillationLoader
            small, large = next(iter(DistillationLoader(images, 8, 16, views=2)))
            assert small.shape == (3, 2, 3, 8, 8) and large.shape == (3, 2, 3, 16, 16)

    for name in ("asymres", "data"):
        (tmp_path / name).mkdir()
        shutil.copy(HERE / f"{name}.py", tmp_path / name)
        process = fork(partial(use, name))
        process.join()
        assert process.exitcode == 0, name


# ----------------------------------------------------------------------------------------- images

PICTURE = Image.fromarray(noise(12, 16, 3))
GREY = PICTURE.convert("L")
STENCIL = Image.fromarray(noise(12, 16) // 128 * 255)  # 0 or 255: clear or opaque


def pixels_of(image):
    return image.size, image.tobytes()


def on_white(image, clear):
    white = Image.new("RGB", image.size, "white")
    return Image.composite(white, image.convert("RGB"), Image.fromarray(clear))


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    """Grey, palettes, transparency on white, 16 bit, floats, CMYK; evaluation_transform agrees."""
    palette, cmyk, key = PICTURE.quantize(16), PICTURE.convert("CMYK"), PICTURE.getpixel((0, 0))
    shades = np.asarray(GREY)
    clear, keyed = np.asarray(STENCIL) == 0, (np.asarray(PICTURE) == key).all(-1)
    cases = [
        ("bilevel.png", PICTURE.convert("1"), PICTURE.convert("1"), {}),
        ("grey.png", GREY, GREY, {}),
        ("rgb.png", PICTURE, PICTURE, {}),
        ("palette.png", palette, palette, {}),
        ("cmyk.tif", cmyk, cmyk, {}),
        ("16-bit.png", Image.fromarray(shades.astype(np.uint16) * 257), GREY, {}),
        ("32-bit.tif", Image.fromarray(shades.astype(np.int32) * (2**31 // 255)), GREY, {}),
        ("float.tif", Image.fromarray(shades.astype(np.float32) / 255), GREY, {}),
        ("float-255.tif", Image.fromarray(shades.astype(np.float32)), GREY, {}),
        (
            "rgba.png",
            Image.merge("RGBA", (*PICTURE.split(), STENCIL)),
            on_white(PICTURE, clear),
            {},
        ),
        ("la.png", Image.merge("LA", (GREY, STENCIL)), on_white(GREY, clear), {}),
        ("keyed.png", PICTURE, on_white(PICTURE, keyed), {"transparency": key}),
    ]
    for name, image, shown, how in cases:
        image.save(tmp_path / name, **how)
        assert pixels_of(read_image(tmp_path / name)) == pixels_of(shown.convert("RGB")), name
        with Image.open(tmp_path / name) as image:
            ours, right = (data.evaluation_transform(8)(x) for x in (image, shown))
        assert torch.equal(ours, right), name


@pytest.mark.parametrize("mode", "1 L P RGB RGBA RGBX CMYK YCbCr LAB HSV I F LA PA I;16".split())
def test_every_mode_becomes_rgb(mode):
    image = Image.new(mode, (16, 12))
    assert data.to_rgb(image).mode == "RGB"
    assert data.evaluation_transform(8)(image).shape == (3, 8, 8)


def test_turned_photographs(tmp_path):
    """By the EXIF entry Orientation, whatever the others hold."""
    turned = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}
    turned |= {5: Image.Transpose.TRANSPOSE, 8: Image.Transpose.ROTATE_90}
    for orientation in (1, 3, 5, 6, 8, 99):
        odd = (0x0100, 2, 4, b"wide")  # ImageWidth, of type text, 4 letters
        turn_by = (0x0112, 3, 1, orientation, 0)  # Orientation, of type short, one of them
        entries = struct.pack("<IHHHI4sHHIHHI", 8, 2, *odd, *turn_by, 0)
        PICTURE.save(tmp_path / "turned.png", exif=b"Exif\0\0II*\0" + entries)
        turn = turned.get(orientation)
        expected = PICTURE if turn is None else PICTURE.transpose(turn)
        assert pixels_of(read_image(tmp_path / "turned.png")) == pixels_of(expected), orientation


def test_the_evaluation_transform_is_resize_and_centre_crop():
    """Both sides times 8/7 of the size over the shorter one, rounded: 73 x 98 of 375 x 500."""
    image = Image.fromarray(noise(500, 375, 3))
    crop = image.resize((73, 98), Image.Resampling.LANCZOS).crop((4, 17, 68, 81))
    expected = data.normalize(TF.pil_to_tensor(crop) / 255)
    assert_close(data.evaluation_transform(64)(image), expected, atol=2.1 / 255 / 0.225, rtol=0)
    difference = (data.evaluation_transform(64)(image) - expected).abs().mean()
    assert difference < 0.1 / 255 / 0.225, "a grey level here and there"


def test_long_narrow_images_take_no_memory(tmp_path):
    Image.new("RGB", (65_000, 1), "red").save(tmp_path / "strip.png")
    for image in (read_image(tmp_path / "strip.png"), read_image(tmp_path / "strip.png", 100)):
        embedded = data.evaluation_transform(448)(image)
        assert embedded.shape == (3, 448, 448) and (embedded[0] > 2).all()


@pytest.mark.parametrize("name", ["big.jpg", "big.png", "16-bit.png", "palette.png"])
def test_big_images_are_shrunk_while_they_are_decoded(name, tmp_path):
    """They look as if they were shrunk afterwards."""
    soft = PICTURE.resize((4, 3)).resize((1200, 900), Image.Resampling.BICUBIC)
    if name == "16-bit.png":
        soft = Image.fromarray(np.asarray(soft.convert("L")).astype(np.uint16) * 257)
    if name == "palette.png":
        soft = soft.quantize(16)
    soft.save(tmp_path / name, quality=95)
    shrunk, whole = read_image(tmp_path / name, 4000), read_image(tmp_path / name, 10**9)
    assert 3900 < shrunk.width * shrunk.height < 4100 and whole.size == soft.size
    small = whole.resize(shrunk.size, Image.Resampling.LANCZOS)
    assert abs(np.asarray(shrunk, int) - np.asarray(small)).mean() < 2
    for images in (ImageDataset([tmp_path / name]), [whole]):  # the loader shrinks both
        _, sizes = next(iter(data.decoding_loader(images, [[0]], 4000, 0, "cpu")))
        assert sizes == [shrunk.size[::-1]]


def test_the_images_of_a_folder(tmp_path):
    """Whatever Pillow reads, by its suffix; not hidden ones, not what is no file; no loops."""
    expected = [f"{name}.png" for name in ("a/b/nested", "with a space [1]", "üß")]
    expected += ["a/UPPER.JPG", "a/x.jfif", "a/x.jpe", "a/x.pgm", "a/x.webp", "a/x.gif"]
    write_images(*(tmp_path / name for name in expected))
    write_images(tmp_path / ".hidden.png", tmp_path / ".ipynb_checkpoints" / "a.png")
    (tmp_path / "a" / "._x.png").write_text("of macOS")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "broken-link.png").symlink_to(tmp_path / "nowhere")
    found = [os.path.relpath(path, tmp_path) for path in data.list_images(tmp_path)]
    assert found == sorted(found) and set(found) == set(expected)


def test_truncated_images_are_refused_by_name(tmp_path):
    PICTURE.resize((64, 48)).save(tmp_path / "cut.jpg")
    os.truncate(tmp_path / "cut.jpg", os.path.getsize(tmp_path / "cut.jpg") - 20)
    for max_pixels in (None, 1):
        with pytest.raises(UserError, match="cut.jpg cannot be read as an image"):
            read_image(tmp_path / "cut.jpg", max_pixels)


# ------------------------------------------------------------------------------- views and loader


def pixels(height, width, seed=0):
    return torch.from_numpy(noise(3, height, width, seed=seed))


def view_by_torchvision(image, box, flip, factors, order, size):
    x = TF.resized_crop(image, *box, [size, size], antialias=True) / 255
    x = TF.horizontal_flip(x) if flip else x
    adjust = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for i in order:
        x = adjust[i](x, factors[i].item())
    return x


@pytest.mark.parametrize("mixup", [True, False])
def test_views_are_what_torchvision_makes_of_their_draws(mixup):
    """At both sizes: the same regions, colours and weights, with the same partners."""
    images = [pixels(50 + 5 * i, 60, seed=i) for i in range(6)]
    images[0][:], images[1][:, :, 30:] = 77, 200  # grey: its hue is anything
    draws = data.sample_views(images[3:], images, 4, 0.2, mixup, np.random.default_rng(7))
    for size in (24, 48):
        views = data.render_views(images[3:], draws, size)
        assert views.shape == (3, 4, 3, size, size)
        for v, view in enumerate(views.flatten(0, 1)):
            alike = (draws.flips[v], draws.factors[v], draws.order, size)
            expected = view_by_torchvision(images[3 + v // 4], draws.boxes[v], *alike)
            if mixup:
                partner = view_by_torchvision(draws.partners[v], draws.partner_boxes[v], *alike)
                expected = draws.weights[v] * expected + (1 - draws.weights[v]) * partner
            expected = data.normalize(expected)
            assert_close(view, expected, atol=0.1, rtol=0)
            assert (view - expected).abs().mean() < 0.02  # older versions round in another way
    assert len(draws.partners) == (12 if mixup else 0)


def test_what_is_drawn_for_views():
    """Boxes of the asked share, as RandomResizedCrop has them; factors, flips and weights vary."""
    images = [pixels(60, 80)] * 50
    draws = data.sample_views(images, images, 8, 0.2, True, np.random.default_rng(0))
    top, left, height, width = np.array(draws.boxes).T
    area, ratio = height * width / 4800, width / height
    assert (top >= 0).all() and (top + height <= 60).all()
    assert (left >= 0).all() and (left + width <= 80).all()
    assert 0.19 < area.min() < 0.25 and 0.9 < area.max() <= 1
    assert 0.72 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.37
    low, high = draws.factors.amin(0), draws.factors.amax(0)
    assert_close(low, torch.tensor([0.6, 0.6, 0.6, -0.1]), atol=0.02, rtol=0)
    assert_close(high, torch.tensor([1.4, 1.4, 1.4, 0.1]), atol=0.02, rtol=0)
    assert 0.4 < draws.flips.float().mean() < 0.6
    assert 0.4 < draws.weights.mean() < 0.6 and draws.weights.std() > 0.35  # Beta(0.2, 0.2)
    generators = [np.random.default_rng(seed) for seed in range(100)]
    orders = [data.sample_views(images, [], 1, 1, False, rng).order for rng in generators]
    assert len(set(map(tuple, orders))) == 24, "any order of the four colour operations"


def test_partners_come_from_the_pool_and_share_the_draw():
    """Any other image of it, never the image itself; its crop is that of the same numbers."""
    images = [pixels(40, 40) for _ in range(3)]
    pool = [pixels(80, 80) for _ in range(5)] + images
    draws = data.sample_views(images, pool, 100, 0.5, True, np.random.default_rng(0))
    chosen = [[x is partner for x in pool].index(True) for partner in draws.partners]
    for i in range(3):
        assert set(chosen[100 * i : 100 * i + 100]) == set(range(8)) - {5 + i}
    scale = np.where(np.array(chosen) < 5, 2, 1)[:, None]
    difference = abs(np.array(draws.partner_boxes) - scale * np.array(draws.boxes)).max(1)
    assert (difference[scale[:, 0] == 1] == 0).all(), "images of one size have the same boxes"
    assert (difference <= 2).mean() > 0.95, "rounded; now and then one box fits and the other not"
    alone = data.sample_views(images[:1], images[:1], 2, 0.5, True, np.random.default_rng(0))
    assert alone.partners[0] is images[0], "there is no other one"


def test_the_two_ways_to_crop_agree_within_a_grey_level():
    """One by one for a CPU, by products for a GPU, which are exact in float32."""
    sides = np.random.default_rng(4).integers(20, 90, (60, 2)).tolist()
    crops = [pixels(*side, seed=i) for i, side in enumerate(sides)]
    flips = torch.arange(60) % 3 == 0
    exact = [TF.resize(crop.float(), [32, 32], antialias=True) / 255 for crop in crops]
    exact = [x.flip(-1) if flip else x for x, flip in zip(exact, flips, strict=True)]
    one_by_one = data.resize_by_interpolation(crops, flips, 32)
    half = data.resize_by_products(crops, flips, 32, torch.float16)
    for room in (1, 2**28):  # one crop at a time, and all
        single = data.resize_by_products(crops, flips, 32, torch.float32, room)
        assert_close(single, torch.stack(exact), atol=1e-5, rtol=0)
    assert_close(one_by_one, single, atol=1.001 / 255, rtol=0)
    assert_close(half, single, atol=0.25 / 255, rtol=0)


def test_the_colour_functions_are_torchvisions():
    views = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    views[0], views[1, :, :8], views[2] = 0.5, views[1, :1, :8], views[2].round()
    factors = {"brightness": [0, 0.6, 0.8, 1, 1.2, 1.4], "hue": [-0.1, -0.05, 0, 0.03, 0.1, 0.5]}
    for name in ("brightness", "contrast", "saturation", "hue"):
        by_view = factors.get(name, factors["brightness"])
        x = views.clone()
        getattr(data, f"adjust_{name}")(x, torch.tensor(by_view)[:, None, None, None])
        theirs = getattr(TF, f"adjust_{name}")
        expected = torch.stack([theirs(v, f) for v, f in zip(views, by_view, strict=True)])
        assert_close(x, expected, atol=1e-5, rtol=0, msg=name)


class Meter(TorchDispatchMode):
    """Counts operations, and the bytes of all storages that are alive at once."""

    def __init__(self):
        super().__init__()
        self.operations, self.peak, self.storages = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        self.operations += function.namespace == "aten"  # not questions for the device
        for tensor in torch.utils._pytree.tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                self.storages[StorageWeakRef(storage)] = storage.nbytes()
        self.storages = {x: size for x, size in self.storages.items() if not x.expired()}
        self.peak = max(self.peak, sum(self.storages.values()))
        return results


@pytest.mark.parametrize("odd", [[], [(300, 10_000)], [(1, 65_000)], [(1500, 2200)] * 8])
def test_views_on_a_gpu_take_little_memory_and_few_operations(odd):
    """At most 1.5 GiB and 1,500 operations for 8 images x 8 views at 448 px, without a GPU."""
    try:
        with FakeTensorMode():
            torch.zeros(2, device="cuda")[:1] = torch.zeros(1, device="cuda")
    except RuntimeError:
        pytest.skip("fake tensors of this release of PyTorch need a real GPU")
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        sides = odd + [(375, 500)] * (8 - len(odd))
        images = [torch.empty(3, *side, dtype=torch.uint8, device="cuda") for side in sides]
        draws = data.sample_views(images, images, 8, 0.08, True, np.random.default_rng(0))
        views = data.render_views(images, draws, 448)
        assert views.shape == (8, 8, 3, 448, 448) and views.device.type == "cuda"
        assert views.dtype == torch.float32
    assert 2**28 < meter.peak <= 1.5 * 2**30 and 100 < meter.operations <= 1500


class Photographs:
    """Anything with a len whose items are PIL images is a data set; this one notes what is read."""

    def __init__(self, count):
        self.images = [Image.fromarray(noise(9, 12, 3, seed=i)) for i in range(count)]
        self.read = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        self.read.append(i)
        return self.images[i]


def loader_of(dataset, **changes):
    return data.DistillationLoader(
        dataset, **dict(student_size=6, teacher_size=8, views=2) | changes
    )


def same_batches(first, second):
    return all(
        torch.equal(x, y)
        for batch, other in zip(first, second, strict=True)
        for x, y in zip(batch, other, strict=True)
    )


def test_an_epoch_reads_each_image_once():
    dataset = Photographs(10)
    loader = loader_of(dataset, batch_size=4)
    batches = list(loader)
    assert sorted(dataset.read) == list(range(10)) != dataset.read
    assert len(loader) == 3 and [len(small) for small, large in batches] == [4, 4, 2]
    small, large = batches[0]
    assert small.shape == (4, 2, 3, 6, 6) and large.shape == (4, 2, 3, 8, 8)
    assert same_batches(batches, loader), "the same epoch again is the same"
    loader.set_epoch(1)
    assert not same_batches(batches, loader)
    assert not same_batches(batches, loader_of(dataset, batch_size=4, seed=1))


def test_epoch_size_draws_other_images_for_each_epoch():
    dataset = Photographs(30)
    loader, seen = loader_of(dataset, epoch_size=10), []
    for epoch in range(4):
        loader.set_epoch(epoch)
        assert sum(len(small) for small, large in loader) == 10 and len(loader) == 2
        seen.append(set(dataset.read))
        assert len(dataset.read) == len(seen[-1]) == 10
        dataset.read.clear()
    assert len(set.union(*seen)) > 20


def test_a_loader_can_be_peeked_into_and_iterated_twice_at_once():
    loader = loader_of(Photographs(30))
    expected, seen = list(loader), []
    for batch in loader:
        next(iter(loader))
        seen.append(batch)
    assert same_batches(seen, expected)
    for first, second in zip(loader, loader, strict=True):
        assert same_batches([first], [second])


def test_partners_are_among_the_last_200_images(monkeypatch):
    """The batch at hand among them."""
    sample, pools = data.sample_views, []

    def noted(images, pool, *others):
        assert all(any(image is other for other in pool) for image in images)
        pools.append(len(pool))
        return sample(images, pool, *others)

    monkeypatch.setattr(data, "sample_views", noted)
    list(loader_of(Photographs(250), batch_size=50, views=1))
    assert pools == [50, 100, 150, 200, 200]


def test_workers_do_not_change_the_batches_and_leave_with_their_loader():
    """Any number of them, however they are started."""
    dataset = ImageDataset(images=noise(10, 9, 12, 3))
    expected = list(loader_of(dataset, batch_size=4))
    usual = multiprocessing.get_start_method()
    cases = [("fork", 1), ("fork", 2), ("forkserver", 1), ("spawn", 1)]
    loaders = [loader_of(dataset, batch_size=4, workers=count) for _, count in cases]
    try:
        for i, (method, _) in enumerate(cases):
            multiprocessing.set_start_method(method, force=True)
            iterator = iter(loaders[i])
            loaders[i] = itertools.chain([next(iterator)], iterator)
    finally:
        multiprocessing.set_start_method(usual, force=True)
    for loader in loaders:
        assert same_batches(expected, loader)
    next(iter(loader_of(dataset, workers=2)))  # and left
    assert not multiprocessing.active_children()


def read_with_few_open_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    eggs = load_dataset("synthetic").subset(range(400))
    net = EmbeddingNet("resnet10-narrow", dim=8, pretrained=False)
    assert len(extract(net, eggs, 16, "cpu", batch_size=256, workers=2)) == 400
    batches = data.DistillationLoader(eggs, 8, 8, views=1, batch_size=100, workers=2)
    assert sum(len(small) for small, _ in batches) == 400


def test_decoded_images_do_not_keep_files_open():
    """A worker hands a batch over as one tensor: 128 open files are enough for 400 images."""
    process = multiprocessing.get_context("fork").Process(target=read_with_few_open_files)
    process.start()
    process.join(60)
    exitcode = process.exitcode
    process.kill()
    assert exitcode == 0


ON_A_GPU = """
import sys, torch
from data import DistillationLoader, load_dataset
if not torch.cuda.is_available():
    sys.exit(5)
eggs = load_dataset("synthetic")
batches = [next(iter(DistillationLoader(eggs, 32, 64, device=where))) for where in ("cpu", "cuda")]
for ours, theirs in zip(*batches):
    assert theirs.is_cuda and (ours - theirs.cpu()).abs().max() < 0.1  # a few of 255 grey levels
"""


needs_a_gpu = pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs a GPU")


def run_on_a_gpu(*words):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ["GPUS_OF_TESTS"]}
    result = subprocess.run([sys.executable, *words], cwd=HERE, env=environment)
    if result.returncode == 5:
        pytest.skip("needs a GPU")
    assert result.returncode == 0


@needs_a_gpu
def test_views_on_a_gpu():
    """A GPU makes the views that a CPU makes of the same seed, to grey levels."""
    run_on_a_gpu("-c", ON_A_GPU)


# -------------------------------------------------------------------------------------- data sets


def write_cub(root, images_per_class=1):
    names = [
        f"{label:03}.Black_Bird/a {i}.jpg"
        for label in (1, 101, 100, 200)
        for i in range(images_per_class)
    ]
    write_images(*(root / "images" / name for name in names))
    lines = [f"{i} {name}\n" for i, name in enumerate(names, start=1)]
    (root / "images.txt").write_text("".join(lines))


def write_sop(root):
    for part, labels in (("train", (1, 1, 2)), ("test", (11319, 11320))):
        rows = [f"{i} {label} 1 bicycle_final/{part}_{i}.JPG" for i, label in enumerate(labels)]
        write_images(*(root / row.split()[3] for row in rows))
        header = "image_id class_id super_class_id path"
        (root / f"Ebay_{part}.txt").write_text("\n".join([header, *rows]))


def write_cars(root):
    """The copy with csv files: its parts are not the split of the paper."""
    names = {label: f"Model {label}" for label in range(1, 197)}
    names[98] = "Ram C/V Cargo Van"  # its folder has - in place of /
    for part, labels in (("train", (98, 99)), ("test", (1, 196))):
        folder = root / "car_data" / "car_data" / part
        write_images(*(folder / names[i].replace("/", "-") / f"{i}.jpg" for i in labels))
        lines = [f"{i}.jpg,1,2,3,4,{i}\n" for i in labels]
        (root / f"anno_{part}.csv").write_text("".join(lines))
    (root / "names.csv").write_text("\n".join(names.values()))


@pytest.mark.parametrize(
    "name, write, folder, train_labels, test_labels",
    [
        ("CUB", write_cub, "CUB_200_2011", [1, 100], [101, 200]),
        ("cars", write_cars, "", [98, 1], [99, 196]),
        ("Sop", write_sop, "Stanford_Online_Products", [1, 1, 2], [11319, 11320]),
    ],
)
@pytest.mark.parametrize("top", [True, False])
def test_published_layouts(
    name, write, folder, train_labels, test_labels, top, tmp_path, monkeypatch
):
    """With or without the archive's folder; split by class; counted, and refused if not whole."""
    write(tmp_path / folder if top else tmp_path)
    with pytest.raises(UserError, match=f"of {data.COUNTS[name.lower()]['train']} train"):
        load_dataset(name, str(tmp_path))
    counts = {"train": len(train_labels), "test": len(test_labels)}
    monkeypatch.setitem(data.COUNTS, name.lower(), counts)
    for split, labels in (("train", train_labels), ("test", test_labels)):
        dataset = load_dataset(name, str(tmp_path), split)
        assert dataset.labels == labels and dataset[0].size == (50, 40)
    os.remove(dataset.paths[1])
    with pytest.raises(UserError, match=f"1 of them are missing .*{re.escape(dataset.paths[1])}"):
        load_dataset(name, str(tmp_path), "test")


def test_cars_as_published(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    rows = [(f"car_ims/{label}.jpg", label) for label in (98, 99, 3)]
    write_images(*(tmp_path / name for name, _ in rows))
    table = np.array(rows, dtype=[("relative_im_path", object), ("class", object)])
    io.savemat(tmp_path / "cars_annos.mat", {"annotations": table})
    monkeypatch.setitem(data.COUNTS, "cars", {"train": 2, "test": 1})
    assert load_dataset("cars", str(tmp_path)).labels == [98, 3]
    assert load_dataset("cars", str(tmp_path), "test").labels == [99]


def classes_of(folder, split, **how):
    dataset = load_dataset(str(folder), split=split, **how)
    return names_of_classes(folder, dataset)


def names_of_classes(folder, dataset):
    return sorted({Path(path).relative_to(folder).parts[0] for path in dataset.paths})


def test_the_split_of_a_folder(tmp_path):
    """The first half of its classes trains, or those that are named; hidden ones are none."""
    write_images(*(tmp_path / name / "deep" / "1.png" for name in ("c", "d", "e", ".hidden")))
    (tmp_path / "empty").mkdir()
    assert classes_of(tmp_path, "train") == ["c", "d"] and classes_of(tmp_path, "test") == ["e"]
    assert classes_of(tmp_path, "fit") == ["c"] and classes_of(tmp_path, "val") == ["d"]
    write_images(tmp_path / "a" / "1.png", tmp_path / "b" / "1.png")
    named = {"training_classes": ["c", "d"]}
    assert classes_of(tmp_path, "train", **named) == ["c", "d"]
    assert classes_of(tmp_path, "test", **named) == ["a", "b", "e"]
    named = {"training_classes": ["c", "x", "y"]}
    with pytest.raises(UserError, match="no images of the training classes x, y"):
        classes_of(tmp_path, "train", **named)
    assert classes_of(tmp_path, "test", **named) == ["a", "b", "d", "e"]


def test_where_a_folder_is(tmp_path, monkeypatch):
    """By itself, or below --root."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "birds").mkdir(parents=True)
    birds = str(tmp_path / "data" / "birds")
    assert data.settle_dataset("CUB", "data") == ("cub", str(tmp_path / "data"))
    assert data.settle_dataset("data/birds", None) == (birds, None)
    assert data.settle_dataset("birds", "data") == (birds, None)
    assert data.settle_dataset(birds, "data") == (birds, None)


def test_folders_without_labels(tmp_path):
    """Every tenth image by name is for testing; images in the folder itself mean no labels."""
    write_images(*(tmp_path / f"{i % 3}" / f"{i:02}.png" for i in range(25)))
    assert load_dataset(str(tmp_path)).labels is not None
    train_part, test_part = (
        load_dataset(str(tmp_path), split=split, unlabelled=True) for split in ("train", "test")
    )
    everything = sorted(map(str, tmp_path.glob("*/*.png")))
    assert test_part.paths == everything[::10] and test_part.labels is None
    assert sorted(train_part.paths + test_part.paths) == everything
    write_images(tmp_path / "here.png")
    assert load_dataset(str(tmp_path)).labels is None
    with pytest.raises(UserError, match="validation needs classes"):
        load_dataset(str(tmp_path), split="val")


def test_the_drawn_eggs(monkeypatch):
    """120 classes train, 60 others test; their colours do not say which class it is."""

    def plain(angles, periods, palettes, uniform):
        return palettes[:, :1].expand(-1, 4, -1)  # (n, 4, 3)

    monkeypatch.setattr(data, "draw_striped_eggs", plain)
    labels = {}
    for split, count in (("train", 960), ("test", 960), ("fit", 480), ("val", 480)):
        dataset = load_dataset("Synthetic", split=split)
        assert len(dataset) == len(dataset.labels) == count
        assert len(np.unique(dataset.images[:, 0], axis=0)) == 6
        labels[split] = set(dataset.labels)
    assert len(labels["train"]) == 120 and len(labels["test"]) == 60
    assert labels["fit"] | labels["val"] == labels["train"]
    assert not labels["train"] & labels["test"] and not labels["fit"] & labels["val"]


def test_the_stripes_of_the_eggs_are_there_at_32_px():
    """Almost as bold as at 64 px, and not at 16 px any more."""
    eggs = data.draw_eggs("test").subset(range(0, 960, 40))

    def boldness(size):
        side = slice(size // 4, -size // 4)  # the inner half
        crops = [np.asarray(data.evaluation_crop(egg, size).convert("L")) for egg in eggs]
        return np.mean([crop[side, side].std() for crop in crops])

    assert boldness(32) > 0.75 * boldness(64) and boldness(16) < 0.5 * boldness(64)


# ----------------------------------------------------------------- training, resume and processes

SMALL = (
    "--arch resnet10-narrow --weights random --dim 8 --epochs 2 --lr 1e-3 --batch-size 8 "
    "--micro-batch 4 --workers 0 --device cpu"
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """6 classes; the first three, of 6, 5 and 7 images, train; the others have 4, 4 and 1."""
    root = tmp_path_factory.mktemp("images")
    for label, count in enumerate([6, 5, 7, 4, 4, 1]):
        write_images(*(root / f"class{label}" / f"{i}.png" for i in range(count)))
    return root


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """40 images in one folder, without labels."""
    root = tmp_path_factory.mktemp("photographs")
    write_images(*(root / f"{i:02}.jpg" for i in range(40)))
    return root


def train_teacher(folder, out, more=""):
    """The network of `train.py --dataset folder --out out --size 48`, made small; no table."""
    words = f"--dataset {folder} --out {out} --size 48 {SMALL} {more}"
    options = train.parse_options(words.split())
    training, _ = train.load_images(options)
    return train.train(training, options)


def student_options(words, teacher=None):
    """The complete options of `distill.py words`, and its teacher, or the one that is given."""
    options, trained = distill.parse_options(words.split()), {}
    if teacher is None:
        teacher, trained = distill.load_teacher(options)
    distill.complete_options(options, teacher, trained)
    return options, teacher


def distil_student(teacher, out, more=""):
    """The student of `distill.py --teacher teacher --out out`, made small, and its teacher."""
    words = f"--teacher {teacher} --out {out} --student-size 32 --views 2 {SMALL} {more}"
    options, net = student_options(words)
    training, _ = train.load_images(options)
    learn = distill.regress if options.regression else distill.distill
    return learn(net, training, options), net


@pytest.fixture(scope="session")
def teacher(folder, tmp_path_factory):
    """The file of a teacher that was trained for one epoch at 48 px."""
    out = tmp_path_factory.mktemp("teacher")
    train_teacher(folder, out, "--epochs 1")
    return out / "model.pt"


def log_of(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def test_the_images_of_an_epoch_of_mining(folder, tmp_path, monkeypatch):
    """Groups of 4 of a class, equally many of each; negatives of other classes, each once."""
    seeds, draw = set(), train.draw_negatives

    def noted(*others):
        seeds.add(others[-1].initial_seed())
        return draw(*others)

    monkeypatch.setattr(train, "draw_negatives", noted)
    labels = np.array([0] * 9 + [1] * 5 + [2] * 3 + [3] * 9 + [4])  # 2 and 4 are too small
    dataset = ImageDataset(images=noise(len(labels), 32, 32, 3), labels=labels.tolist())
    words = f"--dataset {folder} --out {tmp_path} --size 32 {SMALL} --epoch-size 10"
    options = train.parse_options(words.split())
    classes = train.usable_classes(labels)
    epochs = [train.mine(small_net(), dataset, classes, epoch, options) for epoch in range(12)]
    assert set(torch.cat(epochs).flatten().tolist()) == {
        i for i, label in enumerate(labels) if label not in (2, 4)
    }
    assert len({tuple(rows.flatten().tolist()) for rows in epochs}) == 12 == len(seeds), "anew"
    for rows in epochs:
        assert rows.shape == (8, 1 + 4), "whole groups, at most 10 anchors"
        shown = labels[rows]
        assert (shown[:, 0].reshape(2, 4) == shown[::4, :1]).all()
        assert len(set(rows[:, 0].tolist())) == 8
        assert (shown[:, :1] != shown[:, 1:]).all()
        assert (rows[:, 1:].sort(1).values.diff(dim=1) > 0).all()
    with pytest.raises(UserError, match="1 training classes have 4 images"):
        train.usable_classes([0] * 9 + [1] * 3)
    nine, thirteen = np.arange(9), np.arange(13)
    assert train.count_groups([nine, thirteen], epoch_size=8000) == (2, 4)
    assert train.count_groups([nine, thirteen], epoch_size=13) == (2, 3)
    assert train.count_groups([nine, thirteen], epoch_size=3) == (2, 1), "one at least"


class Steps:
    """A run that only counts its steps, of 2 micro-batches."""

    micro_batch, accumulate, steps, loss, device = 4, 2, 0, 0.0, torch.device("cpu")

    add, step_is_due = train.Run.add, train.Run.step_is_due

    def step(self):
        self.steps += 1


class Grey(nn.Module):
    """Embeds an image as its mean grey level, a number."""

    dim = 1

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.scale * images.mean((-3, -2, -1))[..., None]


def test_the_teachers_loop(monkeypatch):
    """The loss compares anchors with the others of their groups and with their mined negatives."""
    levels = torch.arange(24, dtype=torch.uint8)
    images = levels[:, None, None, None].expand(-1, 9, 9, 3).numpy()
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 24, (12, 1 + train.NEGATIVES)))
    seen, loss = [], train.triplet_loss

    def noted(anchors, positives, negatives, margin):
        seen.append((anchors, positives, negatives))
        assert margin == 0.7
        return loss(anchors, positives, negatives, margin)

    monkeypatch.setattr(train, "triplet_loss", noted)
    monkeypatch.setattr(data, "normalize", lambda x: x)
    options = train.parse_options(["--size", "8"])
    run, dataset = Steps(), ImageDataset(images=images)
    train.train_one_epoch(Grey(), dataset, rows, 0, run, options)
    anchors, positives, negatives = (255 * torch.cat(x)[..., 0] for x in zip(*seen, strict=True))
    assert_close(anchors, rows[:, 0].float())
    assert_close(negatives, rows[:, 1:].float())
    assert_close(positives[5], rows[[4, 6, 7], 0].float())
    assert_close(positives[8], rows[[9, 10, 11], 0].float())
    assert run.loss == pytest.approx(sum(loss(*x, 0.7).item() for x in seen)) and run.steps == 2


def test_the_students_loop():
    """The teacher sees large views and the student small ones; each term has its own weight."""
    teacher, student = small_net().requires_grad_(False), small_net()
    batches = [(torch.randn(2, 3, 3, 24, 24), torch.randn(2, 3, 3, 48, 48)) for _ in range(3)]
    student.frozen_batchnorm = True  # what comes of a view does not depend on the others
    expected = sum(
        asymres.absolute_term(s, t) + 3 * asymres.ts_term(s, t) + 50 * asymres.ss_term(s, t)
        for s, t in ((student(small), teacher(large)) for small, large in batches)
    )
    run, options = Steps(), argparse.Namespace(lambda_ts=3, lambda_ss=50, precision="float32")
    distill.distill_one_epoch(teacher, student, batches, run, options)
    assert run.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert run.steps == 2, "of 2 and of 1 micro-batches"


@pytest.mark.parametrize("mixup", [True, False])
def test_the_options_of_the_views(mixup, teacher, tmp_path, monkeypatch):
    """They reach the loader, which is told each epoch."""
    given, epochs, make = {}, [], distill.DistillationLoader

    def noted(dataset, student_size, teacher_size, **others):
        given.update(others, student_size=student_size, teacher_size=teacher_size)
        loader = make(dataset, student_size, teacher_size, **others)
        monkeypatch.setattr(loader.sampler, "set_epoch", epochs.append)
        return loader

    monkeypatch.setattr(distill, "DistillationLoader", noted)
    more = "--views 3 --min-scale 0.3 --epochs 3 --epoch-size 7 --seed 5 --teacher-size 40"
    distil_student(teacher, tmp_path, more + " --no-mixup" * (not mixup))
    expected = {"views": 3, "min_scale": 0.3, "epoch_size": 7, "seed": 5, "batch_size": 4}
    expected |= {"mixup": mixup, "student_size": 32, "teacher_size": 40, "workers": 0}
    assert given == expected | {"device": torch.device("cpu")} and epochs == [0, 1, 2]


def test_the_papers_settings():
    """What is published, and what the paper says (SOP's epoch is capped at 8,000 images)."""
    published = {
        "cub": (1.4025e-4, 0.7718, 0.6684),
        "cars": (1.1692e-4, 0.6371, 0.7731),
        "sop": (1.7579e-4, 0.7482, 0.6778),
    }
    for name, values in published.items():
        recipe = distill.RECIPES[name]
        assert tuple(recipe[option] for option in ("lr", "lambda_ts", "lambda_ss")) == values
        same = dict(teacher_size=448, student_size=224, arch="resnet50", weights="imagenet")
        same |= dict(dim=512, epochs=200, batch_size=200, views=8)
        assert same.items() <= recipe.items()
        assert train.RECIPES[name]["size"] == 448 and train.RECIPES[name]["epochs"] == 200
    assert (train.MARGIN, train.NEGATIVES, train.NEGATIVE_POOL) == (0.7, 4, 20_000)


def test_a_run_takes_the_steps_that_its_schedule_plans(folder, tmp_path, monkeypatch):
    """12 anchors an epoch in steps of 8: two each. The rate rises to --lr and falls to almost 0."""
    rates, step, shown = [], torch.optim.AdamW.step, []

    def noted(optimizer, *others):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *others)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)

    def advance(self, part, note=None):
        if note:  # others are of embedding
            shown.append(note())

    monkeypatch.setattr(train.Progress, "advance", advance)
    net = train_teacher(folder, tmp_path, "--epochs 5 --size 32")
    assert len(rates) == 10
    assert (rates[0], max(rates), rates[-1]) == pytest.approx((1e-4, 1e-3, 1e-8))
    assert [entry["epoch"] for entry in log_of(tmp_path)] == list(range(5))
    assert [entry["lr"] for entry in log_of(tmp_path)] == rates[1::2], "of an epoch's last step"
    assert {"loss", "lr", "seconds", "images_per_s"} <= log_of(tmp_path)[0].keys()
    assert len(shown) == 10 and shown[6].startswith(", epoch 4 of 5, loss ")
    assert shown[7] == f", epoch 4 of 5, loss {log_of(tmp_path)[3]['loss']:.4g}"
    assert set(os.listdir(tmp_path)) == {"model.pt", "log.jsonl", "options.json"}
    assert not net.training and not net.frozen_batchnorm and net.size == 32
    groups = asymres.read_checkpoint(tmp_path / "model.pt")["training"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [1e-6, 0], "none on GeM's p"


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 6, 7, 8, 16])
@pytest.mark.parametrize("script, group", [("train.py", 4), ("distill.py", 1)])
def test_every_recipe_can_be_shared_by_processes(script, group, processes, monkeypatch):
    """In whole groups, a step near to --batch-size, micro-batches of at least half of theirs."""
    monkeypatch.setattr(train, "process_count", lambda: processes)
    for recipe in PROGRAMS[script].RECIPES.values():
        micro_batch, count = train.divide_batch(argparse.Namespace(**recipe), group)
        largest = min(recipe["micro_batch"], max(group, recipe["batch_size"] // processes))
        assert micro_batch % group == 0 and largest / 2 <= micro_batch <= recipe["micro_batch"]
        step = micro_batch * count * processes
        nearest = (group + micro_batch) * processes / 2
        assert count == 1 or abs(step - recipe["batch_size"]) <= nearest
        if recipe["batch_size"] % (group * processes) == 0:
            assert step == recipe["batch_size"]


def test_other_steps_and_micro_batches_are_announced(monkeypatch, capsys):
    monkeypatch.setattr(train, "process_count", lambda: 2)
    for batch_size, micro_batch, group, expected, note in (
        (20, 8, 1, (5, 2), "note: a step is 20 images, in each process 2 x 5"),
        (134, 8, 1, (8, 8), "note: a step is 128 images, in each process 8 x 8"),  # 67 is a prime
        (80, 6, 4, (4, 10), "note: a step is 80 images, in each process 10 x 4"),
        (80, 8, 1, (8, 5), ""),
    ):
        options = argparse.Namespace(batch_size=batch_size, micro_batch=micro_batch)
        assert train.divide_batch(options, group) == expected
        assert capsys.readouterr().out.strip() == note


def test_a_step_does_not_depend_on_how_it_is_divided(folder, teacher, tmp_path, monkeypatch):
    """Into micro-batches: of teachers (here without random crops) and of students."""

    def evaluation_crops(dataset, batches, size, *others):
        for batch in batches:
            yield torch.stack([data.evaluation_transform(size)(dataset[i]) for i in batch])

    monkeypatch.setattr(train, "random_crops", evaluation_crops)
    weights = f"--weights {teacher} --size 32"  # frozen statistics
    taught = [
        train_teacher(folder, tmp_path / f"t{n}", f"{weights} --micro-batch {n}") for n in (4, 8)
    ]
    more = f"--regression --weights {teacher} --micro-batch"
    students = [distil_student(teacher, tmp_path / f"s{n}", f"{more} {n}")[0] for n in (3, 8)]
    for one, other in (taught, students):
        start, one, other = (
            torch.cat([p.flatten() for p in net.backbone.parameters()])
            for net in (load_checkpoint(teacher), one, other)
        )
        assert (one - other).norm() < 0.03 * (one - start).norm()


def test_a_student_and_its_teacher(teacher, tmp_path):
    """The teacher has no gradient and stays as it is, the student learns to agree with it."""
    student, net = distil_student(teacher, tmp_path, "--epochs 4 --lr 4e-3")
    before = fingerprint(load_checkpoint(teacher))
    assert fingerprint(net) == before and not net.training
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    losses = [entry["loss"] for entry in log_of(tmp_path)]
    assert losses[-1] < losses[0] / 2
    assert student.size == 32 and student.dim == net.dim and not student.training
    assert asymres.read_checkpoint(tmp_path / "model.pt")["teacher"] == before


def test_a_student_makes_small_queries_useful(tmp_path):
    """Gratings in 8 directions, which a teacher of 32 px cannot read at 16 px any more."""
    rng, labels = np.random.default_rng(0), np.arange(8).repeat(8)
    y, x = np.mgrid[:40, :40]
    angle = (labels * np.pi / 8)[:, None, None]
    phase = (x * np.cos(angle) + y * np.sin(angle)) / 6 + rng.random((64, 1, 1))
    bars = np.where(np.sin(2 * np.pi * phase) > 0, 200, 60)[..., None]
    images = (bars + rng.integers(-50, 50, (64, 40, 40, 3))).astype(np.uint8)
    gratings = ImageDataset(images=images, labels=labels.tolist())
    common = "--dim 16 --min-scale 0.8 --batch-size 8 --micro-batch 8 --seed 1"
    words = f"--size 32 --epochs 4 --lr 1e-3 --out {tmp_path}/teacher {common}"
    teacher = train.train(gratings, train.parse_options(words.split()))
    words = f"--dataset synthetic --student-size 16 --views 4 --epochs 6 --lr 4e-3 {common}"
    options, _ = student_options(f"{words} --out {tmp_path}/student", teacher)
    student = distill.distill(teacher, gratings, options)
    found = {row["search"]: row["R@1"] for row in evaluate.compare(teacher, [student], gratings)}
    assert found["teacher, symmetric"] > 85 and found["no distillation"] < 40
    assert found["student, asymmetric"] > 2 * found["no distillation"]


def test_regression_compares_the_evaluation_crops(teacher, tmp_path):
    """A student that is its teacher, at its size, has nothing to learn."""
    frozen = load_checkpoint(teacher)
    frozen.frozen_batchnorm, options = True, asymres.read_checkpoint(teacher)["options"]
    save_checkpoint(tmp_path / "teacher.pt", frozen, options=options)
    more = "--regression --weights teacher --student-size 48 --lr 1e-12 --epochs 1"
    distil_student(tmp_path / "teacher.pt", tmp_path, more)
    assert log_of(tmp_path)[0]["loss"] < 1e-9


def test_what_a_student_takes_from_its_teacher(folder, teacher, tmp_path):
    """Data set, classes, network and large size; a command line may say otherwise."""
    options, _ = student_options(f"--teacher {teacher} --out {tmp_path}")
    assert (options.dataset, options.arch, options.dim) == (str(folder), "resnet10-narrow", 8)
    assert (options.teacher_size, options.student_size) == (48, 224)
    assert options.weights == "imagenet" and options.classes == ["class0", "class1", "class2"]
    words = f"--teacher {teacher} --out {tmp_path} --arch resnet18 --dim 4 --teacher-size 64"
    options, _ = student_options(words)
    assert (options.arch, options.dim) == ("resnet18", 4)
    assert options.teacher_size == 64
    words = f"--dataset {folder} --out {tmp_path}"
    options, _ = student_options(words, small_net(dim=0))
    assert (options.dim, options.teacher_size) == (0, 448), "it does not know its size"
    options, _ = student_options(f"{words} --arch resnet18", small_net(dim=0))
    assert options.dim == 256, "another backbone needs a layer to the teacher's dimensions"


def test_a_student_may_learn_from_images_that_its_teacher_never_saw(teacher, photographs, tmp_path):
    """Another folder has other classes, or none."""
    write_images(*(tmp_path / "B" / f"kind{i % 4}" / f"{i}.png" for i in range(16)))
    for folder, count in ((tmp_path / "B", 8), (photographs, 36)):
        words = f"--teacher {teacher} --out {tmp_path / 'out'} --dataset {folder} --workers 0"
        training, test = train.load_images(student_options(words)[0])
        assert len(training) == count and (test.labels is None) == (folder == photographs)


def test_the_classes_that_train_stay_when_folders_are_added(folder, tmp_path):
    """The checkpoint names them: the others are test classes."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    train_teacher(copy, tmp_path / "run", "--epochs 1")
    write_images(copy / "another" / "1.png", copy / "another" / "2.png")
    words = f"--teacher {tmp_path / 'run' / 'model.pt'} --out {tmp_path / 'student'} --workers 0"
    training, test = train.load_images(student_options(words)[0])
    assert names_of_classes(copy, training) == ["class0", "class1", "class2"]
    assert names_of_classes(copy, test) == ["another", "class3", "class4", "class5"]
    words = f"--dataset {copy} --out {tmp_path / 'run'} --workers 0"  # the run goes on
    training, _ = train.load_images(train.parse_options(words.split()))
    assert names_of_classes(copy, training) == ["class0", "class1", "class2"]


def test_a_copy_of_the_folder_has_the_same_training_classes(folder, tmp_path):
    """By their names, also when a class was added that would come first; nothing is tested on."""
    train_teacher(folder, tmp_path / "run", "--epochs 1")
    teacher = tmp_path / "run" / "model.pt"
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_images(copy / "another" / "1.png", copy / "another" / "2.png")
    words = f"--teacher {teacher} --dataset {copy} --workers 0"
    options = student_options(f"{words} --out {tmp_path / 'student'}")[0]
    _, test = train.load_images(options)
    assert names_of_classes(copy, test) == ["another", "class3", "class4", "class5"]
    options = evaluate.parse_options(words.split())
    _, about = evaluate.load_network(teacher)
    test, _ = evaluate.load_test_images(options, about.options)
    assert names_of_classes(copy, test) == ["another", "class3", "class4", "class5"]
    with pytest.raises(UserError, match="trained on the validation classes, too"):
        student_options(f"{words} --validation")


def test_photographs_that_were_added_are_noted(teacher, photographs, tmp_path, capsys):
    """They move the split: before a run goes on, and before it is measured."""
    copy = shutil.copytree(photographs, tmp_path / "copy")
    run = tmp_path / "run"
    words = f"--teacher {teacher} --dataset {copy} --student-size 32 --out {run} {SMALL} --epochs 1"
    options, net = student_options(words)
    training, _ = train.load_images(options)
    distill.distill(net, training, options)
    train.load_images(student_options(words)[0])
    assert "note: there are" not in capsys.readouterr().out
    write_images(copy / "0.jpg")
    train.load_images(student_options(words)[0])
    assert "note: there are 41 images and were 40 in training" in capsys.readouterr().out
    options = evaluate.parse_options(f"--teacher {run}/model.pt --workers 0".split())
    evaluate.load_test_images(options, evaluate.load_network(run / "model.pt")[1].options)
    assert "note: there are 41 images and were 40 in training" in capsys.readouterr().out


def test_other_options_are_refused_by_name(folder, teacher, tmp_path):
    """Some may change; a run that is done is loaded, not trained again."""
    out = tmp_path / "run"
    train_teacher(folder, out)
    before = (out / "model.pt").stat().st_mtime_ns
    with pytest.raises(UserError, match=r"holds another run \(--lr 0.001, now 0.5\), .*--out"):
        train_teacher(folder, out, "--lr 0.5")
    train_teacher(folder, out, "--micro-batch 8 --workers 1")
    assert (out / "model.pt").stat().st_mtime_ns == before
    distil_student(teacher, tmp_path / "student", "--epochs 1")
    with pytest.raises(UserError, match="another --teacher"):
        distil_student(out / "model.pt", tmp_path / "student", "--epochs 1")


def train_a_teacher(folder, teacher, out):
    train_teacher(folder, out, "--epochs 4 --size 32 --epoch-size 8")


def distil_a_student(folder, teacher, out, more=""):
    small = "--teacher-size 32 --student-size 24 --epoch-size 8"
    distil_student(teacher, out, f"--epochs 4 {small} {more}")


def regress_a_student(folder, teacher, out):
    distil_a_student(folder, teacher, out, "--regression")


@pytest.mark.parametrize("work", [train_a_teacher, distil_a_student, regress_a_student])
def test_a_killed_run_goes_on_to_the_same_bits(work, folder, teacher, tmp_path, fork, monkeypatch):
    """Killed at random moments, and while a checkpoint is written. Networks may have dropout."""
    forward = EmbeddingNet.forward

    def with_dropout(net, images):
        return forward(net, F.dropout(images, 0.2, net.training))

    monkeypatch.setattr(EmbeddingNet, "forward", with_dropout)
    began = time.time()
    work(folder, teacher, tmp_path / "whole")
    seconds, rng = time.time() - began, random.Random(0)
    go_on, killed = partial(work, folder, teacher, tmp_path / "killed"), tmp_path / "killed"

    def go_on_till_the_second_checkpoint():
        replace, calls = os.replace, itertools.count(1)

        def dying(source, target):
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = dying
        go_on()

    process = fork(go_on_till_the_second_checkpoint)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert asymres.read_checkpoint(killed / "model.pt")["training"]["epochs"] == 1
    for _ in range(2):
        process = fork(go_on)
        process.join(rng.random() * seconds)
        process.kill()
        process.join()
    process = fork(go_on)
    process.join()
    assert process.exitcode == 0 and len(log_of(killed)) == 4
    whole, again = (asymres.read_checkpoint(tmp_path / x / "model.pt") for x in ("whole", "killed"))
    assert all(torch.equal(again["state_dict"][name], x) for name, x in whole["state_dict"].items())
    assert [x["loss"] for x in log_of(killed)] == [x["loss"] for x in log_of(tmp_path / "whole")]


def test_a_loss_that_is_not_finite_ends_the_run(folder, tmp_path):
    with pytest.raises(UserError, match="loss is not finite in epoch .*: take a smaller --lr"):
        train_teacher(folder, tmp_path, "--lr 1e30 --epochs 3")


@needs_a_gpu
def test_training_on_a_gpu(tmp_path):
    """Teacher and student learn, in bfloat16 where the GPU has it, and a student's run goes on."""
    small = "--device cuda --epoch-size 64 --workers 0"
    run_on_a_gpu("train.py", *small.split(), "--epochs", "1", "--out", tmp_path / "t")
    student = f"{small} --teacher {tmp_path}/t/model.pt --epochs 2 --out {tmp_path}/s"
    for _ in range(2):
        run_on_a_gpu("distill.py", *student.split())
    first, second = log_of(tmp_path / "s")
    assert second["loss"] < first["loss"] and second["peak_gib"] > 0


# Without views or batch-norm statistics a step does not depend on the number of processes.
SAME_IMAGES = "--regression --weights "


def one_of_two_processes(folder, teacher):
    """What the next test starts two of, as this file's program: each leaves what it found."""
    torch.set_num_threads(1)
    evaluate.start_processes()
    rank, forward, passes, found = data.process_rank(), EmbeddingNet.forward, [], {}

    def counted(net, images):
        passes[-1] += net.training * images.flatten(0, -4).shape[0]
        return forward(net, images)

    EmbeddingNet.forward = counted
    runs = {
        "teacher": lambda: train_teacher(folder, "teacher"),
        "student": lambda: distil_student(teacher, "student")[0],
        "regression": lambda: distil_student(teacher, "regression", SAME_IMAGES + teacher)[0],
    }
    for name, learn in runs.items():
        passes.append(0)
        found[name] = {"state": learn().state_dict(), "passes": passes[-1]}
    net = small_net()
    net.backbone[1].running_mean.fill_(rank)
    train.average_statistics(net)
    found["averaged"] = net.backbone[1].running_mean
    found["images"] = list(data.EpochSampler(18))
    net = load_checkpoint(teacher)
    found["embeddings"] = extract(net, load_dataset(folder), 48, batch_size=4)
    torch.save(found, f"process{rank}.pt")
    torch.distributed.barrier()
    if rank == 1:
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    distil_student(teacher, "another", "--epochs 1000")
    Path("survivor").touch()


def test_two_processes(folder, teacher, tmp_path):
    """By torchrun: both end with the same weights after half of the passes each.

    One that dies ends the program.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node", "2", HERE / "test_asymres.py", folder, teacher]
    done = subprocess.run(command, cwd=tmp_path, timeout=100, capture_output=True)
    assert b"about to die" in done.stdout, done.stderr.decode()
    assert done.returncode != 0 and not (tmp_path / "survivor").exists()
    first, second = (
        torch.load(tmp_path / f"process{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    for name in ("teacher", "student", "regression"):
        assert first[name]["passes"] == second[name]["passes"]
        for key, value in first[name]["state"].items():
            if "num_batches" not in key:
                assert torch.equal(second[name]["state"][key], value), key
    processes, epochs, images, views = 2, 2, 18, 2
    assert processes * first["student"]["passes"] == epochs * images * views
    assert sorted(first["images"] + second["images"]) == list(range(18)), "each to one of them"
    assert (first["averaged"] == 0.5).all() and torch.equal(first["averaged"], second["averaged"])
    assert torch.equal(first["embeddings"], second["embeddings"])
    alone = extract(load_checkpoint(teacher), load_dataset(str(folder)), 48)
    assert_close(first["embeddings"], alone)
    alone, start = distil_student(teacher, tmp_path / "same", f"{SAME_IMAGES} {teacher}")
    losses = [[entry["loss"] for entry in log_of(tmp_path / x)] for x in ("regression", "same")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    for name, weights in alone.backbone.named_parameters():
        difference = first["regression"]["state"][f"backbone.{name}"] - weights
        moved = weights - start.backbone.get_parameter(name)
        assert difference.norm() < 0.02 * moved.norm()


# --------------------------------------------------------------------- command line and mistakes

PROGRAMS = {"data.py": data, "train.py": train, "distill.py": distill, "evaluate.py": evaluate}


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train.py --lr 0.1") runs a program in this process: exit code, stdout and stderr."""

    def run(line):
        script, *words = shlex.split(line)
        monkeypatch.setattr(sys, "argv", [script, *words])
        code = 0
        try:
            evaluate.run_program(PROGRAMS[script].main)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def mistakes(folder, teacher, photographs, tmp_path_factory):
    """A folder of what is wrong in one way or another."""
    root = tmp_path_factory.mktemp("mistakes")
    (root / "FOLDER").symlink_to(folder)
    (root / "PHOTOS").symlink_to(photographs)
    (root / "TEACHER").symlink_to(teacher)
    (root / "EMPTY").mkdir()
    (root / "TEXT").write_text("not what it should be")
    (root / "CUT").write_bytes(teacher.read_bytes()[:100_000])
    torch.save({"weights": torch.ones(3)}, root / "OTHER")
    for size, dim in ((None, 8), (32, 4)):
        net = small_net(dim=dim)
        net.size = size
        save_checkpoint(root / f"SIZE-{size}", net)
    for label, i in itertools.product("abcd", range(5)):
        write_images(root / "BAD" / label / f"{i}.png", root / "LONELY" / f"{label}{i}" / "0.png")
        if i < 3:
            write_images(root / "FEW" / label / f"{i}.png")
    write_images(*(root / "LONELY" / label / f"{i}.png" for label in "AB" for i in range(4)))
    for label in "abcd":
        (root / "BAD" / label / "4.png").write_text("an image once")
    return root


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("train.py --epochs 0", "--epochs"),
        ("train.py --lr 0", "--lr"),
        ("train.py --lr inf", "--lr"),
        ("train.py --dim -1", "--dim"),
        ("train.py --min-scale 7", "--min-scale"),
        ("train.py --micro-batch 3", "--micro-batch 3 must be at least 4"),
        ("train.py --pooling avg", "--pooling"),
        ("train.py --device gpu", "--device gpu"),
        ("train.py --device cuda", "finds cpu"),
        ("train.py --arch resnet1O", "resnet1O"),
        ("train.py --arch swin_t", "no feature map"),
        ("train.py --arch googlenet", "normalises in its own"),
        ("train.py --arch timm/resnet18", "pip install timm"),
        ("train.py --arch squeezenet1_1 --size 8", "8 px is too small"),
        ("train.py --arch squeezenet1_1 --weights imagenet", "--weights FILE"),
        ("train.py --weights nowhere.pt", "there is no file nowhere.pt"),
        ("train.py --weights OTHER", "OTHER does not hold the weights of this network"),
        ("train.py --dataset /nowhere", "there is no folder /nowhere"),
        ("distill.py --dataset nowhere", "there is no folder"),
        ("train.py --dataset EMPTY", "a sub-folder of images for each"),
        ("train.py --dataset cub", "python data.py cub --root . downloads it"),
        ("train.py --dataset cub --arch resnet50 --weights imagenet", "python data.py cub"),
        (
            "distill.py --dataset EMPTY --unlabelled --dim 0 --arch resnet50 --weights imagenet",
            "EMPTY holds 0 images",
        ),
        ("train.py --dataset cars", "pip install scipy"),
        ("train.py --dataset sop --root EMPTY", "Ebay_train.txt"),
        ("train.py --root EMPTY", "EMPTY/FOLDER; data sets are cub, cars, sop"),
        ("train.py --dataset FEW", "0 training classes have 4 images"),
        ("train.py --dataset LONELY", "no test class"),
        ("train.py --dataset PHOTOS", "labels come from sub-folders"),
        ("train.py --dataset BAD", "only 8 of 10 images can be read"),
        ("train.py --dataset BAD --workers 1", "only 8 of 10 images can be read"),
        ("distill.py --views 0", "--views"),
        ("distill.py --views many", "--views: invalid int value: 'many'"),
        ("distill.py --lambda-ts nan", "--lambda-ts"),
        ("distill.py --lambda-ss -1", "--lambda-ss: -1 is not at least 0"),
        ("distill.py --dataset FOLDER", "--teacher is needed"),
        ("distill.py --teacher nowhere.pt", "there is no file nowhere.pt"),
        ("distill.py --teacher CUT", "CUT is not a readable checkpoint"),
        ("distill.py --teacher TEXT", "TEXT is not a readable checkpoint"),
        ("distill.py --teacher OTHER", "OTHER is not a checkpoint"),
        ("distill.py --teacher SIZE-None", "SIZE-None does not say at which size"),
        ("distill.py --teacher SIZE-32", "--dataset is needed"),
        ("distill.py --teacher TEACHER --dim 16", "give --dim 8"),
        ("distill.py --teacher TEACHER --arch vgg11 --weights teacher", "--weights teacher"),
        ("distill.py --dataset PHOTOS --validation --teacher TEACHER", "validation needs classes"),
        ("distill.py --dataset PHOTOS", "--dim needs a --teacher"),
        ("distill.py --dataset PHOTOS --dim 0 --weights teacher", "has no ImageNet weights"),
        ("distill.py --dataset PHOTOS --dim 0 --device cuda", "finds cpu"),
        (
            "distill.py --dataset PHOTOS --dim 0 --arch squeezenet1_1 --teacher-size 64 "
            "--student-size 8",
            "8 px is too small",
        ),
        ("distill.py --student 32", "--student"),
        ("distill.py --regression --no-mixup", "--regression has no mixup"),
        ("evaluate.py", "--teacher is needed"),
        ("evaluate.py --teacher sop-448r-resnet50-512-gem-w", "sop-448r-resnet50-512-gem-w.pth"),
        ("evaluate.py --teacher SIZE-32", "--dataset is needed"),
        ("evaluate.py --teacher TEACHER --ks 0", "--ks"),
        ("evaluate.py --teacher TEACHER --device gpu", "--device gpu"),
        ("evaluate.py --teacher TEACHER --figure f.png", "--student"),
        ("evaluate.py --teacher TEACHER --student TEACHER --figure picture", "picture"),
        ("evaluate.py --teacher TEACHER --workers -1", "--workers"),
        ("evaluate.py --teacher TEACHER --student SIZE-32", "dimensions"),
        ("evaluate.py --teacher TEACHER --json /no/t.json", "/no/t.json"),
        ("evaluate.py --teacher TEACHER --database FOLDER", "--index"),
        ("evaluate.py --teacher TEACHER --database FOLDER --index no/i.pt", "no such folder"),
        ("evaluate.py --teacher TEACHER --student TEACHER --figure no/f.png", "no such folder"),
        (
            "evaluate.py --teacher TEACHER --index i.pt",
            "--index is read by --query and --database, not by the table",
        ),
        (
            "evaluate.py --teacher TEACHER --index i.pt --query x.png",
            "--teacher is read by --database and the table",
        ),
        (
            "evaluate.py --teacher TEACHER --database FOLDER --index i.pt --ks 1",
            "by the table, not",
        ),
        (
            "evaluate.py --teacher TEACHER --student TEACHER --dataset PHOTOS --ks 1 2",
            "--supervised and --ks need labels",
        ),
        (
            "evaluate.py --teacher TEACHER --student TEACHER --dataset synthetic --unlabelled",
            "--unlabelled needs a folder",
        ),
        ("evaluate.py --teacher TEACHER --top 3", "--top is read by --query, not by the table"),
        ("evaluate.py --database FOLDER --index i.pt", "--database needs a --teacher"),
        ("evaluate.py --teacher TEACHER --database EMPTY --index i.pt", "no images below EMPTY"),
        ("evaluate.py --query x.png", "--student"),
        ("evaluate.py --student TEACHER --index i.pt --query x.png --top 0", "--top"),
        ("evaluate.py --student TEACHER --index OTHER --query x.png", "OTHER is not an index"),
        ("data.py cars --root .", "Kaggle"),
    ],
)
def test_mistakes_end_in_one_sentence(line, sentence, mistakes, tmp_path, monkeypatch, run):
    """With exit code 2, and without a traceback or a new folder."""

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.chdir(mistakes)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    script, *words = line.split()
    usual = {"train.py": f"--dataset FOLDER --size 32 --out {tmp_path}/out {SMALL}"}
    usual["distill.py"] = f"--student-size 32 --out {tmp_path}/out {SMALL}"
    code, _, said = run(" ".join([script, usual.get(script, ""), *words]))
    last = said.strip().splitlines()[-1]
    assert code == 2 and "error: " in last and sentence in last and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_mistakes_of_programmers_show_their_traceback(fork, capfd):
    """And those of users do not."""

    def slip():
        evaluate.run_program(partial(divmod, 1, 0))

    def mistake():
        sys.argv = ["evaluate.py", "--teacher", "nowhere.pt"]
        runpy.run_path(str(HERE / "evaluate.py"), run_name="__main__")

    process = fork(slip)
    process.join()
    said = capfd.readouterr().err
    assert process.exitcode == 1 and "Traceback" in said and "ZeroDivisionError" in said
    process = fork(mistake)
    process.join()
    said = capfd.readouterr().err
    assert (
        process.exitcode == 2
        and said.startswith("error: there is no file nowhere.pt")
        and said.count("\n") == 1
    )


def test_names_that_the_terminal_cannot_show(monkeypatch):
    """Are printed with a replacement character, and the program goes on."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    evaluate.run_program(lambda: data.say("caf\udce9.jpg", "the next"))
    terminal.flush()
    assert terminal.buffer.getvalue() == b"caf?.jpg\nthe next\n"


@pytest.mark.parametrize("script", ["train.py", "distill.py", "evaluate.py"])
def test_help_fits_on_a_page(script, run):
    """And names every option."""
    code, said, _ = run(f"{script} --help")
    assert code == 0 and len(said.splitlines()) <= 60
    options = re.findall(r'add\(\s*"(--[\w-]+)"', (HERE / script).read_text())
    assert options and all(option in said for option in options)


def test_a_damaged_image_of_a_published_set(tmp_path, monkeypatch, run):
    """Ends the program in one sentence, though a worker process meets it."""
    write_cub(tmp_path, images_per_class=6)
    monkeypatch.setitem(data.COUNTS, "cub", {"train": 12, "test": 12})
    os.truncate(tmp_path / "images" / "001.Black_Bird" / "a 2.jpg", 900)
    small = SMALL.replace("--workers 0", "--workers 1")
    line = f"train.py --dataset cub --root {tmp_path} --size 32 --out {tmp_path}/out {small}"
    code, _, said = run(line)
    (sentence,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert code == 2 and "a 2.jpg cannot be read as an image" in sentence
    assert "Traceback" not in said


def test_images_that_cannot_be_read_are_left_out(folder, tmp_path, run):
    """Named once, counted, in training and in testing; when they are gone the run goes on."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    write_images(*(copy / "class0" / f"more{i}.png" for i in range(9)))
    write_images(*(copy / "class3" / f"more{i}.png" for i in range(9)))
    shutil.copy(copy / "class0" / "0.png", copy / "class0" / "cut.png")
    os.truncate(copy / "class0" / "cut.png", 3000)
    (copy / "class3" / "empty.png").write_bytes(b"")
    line = f"train.py --dataset {copy} --out {tmp_path}/run --size 32 {SMALL}"
    code, said, _ = run(line)
    assert code == 0 and "1 of 28 images cannot be read" in said
    assert said.count("cut.png cannot be read") == said.count("empty.png cannot be read") == 1
    os.remove(copy / "class0" / "cut.png")
    code, said, _ = run(line)
    assert code == 0 and "cut.png" not in said and "empty.png cannot be read" in said


def test_index_and_search(folder, teacher, tmp_path, monkeypatch, run):
    """A moved folder is indexed by its teacher, and searched by a student alone."""
    student, net = distil_student(teacher, tmp_path / "run", "--epochs 1")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "photos")
    Path("photos/class0/broken.jpg").write_text("no image")
    code, said, _ = run(f"evaluate.py --teacher {teacher} --database photos --index i.pt")
    assert code == 0 and "27 images in i.pt, 1 that cannot be read left out" in said
    assert said.count("broken.jpg cannot be read") == 1
    index = asymres.read_checkpoint("i.pt")
    assert index["embeddings"].shape == (27, 8) and index["folder"] == str(tmp_path / "photos")
    assert index["paths"][0] == "class0/0.png"
    photos = ImageDataset([os.path.join("photos", path) for path in index["paths"]])
    assert_close(index["embeddings"], extract(net, photos, 48))
    search = "evaluate.py --student run/model.pt --index i.pt --top 40 --figure answers.png"
    query, other = "photos/class1/2.png", "photos/class2/0.png"
    code, said, _ = run(f"{search} --query {query} photos/class0/broken.jpg nowhere.png {other}")
    lines = said.splitlines()
    assert code == 0 and "broken.jpg cannot be read" in said and "nowhere.png cannot" in said
    answers = lines[lines.index(query) + 1 :][:27]
    scores, files = zip(*(line.split() for line in answers), strict=True)
    assert sorted(files) == [str(tmp_path / "photos" / path) for path in index["paths"]]
    assert list(scores) == sorted(scores, key=float, reverse=True)
    assert other in lines and Image.open("answers.png").width > 1000
    run(f"train.py --dataset photos --out another --size 48 --seed 7 {SMALL}")
    run("evaluate.py --teacher another/model.pt --database photos --index other.pt")
    code, _, said = run(search.replace("i.pt", "other.pt") + f" --query {query}")
    assert code == 2 and "other.pt is of another network than the teacher of this student" in said
    run(f"evaluate.py --teacher {teacher} --database photos --index large.pt --size 64 --workers 0")
    code, _, said = run(search.replace("i.pt", "large.pt") + f" --query {query}")
    assert code == 2 and "large.pt is of 64 px, and the student was taught by 48 px" in said
    line = "evaluate.py --teacher another/model.pt --student run/model.pt"
    code, _, said = run(line)
    assert code == 2 and "run/model.pt was not taught by this --teacher" in said
    code, _, said = run(f"evaluate.py --teacher {teacher} --student run/model.pt --size 64")
    assert code == 2 and "was taught by images of 48 px: give --size 48" in said
    code, said, _ = run("evaluate.py --teacher run/model.pt --student run/model.pt --workers 0")
    assert code == 0 and "student, asymmetric" in said, "a student may have its own database"


def table_of(said):
    """The rows of a printed table without the milliseconds, {first cell: the others}."""
    rows = [re.split(r"  +", line.strip()) for line in said.splitlines()]
    names = ("teacher", "no distillation", "student")
    return {row[0]: row[1:-1] for row in rows if len(row) > 5 and row[0].startswith(names)}


def test_distillation_without_labels(photographs, tmp_path, monkeypatch, run):
    """The teacher is the network as it comes, unwhitened; the table is one of agreement."""
    monkeypatch.chdir(tmp_path)
    small = SMALL.replace("--dim 8", "")
    line = f"distill.py --dataset {photographs} --teacher-size 48 --student-size 32 --views 2"
    code, said, _ = run(f"{line} --unlabelled --out run {small} --epochs 1")
    table = table_of(said)
    assert code == 0 and set(table) == {"teacher", "no distillation", "student"}
    network, queries, database, top_1, top_10, cosine, _ = table["teacher"]
    assert (queries, database, top_1, top_10, cosine) == ("48", "48", "100.0", "100.0", "1.000")
    assert load_checkpoint("run/teacher.pt").dim == 256 == load_checkpoint("run/model.pt").dim
    assert Image.open("run/queries.png").width > 1000
    os.remove("run/model.pt")  # teacher.pt is left: it is the same with a seed, or another one
    code, _, mistake = run(f"{line} --unlabelled --out run {small} --epochs 1 --seed 5")
    assert code == 2 and "run/teacher.pt is another teacher: give another --out" in mistake
    code, _, _ = run(f"{line} --unlabelled --out run {small} --epochs 1")
    assert code == 0
    before = Path("run/teacher.pt").read_bytes()
    code, _, mistake = run(f"{line} --unlabelled --out run {small} --epochs 1 --teacher-size 56")
    assert code == 2 and "--teacher-size 48, now 56" in mistake
    assert Path("run/teacher.pt").read_bytes() == before
    other = "distill.py --teacher run/teacher.pt --student-size 32 --views 2 --out other"
    code, said, _ = run(f"{other} {small} --arch resnet10 --epochs 1")
    assert code == 0 and "top-1 agreement" in said
    assert load_checkpoint("other/model.pt").arch == "resnet10"
    assert load_checkpoint("other/model.pt").dim == 256
    line = f"evaluate.py --teacher run/teacher.pt --student run/model.pt --dataset {photographs}"
    code, said, _ = run(f"{line} --unlabelled --json t.json --workers 0")
    assert code == 0 and table_of(said) == table
    assert "top-1 agreement" in json.loads(Path("t.json").read_text())[1]


def test_the_paper_in_miniature(tmp_path, monkeypatch, run):
    """distill.py without options, here on few eggs: labels, teacher, student, and their table."""
    few = ImageDataset(images=noise(16, 80, 80, 3), labels=[i // 8 for i in range(16)])
    monkeypatch.setattr(data, "draw_eggs", lambda split: few)
    monkeypatch.setitem(train.RECIPES["synthetic"], "epochs", 1)  # of the teacher
    monkeypatch.chdir(tmp_path)
    code, said, _ = run("distill.py --epochs 1 --views 8 --workers 0")
    rows = ("teacher", "no distillation", "labels", "student, asymmetric", "student, symmetric")
    assert code == 0 and all(f"\n{row}" in said for row in rows)
    (out,) = os.listdir("runs")
    files = {"labels", "teacher", "model.pt", "log.jsonl", "options.json", "queries.png"}
    assert set(os.listdir(f"runs/{out}")) == files

    def epochs_of_labels(folder):
        return json.loads(Path(folder, "labels", "options.json").read_text())["options"]["epochs"]

    assert epochs_of_labels(f"runs/{out}") == 2, "8 views of an image; an anchor has 5"
    code, _, _ = run("distill.py --epochs 5 --regression --workers 0 --out regression")
    assert code == 0 and epochs_of_labels("regression") == 1


# ----------------------------------------------------------------------------------------- README


def readme_commands(section):
    """The lines of a section of the README that run a program, without their comments."""
    text = re.split(r"^## ", (HERE / "README.md").read_text(), flags=re.M)
    body = next(part for part in text if part.startswith(section))
    body = re.sub(r"\s*\\\n\s*", " ", body)  # lines that go on
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in body.splitlines())
    return [line.removeprefix("python ") for line in lines if re.match(r"python \w+\.py ", line)]


def test_the_benchmark_of_the_readme(tmp_path, monkeypatch, run):
    """Its lines, word for word and in order, on a replica of CUB; options behind make it small."""
    small = f"{SMALL} --epochs 1"
    commands = readme_commands("Reproduce a benchmark")
    download, released, of_released, teacher, student, baseline, table = commands
    monkeypatch.chdir(tmp_path)
    write_cub(tmp_path / "www" / "CUB_200_2011", images_per_class=6)
    monkeypatch.setitem(data.COUNTS, "cub", {"train": 12, "test": 12})

    def copy_archive(url, root, md5):
        assert (url, md5) == data.DOWNLOADS["cub"]
        shutil.copytree("www", root)

    monkeypatch.setattr(data, "download_and_extract_archive", copy_archive)
    code, said, _ = run(download)
    assert code == 0 and "12 train images" in said and "12 test images" in said

    assert train.parse_options(teacher.split()[1:]).out == "runs/cub-448-seed1234"
    code, said, _ = run(f"{teacher} {small} --size 48 --out runs/cub-448-seed1234")
    assert code == 0 and "\nsymmetric " in said
    options, _ = student_options(f"{student.partition(' ')[2]} --teacher-size 448")
    assert options.out == "runs/cub-448to224-seed1234"
    out = "--out runs/cub-448to224-seed1234"
    code, said, _ = run(f"{student} {small} --views 2 --student-size 32 {out}")
    assert code == 0 and "student, asymmetric" in said
    assert train.parse_options(baseline.split()[1:]).out == "runs/cub-224-seed1234"
    code, said, _ = run(f"{baseline} {small} --size 32 --out runs/cub-224-seed1234")
    assert code == 0

    code, said, _ = run(f"{table} --json t.json --figure f.png --ks 1 2 --workers 0")
    rows = json.loads(Path("t.json").read_text())
    assert code == 0 and [(row["search"], row["query px"], row["database px"]) for row in rows] == [
        ("teacher, symmetric", 48, 48),
        ("no distillation", 32, 48),
        ("labels, symmetric", 32, 32),
        ("student, asymmetric", 32, 48),
        ("student, symmetric", 32, 32),
    ]
    assert all(0 <= row["R@1"] <= row["R@2"] <= 100 for row in rows)
    assert rows[0]["GFLOPs/query"] > 1.5 * rows[1]["GFLOPs/query"]
    assert {"mAP", "MAP@R", "R-Precision", "P@2", "mAP@1"} <= rows[0].keys()
    assert Image.open("f.png").width > 1000
    files = {"model.pt", "log.jsonl", "options.json", "queries.png"}
    assert set(os.listdir("runs/cub-448to224-seed1234")) == files

    def copy_network(url, path):
        name = "448to224" if "-S224r-" in url else "224" if "-224r-" in url else "448"
        shutil.copy(f"runs/cub-{name}-seed1234/model.pt", path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", copy_network)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    code, said, _ = run(f"{released} --workers 0")
    assert code == 0 and "student, asymmetric" in said and "labels, symmetric" in said
    options, _ = student_options(of_released.partition(" ")[2])
    assert (options.teacher_size, options.student_size, options.dim) == (48, 224, 8), "the file's"
    code, said, _ = run(f"{of_released} {small} --views 2 --student-size 32 --out own")
    assert code == 0 and "student, asymmetric" in said


def test_a_module_of_ones_own_as_in_the_readme(tmp_path, monkeypatch, capsys):
    """Teacher, student and table, by the README's lines, with epochs made short."""
    monkeypatch.chdir(tmp_path)
    write_images(*(Path("FOLDER", f"{i % 4}", f"{i}.png") for i in range(32)))
    short = {"epochs": 1, "views": 2, "batch_size": 8, "size": 32, "workers": 0}
    for module in (train, distill):
        monkeypatch.setitem(module.RECIPES, "folder", module.RECIPES["folder"] | short)
    code = (HERE / "README.md").read_text().split("**Another backbone.**")[1].split("\n\n")[1]
    code = code.replace("--student-size 224", "--student-size 16")
    names = {"make_module": lambda: nn.Conv2d(3, 4, 3, stride=4)}
    exec("\n".join(line.strip() for line in code.splitlines()), names)
    assert "student, asymmetric  custom   16        32" in capsys.readouterr().out
    words = "--dataset FOLDER --teacher-size 32 --student-size 16 --out runs/mixed"
    options, teacher = distill.parse_options(words.split()), small_net(dim=512)
    distill.complete_options(options, teacher)
    student = EmbeddingNet(backbone=names["make_module"](), pretrained=False)
    distill.distill(teacher, names["training"], options, student)
    for run in ("own", "own-student", "mixed"):
        options = json.loads(Path("runs", run, "options.json").read_text())["options"]
        assert (options["arch"], options["dim"]) == ("custom", 512)


def test_the_pieces_to_copy_of_the_readme(tmp_path, monkeypatch):
    """Its lines run, in order; here on smaller networks and images."""
    monkeypatch.chdir(tmp_path)
    write_images("a.jpg", *(Path("PHOTOS", f"{i}.png") for i in range(20)))
    net = small_net()
    net.size = 32
    Path("runs/photos").mkdir(parents=True)
    save_checkpoint("runs/photos/model.pt", net)
    section = (HERE / "README.md").read_text().split("## Pieces to copy")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in section.splitlines() if line.startswith("    "))
    for large, small in {
        '"resnet50", dim=512': '"resnet18", dim=512, pretrained=False',
        '224, 448, views=8, batch_size=16, workers=8, device="cuda"': "16, 32, batch_size=4",
        "range(200)": "range(2)",
    }.items():
        assert large in code
        code = code.replace(large, small)
    x = unit_vectors(8, 8)
    names = {"s": x[None], "t": x[None], "x": x, "labels": [i // 2 for i in range(8)]}
    names |= {"queries": x, "database": torch.cat([x, x]), "other_labels": 2 * names["labels"]}
    exec(code, names)
    assert names["embedding"].shape == (1, 8) and names["loss"] < 1e-6
    assert names["large"].shape == (2, 8, 3, 32, 32) and names["rows"].shape == (8, 10)


# ------------------------------------------------------------------------------ recorded values

# What the authors' functions (pavelsuma/raml at ea0f00f) gave when they were run once on random
# unit vectors and feature maps, with losses' gradients: inputs are rounded to 4 decimals.
RECORDED_TEXT = """
student_0 2x3x4: .5981 .1684 -.5557 -.5523 .8088 -.1076 -.0524 -.5757 .9776 -.1623 .1317 -.0241
  .5 .6007 -.3632 .5072 .3634 .0154 -.572 -.7352 -.3189 .7997 .4893 -.1394
teacher_0 2x3x4: .4294 -.348 .1392 -.8217 -.963 -.0115 .1337 -.2339 -.2036 .6142 .4855 .5879
  .3419 .4387 -.6345 -.5367 .1697 -.8977 -.1852 -.362 -.7227 -.0502 .6871 .0553
gradient_0 2x3x4: -.121752 .098672 -.039469 .232984 1.059292 .01265 -.147069 .257288 .169525
  -.511405 -.404245 -.489506 -.138421 -.177611 .256883 .217288 -.065626 .347158 .071621 .139993
  .231836 .016104 -.220416 -.01774
student_1 2x3x4: -.4686 -.2205 .231 -.8237 -.0738 -.5562 .4959 -.6628 .6859 -.5062 -.0403 .5212
  .4385 -.3595 .2945 -.7693 .1015 .0486 -.457 -.8823 .3505 .3558 -.3125 -.808
teacher_1 2x3x4: .4574 -.3376 .786 .2431 -.2406 -.7504 .4401 .4305 -.7502 -.0105 -.3015 .5884
  -.6999 .5813 -.4131 -.0401 -.1962 -.8203 .537 .0163 .5269 .0452 .0795 -.845
gradient_1 2x3x4: -.436116 .362879 -.636221 -.33148 .046168 .414659 -.136048 -.498929 .767088
  .029652 .336768 -.181286 1.061437 -.635033 .238601 -.988952 .538297 .823196 -.526827 -.968288
  .109804 .034393 -.206317 -.63547
anchors 4x3: -.5555 .5909 -.5851 -.7771 -.629 .0227 .2289 .8187 .5266 -.4824 -.3744 -.7919
positives 4x2x3: .9666 -.0608 .249 -.7545 -.6404 -.1434 -.1878 .5912 .7843 .0481 .7756 -.6294
  -.0962 -.4802 .8719 .8407 -.5337 .0917 .9847 -.1699 .0377 -.59 .0537 -.8056
negatives 4x2x3: -.8566 .1997 .4757 -.1459 .4669 .8722 -.2192 .1911 .9568 .2425 -.9701 .0107
  -.4159 -.6661 .6191 .5063 .8127 -.2886 .3481 .5635 .7492 -.1595 .9861 .0468
triplet_gradient 4x3: -1.2146 1.3678 1.2423 .163 -2.1458 .8126 -.49425 1.25345 -.5067
  -.5721 .578 .00455
database 10x3: .0569 -.9793 .1942 .0258 -.3087 .9508 .9022 .3843 -.1957 -.6033 -.7972 .0245
  -.2711 .5332 -.8014 .4423 -.2275 -.8675 .8117 .0986 .5757 -.9392 -.1975 -.2808
  -.76 -.5152 .3962 -.7953 -.1499 -.5874
queries 10x3: -.3427 -1.1067 -.2349 -.2493 -.182 1.4687 1.3457 .4323 .2056 -.1968 -1.2022 .1997
  .0479 .3566 -1.2779 .6271 -.7676 -1.0522 .3167 .1689 .244 -1.3344 -.2051 -.7322
  -1.1055 -.89 .0798 -1.1882 .2815 -.4477
"""
RECORDED = {
    name: torch.tensor([float(x) for x in values.split()], dtype=torch.float64).view(
        *map(int, shape.split("x"))
    )
    for name, shape, values in re.findall(r"(\w+) ([\dx]+):([-.\d\s]+)$", RECORDED_TEXT, re.M)
}


if __name__ == "__main__":
    one_of_two_processes(*sys.argv[1:])

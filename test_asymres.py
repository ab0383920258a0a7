"""What holds, shown on small cases: python -m pytest. Needs no data, no network, no GPU; under two minutes on two cores."""
import contextlib
import functools
import hashlib
import http.server
import io
import json
import math
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as TV

import asymres
import data
import distill
import evaluate
import train
from asymres import (EmbeddingNet, GeM, distillation_loss, draw_negatives, load_checkpoint, negative_probabilities,
                     save_checkpoint, triplet_loss)
from data import distillation_loader, load_dataset, read_image, run_command
from evaluate import extract, knn, retrieval_metrics

HERE = Path(__file__).parent
f64 = functools.partial(torch.tensor, dtype=torch.float64)


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder of 6 classes of coloured noise; the first three, of 6, 5 and 7 images, are for training."""
    root, noise = tmp_path_factory.mktemp("tiny"), np.random.default_rng(0)
    for label, count in enumerate([6, 5, 7, 4, 4, 1]):
        (root / f"class{label}").mkdir()
        for i in range(count):
            pixels = noise.integers(0, 80, (40, 40 + 4 * i, 3)) + 25 * np.array([label, 5 - label, 3])
            Image.fromarray(pixels.astype(np.uint8)).save(root / f"class{label}" / f"{i}.png")
    return root


@pytest.fixture
def quiet(capsys):
    """Programs called in this test may talk."""


def TINY(root, out, **changes):
    """A command line of train.py or distill.py that takes a second."""
    flags = {"dataset": root, "out": out, "arch": "resnet10", "dim": 8, "weights": "random", "epochs": 2, "lr": 1e-3,
             "batch": 8, "forward": 4, "workers": 0, "device": "cpu", **changes}
    return [str(part) for name, value in flags.items() for part in (f"--{name}", value)]


def fails(capsys, program, *argv):
    """The one sentence with which a program refuses its command line."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: program.main([str(a) for a in argv]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and lines[-1].startswith("error: ") and not any("Traceback" in line for line in lines)
    return lines[-1]


# ------------------------------------------------------ values recorded from the authors' implementation, 4 decimals in

STUDENT_0 = [[[0.5981, 0.1684, -0.5557, -0.5523], [0.8088, -0.1076, -0.0524, -0.5757], [0.9776, -0.1623, 0.1317,
    -0.0241]], [[0.5, 0.6007, -0.3632, 0.5072], [0.3634, 0.0154, -0.572, -0.7352], [-0.3189, 0.7997, 0.4893,
    -0.1394]]]
TEACHER_0 = [[[0.4294, -0.348, 0.1392, -0.8217], [-0.963, -0.0115, 0.1337, -0.2339], [-0.2036, 0.6142, 0.4855,
    0.5879]], [[0.3419, 0.4387, -0.6345, -0.5367], [0.1697, -0.8977, -0.1852, -0.362], [-0.7227, -0.0502, 0.6871,
    0.0553]]]
GRAD_0 = [[[-0.1217516724, 0.09867159288, -0.03946863715, 0.2329840456], [1.059292071, 0.01264990532, -0.1470688992,
    0.2572880742], [0.169524562, -0.5114046463, -0.4042444738, -0.489506336]], [[-0.1384211212, -0.177611424,
    0.2568827183, 0.217287557], [-0.06562636137, 0.3471584243, 0.07162051931, 0.1399925917], [0.2318362339,
    0.01610374836, -0.2204160458, -0.01773978654]]]
STUDENT_1 = [[[-0.4686, -0.2205, 0.231, -0.8237], [-0.0738, -0.5562, 0.4959, -0.6628], [0.6859, -0.5062, -0.0403,
    0.5212]], [[0.4385, -0.3595, 0.2945, -0.7693], [0.1015, 0.0486, -0.457, -0.8823], [0.3505, 0.3558, -0.3125,
    -0.808]]]
TEACHER_1 = [[[0.4574, -0.3376, 0.786, 0.2431], [-0.2406, -0.7504, 0.4401, 0.4305], [-0.7502, -0.0105, -0.3015,
    0.5884]], [[-0.6999, 0.5813, -0.4131, -0.0401], [-0.1962, -0.8203, 0.537, 0.0163], [0.5269, 0.0452, 0.0795,
    -0.845]]]
GRAD_1 = [[[-0.4361160221, 0.3628789066, -0.636221239, -0.3314795945], [0.04616836998, 0.4146594279, -0.1360475626,
    -0.4989286537], [0.7670877468, 0.02965220328, 0.3367682455, -0.1812856109]], [[1.061436831, -0.6350327252,
    0.2386015085, -0.9889521512], [0.5382974701, 0.8231955924, -0.5268272347, -0.9682883134], [0.1098041581,
    0.03439263582, -0.2063165113, -0.6354701909]]]
T_anchors = [[-0.5555, 0.5909, -0.5851], [-0.7771, -0.629, 0.0227], [0.2289, 0.8187, 0.5266], [-0.4824, -0.3744,
    -0.7919]]
T_positives = [[[0.9666, -0.0608, 0.249], [-0.7545, -0.6404, -0.1434]], [[-0.1878, 0.5912, 0.7843], [0.0481, 0.7756,
    -0.6294]], [[-0.0962, -0.4802, 0.8719], [0.8407, -0.5337, 0.0917]], [[0.9847, -0.1699, 0.0377], [-0.59, 0.0537,
    -0.8056]]]
T_negatives = [[[-0.8566, 0.1997, 0.4757], [-0.1459, 0.4669, 0.8722]], [[-0.2192, 0.1911, 0.9568], [0.2425, -0.9701,
    0.0107]], [[-0.4159, -0.6661, 0.6191], [0.5063, 0.8127, -0.2886]], [[0.3481, 0.5635, 0.7492], [-0.1595, 0.9861,
    0.0468]]]
T_grad = [[-1.2146, 1.3678, 1.2423], [0.163, -2.1458, 0.8126], [-0.49425, 1.25345, -0.5067], [-0.5721, 0.578,
    0.00455]]


@pytest.mark.parametrize("student, teacher, ts, ss, loss, grad", [
    (STUDENT_0, TEACHER_0, 0, 0, 1.8000209920876884, GRAD_0),
    (STUDENT_1, TEACHER_1, 0.7718, 0.6684, 4.054649398303912, GRAD_1)])
def test_distillation_loss_is_the_authors(student, teacher, ts, ss, loss, grad):
    student = f64(student).requires_grad_()
    ours = distillation_loss(student, f64(teacher), ts, ss)
    ours.backward()
    assert ours.item() == pytest.approx(loss, rel=3e-6)                         # theirs adds 1e-6 to each 1 - s.t
    torch.testing.assert_close(student.grad, f64(grad), rtol=0, atol=2e-6)


def test_triplet_loss_is_the_authors():
    anchors = f64(T_anchors).requires_grad_()
    loss = triplet_loss(anchors, f64(T_positives), f64(T_negatives), 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(4.7996729925, abs=1e-12)
    torch.testing.assert_close(anchors.grad, f64(T_grad), rtol=0, atol=1e-10)


# ------------------------------------------------------------------------------------------------------------- losses

def test_distillation_loss_by_hand():
    """Two views at right angles to the teacher, the student has them swapped: each term by mental arithmetic."""
    t, s = f64([[[1, 0], [0, 1]]]), f64([[[0, 1], [1, 0]]])
    assert distillation_loss(s, t, 0, 0) == 1                                   # both views off by 1, mean over A = 2
    assert distillation_loss(s, t, 1, 0) == 1 + 1                               # s_i.t_j = 1 where t_i.t_j = 0
    assert distillation_loss(s, t, 0, 1) == 1 + 0                               # among themselves they stand as they should
    assert distillation_loss(t, t, 1, 1) == 0
    assert distillation_loss(s[:, :1], t[:, :1], 1, 1) == 1                     # one view has no relations


def test_relations_never_cross_images():
    """Changing image 2 leaves image 1's gradient alone, to the bit."""
    grads = []
    for seed in (1, 2):
        s = torch.cat([unit(1, 4, 8), unit(1, 4, 8, seed=seed)]).requires_grad_()
        distillation_loss(s, torch.cat([unit(1, 4, 8, seed=9), unit(1, 4, 8, seed=seed + 9)]), 0.7, 0.6).backward()
        grads.append(s.grad)
    assert torch.equal(grads[0][0], grads[1][0]) and not torch.equal(grads[0][1], grads[1][1])


def test_losses_are_sums_over_images():
    """Accumulating 4 x 2 images is 8 at once."""
    s, t = unit(8, 4, 16, dtype=torch.float64), unit(8, 4, 16, seed=1, dtype=torch.float64)
    whole, parts = distillation_loss(s, t, 0.7, 0.6), sum(distillation_loss(a, b, 0.7, 0.6) for a, b in zip(s.split(2), t.split(2)))
    torch.testing.assert_close(whole, parts)
    a, p, n = unit(8, 16), unit(8, 3, 16, seed=1), unit(8, 4, 16, seed=2)
    torch.testing.assert_close(triplet_loss(a, p, n), sum(map(triplet_loss, a.split(2), p.split(2), n.split(2))))


# ------------------------------------------------------------------------------------------------ sampling of negatives

def test_negative_probabilities_follow_the_formula():
    anchors, pool = unit(3, 16, dtype=torch.float64), unit(40, 16, seed=1, dtype=torch.float64)
    own, labels = torch.tensor([0, 1, 2]), torch.arange(40) % 5
    ours = negative_probabilities(anchors, pool, own, labels)
    for i in range(3):
        d = (2 - 2 * pool @ anchors[i]).sqrt().clamp(min=0.5)
        log_weight = (2 - 16) * d.log() - (16 - 3) / 2 * (1 - d ** 2 / 4).log()
        log_weight[labels == own[i]] = 0
        weight = (log_weight - log_weight.max()).exp() + 1e-6
        weight[labels == own[i]] = 0
        torch.testing.assert_close(ours[i], weight / weight.sum())


def test_negative_probabilities_at_the_ends():
    """Duplicates and antipodes: no NaN, rows sum to one, nothing of the anchor's class."""
    anchors = torch.eye(4, 512)                                                 # whose products are exact
    pool, labels = torch.cat([anchors, -anchors, anchors]), torch.tensor([0, 1, 2, 3, 1, 2, 3, 0] + [7] * 4)
    p = negative_probabilities(anchors, pool, torch.arange(4), labels)
    assert p.isfinite().all() and torch.allclose(p.sum(1), torch.ones(4))
    assert (p[labels == torch.arange(4)[:, None]] == 0).all() and (p[labels != torch.arange(4)[:, None]] > 0).all()
    with pytest.raises(ValueError, match="no negatives"):
        negative_probabilities(anchors, pool, torch.zeros(4), torch.zeros(12))


def test_draws_have_that_distribution_and_do_not_repeat():
    """Chi-square of first draws against the probabilities: 0.001 critical value at 24 degrees of freedom."""
    pool, labels = unit(30, 8, seed=3), torch.arange(30) // 6
    anchor = unit(1, 8)
    p = negative_probabilities(anchor, pool, labels[:1], labels)[0]
    n = 20000
    one = draw_negatives(anchor.expand(n, -1), pool, labels[:1].expand(n), labels, 1, generator=torch.Generator().manual_seed(0))
    expected, seen = n * p[6:], torch.bincount(one[:, 0], minlength=30)
    assert seen[:6].sum() == 0 and ((seen[6:] - expected) ** 2 / expected).sum() < 51.2
    four = draw_negatives(anchor.expand(n, -1), pool, labels[:1].expand(n), labels, 4, chunk=999)
    assert (four.sort(1).values.diff(dim=1) > 0).all()
    with pytest.raises(ValueError, match="fewer than 25"):
        draw_negatives(anchor, pool, labels[:1], labels, 25)


def test_an_epoch_of_mining(tiny):
    """Groups of 4 of one class, equally many of each class, and no negative of the anchor's class."""
    dataset, labels = load_dataset(str(tiny)), torch.tensor(load_dataset(str(tiny)).labels)
    options = train.parse(["--dataset", str(tiny), "--size", "32", "--workers", "0", "--device", "cpu", "--precision", "float32"])
    rows = train.mine(EmbeddingNet("resnet10", dim=8, pretrained=False), dataset, 0, options)
    classes = labels[rows]                                                      # (R, 1 + M)
    assert len(rows) == 3 * 4 and rows.shape[1] == 5                            # classes of 6, 5, 7: one group each
    assert (classes[:, :1] != classes[:, 1:]).all()
    assert (classes[:, 0].view(-1, 4) == classes[::4, :1]).all() and len(rows[:, 0].unique()) == 12


# ------------------------------------------------------------------------------------------------------------- metrics

M_database = [[0.0569, -0.9793, 0.1942], [0.0258, -0.3087, 0.9508], [0.9022, 0.3843, -0.1957], [-0.6033, -0.7972,
    0.0245], [-0.2711, 0.5332, -0.8014], [0.4423, -0.2275, -0.8675], [0.8117, 0.0986, 0.5757], [-0.9392, -0.1975,
    -0.2808], [-0.76, -0.5152, 0.3962], [-0.7953, -0.1499, -0.5874]]
M_queries = [[-0.3427, -1.1067, -0.2349], [-0.2493, -0.182, 1.4687], [1.3457, 0.4323, 0.2056], [-0.1968, -1.2022,
    0.1997], [0.0479, 0.3566, -1.2779], [0.6271, -0.7676, -1.0522], [0.3167, 0.1689, 0.244], [-1.3344, -0.2051,
    -0.7322], [-1.1055, -0.89, 0.0798], [-1.1882, 0.2815, -0.4477]]
M_labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]
M_symmetric = {"mAP": 0.197619047619, "R@1": 0, "R@2": 0.111111111111, "R@4": 0.666666666667, "P@1": 0, "P@2":
    0.0555555555556, "P@4": 0.166666666667, "mAP@1": 0, "mAP@2": 0.0138888888889, "mAP@4": 0.045524691358}
M_asymmetric = {"mAP": 0.190729717813, "R@1": 0, "R@2": 0.111111111111, "R@4": 0.555555555556, "P@1": 0, "P@2":
    0.0555555555556, "P@4": 0.138888888889, "mAP@1": 0, "mAP@2": 0.0138888888889, "mAP@4": 0.037037037037}


def test_metrics_are_the_authors():
    """The last image is alone in its class: no query, but in the database."""
    database, queries = f64(M_database), f64(M_queries)
    for q, expected in ((database, M_symmetric), (queries, M_asymmetric)):
        ours = retrieval_metrics(q, database, M_labels, M_labels, ks=(1, 2, 4))
        assert {key: ours[key] for key in expected} == pytest.approx(expected, abs=1e-9)


def by_sorting(queries, database, query_labels, database_labels, ks, same_images):
    """The definitions, query by query, on a stable argsort."""
    rows = []
    for i, label in enumerate(query_labels):
        order = np.argsort(-(database @ queries[i]), kind="stable")
        hit = np.asarray(database_labels)[order[order != i] if same_images else order] == label
        ranks, n = np.flatnonzero(hit), int(hit.sum())
        if not n:
            continue
        precision = [((j / r if r else 1) + (j + 1) / (r + 1)) / 2 for j, r in enumerate(ranks)]
        row = {"mAP": np.mean(precision), "R-Precision": hit[:n].mean(),
               "MAP@R": sum((j + 1) / (r + 1) for j, r in enumerate(ranks) if r < n) / n}
        for k in ks:
            row |= {f"R@{k}": hit[:k].any(), f"P@{k}": hit[:min(k, ranks[-1] + 1)].mean(),
                    f"mAP@{k}": sum(p for p, r in zip(precision, ranks) if r < k) / min(n, k)}
        rows.append(row)
    return {key: np.mean([row[key] for row in rows]) for key in rows[0]}


def test_metrics_against_brute_force_with_ties_and_lone_classes():
    """Embeddings on a coarse grid tie all the time; every chunk size gives the same numbers, to the bit."""
    draw, ks = np.random.default_rng(0), (1, 2, 3, 5, 8, 100)
    for case in range(60):
        n, m, same = draw.integers(2, 30), draw.integers(2, 30), bool(case % 2)
        m = n if same else m
        queries, database = draw.integers(-1, 2, (n, 3)) / 2, draw.integers(-1, 2, (m, 3)) / 2
        labels = draw.integers(-3, 4, n) * 10 ** 15
        others = labels if same else np.append(draw.integers(-3, 4, m - 1) * 10 ** 15, labels[0])
        if same:
            others[1] = others[0]
        expected = by_sorting(queries, database, labels, others, ks, same)
        for chunk in (1, 7, 1000):
            ours = retrieval_metrics(torch.tensor(queries), torch.tensor(database), labels, others.tolist(), ks, same, chunk=chunk)
            assert ours == pytest.approx(expected, abs=1e-12), (case, chunk)


def test_chunks_and_precisions_agree():
    """3,000 embeddings, many of them twice: chunk 1, 7 and all are identical; float64 input ranks as float32 does."""
    database = unit(1500, 64).repeat(2, 1)
    queries = F.normalize(database + 0.1 * unit(3000, 64, seed=1), dim=1)
    labels = torch.arange(3000) % 400
    results = [retrieval_metrics(q[:600], d, labels[:600], labels, same_images=False, chunk=chunk)
               for q, d, chunk in ((queries, database, 1), (queries, database, 7), (queries, database, 10 ** 6),
                                   (queries.double(), database.double(), 100))]
    assert results[0] == results[1] == results[2] == results[3]
    found = [knn(queries[:50], database, 9, chunk=chunk)[1] for chunk in (1, 7, 10 ** 6)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    scores = queries[:50].double() @ database.double().T
    assert torch.equal(found[0], scores.float().sort(dim=1, descending=True, stable=True)[1][:, :9])


def test_knn_by_hand():
    database = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0.6, 0.8]])
    scores, rows = knn(database[:1], database, 10)
    assert rows.tolist() == [[0, 2, 3, 1]] and scores[0].tolist() == pytest.approx([1, 1, 0.6, 0])     # ties: first come first
    assert knn(database, database, 1, same_images=True)[1][:, 0].tolist() == [2, 3, 0, 1]


def test_all_embeddings_the_same():
    """A collapsed network: ranks fall back on the database's order, in bounded memory."""
    x, labels = torch.ones(3000, 8), torch.arange(3000) % 2
    assert retrieval_metrics(x, x, labels, labels, ks=(1,))["R@1"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("sentence, change", [
    ("at least one", {"queries": torch.empty(0, 4)}), ("at least one", {"database": torch.empty(0, 4)}),
    ("queries: embedding 1 is not finite", {"queries": torch.tensor([[1.0] * 4, [math.nan] * 4, [0] * 4])}),
    ("database: embedding 0 is not finite", {"database": torch.full((3, 4), math.inf)}),
    ("4 dimensions and the database has 5", {"database": torch.ones(3, 5)}), ("2 labels", {"query_labels": [1, 2]}),
    ("2 queries and 3 database rows", {"queries": torch.ones(2, 4), "query_labels": [1, 1]}),
    ("no query has a correct image", {"query_labels": [1, 2, 3], "database_labels": [1, 2, 3]}),
    ("positive", {"ks": (1, 0)}), ("positive", {"ks": (1.5,)})])
def test_metrics_refuse(sentence, change):
    arguments = {"queries": torch.ones(3, 4), "database": torch.ones(3, 4), "query_labels": [1, 1, 2],
                 "database_labels": [1, 1, 2], **change}
    with pytest.raises(ValueError, match=sentence):
        retrieval_metrics(**arguments)


# ------------------------------------------------------------------------------------------------------------- network

def test_gem_is_between_mean_and_maximum():
    x = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(GeM(1)(x), x.mean((2, 3)))
    torch.testing.assert_close(GeM(200)(x), x.amax((2, 3)), rtol=0.03, atol=0)
    torch.testing.assert_close(GeM(3, channels=3)(x), x.pow(3).mean((2, 3)).pow(1 / 3))


@pytest.mark.parametrize("arch, first", [("resnet10", "backbone.0.weight"), ("mobilenet_v3_small", "backbone.0.0.weight"),
                                         ("squeezenet1_1", "backbone.0.weight"), ("shufflenet_v2_x0_5", "backbone.0.0.weight")])
def test_families_of_backbones(arch, first):
    net = EmbeddingNet(arch, "gemmp", 16, pretrained=False).eval()
    assert {first, "pool.p", "whiten.weight", "whiten.bias"} <= net.state_dict().keys()
    for size in (64, 96):
        torch.testing.assert_close(net(torch.randn(2, 3, size, size)).norm(dim=1), torch.ones(2))
    assert net.pool.p.shape == (net.whiten.in_features,)


def test_a_backbone_of_ones_own_and_no_whitening():
    net = EmbeddingNet(backbone=torch.nn.Conv2d(3, 7, 3), pooling="spoc", dim=0, pretrained=False)
    assert net(torch.randn(2, 3, 8, 8)).shape == (2, 7) and net.dim == 7 and isinstance(net.whiten, torch.nn.Identity)
    with pytest.raises(ValueError, match="no feature map"):
        EmbeddingNet(backbone=torch.nn.Flatten(), pretrained=False)
    with pytest.raises(ValueError, match="did you mean resnet50"):
        EmbeddingNet("resnet5O")


def test_multiscale_is_the_mean_over_sizes():
    net, x = EmbeddingNet("resnet10", dim=8, pretrained=False).eval(), torch.randn(2, 3, 64, 64)
    half = F.interpolate(x, scale_factor=0.5, mode="bilinear", align_corners=False)
    torch.testing.assert_close(asymres.multiscale(net, x, (1, 0.5)), F.normalize(net(x) + net(half)))


def test_batchnorm_is_frozen_only_when_pretrained():
    net, x = EmbeddingNet("resnet10", dim=8, pretrained=False), torch.randn(4, 3, 32, 32)
    for frozen in (False, True):
        net.frozen_batchnorm = frozen
        before = net.backbone[1].running_mean.clone()
        net.train()(x).sum().backward()
        assert torch.equal(before, net.backbone[1].running_mean) == frozen
        assert net.backbone[1].weight.grad is not None                          # scale and shift are learned all the same


def test_batchnorm_statistics_stand_still_at_the_end(tiny, tmp_path, quiet, monkeypatch):
    """From random weights they train for 7 epochs of 10, then the network trains as it will be used."""
    seen, real = [], train._Run.end_epoch
    monkeypatch.setattr(train._Run, "end_epoch", lambda run: real(run) or seen.append(run.net.backbone[1].running_var.clone()))
    net = train.train(train.parse(TINY(tiny, tmp_path / "r", epochs=10) + ["--size", "32"]))
    assert [torch.equal(a, b) for a, b in zip(seen, seen[1:])] == [False] * 6 + [True] * 3
    assert not net.frozen_batchnorm                                             # a student started from it trains them


def test_the_teacher_stays_as_it_is(tiny, tmp_path, quiet):
    """After a distillation: no gradient, no moved statistics, no changed weight; the student moved."""
    teacher = EmbeddingNet("resnet10", dim=8, pretrained=False)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    options, _ = distill.parse(TINY(tiny, tmp_path / "s", epochs=1) + ["--weights", "teacher", "--student-size", "32"])
    student = distill.distill(teacher, options)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not torch.equal(student.whiten.weight, teacher.whiten.weight)
    assert not torch.equal(student.backbone[1].running_mean, teacher.backbone[1].running_mean)


# --------------------------------------------------------------------------------------------------------- checkpoints

def authors_file(path, net, **changes):
    """A checkpoint as the authors' code writes it, numpy float and all."""
    meta = {"architecture": net.arch, "pooling": "gem", "whitening": net.dim, "outputdim": net.dim,
            "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    torch.save({"meta": meta, "state_dict": net.state_dict(), "epoch": 3, "max_map": np.float64(0.4), **changes}, path)
    return str(path)


def test_checkpoints_of_the_authors_load(tmp_path):
    net = EmbeddingNet("resnet10", dim=8, pretrained=False).eval()
    loaded = load_checkpoint(authors_file(tmp_path / "cub-S224r-T448r-resnet50-512-gem-w.pth", net))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(x), net(x)) and loaded.size == 224 and not loaded.training
    assert load_checkpoint(authors_file(tmp_path / "sop-448r-resnet50-512-gem-w.pth", net)).size == 448
    old = (tmp_path / "sop-448r-resnet50-512-gem-w.pth").read_bytes().replace(b"numpy._core", b"numpy.core")
    assert b"numpy.core" in old                                                 # numpy 1's name; its checksum is now off
    assert len(asymres.RELEASED) == 9 and "cars-S224r-T448r-resnet50-512-gem-w" in asymres.RELEASED


def test_a_released_name_is_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    fetched = []

    def fetch(url, path):
        fetched.append(url)
        authors_file(path, EmbeddingNet("resnet10", dim=8, pretrained=False))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        assert load_checkpoint("cub-448r-resnet50-512-gem-w").size == 448
    assert fetched == ["http://ptak.felk.cvut.cz/personal/sumapave/public/cub-448r-resnet50-512-gem-w.pth"]


def test_checkpoints_of_ours_come_back_whole(tmp_path):
    for pooling, dim in (("gem", 8), ("gemmp", 0), ("mac", 4)):
        net = EmbeddingNet("resnet10", pooling, dim, pretrained=False).eval()
        net.size, net.teacher = 32, "0123456789abcdef"
        save_checkpoint(tmp_path / "n.pt", net, options={"dataset": "x"})
        back = load_checkpoint(tmp_path / "n.pt")
        assert (back.size, back.teacher, back.dim, back.pooling) == (32, net.teacher, net.dim, pooling)
        assert asymres.fingerprint(back) == asymres.fingerprint(net) and back.options == {"dataset": "x"}


class Malice:
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.mark.parametrize("write", [lambda x, path: torch.save(x, path), lambda x, path: path.write_bytes(pickle.dumps(x)),
                                   lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False)])
def test_a_strangers_file_runs_no_code(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"meta": Malice(), "state_dict": {}}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="evil.pt is not a readable checkpoint"):
        load_checkpoint("evil.pt")
    with pytest.raises(ValueError, match="evil.pt is not a readable checkpoint"):
        evaluate.read_index("evil.pt", None)
    assert not (tmp_path / "was_run").exists()


def test_asymres_alone_in_an_empty_folder(tmp_path):
    shutil.copy(HERE / "asymres.py", tmp_path)
    code = ("import torch, asymres as a; n = a.EmbeddingNet('resnet10', dim=8, pretrained=False).eval(); "
            "v = n(torch.randn(4, 3, 32, 32)).view(2, 2, 8); a.distillation_loss(v, v.flip(0), 1, 1).backward(); "
            "a.save_checkpoint('x.pt', n); print(a.load_checkpoint('x.pt').dim)")
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.strip() == "8", run.stderr


# -------------------------------------------------------------------------------------------------------------- images

PIXELS = np.random.default_rng(5).integers(0, 256, (12, 16, 3)).astype(np.uint8)
RGB = Image.fromarray(PIXELS)


def as_read(image, path, **how):
    image.save(path, **how)
    return np.asarray(read_image(path)).astype(int)


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    grey, alpha = RGB.convert("L"), np.zeros((12, 16), np.uint8)
    alpha[:, 8:] = 255
    white = PIXELS.astype(int).copy()
    white[:, :8] = 255                                                          # whatever colour hides under alpha 0
    shades = np.asarray(grey).astype(int)[:, :, None].repeat(3, 2)
    rgba = Image.fromarray(np.dstack([PIXELS, alpha]))
    assert (as_read(RGB, tmp_path / "a.png") == PIXELS).all()
    assert (as_read(grey, tmp_path / "b.png") == shades).all()
    assert (as_read(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), tmp_path / "c.png") == shades).all()
    assert (as_read(rgba, tmp_path / "d.png") == white).all()
    grey_alpha = Image.merge("LA", (grey, Image.fromarray(alpha)))
    assert (as_read(grey_alpha, tmp_path / "e.png")[:, 8:] == shades[:, 8:]).all()
    assert (as_read(grey_alpha, tmp_path / "e.png")[:, :8] == 255).all()
    palette = RGB.quantize(16)
    assert (as_read(palette, tmp_path / "f.png") == np.asarray(palette.convert("RGB"))).all()
    clear = as_read(palette, tmp_path / "g.png", transparency=3)
    assert (clear[np.asarray(palette) == 3] == 255).all()
    assert (clear[np.asarray(palette) != 3] == np.asarray(palette.convert("RGB"))[np.asarray(palette) != 3]).all()
    keyed = as_read(RGB, tmp_path / "h.png", transparency=tuple(PIXELS[0, 0].tolist()))
    assert (keyed[0, 0] == 255).all() and (keyed[1:] == PIXELS[1:]).all()
    cmyk = RGB.convert("CMYK")
    assert (as_read(cmyk, tmp_path / "i.tif") == np.asarray(cmyk.convert("RGB"))).all()
    smooth = Image.fromarray(np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(64, 0)).convert("CMYK")
    assert abs(as_read(smooth, tmp_path / "j.jpg", quality=95) - np.asarray(smooth.convert("RGB"))).max() < 8
    assert (as_read(grey.convert("1"), tmp_path / "k.png") == np.asarray(grey.convert("1").convert("RGB"))).all()


def test_exif_rotation_is_undone(tmp_path):
    for orientation, upright in ((3, Image.ROTATE_180), (6, Image.ROTATE_270), (8, Image.ROTATE_90), (2, Image.FLIP_LEFT_RIGHT)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        assert (as_read(RGB, tmp_path / "x.png", exif=exif) == np.asarray(RGB.transpose(upright))).all()


def test_bombs_and_damage_name_their_file(tmp_path):
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")                  # 144 megapixels in 18 kB
    RGB.save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("not an image")
    for name in ("bomb.png", "cut.png", "text.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read as an image"):
            read_image(tmp_path / name)


def test_evaluation_transform():
    """Shorter side to size*8/7, centre crop, normalised: a picture of two halves keeps its middle line."""
    halves = Image.fromarray(np.concatenate([np.zeros((70, 50, 3), np.uint8), np.full((70, 50, 3), 255, np.uint8)], 1))
    x = data.evaluation_transform(56)(halves)
    assert x.shape == (3, 56, 56) and x.dtype == torch.float32
    black, white = (data.normalize(torch.full((1, 3, 1, 1), v))[0, :, 0, 0] for v in (0.0, 1.0))
    torch.testing.assert_close(x[:, 10, 20], black)
    torch.testing.assert_close(x[:, 10, 36], white)
    framed = np.full((64, 64, 3), 255, np.uint8)
    framed[4:-4, 4:-4] = 0                                                      # what the crop keeps of 64 px for 56
    torch.testing.assert_close(data.evaluation_transform(56)(Image.fromarray(framed)), black[:, None, None].expand(3, 56, 56))
    assert data.evaluation_transform(7)(Image.new("RGB", (300, 1))).shape == (3, 7, 7)


# ---------------------------------------------------------------------------------------------- coupled augmentation

def test_views_are_the_same_region_at_both_sizes(tiny):
    """A picture whose colours are its coordinates: both crops hold the same corners, whatever was drawn."""
    ramp = np.stack(np.broadcast_arrays(np.arange(256)[None], np.arange(256)[:, None], 128), -1).astype(np.uint8)
    loader = data.ViewLoader(data.ImageSet([0], images=ramp[None]), (32, 64), 50, crop_scale=(0.08, 1.0))
    _, (small, large), draws = loader.views[(0, 0, 0)]
    torch.testing.assert_close(F.avg_pool2d(large.float(), 2), small.float(), atol=3, rtol=0)
    left, top = small[:, 0, :, 0].float().mean(1), small[:, 1, 0].float().mean(1)
    assert left.std() > 20 and top.std() > 20 and 0.2 < (draws[:, 0] > 0).float().mean() < 0.8


def by_torchvision(loader, batch):
    """What the loader should give, made view by view of torchvision's own functions."""
    index, crops, draws, partner = loader._collate([loader.views[key] for key in batch])
    change, sizes = (TV.adjust_brightness, TV.adjust_contrast, TV.adjust_saturation, TV.adjust_hue), []
    for crop in crops:
        views = []
        for view, draw in zip(crop.flatten(0, 1), draws.tolist()):
            view = TV.hflip(view / 255) if draw[0] else view / 255
            for op in map(int, draw[5:9]):
                view = change[op](view, draw[1 + op])
            views.append(view)
        views, weight = torch.stack(views), draws[:, 9, None, None, None].float()
        mixed = weight * views + (1 - weight) * views[partner]
        sizes.append(TV.normalize(mixed, data.MEAN, data.STD).unflatten(0, crop.shape[:2]))
    return sizes, draws.unflatten(0, (len(batch), -1)), partner.view(len(batch), -1)


def test_the_loader_equals_torchvision_and_couples_everything():
    """Colour by torchvision's functions, one partner and one weight for both sizes, partners from other images."""
    images = np.random.default_rng(1).integers(0, 256, (6, 50, 60, 3)).astype(np.uint8)
    images[0], images[1, :, 30:] = 77, 200                                      # grey: hue has no say there
    loader = distillation_loader(data.ImageSet(range(6), images=images), 24, 48, copies=4, batch_size=3, seed=7)
    batches = list(loader)
    assert len(batches) == len(loader) == 2 and batches[0][1].shape == (3, 4, 3, 48, 48)
    keys = [(0, p, i) for p, i in enumerate(torch.randperm(6, generator=data.seeded(7, 0)).tolist())]
    for (small, large), batch in zip(batches, (keys[:3], keys[3:])):
        expected, draws, partner = by_torchvision(loader, batch)
        torch.testing.assert_close(small, expected[0], atol=2e-5, rtol=0)
        torch.testing.assert_close(large, expected[1], atol=2e-5, rtol=0)
        assert (partner // 4 != torch.arange(3)[:, None]).all()                 # (B, A), views are numbered b*A + a
        assert ((draws[..., 9] >= 0) & (draws[..., 9] <= 1)).all() and draws[..., 9].std() > 0.2
        assert len(draws[..., 5:9].flatten(0, 1).unique(dim=0)) > 4             # orders differ from view to view


def test_views_in_groups_and_one_by_one_are_the_same():
    """The grouping that a GPU gets, on the CPU."""
    loader = distillation_loader(data.ImageSet([0], images=np.asarray(RGB)[None]), 24, 24, copies=16)
    _, crops, draws, _ = loader._collate([loader.views[(0, 0, 0)]])
    together = data.render(crops[0][0], draws)
    torch.testing.assert_close(together, torch.cat([data.render(crops[0][0][i:i + 1], draws[i:i + 1]) for i in range(16)]))


def test_the_same_seed_gives_the_same_views_whatever_the_workers(tiny):
    views = [[batch for _ in range(2) for batch in
              distillation_loader(load_dataset(str(tiny)), 16, 24, copies=2, batch_size=7, workers=workers, seed=seed)]
             for workers, seed in ((0, 3), (2, 3), (0, 4))]
    same = lambda a, b: all(torch.equal(x, y) for p, q in zip(a, b) for x, y in zip(p, q))
    assert same(views[0], views[1]) and not same(views[0], views[2])
    loader = distillation_loader(load_dataset(str(tiny)), 16, 24, copies=2, batch_size=7, seed=3)
    assert same(views[0], list(loader)) and not same(list(loader), list(loader))     # each pass is a new epoch


def test_regression_sees_the_evaluation_crop(tiny):
    dataset = load_dataset(str(tiny))
    loader = data.ViewLoader(dataset, [16], 1, crop_scale=None)
    (index, views), = loader.epoch(0, [torch.tensor([3, 1])])
    torch.testing.assert_close(views[1, 0], data.evaluation_transform(16)(dataset.image(1)))
    assert index.tolist() == [3, 1]


# ----------------------------------------------------------------------------------------------------------- data sets

def put(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text) if text is not None else Image.new("RGB", (8, 8)).save(path)


def cub(root):
    names = ["001.Black_footed_Albatross/a_1.jpg", "101.White_Pelican/b 2.jpg", "100.Brown_Pelican/c.jpg", "200.Yellowthroat/d.jpg"]
    put(root / "images.txt", "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    for name in names:
        put(root / "images" / name)


def sop(root):
    for part, classes in (("train", (1, 1, 2)), ("test", (11319, 11320))):
        rows = [f"{i} {c} 1 bicycle_final/{part}_{i}.JPG" for i, c in enumerate(classes, 1)]
        put(root / f"Ebay_{part}.txt", "image_id class_id super_class_id path\n" + "\n".join(rows) + "\n")
        for i in range(1, len(classes) + 1):
            put(root / f"bicycle_final/{part}_{i}.JPG")


def cars(root):
    names = [f"Make Model {i}" for i in range(1, 197)]
    names[97] = "Ram C/V Cargo Van"                                             # class 98; a - on disk
    put(root / "names.csv", "\n".join(names) + "\n")
    for division, rows in (("train", [("00001.jpg", 98), ("00002.jpg", 99)]), ("test", [("00001.jpg", 1), ("00002.jpg", 196)])):
        put(root / f"anno_{division}.csv", "".join(f"{file},1,2,3,4,{c}\n" for file, c in rows))
        for file, c in rows:
            put(root / "car_data/car_data" / division / names[c - 1].replace("/", "-") / file)


@pytest.mark.parametrize("name, write, top, train_labels, test_labels", [
    ("cub", cub, "CUB_200_2011", [1, 100], [101, 200]), ("cars", cars, "", [98, 1], [99, 196]),
    ("sop", sop, "Stanford_Online_Products", [1, 1, 2], [11319, 11320])])
def test_published_layouts(tmp_path, name, write, top, train_labels, test_labels):
    """Split by class id, with and without the archive's own folder; whole or refused."""
    for root in {tmp_path / "plain", tmp_path / "wrapped" / top}:
        write(root)
    for root in (tmp_path / "plain", tmp_path / "wrapped"):
        for split, labels in (("train", train_labels), ("test", test_labels)):
            dataset = load_dataset(name, str(root), split, check=False)
            assert dataset.labels == labels and dataset.image(0).size == (8, 8)
    with pytest.raises(ValueError, match=f"{name} lists {len(train_labels)} images .* {data.COUNTS[name]['train']} are expected"):
        load_dataset(name, str(root))
    os.remove(dataset.paths[1])
    with pytest.raises(FileNotFoundError, match=f"1 of the 2 images of {name} are missing .*{re.escape(dataset.paths[1])}"):
        load_dataset(name, str(root), "test")
    with pytest.raises(FileNotFoundError, match=f"no {name} in .* is expected"):
        load_dataset(name, str(tmp_path / "nowhere"))


def test_cars_as_published_needs_scipy(tmp_path):
    put(tmp_path / "cars_annos.mat", "")
    try:
        from scipy.io import savemat
    except ImportError:
        with pytest.raises(ImportError, match="pip install scipy"):
            load_dataset("cars", str(tmp_path))
        return
    rows = np.array([("car_ims/1.jpg", 98), ("car_ims/2.jpg", 99), ("car_ims/3.jpg", 98)],
                    dtype=[("relative_im_path", object), ("class", object)])
    savemat(tmp_path / "cars_annos.mat", {"annotations": rows})
    for i in (1, 2, 3):
        put(tmp_path / f"car_ims/{i}.jpg")
    assert load_dataset("cars", str(tmp_path), check=False).labels == [98, 98]


def test_folders_and_their_quirks(tiny, tmp_path):
    splits = {split: load_dataset(str(tiny), None, split) for split in ("train", "test", "fit", "val")}
    assert {k: sorted(set(d.labels)) for k, d in splits.items()} == {"train": [0, 1, 2], "test": [3, 4, 5], "fit": [0, 1], "val": [2]}
    assert len(splits["train"]) == 18 and len(load_dataset("a name", str(tiny))) == 18
    shutil.copytree(tiny, tmp_path / "odd")
    (tmp_path / "odd" / "class0" / "notes.txt").write_text("not an image")
    (tmp_path / "odd" / "class0" / "again").symlink_to(tmp_path / "odd")        # a loop
    (tmp_path / "odd" / "self").symlink_to(tmp_path / "odd" / "self")
    (tmp_path / "odd" / "empty").mkdir()
    assert load_dataset(str(tmp_path / "odd")).labels == splits["train"].labels
    assert len(data.list_images(tmp_path / "odd")) == 27
    for bad in (tmp_path / "nothing", tmp_path / "odd" / "empty", tiny / "class0"):
        with pytest.raises(FileNotFoundError, match="one sub-folder of images per class"):
            load_dataset(str(bad))


def test_the_embedded_data_set():
    (images, labels), (_, others) = data.synthetic("train"), data.synthetic("test")
    assert images.shape == (960, 80, 80, 3) and len(others) == 960 and not set(labels) & set(others)
    assert np.bincount(labels).tolist() == [8] * 120
    assert len(load_dataset("synthetic", split="val")) == 480 and images[0].std() > 20


def test_download_verifies_and_unpacks(tmp_path, monkeypatch, capsys):
    """Against a server on this machine; a file that is not the published one is refused."""
    cub(tmp_path / "CUB_200_2011")
    (tmp_path / "www").mkdir()
    with tarfile.open(tmp_path / "www" / "CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(tmp_path / "CUB_200_2011", "CUB_200_2011")
    md5 = hashlib.md5((tmp_path / "www" / "CUB_200_2011.tgz").read_bytes()).hexdigest()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/CUB_200_2011.tgz"
        monkeypatch.setattr(data, "COUNTS", {"cub": {"train": 2, "test": 2}})
        monkeypatch.setattr(data, "DOWNLOADS", {"cub": (url, md5)})
        data.main(["cub", "--root", str(tmp_path / "here")])
        assert "cub test: 2 images, all there" in capsys.readouterr().out
        monkeypatch.setattr(data, "DOWNLOADS", {"cub": (url, "0" * 32)})
        assert "could not be downloaded whole" in fails(capsys, data, "cub", "--root", tmp_path / "there")
        server.shutdown()
    assert "copies are on Kaggle" in fails(capsys, data, "cars", "--root", tmp_path)


# -------------------------------------------------------------------------------------------------------------- a run

def program(*argv, **how):
    """A program of this project in a process of its own."""
    return subprocess.run([sys.executable, *map(str, argv)], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **how)


def test_the_whole_chain_through_the_command_line(tiny, tmp_path):
    """train, distil, evaluate, index, search."""
    teacher, student = tmp_path / "t" / "model.pt", tmp_path / "s" / "model.pt"
    run = program("train.py", *TINY(tiny, tmp_path / "t"), "--size", 48)
    assert run.returncode == 0 and "48" in run.stdout, run.stderr
    run = program("distill.py", "--teacher", teacher, "--student-size", 32, "--out", tmp_path / "s", "--epochs", 2, "--batch", 8,
                  "--copies", 3, "--workers", 0, "--device", "cpu")             # its network and start are the teacher's
    assert run.returncode == 0 and "student, asymmetric" in run.stdout and (tmp_path / "s" / "queries.png").exists(), run.stderr
    log = [json.loads(line) for line in (tmp_path / "s" / "log.jsonl").read_text().splitlines()]
    assert {"absolute", "teacher-student", "student-student", "lr", "images_per_s"} <= log[-1].keys() and log[-1]["epoch"] == 1
    assert {"command", "options", "versions"} == json.loads((tmp_path / "s" / "options.json").read_text()).keys()
    run = program("evaluate.py", "--teacher", teacher, "--student", student, student, "--json", tmp_path / "table.json",
                  "--figure", tmp_path / "f.png", "--figure-by", "disagreement", "--workers", 0)
    assert run.returncode == 0, run.stderr
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["query px"] for row in table] == [48, 32, 32, 32, 32, 32] and all(0 <= row["R@1"] <= 100 for row in table)
    assert table[2]["GFLOPs/query"] < table[0]["GFLOPs/query"] and Image.open(tmp_path / "f.png").width > 1000
    (tiny / "class0" / "broken.png").write_text("x")
    run = program("evaluate.py", "--teacher", teacher, "--database", tiny, "--index", tmp_path / "i.pt", "--workers", 0)
    (tiny / "class0" / "broken.png").unlink()
    assert "27 images" in run.stdout and "1 skipped" in run.stdout and "broken.png" in run.stderr, run.stderr
    teacher.rename(tmp_path / "away.pt")                                        # a search needs the student only
    wanted = str(tiny / "class1" / "2.png")
    run = program("evaluate.py", "--student", student, "--index", tmp_path / "i.pt", "--query", wanted, "--top", 27)
    lines = run.stdout.splitlines()
    assert lines[0] == wanted and len(lines) == 28 and any(wanted in line for line in lines[1:]), run.stderr


def test_schedule_ends_with_the_steps(tiny, tmp_path, monkeypatch, quiet):
    """As many as were planned, a smaller last step of an epoch included, and the learning rate is annealed to its end."""
    seen = []
    step = torch.optim.lr_scheduler.OneCycleLR.step
    monkeypatch.setattr(torch.optim.lr_scheduler.OneCycleLR, "step",
                        lambda self, *a: (seen.append((self.total_steps, self.optimizer.param_groups[0]["lr"])), step(self, *a)))
    options = train.parse(TINY(tiny, tmp_path, batch=8))
    options.size = 32
    train.train(options)
    steps = seen[1:]                                                            # the first call is the constructor's
    assert len(steps) == steps[0][0] == 2 * len(train.divide(torch.arange(12), 8, 4))
    lr = [rate for _, rate in steps]
    assert lr[0] == pytest.approx(1e-4) and max(lr) > 5e-4 and lr[-1] == pytest.approx(1e-8)     # div_factor 10 and 1e4


def test_divide():
    lengths = lambda rows, batch, forward: [[len(part) for part in step] for step in train.divide(torch.arange(rows), batch, forward)]
    assert lengths(20, 8, 3) == [[3, 3, 2], [3, 3, 2], [4]] == lengths(20, 8, 3)
    assert lengths(17, 8, 8) == [[8], [9]] and lengths(1, 8, 8) == [[1]]        # a lone image joins the step before


def test_accumulated_steps_are_the_whole_step(tiny, tmp_path, quiet):
    """With frozen batch-norm, 2 images at a time or 8 give the same weights."""
    weights = []
    for forward in (2, 8):
        options, _ = distill.parse(TINY(tiny, tmp_path / str(forward), forward=forward, epochs=1) + ["--no-mixup", "--copies", "2",
                                   "--student-size", "32", "--teacher-size", "32", "--weights", "teacher"])
        teacher = EmbeddingNet("resnet10", dim=8, pretrained=False)
        teacher.load_state_dict(EmbeddingNet("resnet10", dim=8, pretrained=False).state_dict() if not weights else start)
        start = {k: v.clone() for k, v in teacher.state_dict().items()}
        teacher.frozen_batchnorm = True
        weights.append(distill.distill(teacher, options).whiten.weight.detach())
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-3)
    assert not torch.equal(weights[0], start["whiten.weight"])


def test_killed_and_continued_is_as_if_nothing_had_happened(tiny, tmp_path):
    """SIGKILL at random moments, in the middle of writing too, a checkpoint at every step: the same weights to the bit."""
    command = lambda out: [sys.executable, "train.py", *TINY(tiny, out, epochs=6), "--size", "32", "--minutes", "0"]
    how = dict(cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert subprocess.run(command(tmp_path / "whole"), **how).returncode == 0
    draw, kills = random.Random(0), 0
    path = tmp_path / "killed" / "model.pt"
    for attempt in range(8):
        run = subprocess.Popen(command(tmp_path / "killed"), **how)
        while run.poll() is None and not (path.exists() if attempt % 2 else Path(f"{path}.tmp").exists()):
            time.sleep(0.001)                                                   # odd: at work; even: while it writes
        time.sleep(draw.random() * (0.3 if attempt % 2 else 0.002))
        kills += run.poll() is None
        run.kill()
        run.communicate()
        if attempt % 2:
            assert load_checkpoint(path).dim == 8                               # never half a file
    assert kills >= 4
    final = subprocess.run(command(tmp_path / "killed"), **how)
    assert final.returncode == 0, final.stderr
    ours, whole = (load_checkpoint(tmp_path / name / "model.pt").state_dict() for name in ("killed", "whole"))
    assert all(torch.equal(ours[key], whole[key]) for key in whole)
    epochs = [[json.loads(line)["epoch"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("killed", "whole")]
    assert epochs[0] == epochs[1] == list(range(6))


def test_ctrl_c_saves_and_says_so(tiny, tmp_path):
    run = subprocess.Popen([sys.executable, "train.py", *TINY(tiny, tmp_path / "r", epochs=500, workers=1), "--size", "32"], cwd=HERE,
                           stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not (tmp_path / "r" / "log.jsonl").exists() or not (tmp_path / "r" / "log.jsonl").read_text():
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)                                           # as a terminal does, workers included
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and "is saved, and the same command continues" in error and "Traceback" not in error
    saved = asymres.read_checkpoint(tmp_path / "r" / "model.pt")["training"]
    assert f"stopped after epoch {saved['epoch']}, step {saved['step']};" in error and saved["epoch"] >= 1 and saved["step"] > 0


def test_a_full_disk_leaves_the_previous_checkpoint(tiny, tmp_path):
    """A limit on file size stands for the disk: the first checkpoint fits, the next one, with AdamW's state, does not."""
    argv, path = TINY(tiny, tmp_path / "r"), tmp_path / "r" / "model.pt"
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30 * 2**20, 30 * 2**20));"
            "import data, train; data.run_command(lambda: train.main(sys.argv[1:]))")
    run = program("-c", code, *argv, "--size", 32)
    assert run.returncode == 2 and "could not be written" in run.stderr and "the previous one is intact" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "r" / "model.pt.tmp").exists()
    assert asymres.read_checkpoint(path)["training"]["epoch"] == 0
    train.main(argv + ["--size", "32"])                                         # space again: the same command continues
    assert "training" not in asymres.read_checkpoint(path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, limits[1]))
    try:
        with pytest.raises(OSError, match="the previous one is intact"):
            save_checkpoint(path, load_checkpoint(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and not (tmp_path / "r" / "model.pt.tmp").exists()


# ------------------------------------------------------------------------------------------------------------ mistakes

@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """A checkpoint of a teacher at 48 px, 8-D, one epoch."""
    out = tmp_path_factory.mktemp("teacher")
    train.main(TINY(tiny, out / "t", epochs=1) + ["--size", "48"])
    return out / "t" / "model.pt"


@pytest.mark.parametrize("sentence, flags", [
    ("one sub-folder of images per class", {"dataset": "/nowhere"}), ("one sub-folder of images per class", {"dataset": HERE / ".ci"}),
    ("cub needs its folder, which holds images.txt", {"dataset": "cub"}), ("resnet18, resnet10", {"arch": "resnet1O"}),
    ("at least two groups", {"batch": 4}), ("at least two groups", {"batch": 10}), ("finds no CUDA GPU", {"device": "cuda"}),
    ("must be above 0", {"epochs": 0}), ("at most 1, not 7.0", {"crop": 7}), ("unknown pooling", {"pooling": "avg"}),
    ("16 px is too small for vgg11", {"arch": "vgg11", "size": 16}), ("resnet10 has no ImageNet weights", {"weights": "imagenet"}),
    ("there is no checkpoint here.pth", {"weights": "here.pth"}), ("cannot be negative", {"dim": -1})])
def test_mistakes_are_found_before_training(tiny, tmp_path, capsys, sentence, flags):
    if sentence == "finds no CUDA GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert sentence in fails(capsys, train, *TINY(tiny, tmp_path / "o", **flags))
    assert not (tmp_path / "o").exists()


def test_too_few_classes_or_images(tmp_path, capsys):
    for label in range(4):
        for i in range(3):
            put(tmp_path / "d" / f"c{label}" / f"{i}.png")
    assert "triplets need 2 classes, and one with 4 images" in fails(capsys, train, *TINY(tmp_path / "d", tmp_path / "o"))
    for label in (2, 3):
        shutil.rmtree(tmp_path / "d" / f"c{label}")
    assert "1 training classes" in fails(capsys, train, *TINY(tmp_path / "d", tmp_path / "o"))


def test_teachers_that_do_not_fit(teacher, tiny, tmp_path, capsys):
    argv = [*TINY(tiny, tmp_path / "o", epochs=1, forward=8), "--student-size", "32", "--copies", "1"]
    whole = teacher.read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.ones(3)}, tmp_path / "other.pt")
    for name, sentence in (("none.pt", "there is no checkpoint"), ("cut.pt", "is not a readable checkpoint"),
                           ("text.pt", "is not a readable checkpoint"), ("other.pt", "is not a checkpoint of this project")):
        assert sentence in fails(capsys, distill, *argv, "--teacher", tmp_path / name)
    assert "--dim 16: the teacher has 8 dimensions" in fails(capsys, distill, *argv, "--teacher", teacher, "--dim", 16)
    assert "the student is a mobilenet_v3_small, the teacher a resnet10" in fails(
        capsys, distill, *argv, "--teacher", teacher, "--arch", "mobilenet_v3_small", "--weights", "teacher")
    distill.main([*argv, "--teacher", str(teacher), "--teacher-size", "40", "--student-size", "56"])
    said = capsys.readouterr().err
    assert "warning: the teacher was trained at 48 px and is used at 40" in said
    assert "warning: the student's images (56 px) are larger than the teacher's (40)" in said


def test_a_folder_of_another_run(teacher, tiny, capsys):
    out = teacher.parent
    assert "its --lr is 0.001, not 0.5" in fails(capsys, train, *TINY(tiny, out, epochs=1, lr=0.5), "--size", 48)
    assert "its --size is 48, not 32" in fails(capsys, train, *TINY(tiny, out, epochs=1), "--size", 32)
    train.main(TINY(tiny, out, epochs=1) + ["--size", "48"])                    # finished: loaded, not trained again
    assert "step" not in capsys.readouterr().err


def test_evaluate_refuses(teacher, tiny, tmp_path, capsys):
    index, other = tmp_path / "i.pt", EmbeddingNet("resnet10", dim=8, pretrained=False)
    evaluate.main(["--teacher", str(teacher), "--database", str(tiny / "class0"), "--index", str(index), "--workers", "0"])
    for name, net, change in (("alien.pt", other, "made by another network"), ("d4.pt", EmbeddingNet("resnet10", dim=4, pretrained=False),
                                                                               "has 4 dimensions, the index")):
        net.teacher, net.size = "0" * 16, 32
        save_checkpoint(tmp_path / name, net)
        assert change in fails(capsys, evaluate, "--student", tmp_path / name, "--index", index, "--query", tiny / "class0" / "0.png")
    assert "has 4 dimensions, its teacher" in fails(capsys, evaluate, "--teacher", teacher, "--student", tmp_path / "d4.pt")
    assert "is not an index" in fails(capsys, evaluate, "--student", teacher, "--index", teacher, "--query", tiny / "class0" / "0.png")
    assert "no images under" in fails(capsys, evaluate, "--teacher", teacher, "--database", tmp_path, "--index", index)
    assert "cannot be read as an image" in fails(capsys, evaluate, "--student", teacher, "--index", index, "--query", tmp_path / "no.png")
    assert "--teacher is needed" in fails(capsys, evaluate)
    evaluate.main(["--student", str(teacher), "--index", str(index), "--query", str(tiny / "class0" / "3.png"), "--top", "2"])
    answer = capsys.readouterr().out.splitlines()
    assert answer[1].split() == ["1.0000", str(tiny / "class0" / "3.png")] and len(answer) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named(tiny, tmp_path, capsys, workers):
    shutil.copytree(tiny, tmp_path / "d")
    bad = tmp_path / "d" / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:300])
    assert f"{bad} cannot be read as an image" in fails(capsys, train, *TINY(tmp_path / "d", tmp_path / "o", workers=workers), "--size", 32)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path, capsys, monkeypatch):
    """At that step; the checkpoint is the last good one."""
    real, calls = train.triplet_loss, []
    monkeypatch.setattr(train, "triplet_loss", lambda *a: real(*a) * (math.nan if calls.append(1) or len(calls) == 4 else 1))
    sentence = fails(capsys, train, *TINY(tiny, tmp_path, forward=8, epochs=9), "--size", 32)
    assert "not finite at epoch 1, step 2 (triplet nan)" in sentence and "last good checkpoint" in sentence
    saved = asymres.read_checkpoint(tmp_path / "model.pt")
    assert saved["training"]["epoch"] == 1 and all(v.isfinite().all() for v in saved["state_dict"].values())


def test_out_of_gpu_memory_says_what_to_lower(tiny, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train, "triplet_loss", full)
    assert "lower --forward (now 4)" in fails(capsys, train, *TINY(tiny, tmp_path), "--size", 32)


def test_weights_that_cannot_be_downloaded(monkeypatch, tiny, tmp_path, capsys):
    """One sentence with the two ways out; and a file of torchvision's weights is one."""
    def offline(*_, **__):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    sentence = fails(capsys, train, *TINY(tiny, tmp_path / "o", arch="squeezenet1_1", weights="imagenet"))
    assert "--weights FILE" in sentence and "--weights random" in sentence
    assert "could not be downloaded" in fails(capsys, evaluate, "--teacher", "cub-448r-resnet50-512-gem-w")
    model = asymres.torchvision.models.squeezenet1_1()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    net = EmbeddingNet("squeezenet1_1", pretrained=tmp_path / "w.pth")
    assert torch.equal(net.backbone[0].weight, model.features[0].weight) and net.frozen_batchnorm
    with pytest.raises(ValueError, match="does not hold torchvision weights of vgg11"):
        EmbeddingNet("vgg11", pretrained=tmp_path / "w.pth")


# ---------------------------------------------------------------------------------------------------------------- fuzz

def damaged(content, draw):
    """Cut short, with bytes flipped, a piece gone, or a piece of something else."""
    content, at = bytearray(content), draw.randrange(max(1, len(content)))
    kind = draw.randrange(4)
    if kind == 0:
        return bytes(content[:at])
    if kind == 1:
        for _ in range(draw.choice((1, 3, 30))):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    if kind == 2:
        del content[at:at + draw.choice((1, 7, 100))]
    if kind == 3:
        content[at:at + 9] = draw.choice((b"\0" * 9, b"\xff" * 9, b"-1 1e999\n", "ü🥚\n".encode()))
    return bytes(content)


def test_fuzz_checkpoints(teacher, tmp_path):
    """150 damaged files: refused, or the damage changed nothing; and 9 with the wrong things in them."""
    draw = random.Random(1)
    net = EmbeddingNet(backbone=torch.nn.Conv2d(3, 4, 3), dim=4, pretrained=False)
    save_checkpoint(tmp_path / "n.pt", net, options={"dataset": "x"})
    whole, survived = (tmp_path / "n.pt").read_bytes(), 0
    for _ in range(150):
        (tmp_path / "d.pt").write_bytes(damaged(whole, draw))
        try:
            back = load_checkpoint(tmp_path / "d.pt", backbone=torch.nn.Conv2d(3, 4, 3))
        except ValueError as error:
            assert "d.pt is not a" in str(error)
        else:
            survived += 1
            assert asymres.fingerprint(back) == asymres.fingerprint(net) and back.options == {"dataset": "x"}
    assert survived < 75
    good = asymres.read_checkpoint(teacher)
    for wrong in (None, 3, [], {"meta": 1, "state_dict": 2}, {**good, "meta": {}}, {**good, "state_dict": None},
                  {**good, "state_dict": {}}, {**good, "meta": {**good["meta"], "whitening": "x"}},
                  {**good, "meta": {**good["meta"], "architecture": 5}}, {**good, "meta": {**good["meta"], "mean": [0, 0, 0]}}):
        torch.save(wrong, tmp_path / "w.pt")
        with pytest.raises(ValueError, match="w.pt is not a checkpoint"):
            load_checkpoint(tmp_path / "w.pt")


def test_fuzz_annotations(tmp_path):
    """150 damaged annotation files, 50 of each set: a clear error, or labels and paths that stand in the file."""
    draw = random.Random(2)
    for name, write, files in (("cub", cub, ["images.txt"]), ("sop", sop, ["Ebay_train.txt"]), ("cars", cars, ["anno_train.csv", "names.csv"])):
        write(tmp_path / name)
        right = set(zip(load_dataset(name, str(tmp_path / name), check=False).paths, load_dataset(name, str(tmp_path / name), check=False).labels))
        for _ in range(50):
            file = tmp_path / name / draw.choice(files)
            whole = file.read_bytes()
            file.write_bytes(damaged(whole, draw))
            try:
                dataset = load_dataset(name, str(tmp_path / name), check=False)
                seen = {(p, l) for p, l in zip(dataset.paths, dataset.labels)}
                assert {p for p, _ in seen} <= {p for p, _ in right} and all(type(l) is int for _, l in seen)
            except (ValueError, FileNotFoundError) as error:
                assert name in str(error) or file.name in str(error) or "anno_" in str(error), error
            file.write_bytes(whole)


def test_fuzz_images(tmp_path):
    """150 damaged images: one sentence with the file's name, or a picture of some sort; never a hang or another error."""
    draw, smooth = random.Random(3), RGB.resize((64, 48), Image.BICUBIC)
    for i, (suffix, image) in enumerate([(".png", smooth), (".jpg", smooth), (".gif", smooth.quantize(32)), (".png", smooth.quantize(32)),
                                         (".tif", smooth.convert("CMYK"))] * 30):
        path = tmp_path / f"x{suffix}"
        image.save(path)
        path.write_bytes(damaged(path.read_bytes(), draw))
        try:
            assert read_image(path).mode == "RGB"
        except ValueError as error:
            assert f"x{suffix} cannot be read as an image" in str(error)

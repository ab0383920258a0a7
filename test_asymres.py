"""What holds, shown on small cases: python -m pytest. No data, network or GPU; 90 s on two cores."""

import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # the same numbers everywhere; CUDA would not survive a fork
)
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TV
import data
import distill
import evaluate
import train
from asymres import (
    RELEASED,
    EmbeddingNet,
    GeM,
    distillation_loss,
    draw_negatives,
    fingerprint,
    load_checkpoint,
    negative_probabilities,
    read_checkpoint,
    save_checkpoint,
    triplet_loss,
)
from data import ImageSet, Views, load_dataset, read_image
from evaluate import extract, knn, retrieval_metrics

torch.set_num_threads(1)  # no threads that a forked process would lack
HERE, close = Path(__file__).parent, torch.testing.assert_close
T, D, E = train, distill, evaluate
options_of = lambda argv: train.parse("teacher", "", argv)[0]


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def put(*paths, text=None):
    """Write files: the text, or images of noise that depends on their names."""
    for path in map(Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(
            noise(40, 50, 3, seed=[*f"{path.parent.name}{path.name}".encode()])
        )
        picture.save(path) if text is None else path.write_text(text)


def small_net(arch="resnet10", pooling="gem", dim=8, **how):
    return EmbeddingNet(arch, pooling, dim, **{"pretrained": False, **how}).eval()


def small(root, out, **changes):
    """A command line of train.py or distill.py that takes a second. None drops an option, True is a flag."""
    options = {
        "dataset": root,
        "out": out,
        "arch": "resnet10",
        "dim": 8,
        "weights": "random",
        "epochs": 2,
        "lr": 1e-3,
        "batch": 8,
        "forward": 4,
        "workers": 0,
        "device": "cpu",
        **changes,
    }
    words = [
        ("--" + name.replace("_", "-"), value)
        for name, value in options.items()
        if value is not None
    ]
    return [str(word) for pair in words for word in pair if word is not True]


def trained(root, out, **changes):
    """The network that train.py's function returns, without the table."""
    return train.train(options_of(small(root, out, **{"size": 32, **changes})))


def distilled(teacher, out, **changes):
    """A command line of distill.py: data set, network and weights are the teacher's."""
    return small(
        None,
        out,
        **{
            "teacher": teacher,
            "student_size": 32,
            "copies": 2,
            "weights": "teacher",
            "arch": None,
            "dim": None,
            **changes,
        },
    )


def student_of(teacher, out, **changes):
    """The network that distill.py's function returns, without the table; and its teacher."""
    options, (net,) = train.parse("student", "", distilled(teacher, out, **changes))
    return distill.distill(net, options), net


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder of 6 classes; the first three, of 6, 5 and 7 images, are for training."""
    root = tmp_path_factory.mktemp("tiny")
    for label, count in enumerate([6, 5, 7, 4, 4, 1]):
        put(*(root / f"class{label}" / f"{i}.png" for i in range(count)))
    return root


@pytest.fixture(scope="session")
def teacher(tiny, tmp_path_factory):
    """The file of a teacher at 48 px, whose students keep the statistics of batch-norm as they are."""
    out = tmp_path_factory.mktemp("teacher")
    net = trained(tiny, out / "run", epochs=1, size=48)
    net.frozen_batchnorm = True
    save_checkpoint(
        out / "teacher.pt", net, options=load_checkpoint(out / "run" / "model.pt").options
    )
    return out / "teacher.pt"


def fails(capsys, program, *argv):
    """The one sentence with which a program refuses its command line."""
    with pytest.raises(SystemExit) as stop:
        data.run_command(lambda: program.main([str(word) for word in argv]))
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        stop.value.code == 2
        and lines[-1].startswith("error: ")
        and "Traceback" not in "".join(lines)
    )
    return lines[-1]


@pytest.fixture
def start():
    """start(main, count=1): `count` processes of one program, forked, so that nothing is imported again."""
    started = []

    def run(main, place):
        os.setsid()  # a group of its own, with its workers
        os.environ.update({name: str(value) for name, value in place.items()})
        data.run_command(main)

    def start(main, count=1):
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = {
                "WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": free.getsockname()[1],
            }
        for rank in range(count):
            arguments = main, {**place, "RANK": rank, "LOCAL_RANK": rank}
            started.append(multiprocessing.get_context("fork").Process(target=run, args=arguments))
            started[-1].start()
        return started[-count:]

    yield start
    for process in started:
        process.kill()
        process.join()


def end(processes, seconds=60):
    """Their exit codes, None of one that goes on after that time."""
    return [process.join(seconds) or process.exitcode for process in processes]


@pytest.fixture
def start_method():
    """start_method(name) sets how workers are started from then on."""
    usual = multiprocessing.get_start_method()
    multiprocessing.set_forkserver_preload(["torchvision"])  # takes time, so once
    yield lambda name: multiprocessing.set_start_method(name, force=True)
    multiprocessing.set_start_method(usual, force=True)


# -------------------------------------------- values recorded from the authors' implementation, 4 decimals in
def numbers(*shape):
    return torch.tensor([*map(float, shape[-1].split())], dtype=torch.float64).view(shape[:-1])


STUDENT_0 = numbers(
    2,
    3,
    4,
    """.5981 .1684 -.5557 -.5523 .8088 -.1076 -.0524 -.5757 .9776 -.1623 .1317 -.0241
    .5 .6007 -.3632 .5072 .3634 .0154 -.572 -.7352 -.3189 .7997 .4893 -.1394""",
)
TEACHER_0 = numbers(
    2,
    3,
    4,
    """.4294 -.348 .1392 -.8217 -.963 -.0115 .1337 -.2339 -.2036 .6142 .4855 .5879
    .3419 .4387 -.6345 -.5367 .1697 -.8977 -.1852 -.362 -.7227 -.0502 .6871 .0553""",
)
GRAD_0 = numbers(
    2,
    3,
    4,
    """-.121752 .098672 -.039469 .232984 1.059292 .01265 -.147069 .257288 .169525
    -.511405 -.404245 -.489506 -.138421 -.177611 .256883 .217288 -.065626 .347158 .071621 .139993 .231836
    .016104 -.220416 -.01774""",
)
STUDENT_1 = numbers(
    2,
    3,
    4,
    """-.4686 -.2205 .231 -.8237 -.0738 -.5562 .4959 -.6628 .6859 -.5062 -.0403 .5212
    .4385 -.3595 .2945 -.7693 .1015 .0486 -.457 -.8823 .3505 .3558 -.3125 -.808""",
)
TEACHER_1 = numbers(
    2,
    3,
    4,
    """.4574 -.3376 .786 .2431 -.2406 -.7504 .4401 .4305 -.7502 -.0105 -.3015 .5884
    -.6999 .5813 -.4131 -.0401 -.1962 -.8203 .537 .0163 .5269 .0452 .0795 -.845""",
)
GRAD_1 = numbers(
    2,
    3,
    4,
    """-.436116 .362879 -.636221 -.33148 .046168 .414659 -.136048 -.498929 .767088
    .029652 .336768 -.181286 1.061437 -.635033 .238601 -.988952 .538297 .823196 -.526827 -.968288 .109804
    .034393 -.206317 -.63547""",
)
ANCHORS = numbers(
    4, 3, """-.5555 .5909 -.5851 -.7771 -.629 .0227 .2289 .8187 .5266 -.4824 -.3744 -.7919"""
)
POSITIVES = numbers(
    4,
    2,
    3,
    """.9666 -.0608 .249 -.7545 -.6404 -.1434 -.1878 .5912 .7843 .0481 .7756 -.6294
    -.0962 -.4802 .8719 .8407 -.5337 .0917 .9847 -.1699 .0377 -.59 .0537 -.8056""",
)
NEGATIVES = numbers(
    4,
    2,
    3,
    """-.8566 .1997 .4757 -.1459 .4669 .8722 -.2192 .1911 .9568 .2425 -.9701 .0107
    -.4159 -.6661 .6191 .5063 .8127 -.2886 .3481 .5635 .7492 -.1595 .9861 .0468""",
)
TRIPLET_GRAD = numbers(
    4,
    3,
    """-1.2146 1.3678 1.2423 .163 -2.1458 .8126 -.49425 1.25345 -.5067 -.5721 .578
    .00455""",
)
DATABASE = numbers(
    10,
    3,
    """.0569 -.9793 .1942 .0258 -.3087 .9508 .9022 .3843 -.1957 -.6033 -.7972 .0245
    -.2711 .5332 -.8014 .4423 -.2275 -.8675 .8117 .0986 .5757 -.9392 -.1975 -.2808 -.76 -.5152 .3962 -.7953
    -.1499 -.5874""",
)
QUERIES = numbers(
    10,
    3,
    """-.3427 -1.1067 -.2349 -.2493 -.182 1.4687 1.3457 .4323 .2056 -.1968 -1.2022 .1997
    .0479 .3566 -1.2779 .6271 -.7676 -1.0522 .3167 .1689 .244 -1.3344 -.2051 -.7322 -1.1055 -.89 .0798 -1.1882
    .2815 -.4477""",
)


def test_losses_are_the_authors():
    for student, teacher, ts, ss, expected, grad in (
        (STUDENT_0, TEACHER_0, 0, 0, 1.8000209920876884, GRAD_0),
        (STUDENT_1, TEACHER_1, 0.7718, 0.6684, 4.054649398303912, GRAD_1),
    ):
        loss = distillation_loss(student.requires_grad_(), teacher, ts, ss)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=3e-6)  # theirs adds 1e-6 to each 1 - s.t
        close(student.grad, grad, rtol=0, atol=2e-6)
    loss = triplet_loss(ANCHORS.requires_grad_(), POSITIVES, NEGATIVES, 0.7)
    loss.backward()
    assert loss.item() == pytest.approx(4.7996729925, abs=1e-12)
    close(ANCHORS.grad, TRIPLET_GRAD, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "queries, expected",
    [
        (DATABASE, (0.197619047619, 0, 1 / 9, 6 / 9, 0, 1 / 18, 1 / 6, 0, 1 / 72, 0.045524691358)),
        (QUERIES, (0.190729717813, 0, 1 / 9, 5 / 9, 0, 1 / 18, 5 / 36, 0, 1 / 72, 1 / 27)),
    ],
)
def test_metrics_are_the_authors(queries, expected):
    labels = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3]  # 3 is alone: no query, but in the database
    ours = retrieval_metrics(queries, DATABASE, labels, labels, ks=(1, 2, 4))
    names = ("mAP", "R@1", "R@2", "R@4", "P@1", "P@2", "P@4", "mAP@1", "mAP@2", "mAP@4")
    assert [ours[name] for name in names] == pytest.approx(expected, abs=1e-9)


# --------------------------------------------------------------------------------- losses, negatives, metrics
def test_distillation_loss_by_hand():
    """Two views at right angles to the teacher, which the student has swapped: mental arithmetic."""
    t, s = torch.eye(2)[None], torch.eye(2).flip(0)[None]
    assert distillation_loss(s, t, 0, 0) == 1  # both views off by 1, mean over A = 2
    assert distillation_loss(s, t, 1, 0) == 1 + 1  # s_i.t_j = 1 where t_i.t_j = 0
    assert distillation_loss(s, t, 0, 1) == 1 + 0  # among themselves they stand right
    assert distillation_loss(t, t, 1, 1) == 0 and distillation_loss(s[:, :1], t[:, :1], 1, 1) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_negative_probabilities_follow_the_formula(dtype):
    """In float32 at least, under autocast too; finite for duplicates and antipodes."""
    anchors, labels = unit(3, 16).to(dtype), torch.arange(46) % 5
    pool, own = (
        torch.cat([unit(40, 16, seed=1).to(dtype), anchors, -anchors]),
        labels[1:4, None] == labels,
    )
    with torch.autocast("cpu", torch.bfloat16):
        ours = negative_probabilities(anchors, pool, labels[1:4], labels)
    d = (2 - 2 * anchors.double() @ pool.double().T).clamp(0.25, 4 - 1e-6).sqrt()
    log_weight = ((2 - 16) * d.log() - (16 - 3) / 2 * (1 - d**2 / 4).log()).masked_fill(own, 0)
    weight = ((log_weight - log_weight.amax(1, keepdim=True)).exp() + 1e-6).masked_fill(own, 0)
    close(ours.double(), weight / weight.sum(1, keepdim=True), rtol=1e-3, atol=1e-9)
    with pytest.raises(ValueError, match="no negatives"):
        negative_probabilities(anchors, pool, torch.zeros(3), torch.zeros(46))


def test_negatives_are_drawn_with_these_probabilities():
    """Chi-square of first draws: 0.001 critical value at 24 degrees of freedom."""
    pool, labels, n = unit(30, 8, seed=3), torch.arange(30) // 6, 20000
    anchors, own, draw = (
        unit(1, 8).expand(n, -1),
        labels[:1].expand(n),
        torch.Generator().manual_seed(0),
    )
    expected = n * negative_probabilities(anchors[:1], pool, own[:1], labels)[0, 6:]
    seen = torch.bincount(
        draw_negatives(anchors, pool, own, labels, 1, generator=draw)[:, 0], minlength=30
    )
    assert seen[:6].sum() == 0 and ((seen[6:] - expected) ** 2 / expected).sum() < 51.2


def test_an_epoch_of_mining(tiny):
    """Groups of 4 of a class, at most --images, drawn anew; negatives of others; no class of fewer than 4."""
    labels = torch.tensor([0] * 6 + [1] * 5 + [2] * 3 + [3] * 9 + [4])
    dataset = ImageSet(labels.tolist(), images=noise(len(labels), 32, 32, 3))
    options, net = options_of(small(tiny, None, size=32, images=10)), small_net()
    epochs = torch.stack(
        [train.mine(net, dataset, data.decoder(dataset), e, options) for e in range(12)]
    )
    assert epochs.shape == (12, 8, 1 + train.NEGATIVES) and len(epochs.unique(dim=0)) == 12
    assert epochs.unique().tolist() == [i for i in range(24) if labels[i] not in (2, 4)]
    for rows in epochs:
        classes = labels[rows]  # (R, 1 + NEGATIVES)
        assert (classes[:, 0].view(-1, 4) == classes[::4, :1]).all() and len(
            rows[:, 0].unique()
        ) == 8
        assert (classes[:, :1] != classes[:, 1:]).all() and (
            rows.sort(1).values.diff(dim=1) > 0
        ).all()


def by_sorting(queries, database, query_labels, database_labels, ks, same_images):
    """The definitions, query by query: the wrong images of a score stand before the correct ones."""
    rows = []
    for i, label in enumerate(query_labels):
        correct = np.asarray(database_labels) == label
        order = np.lexsort((correct, -(database @ queries[i]).round(9)))
        hit = correct[order[order != i] if same_images else order]
        ranks, n = np.flatnonzero(hit), int(hit.sum())
        if not n:
            continue
        precision = [((j / r if r else 1) + (j + 1) / (r + 1)) / 2 for j, r in enumerate(ranks)]
        row = {
            "mAP": np.mean(precision),
            "R-Precision": hit[:n].mean(),
            "MAP@R": sum((j + 1) / (r + 1) for j, r in enumerate(ranks) if r < n) / n,
        }
        for k in ks:
            row |= {
                f"R@{k}": hit[:k].any(),
                f"P@{k}": hit[: min(k, ranks[-1] + 1)].mean(),
                f"mAP@{k}": sum(p for p, r in zip(precision, ranks) if r < k) / min(n, k),
            }
        rows.append(row)
    return {key: np.mean([row[key] for row in rows]) for key in rows[0]}


def test_metrics_and_knn_against_brute_force():
    """One to nine different embeddings, so that scores tie; classes of one to several hundred images."""
    draw, ks = np.random.default_rng(0), (1, 2, 3, 5, 8, 100)
    for case, (n, m) in enumerate([*draw.integers(2, 30, (40, 2)).tolist(), (30, 900), (700, 700)]):
        same, classes, different = (
            bool(case % 2),
            min(7, 2000 // m),
            unit(1 + case % 9, 13).double(),
        )
        m = n if same else m
        queries, database = (different[draw.integers(0, len(different), count)] for count in (n, m))
        labels, others = ((draw.integers(0, classes, count) - 1) * 10**15 for count in (n, m))
        labels, others[:2] = (
            others if same else labels,
            others[1] if same else labels[0],
        )  # one to find
        expected = by_sorting(queries.numpy(), database.numpy(), labels, others, ks, same)
        scores = queries @ database.T - (torch.eye(n) * 9 if same else 0)
        for chunk, kind in itertools.product((1, 7 * m, 2**24), (torch.float32, torch.float64)):
            x, y = queries.to(kind), database.to(kind)
            ours = retrieval_metrics(x, y, labels, others.tolist(), ks, same, chunk=chunk)
            assert ours == pytest.approx(expected, abs=1e-6), (case, chunk, kind)
            found, rows = knn(x, y, 9, same, chunk=chunk)  # ties in any order, fewer if there are
            close(found.double(), scores.topk(min(9, m - same)).values, rtol=0, atol=1e-6)
            close(found.double(), scores.gather(1, rows), rtol=0, atol=1e-6)
            assert (rows.sort(1).values.diff(dim=1) > 0).all()


@pytest.mark.parametrize(
    "sentence, change",
    [
        ("embedding 0 is not finite", {"database": torch.full((3, 4), torch.nan)}),
        ("positive", {"ks": (1, 0)}),
        ("N, 4.* not .3, 5", {"database": torch.ones(3, 5)}),
        ("same images", {"query_labels": [1, 1, 1]}),
    ],
)
def test_metrics_refuse(sentence, change):
    usual = dict(queries=torch.ones(3, 4), database=torch.ones(3, 4), query_labels=[1, 1, 2])
    with pytest.raises(ValueError, match=sentence):
        retrieval_metrics(**{**usual, "database_labels": [1, 1, 2], **change})


# ------------------------------------------------------------------------------------ network and checkpoints
def test_gem_is_between_mean_and_maximum():
    x = torch.rand(2, 3, 5, 5)
    for p, expected in (
        (1, x.mean((2, 3))),
        (3, x.pow(3).mean((2, 3)).pow(1 / 3)),
        (300, x.amax((2, 3))),
    ):
        close(GeM(p, channels=3)(x), expected, rtol=0.03 if p == 300 else 1e-5, atol=0)


@pytest.mark.parametrize(
    "arch, how",
    [
        ("googlenet", {"transform_input": True, "init_weights": True}),
        ("densenet121", {}),
        ("mnasnet0_5", {}),
        ("inception_v3", {"transform_input": True, "init_weights": True}),
        ("mobilenet_v3_small", {}),
    ],
)
def test_networks_are_torchvisions_up_to_the_pooling(arch, how, tmp_path):
    """From a file of its weights: what its classifier sees, input transform and last ReLU included."""
    model, seen, x = torchvision.models.get_model(arch, **how).eval(), [], torch.randn(2, 3, 96, 96)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    linear = [
        m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name[0] in "cf"
    ][0]
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(F.normalize(inputs[0])))
    model(x)
    close(small_net(arch, "spoc", 0, pretrained=tmp_path / "w.pth")(x), seen[0])


def test_timm():
    pytest.importorskip("timm")
    assert small_net("timm/lcnet_035")(torch.randn(2, 3, 64, 64)).shape == (2, 8)


def test_a_backbone_of_ones_own():
    """In bfloat16, with a batch-norm layer that its owner froze; the other one trains unless pretrained."""
    layers = torch.nn.Conv2d(3, 7, 3), torch.nn.BatchNorm2d(7).eval(), torch.nn.BatchNorm2d(7)
    net = small_net(None, "spoc", 0, backbone=torch.nn.Sequential(*layers).bfloat16())
    for net.frozen_batchnorm in (False, True):
        embeddings = net.train()(torch.randn(2, 3, 8, 8))
        assert embeddings.shape == (2, net.dim) == (2, 7) and embeddings.dtype == torch.float32
        assert [layer.num_batches_tracked.item() for layer in layers[1:]] == [0, 1]


@pytest.mark.parametrize("dtype, pooling", [(torch.float16, "gemmp"), (torch.bfloat16, "mac")])
def test_a_network_in_half_precision(dtype, pooling):
    net, x = small_net(pooling=pooling), torch.randn(2, 3, 64, 64)
    expected, before = net(x), fingerprint(net)
    assert (net.to(dtype)(x) * expected).sum(1).min() > 0.99 and fingerprint(net) != before


def test_checkpoints_of_the_authors(tmp_path, monkeypatch, capsys):
    """By name, downloaded once, numpy float and all; the size is in the name. The data set has to be said."""
    net, x, fetched = small_net(), torch.randn(2, 3, 32, 32), []
    meta = {
        "architecture": net.arch,
        "pooling": "gem",
        "whitening": net.dim,
        "outputdim": net.dim,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    theirs = {"meta": meta, "state_dict": net.state_dict(), "epoch": 3, "max_map": np.float64(0.4)}
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, path: fetched.append(url) or torch.save(theirs, path),
    )
    for name, size in (
        ("cub-S224r-T448r-resnet50-512-gem-w", 224),
        ("sop-448r-resnet50-512-gem-w", 448),
    ):
        for loaded in (load_checkpoint(name), load_checkpoint(name)):
            assert torch.equal(loaded(x), net(x)) and loaded.size == size
    assert len(RELEASED) == 9 and [url.rpartition("/") for url in fetched] == [
        ("http://ptak.felk.cvut.cz/personal/sumapave/public", "/", f"{name}-resnet50-512-gem-w.pth")
        for name in ("cub-S224r-T448r", "sop-448r")
    ]
    for program in (distill, evaluate):
        assert "--dataset" in fails(capsys, program, "--teacher", "sop-448r-resnet50-512-gem-w")


def test_asymres_stands_alone():
    imported = re.findall(r"^ *(?:from|import) (\w+)", (HERE / "asymres.py").read_text(), re.M)
    assert "torch" in imported and not {"data", "evaluate", "train", "distill"} & {*imported}


# ----------------------------------------------------------------------------------------------------- images
RGB = Image.fromarray(noise(12, 16, 3))


def test_images_are_read_as_a_viewer_shows_them(tmp_path):
    """Grey, palettes, transparency on white, 16 bit, CMYK, turned by EXIF; evaluation_transform, too."""
    grey, palette, cmyk, exif = (
        RGB.convert("L"),
        RGB.quantize(16),
        RGB.convert("CMYK"),
        Image.Exif(),
    )
    alpha, key, exif[0x0112] = Image.fromarray(noise(12, 16) // 128 * 255), RGB.getpixel((0, 0)), 6
    shades, clear, white = (
        np.asarray(grey).astype(np.uint16),
        np.asarray(alpha) == 0,
        RGB.point([255] * 768),
    )
    on_white = lambda image, clear: Image.composite(
        white, image.convert("RGB"), Image.fromarray(clear)
    )
    for name, image, shown, how in [
        ("grey.png", grey, grey, {}),
        ("rgb.png", RGB, RGB, {}),
        ("palette.png", palette, palette, {}),
        ("deep.png", Image.fromarray(shades * 257), grey, {}),
        ("cmyk.tif", cmyk, cmyk, {}),
        ("rgba.png", Image.merge("RGBA", (*RGB.split(), alpha)), on_white(RGB, clear), {}),
        ("la.png", Image.merge("LA", (grey, alpha)), on_white(grey, clear), {}),
        ("clear.png", palette, on_white(palette, np.asarray(palette) == 3), {"transparency": 3}),
        ("keyed.png", RGB, on_white(RGB, (np.asarray(RGB) == key).all(-1)), {"transparency": key}),
        ("turned.png", RGB, RGB.transpose(Image.ROTATE_270), {"exif": exif}),
    ]:
        image.save(tmp_path / name, **how)
        assert (
            np.asarray(read_image(tmp_path / name)) == np.asarray(shown.convert("RGB"))
        ).all(), name
        if name != "turned.png":
            close(*(data.evaluation_transform(8)(x) for x in (Image.open(tmp_path / name), shown)))
    Image.new("1", (12000, 12000)).save(tmp_path / "bomb.png")  # 144 megapixels in 18 kB
    with pytest.raises(ValueError, match="bomb.png cannot be read as an image"):
        read_image(tmp_path / "bomb.png")


def test_evaluation_transform():
    """Both sides times 8/7 of the size over the shorter one, rounded; the centre. 375 x 500: 73 x 98."""
    image = Image.fromarray(noise(500, 375, 3))
    crop = np.asarray(image.resize((73, 98), Image.LANCZOS).crop((4, 17, 68, 81)))
    expected = (crop / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    close(data.evaluation_transform(64)(image), torch.tensor(expected).permute(2, 0, 1).float())
    assert data.evaluation_transform(7)(Image.new("RGB", (300, 1))).shape == (3, 7, 7)


@pytest.mark.parametrize("name", ["big.jpg", "big.png", "deep.png", "palette.png"])
def test_big_images_are_shrunk_while_they_are_read(tmp_path, name):
    """To what their smallest crop needs: views differ by little from those of the whole image."""
    soft, most = RGB.resize((4, 3)).resize((1200, 900), Image.BICUBIC), 32**2 / (0.5 * 0.75)
    deep = Image.fromarray(np.asarray(soft.convert("L")).astype(np.uint16) * 257)
    soft = {"deep.png": deep, "palette.png": soft.quantize(16)}.get(name, soft)
    soft.save(tmp_path / name, quality=95)
    image, dataset = read_image(tmp_path / name, most), ImageSet([0], [str(tmp_path / name)])
    assert (
        0.9 * most < image.width * image.height <= most
        and abs(image.width / image.height - 4 / 3) < 0.1
    )
    both = [Views(dataset, (32,), copies=20, least=0.5) for _ in range(2)]
    both[1].most = 1e9
    shrunk, whole = (next(iter(views))[0] for views in both)
    difference = ((shrunk - whole) * 255 * 0.225).abs().mean((2, 3, 4))  # grey levels, view by view
    assert (
        both[0].most == most
        and 0 < difference.median() < 4
        and read_image(tmp_path / name, 10**9).size == soft.size
    )


# --------------------------------------------------------------------------------------- coupled augmentation
def views_of(size, start=0, **how):
    """Views at 6 and 8 px of an epoch of 230 images in order, asked for in slices of `size` images."""
    dataset = ImageSet(range(230), images=noise(230, 9, 12, 3))
    views = Views(dataset, (6, 8), 2, jitter=True, mixup=True, **how)
    parts = [slice(i, min(i + size, 230)) for i in range(start, 230, size)]
    return [torch.cat(batches) for batches in zip(*views.epoch(1, torch.arange(230), parts))]


same = lambda xs, ys: all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))


def test_views_depend_on_seed_epoch_and_block_alone(monkeypatch):
    """Not on slices, workers, or where an epoch is entered. An image is decoded once an epoch."""
    decoded, image = [], ImageSet.image
    monkeypatch.setattr(
        ImageSet, "image", lambda self, i, *most: decoded.append(i) or image(self, i, *most)
    )
    whole = views_of(8)
    assert sorted(decoded) == list(range(230))
    assert all(same(whole, views_of(4, workers=workers)) for workers in (0, 1, 3))
    assert same([x[196:] for x in whole], views_of(8, start=196)) and not same(
        whole, views_of(8, seed=2)
    )


def test_partners_are_spread_over_their_block():
    """Of 200 images in the order of the epoch; never the image itself."""
    partner, own = data.draw_views(450, 8, 1, 2).partner.reshape(450, 8), np.arange(450)[:, None]
    assert (partner != own).all() and (partner // 200 == own // 200).all()
    for block in np.split(partner - own // 200 * 200, [200, 400]):
        assert {*block.flat} == {*range(len(block))}
        assert len(np.unique(block - np.arange(len(block))[:, None])) > 1.2 * len(block)


def by_torchvision(image, draws, v, size, least):
    """What `draws` say of view v, of an image (3,H,W), uint8, by torchvision's own functions."""
    box = data.crop_box(draws.crop[v], *image.shape[1:], least)
    x = TV.resized_crop(image, *box, [size, size], antialias=True) / 255
    x = TV.hflip(x) if draws.flip[v] else x
    changes = (TV.adjust_brightness, TV.adjust_contrast, TV.adjust_saturation, TV.adjust_hue)
    for change in draws.order[v]:
        x = changes[change](x, draws.factors[v][change])
    return x


def test_views_are_what_torchvision_makes_of_their_draws():
    """At both sizes: one region, one weight, one partner, put through the same draw in its own frame."""
    images, order = [noise(50 + 5 * i, 60, 3, seed=i) for i in range(6)], [3, 0, 5, 1, 4, 2]
    images[0][:], images[1][:, 30:] = 77, 200  # grey: hue has no say there
    draws, parts = data.draw_views(6, 4, 7, 2), [slice(0, 3), slice(3, 6)]
    views = Views(
        ImageSet(range(6), images=images), (24, 48), 4, least=0.2, jitter=True, mixup=True, seed=7
    )
    pixels = [torch.from_numpy(images[i]).permute(2, 0, 1) for i in order]
    for size, ours in zip(
        (24, 48), map(torch.cat, zip(*views.epoch(2, torch.tensor(order), parts)))
    ):
        for v in range(6 * 4):
            own, other = (
                by_torchvision(pixels[i], draws, v, size, 0.2) for i in (v // 4, draws.partner[v])
            )
            mixed = (draws.weight[v] * own + (1 - draws.weight[v]) * other).float()
            close(ours[v // 4, v % 4], TV.normalize(mixed, data.MEAN, data.STD), atol=1e-4, rtol=0)
    assert (
        0.2 < draws.flip.mean() < 0.8
        and draws.weight.std() > 0.3
        and len({*map(tuple, draws.order)}) > 3
    )


def test_two_ways_to_crop():
    """One by one for a CPU and by two products for a GPU: a grey level apart; the products are exact."""
    draws, sides = data.draw_views(60, 1, 3), np.random.default_rng(4).integers(20, 90, (60, 2))
    images = [torch.from_numpy(noise(3, *side)) for side in sides]
    boxes = [data.crop_box(crop, *side, 0.08) for crop, side in zip(draws.crop, sides.tolist())]
    exact = torch.stack(
        [
            TV.resized_crop(image.float(), *box, [32, 32]).flip([-1] if flipped else [])
            for image, box, flipped in zip(images, boxes, draws.flip)
        ]
    )
    products = lambda *kind: data.crop_by_products(images, boxes, draws.flip, 32, *kind)
    half, ours = products(), products(torch.float32)
    close(ours, exact, atol=1e-3, rtol=0)
    for other in (half, data.crop_one_by_one(images, boxes, draws.flip, 32)):
        close(other, ours, atol=1.001, rtol=0)
    assert 0.05 < (np.array(boxes)[:, 2:].prod(1) / sides.prod(1)).min() < 0.2


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_the_loader_of_the_student(method, start_method):
    """Each image once an epoch, in a new order, in new views; workers, however started, end with it."""
    dataset = ImageSet(range(10), images=[np.full((9, 9, 3), 25 * i, np.uint8) for i in range(10)])
    make = lambda **how: data.distillation_loader(dataset, 8, 16, copies=3, batch_size=4, **how)
    start_method(method)
    loader, again, plain = make(), make(workers=1), make(mixup=False)
    first, second = list(loader), list(loader)
    assert [x.shape for _, x in first] == [(n, 3, 3, 16, 16) for n in (4, 4, 2)]
    assert all(map(same, first + second, [*again, *again])) and not any(map(same, first, second))
    assert len({round(x.mean().item(), 3) for _, large in plain for x in large}) == 10
    del again
    assert not multiprocessing.active_children()


# -------------------------------------------------------------------------------------------------- data sets
def cub(root, each=1):
    names = [
        f"{label:03}.Black_Bird/a {i}.jpg" for label in (1, 101, 100, 200) for i in range(each)
    ]
    put(root / "images.txt", text="".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    put(*(root / "images" / name for name in names))


def sop(root):
    for part, labels in (("train", (1, 1, 2)), ("test", (11319, 11320))):
        rows = [f"{i} {label} 1 bicycle_final/{part}_{i}.JPG" for i, label in enumerate(labels)]
        put(
            root / f"Ebay_{part}.txt",
            text="\n".join(["image_id class_id super_class_id path", *rows]),
        )
        put(*(root / row.split()[3] for row in rows))


def cars(root):
    models = {label: f"Model {label}" for label in range(1, 197)} | {
        98: "Ram C/V Cargo Van"
    }  # a - on disk
    put(root / "names.csv", text="\n".join(models.values()) + "\n\n")
    for part, labels in (("train", (98, 99)), ("test", (1, 196))):
        put(
            root / f"anno_{part}.csv",
            text="\n".join(f"{i}.jpg,1,2,3,4,{i}" for i in labels) + "\n\n",
        )
        put(
            *(
                root / "car_data/car_data" / part / models[i].replace("/", "-") / f"{i}.jpg"
                for i in labels
            )
        )


@pytest.mark.parametrize(
    "name, write, top, train_labels, test_labels",
    [
        ("CUB", cub, "CUB_200_2011", [1, 100], [101, 200]),
        ("cars", cars, "", [98, 1], [99, 196]),
        ("Sop", sop, "Stanford_Online_Products", [1, 1, 2], [11319, 11320]),
    ],
)
def test_published_layouts(tmp_path, name, write, top, train_labels, test_labels):
    """Names in any case; split by class id; with and without the archive's folder; whole or refused."""
    for root in (tmp_path / "plain", tmp_path / "wrapped"):
        write(root / top if root.name == "wrapped" else root)
        for split, labels in (("train", train_labels), ("test", test_labels)):
            dataset = load_dataset(name, str(root), split, check=False)
            assert dataset.labels == labels and dataset.image(0).size == (50, 40)
    with pytest.raises(ValueError, match=f"of {data.COUNTS[name.lower()]['train']} train"):
        load_dataset(name, str(root))
    os.remove(dataset.paths[1])
    with pytest.raises(ValueError, match=f"1 of them missing .*{re.escape(dataset.paths[1])}"):
        load_dataset(name, str(root), "test")


def test_cars_as_published(tmp_path):
    rows = [(f"car_ims/{label}.jpg", label) for label in (98, 99, 3)]
    put(*(tmp_path / name for name, _ in rows))
    rows = np.array(rows, dtype=[("relative_im_path", object), ("class", object)])
    pytest.importorskip("scipy.io").savemat(tmp_path / "cars_annos.mat", {"annotations": rows})
    assert load_dataset("cars", str(tmp_path), check=False).labels == [98, 3]


def test_splits_and_the_quirks_of_folders(tiny, tmp_path):
    splits = lambda name: [
        load_dataset(name, "", split).labels for split in ("train", "test", "fit", "val")
    ]
    assert [{*labels} for labels in splits(str(tiny))] == [{0, 1, 2}, {3, 4, 5}, {0, 1}, {2}]
    drawn = splits("synthetic")
    assert [*map(len, drawn)] == [960, 960, 480, 480] and not {*drawn[0]} & {*drawn[1]}
    odd = shutil.copytree(tiny, tmp_path / "odd")
    put(odd / "class0" / "notes.txt", text="not an image")
    (odd / "class0" / "again").symlink_to(odd)  # a loop
    (odd / "self").symlink_to(odd / "self")
    (odd / "empty").mkdir()
    assert len(load_dataset("a name", str(odd))) == 18 and len(data.list_images(odd)) == 27


# ------------------------------------------------------------------------- runs of one process and of several
def test_the_readmes_benchmark(tmp_path, monkeypatch, capsys, start, start_method):
    """Its lines, word for word and in order, on a replica of CUB; made small by options behind each."""
    monkeypatch.chdir(tmp_path)
    block = re.search(
        r"## Reproduce a benchmark\n((\n|    .*)+)", (HERE / "README.md").read_text()
    )[1]
    lines = [
        shlex.split(line, comments=True)
        for line in block.splitlines()
        if line.startswith("    python")
    ]
    assert [line[1] for line in lines] == [
        "data.py",
        "train.py",
        "distill.py",
        "train.py",
        "evaluate.py",
    ]
    download, teacher, student, baseline, table = (line[2:] for line in lines)
    cub(tmp_path / "www" / "CUB_200_2011", each=6)
    monkeypatch.setitem(data.COUNTS, "cub", {"train": 12, "test": 12})
    monkeypatch.setattr(
        data,
        "download_and_extract_archive",
        lambda url, root, md5: (url, md5) == data.DOWNLOADS["cub"] and shutil.copytree("www", root),
    )
    data.main(download)
    autocast, forward, how = [], EmbeddingNet.forward, {"workers": 2, "precision": "bfloat16"}
    monkeypatch.setattr(
        EmbeddingNet,
        "forward",
        lambda net, images: (
            autocast.append(torch.is_autocast_enabled("cpu") or not images.any())
            or forward(net, images)
        ),
    )  # black: the cost
    train.main(teacher + small(None, None, size=48, **how))
    student += distilled(None, None, weights=None, lambda_ts=0, **how)
    distill.main(student)
    train.main(baseline + small(None, None, size=32, **how))
    made = Path("runs/cub-48to32-seed1234")
    assert f"{made}/model.pt".replace("48to32", "448to224") == table[table.index("--student") + 1]
    assert {*os.listdir(made)} == {"model.pt", "log.jsonl", "options.json", "queries.png"}
    log = [json.loads(line) for line in (made / "log.jsonl").read_text().splitlines()]
    assert [entry["epoch"] for entry in log] == [0, 1] and {"step", "lr", "images_per_s"} <= log[
        0
    ].keys()
    assert log[0]["absolute"] > log[0]["student-student"] > log[0]["teacher-student"] == 0
    # Killed wherever it is, in the middle of writing too, and continued where the data lie elsewhere.
    monkeypatch.setattr(train, "MINUTES", 0)  # a checkpoint before every step
    student, seconds, kills = [*student, "--out", "killed"], 0.3, 0
    while end(process := start(lambda: distill.main(student)), seconds) == [None]:
        os.killpg(process[0].pid, signal.SIGKILL)
        seconds, kills = 1.3 * seconds, kills + 1
        if kills == 3:
            student += ["--root", shutil.move("data", "moved")]
    assert end(process) == [0] and kills >= 3
    assert fingerprint(load_checkpoint("killed/model.pt")) == fingerprint(
        load_checkpoint(made / "model.pt")
    )
    shutil.move("moved", "data")
    start_method("forkserver")
    how = "--workers 1 --device cpu --precision bfloat16".split()
    students = ["--student", f"{made}/model.pt", "killed/model.pt"]
    evaluate.main([*table, *students, *"--json t.json --figure f.png --ks 1 2".split(), *how])
    rows = json.loads(Path("t.json").read_text())
    assert [(row["query px"], row["database px"]) for row in rows] == [
        (48, 48),
        (32, 48),
        (32, 32),
        (32, 48),
        (32, 32),
        (32, 48),
        (32, 32),
    ]
    assert [row["R@2"] for row in rows[3:5]] == [row["R@2"] for row in rows[5:]]
    assert Image.open("f.png").width > 1000
    # A folder of images, indexed by the teacher, searched by the student alone.
    put("www/broken.jpg", text="not an image")
    evaluate.main([*table[:2], "--database", "www", "--index", "i.pt", *how])
    said, paths = capsys.readouterr(), read_checkpoint("i.pt")["paths"]
    assert "24 images" in said.out and "1 skipped" in said.out and "broken.jpg" in said.out
    search = [*students[:2], "--query", paths[7], "--top", "30", *how, "--index"]
    evaluate.main([*search, "i.pt"])
    first, *answers = capsys.readouterr().out.splitlines()
    scores, found = zip(*(answer.split(maxsplit=1) for answer in answers))
    assert (
        first == paths[7] and {*found} == {*paths} and [*scores] == sorted(scores, key=float)[::-1]
    )
    evaluate.main(
        ["--teacher", "runs/cub-224/model.pt", "--database", "www", "--index", "o.pt", *how]
    )
    assert "another network" in fails(capsys, evaluate, *search, "o.pt")
    assert len(autocast) > 50 and all(autocast) and not multiprocessing.active_children()


def test_ten_epochs_from_random_weights(tiny, tmp_path, monkeypatch):
    """Batch-norm statistics train for 7, then stand still; two workers; the rate is annealed to its end."""
    options = options_of(small(tiny, tmp_path, epochs=10, size=32, workers=2))
    sizes = lambda n: [[p.stop - p.start for p in T.cut(step, 4)] for step in T.cut(slice(0, n), 8)]
    assert (
        sizes(20) == [[4, 4], [4, 4], [4]] and sizes(17) == [[4, 4], [4, 5]] and sizes(1) == [[1]]
    )
    seen, workers, mine, rates, step = [], [], train.mine, [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *how: rates.append(self.param_groups[0]["lr"]) or step(self, *how),
    )
    monkeypatch.setattr(
        train,
        "mine",
        lambda net, *how: (
            seen.append(net.backbone[1].running_var.clone())
            or (workers.append(multiprocessing.active_children()))
            or mine(net, *how)
        ),
    )
    net = train.train(options)
    seen.append(net.backbone[1].running_var)
    assert [torch.equal(a, b) for a, b in zip(seen, seen[1:])] == [False] * 7 + [True] * 3
    assert (
        max(map(len, workers)) == 2
        and not multiprocessing.active_children()
        and not net.frozen_batchnorm
    )
    assert len(rates) == 20 and (rates[0], max(rates), rates[-1]) == pytest.approx(
        (1e-4, 1e-3, 1e-8)
    )


def test_precision(monkeypatch):
    """By itself it is bfloat16 where the card has that; float32 is not TF32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: has)
    for has, precision in ((True, "bfloat16"), (False, "float32")):
        assert evaluate.set_precision("auto", torch.device("cuda")) == precision
    assert (
        torch.backends.cuda.matmul.fp32_precision
        == torch.backends.cudnn.conv.fp32_precision
        == "ieee"
    )


def test_a_student_and_its_teacher(teacher, tmp_path, monkeypatch):
    """An epoch is --images of the images, drawn anew; the teacher stays as it is."""
    orders, epoch = [], Views.epoch
    monkeypatch.setattr(
        Views,
        "epoch",
        lambda self, number, order, parts: (
            orders.append({*order.tolist()}) or epoch(self, number, order, parts)
        ),
    )
    student, net = student_of(teacher, tmp_path, images=10)
    assert [*map(len, orders)] == [10, 10] and orders[0] != orders[1]
    assert fingerprint(net) == fingerprint(load_checkpoint(teacher)) == student.teacher
    assert all(p.grad is None and not p.requires_grad for p in net.parameters())
    assert torch.equal(student.backbone[1].running_var, net.backbone[1].running_var)


def test_regression_sees_the_evaluation_crops(teacher, tmp_path):
    """Both networks the same ones: a student that is its teacher has nothing to learn."""
    student_of(teacher, tmp_path, regression=True, student_size=48, lr=1e-12)
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])["absolute"] < 1e-9


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, start, capfd):
    save_checkpoint(tmp_path / "n.pt", small_net(dim=4))

    def main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))
        save_checkpoint(tmp_path / "n.pt", small_net())

    assert end(start(main)) == [2] and "a previous one is intact" in capfd.readouterr().err
    assert load_checkpoint(tmp_path / "n.pt").dim == 4 and os.listdir(tmp_path) == ["n.pt"]


def test_out_of_memory(teacher, tiny, tmp_path, monkeypatch, capsys):
    """The advice, when followed, ends where a run with room enough does. Embedding has a sentence, too."""
    (wide, net), (room, calls, forward) = (
        student_of(teacher, tmp_path / "a", forward=8),
        (8, itertools.count(), EmbeddingNet.forward),
    )

    def limited(net, images):
        if len(images) > room and next(calls) > 6:  # not at once
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(net, images)

    monkeypatch.setattr(EmbeddingNet, "forward", limited)
    assert "lower --forward" in fails(
        capsys, distill, *distilled(teacher, tmp_path / "b", forward=8)
    )
    assert read_checkpoint(tmp_path / "b" / "model.pt")["training"]["step"] == 3
    assert_close(student_of(teacher, tmp_path / "b", forward=4)[0].state_dict(), wide.state_dict())
    room = 0
    search = "--database", tiny, "--index", tmp_path / "i.pt"
    assert "out of GPU memory" in fails(
        capsys, evaluate, "--teacher", teacher, "--workers", 0, *search
    )


@pytest.fixture
def together(start, tmp_path):
    """together(count, function): what the function returns in each of `count` processes of one program."""

    def together(count, function):
        main = lambda: torch.save(function(), tmp_path / f"result{data.PROCESSES['rank']}")
        assert end(start(main, count)) == [0] * count
        return [torch.load(tmp_path / f"result{rank}") for rank in range(count)]

    return together


def assert_close(ours, theirs):
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).float().norm() <= 1e-2 * tensor.float().norm(), name


def test_two_processes_distil_as_one(teacher, tmp_path, together, start, capfd):
    """Steps of 4 and 3 forward passes. One process dies: the other says so, and one alone goes on."""
    drawn = dict(dataset="synthetic", images=56, batch=32, forward=8, epochs=1)
    student = lambda name: student_of(teacher, tmp_path / name, **drawn)[0].state_dict()

    def dying():
        train.MINUTES = 0  # a checkpoint before every step
        if data.PROCESSES["rank"]:
            torch.optim.AdamW.step = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        student("half")

    (one,), (two, _) = together(1, lambda: student("one")), together(2, lambda: student("two"))
    assert_close(two, one)
    capfd.readouterr()
    assert end(start(dying, 2), 20) == [2, -signal.SIGKILL]
    assert re.fullmatch("error: another process .*\n", capfd.readouterr().err)
    assert read_checkpoint(tmp_path / "half" / "model.pt")["training"]["step"] == 1
    assert_close(student("half"), one)


def test_two_processes_train_and_embed_as_one(tiny, tmp_path, together, monkeypatch):
    """From given weights, with which batch-norm statistics stand still; if they train, the same in both."""
    monkeypatch.chdir(tmp_path)
    torch.save(
        torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1] * 4).state_dict(),
        "given",
    )
    run = lambda count, weights: together(
        count, lambda: trained(tiny, f"{weights}{count}", weights=weights).state_dict()
    )
    assert_close(run(2, "given")[0], run(1, "given")[0])
    first, second = run(2, "random")
    assert all(
        torch.equal(first[name], second[name]) for name in first if "num_batches" not in name
    )
    net, dataset = small_net(), load_dataset(str(tiny))
    (one,), (two, other) = (
        together(n, lambda: extract(net, dataset, 48, batch_size=4)) for n in (1, 2)
    )
    assert torch.equal(one, two) and torch.equal(one, other)


def test_ctrl_c_saves_once_and_a_folder_has_one_program(tiny, tmp_path, start, capfd):
    argv, path = (
        small(tiny, tmp_path / "r", epochs=500, size=32, workers=1),
        tmp_path / "r" / "model.pt",
    )
    programs = start(lambda: train.main(argv), 2)
    while not path.exists():
        programs[0].join(0.02)
    assert "another program is at work" in fails(capfd, train, *argv)
    for program in programs:
        os.killpg(program.pid, signal.SIGINT)  # as a terminal does, workers included
    assert end(programs) == [130, 130]
    said, saved = capfd.readouterr().err, read_checkpoint(path)["training"]
    assert said.count(f"saved after step {saved['step']}: ") == 1
    assert "Traceback" not in said and "the same command continues" in said


def test_torchrun(teacher, tmp_path):
    """Process 0 alone talks, draws and writes."""
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 distill.py".split()
    told = subprocess.check_output(
        torchrun + distilled(teacher, tmp_path, epochs=1), cwd=HERE, timeout=100
    )
    assert told.count(b"student, asymmetric") == 1
    assert {*os.listdir(tmp_path)} == {"model.pt", "log.jsonl", "options.json", "queries.png"}


# --------------------------------------------------------------------------------------- options and mistakes
def test_what_a_student_inherits(tiny, teacher, tmp_path, capsys):
    """Validation classes, no whitening; a teacher is the same by another path, not with other weights."""
    plain, moved, done = (
        tmp_path / "t" / "model.pt",
        tmp_path / "moved.pt",
        tmp_path / "s" / "model.pt",
    )
    trained(tiny, tmp_path / "t", epochs=1, size=48, dim=0, validation=True)
    options, _ = train.parse("student", "", distilled(plain, tmp_path / "s"))
    assert (options.validation, options.dim, options.root, options.teacher_size) == (
        True,
        0,
        str(tiny),
        48,
    )
    for program in (distill, evaluate):
        assert "--validation" in fails(capsys, program, "--teacher", plain, "--no-validation")
    assert student_of(plain, tmp_path / "s", epochs=1)[0].dim == 512
    before = done.stat().st_mtime_ns
    student_of(plain.rename(moved), tmp_path / "s", epochs=1)  # finished: loaded, not trained again
    assert done.stat().st_mtime_ns == before
    for net, lr, difference in (
        (moved, 0.5, "not with {'lr': 0.5}"),
        (teacher, 1e-3, "another run"),
    ):
        assert difference in fails(
            capsys, distill, *distilled(net, tmp_path / "s", epochs=1, lr=lr)
        )


def test_a_run_without_a_teacher_trains_its_own(tiny, tmp_path, monkeypatch, capsys):
    """In folders of its own: none that nobody named is in the way of others. A NaN gradient stops it."""
    monkeypatch.chdir(tmp_path)
    recipe = {**train.RECIPES["teacher"]["folder"], "epochs": 2, "batch": 8}
    monkeypatch.setitem(train.RECIPES["teacher"], "folder", recipe)
    argv, calls = (
        small(tiny, None, teacher_size=48, student_size=32, copies=2, epochs=1),
        itertools.count(1),
    )
    with monkeypatch.context() as broken:
        broken.setattr(
            train,
            "triplet_loss",
            lambda a, p, *more: (
                triplet_loss(a, p, *more)
                + 0 * (a * (next(calls) < 6 and torch.equal(p[1], a[[0, 2, 3]]))).sum().abs().sqrt()
            ),
        )  # slope NaN
        assert re.search(
            "not finite: .*epoch 1, step 4", fails(capsys, distill, *argv, "--forward", "8")
        )
    for options in (["--dim", "4"], [], ["--dim", "4"]):
        distill.main(argv + options)
    folders = {
        f"runs/{tiny.name}-{size}-seed1234{n}"
        for size in ("32", "48", "48to32")
        for n in ("", "-2")
    }
    assert {str(path.parent) for path in Path("runs").glob("**/model.pt")} == folders


@pytest.mark.parametrize(
    "program, options, sentence",
    [
        *(
            (T, bad, bad.split()[0])
            for bad in ("--crop 7", "--dim -1", "--epochs 0", "--images 0", "--lr 0")
        ),
        *(
            (D, bad, bad.split()[0])
            for bad in ("--copies 0", "--device gpu", "--validation", "--dim 16")
        ),
        *(
            (E, f"--teacher TEACHER {bad}", bad.split()[0])
            for bad in ("--ks 0", "--device gpu", "--validation")
        ),
        *(
            (D, f"--teacher {file}", "is not a readable checkpoint")
            for file in ("CUT", "TEXT", "EVIL", "OLD")
        ),
        (T, "--dataset /nowhere", "one sub-folder of images per class"),
        (T, "--dataset cub", "images.txt"),
        (T, "--dataset FEW", "two such classes"),
        (T, "--dataset cars --root CARS", "pip install scipy"),
        (T, "--dataset BAD", "3.png cannot be read"),
        (T, "--dataset BAD --workers 2", "3.png cannot be read"),
        (T, "--batch 4", "two groups"),
        (T, "--batch 10", "groups of 4"),
        (T, "--pooling avg", "pooling 'avg'"),
        (T, "--arch resnet1O", "resnet1O"),
        (T, "--arch vit_b_16", "no feature map"),
        (T, "--arch timm/resnet18", "pip install timm"),
        (T, "--size 16 --arch vgg11", "too small"),
        (T, "--arch regnet_y_128gf --weights imagenet", "regnet_y_128gf"),
        (T, "--device cuda", "only cpu"),
        (T, "--arch squeezenet1_1 --weights imagenet", "--weights FILE"),
        (T, "--weights w.pt", "w.pt is not a readable"),
        (T, "--weights OTHER", "resnet10, pretrained='OTHER'"),
        (T, "--dataset SOP --root CARS", "Ebay_test.txt"),
        (D, "--arch vgg11", "--weights teacher"),
        (D, "--teacher OTHER", "not a checkpoint of this project"),
        (D, "--teacher w.pt", "w.pt is not a readable"),
        (E, f"--teacher {RELEASED[0]}", "could not be downloaded"),
        (E, "", "--teacher is needed"),
        (E, "--query x.png", "--index"),
        (E, "--student D4 --query BAD/a/0.png --index TEACHER", "is not an index"),
        *(
            (E, f"--teacher TEACHER {bad}", sentence)
            for bad, sentence in (
                ("--student D4", "4 dimensions"),
                ("--figure x", "--student"),
                ("--json /no/t", "cannot be written"),
                ("--database . --index /no/i", "cannot be written"),
                ("--database CARS --index i", "no images"),
            )
        ),
    ],
)
def test_mistakes_end_in_a_sentence(
    program, options, sentence, teacher, tmp_path, monkeypatch, start, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_, **__: open("no network"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "scipy.io", None)

    class Malice:
        __reduce__ = lambda self: (os.system, ("touch was_run",))

    other, evil = small_net(dim=4), {"meta": Malice(), "state_dict": {}}
    other.size = 32
    save_checkpoint("D4", other)
    for name, content in (("OTHER", {"weights": torch.ones(3)}), ("EVIL", evil), ("OLD", evil)):
        torch.save(content, name, _use_new_zipfile_serialization=name != "OLD")
    Path("CUT").write_bytes(teacher.read_bytes()[: 10**6])
    put(
        "TEXT",
        "CARS/cars_annos.mat",
        *(f"BAD/{label}/3.png" for label in "abcd"),
        text="not what it says",
    )
    put(
        *(
            f"{name}/{label}/{i}.png"
            for name, label, i in itertools.product(["FEW", "BAD"], "abcd", "012")
        )
    )
    base = {train: small("BAD", "out"), distill: distilled(teacher, "out"), evaluate: []}
    argv = base[program] + options.replace("TEACHER", str(teacher)).split()
    codes, said = end(start(lambda: program.main(argv)), 20), capfd.readouterr().err
    assert (
        codes == [2] and sentence in said and said.count("error: ") == 1 and "Traceback" not in said
    )
    assert not os.path.exists("was_run") and ("BAD" in options or not os.path.exists("out"))


@pytest.mark.parametrize(
    "name, write",
    [
        ("images.txt", cub),
        ("Ebay_train.txt", sop),
        ("anno_train.csv", cars),
        ("names.csv", cars),
        *((name, None) for name in ("net.pt", "x.png", "x.jpg", "x.gif", "x.tif")),
    ],
)
def test_damaged_files_are_refused_or_read_right(name, write, tmp_path):
    """50 of each: a sentence with its name, or what was there before; of an image, a picture of some sort."""
    file, draw, layer = tmp_path / name, random.Random(name), torch.nn.Conv2d(3, 4, 3)
    if write:
        write(tmp_path)
        read = lambda: {*load_dataset(write.__name__, str(tmp_path), check=False).paths}
    elif name == "net.pt":
        save_checkpoint(file, small_net(pooling="gemmp", backbone=layer))
        read = lambda: {fingerprint(load_checkpoint(file, backbone=layer))}
    else:
        RGB.resize((64, 48), Image.BICUBIC).save(file)
        read = lambda: {read_image(file, draw.choice((1e9, 1000))).mode}
    right, whole = read(), file.read_bytes()
    for _ in range(50):
        content, at, size = (
            bytearray(whole),
            draw.randrange(len(whole)),
            draw.choice((1, 7, 100, len(whole))),
        )
        content[at : at + size] = draw.choice(
            (b"", b"\xff", bytes(9), b"-1 1e999\n", "ü🥚\n".encode())
        )
        file.write_bytes(content)
        try:
            assert read() <= right
        except ValueError as error:
            assert name in str(error) or write and write.__name__ in str(error)

"""Small CNNs that are trained, quantized and scored: 8 bits keep the accuracy, 4-bit weights stay near; the bench itself."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qpass

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def nets():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("digits_nets")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def bench(nets):
    return importlib.import_module("digits")


@pytest.fixture(scope="module")
def tiny(nets):
    """(net, what tells of the data): an inverted bottleneck and a residual block after a few epochs."""
    images, labels, test, wanted = nets.digits()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations of microseconds: more threads only wait for each other
    with torch.random.fork_rng():
        torch.manual_seed(0)
        body = (nets.Inverted(8, 12, 2), nets.Inverted(12, 12), nets.Residual(12, 24, 2))
        net = nn.Sequential(nets.conv_norm(1, 8, act=nn.ReLU6), *body, *nets.mean_linear(24))
        nets.train(net, images, labels, epochs=14)  # trained less, it hangs on the processor what 4 bits cost
    torch.set_num_threads(threads)
    return net, images[:256].split(64), test, wanted


def scored(bench, tiny, scheme):
    net, calibration, images, labels = tiny
    q = qpass.compile(net, scheme, images[:90], calibration, backend="reference")
    return bench.score(bench.logits(q, images), bench.logits(net, images), labels)


def test_accuracy_stays(bench, tiny):
    net, _, images, labels = tiny
    right = int((bench.logits(net, images).argmax(1) == labels).sum())
    assert right > 0.93 * len(labels)
    found = {scheme: scored(bench, tiny, scheme) for scheme in ("w8a8", "w4a8", "w4a8,solver=rtn")}
    assert abs(found["w8a8"][0] - right) <= 1
    assert found["w8a8"][2] > 30
    assert abs(found["w4a8"][0] - right) <= 6
    assert found["w4a8"][2] > 15
    assert found["w4a8"][2] > found["w4a8,solver=rtn"][2] + 2


def test_variants_have_the_options_that_they_read(bench):
    names = bench.variants(None)
    assert len(set(names)) == len(names)
    assert {"w8a8", "w4a4,ends=w8a8", "w8a8,range=mse", "w4a16"} < set(names)
    assert not {"w4a16,range=mse", "w4a16,bias=none", "w8a8-dynamic,range=mse", "w8a8,ends=w8a8"} & set(names)
    for name in names:
        qpass.Scheme.parse(name.removesuffix(bench.ENDS).rstrip(","))
    assert bench.variants(["w4a16*"]) == ["w4a16", f"w4a16,{bench.PLAIN}"]


def test_scores(bench):
    labels = torch.tensor([0, 1, 2])
    wanted = 2 * torch.eye(3)
    assert bench.score(wanted, wanted, labels) == (3, 0, math.inf)
    found = wanted.clone()
    found[2] = torch.tensor([3.0, 0, 2])
    right, changed, db = bench.score(found, wanted, labels)
    assert (right, changed) == (2, 1)
    assert db == pytest.approx(10 * math.log10(12 / 9))


def test_the_ends_of_each_net(bench, nets):
    for make in nets.NETS.values():
        net = make()
        first, last = (net.get_submodule(path) for path in bench.ends(net))
        assert first.in_channels == 1
        assert last.out_features == 10


def test_the_table_is_written(bench, tmp_path):
    rows = bench.table({"float": {"a": (350, 0, math.inf)}, "w8a8": {"a": (349, 1, 40.04)}})
    assert rows == [
        ("of 360 images", "a: right", "a: changed", "a: SQNR dB"),
        ("float", "350", "0", "inf"),
        ("w8a8", "349", "1", "40.0"),
    ]
    text = bench.write(rows, 0, tmp_path).read_text()
    assert "| w8a8 | 349 | 1 | 40.0 |" in text
    assert "scikit-learn" in text
    assert torch.__version__.partition("+")[0] in text


@pytest.mark.parametrize("damage", ["", "cut", "other shapes"])
def test_weights_come_from_the_cache_unless_they_are_damaged(nets, monkeypatch, tmp_path, damage):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    trainings = []
    monkeypatch.setattr(nets, "train", lambda model, *_: trainings.append(model) or model.eval())
    first, path = nets.trained("plain", 1), nets.weights_file("plain", 1)
    assert len(trainings) == 1
    assert path.is_relative_to(tmp_path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage:
        nets.save_file(nets.NETS["depthwise"]().state_dict(), path)
    again = nets.trained("plain", 1)
    assert len(trainings) == (2 if damage else 1)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)  # seeded, so also when it is made again
    assert nets.restored(nets.NETS["plain"](), path)  # whole again
    assert [f.suffix for f in path.parent.iterdir()] == [".safetensors"]


def test_an_interrupt_leaves_no_weights(nets, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(nets, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        nets.trained("plain", 2)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.rglob("*.part"))

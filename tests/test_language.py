"""The small language model and what is measured on it, without training it in earnest."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def gpt():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("byte_gpt")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def bench(gpt):
    return importlib.import_module("language")


@pytest.fixture
def quick(gpt, monkeypatch, tmp_path):
    """Trains for two steps of two sequences, into an empty cache."""
    monkeypatch.setattr(gpt, "STEPS", 2)
    monkeypatch.setattr(gpt, "BATCH", 2)
    monkeypatch.setattr(gpt, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_nothing_that_is_scored_was_trained_on(gpt):
    train, held_out = gpt.source()
    assert 5 < len(train) / len(held_out) < 20
    assert len(train) > 2_000_000
    drawn = gpt.sequences(held_out, 3, 0)
    assert drawn.shape == (3, gpt.LENGTH + 1)
    assert torch.equal(drawn, gpt.sequences(held_out, 3, 0))
    assert not torch.equal(drawn, gpt.sequences(held_out, 3, 1))


def test_a_byte_sees_those_before_it(gpt):
    torch.manual_seed(0)
    model, tokens = gpt.ByteGpt().eval(), torch.randint(256, (1, 20))
    other = tokens.clone()
    other[0, 10:] = 7
    with torch.no_grad():
        a, b = model(tokens), model(other)
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.equal(a[:, 10:], b[:, 10:])
    assert 3.3e6 < sum(p.numel() for p in model.parameters()) < 3.5e6


@pytest.mark.parametrize("damage", ["", "cut", "other"])
def test_weights_come_from_the_cache_unless_they_are_damaged(gpt, quick, damage, monkeypatch):
    first = gpt.trained(0)
    (path,) = (quick / "nets").iterdir()
    if damage:
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"{}")
    times = []
    train = gpt._train
    monkeypatch.setattr(gpt, "_train", lambda seed: times.append(seed) or train(seed))
    again = gpt.trained(0)
    assert len(times) == bool(damage)
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_scores(bench):
    torch.manual_seed(0)
    wanted, tokens = torch.randn(4, 6, 256), torch.randint(256, (4, 7))
    assert bench.score(wanted, wanted, tokens) == (0.0, 0.0, 0.0, 1.0)
    found = torch.zeros_like(wanted)
    above, spread, divergence, same = bench.score(found, wanted, tokens)
    logs = wanted.log_softmax(-1)
    assert above == pytest.approx(8 + float(logs.gather(-1, tokens[:, 1:, None]).mean()) / math.log(2), abs=1e-4)
    assert spread > 0
    assert divergence == pytest.approx(8 + float((logs.exp() * logs).sum(-1).mean()) / math.log(2), abs=1e-4)
    assert same < 0.1


def test_variants(bench):
    names = bench.variants(None)
    assert len(names) == len({*names})
    assert "w4a16,solver=free" in names
    assert bench.variants(["w2*"]) == [f"w2a16-g32,solver={solver}" for solver in bench.SOLVERS]


def test_a_variant_leaves_the_head_alone(bench, gpt):
    torch.manual_seed(0)
    model, tokens = gpt.ByteGpt().eval().requires_grad_(False), torch.randint(256, (2, gpt.LENGTH + 1))
    q = bench.quantized(model, "w4a16,solver=rtn", [tokens[:, :-1]])
    found, wanted = bench.logits(q, tokens), bench.logits(model, tokens)
    above, _, divergence, _ = bench.score(found, wanted, tokens)
    assert abs(above) < 0.05
    assert 0 < divergence < 0.01

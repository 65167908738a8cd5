"""Wrong input of qpass.inspect: models, batches, metrics, paths, names and graphs; each a sentence that says what to do."""

# ruff: noqa: F401, F811 (fixtures of another file)

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import qpass
from qpass.inspect import document as documents
from tests.models import FeedForward
from tests.test_inspect_report import block, check, report


@pytest.mark.parametrize("write", ["to_json", "to_csv", "to_graphml", "to_html"])
def test_paths_that_cannot_be_written(report, tmp_path, write, monkeypatch):
    if write == "to_html":
        pytest.importorskip("qpass.inspect.page")
    for path in (tmp_path / "no" / "such" / "folder", tmp_path):
        with pytest.raises(qpass.QpassError, match=re.escape(str(path))):
            getattr(report, write)(path)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(qpass.QpassError, match="No space left on device"):
        getattr(report, write)(tmp_path / "file")
    assert not list(Path(tmp_path).iterdir())


def test_a_graph_of_a_million_nodes_is_refused(report, monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "LINES", 5)
    for call in (report.to_dot, report.to_json, lambda: report.to_graphml(tmp_path / "g")):
        with pytest.raises(qpass.QpassError, match=r"nodes after .*more than 5.*depth"):
            call()
    assert "digraph" in report.to_dot(depth=1)


def test_levels_and_depths_that_are_none(report):
    with pytest.raises(qpass.QpassError, match="Did you mean 'lowered'"):
        report.to_dot("lowerd")
    with pytest.raises(qpass.QpassError, match="depth=0"):
        report.to_dot(depth=0)


def wrong(*_):
    raise KeyError("missing")


@pytest.mark.parametrize(
    ("metric", "says"),
    [
        (lambda *_: float("nan"), r"<lambda>, with all sites quantized: it returned nan"),
        (lambda *_: "much", "returned a str; expected one number"),
        (lambda *_: torch.zeros(2), "returned a Tensor; expected one number"),
        (wrong, "metric wrong, with all sites quantized: it raised KeyError: 'missing'"),
        (7, "metric=7 is none of auto, kl, squared error"),
        ("klm", "Did you mean 'kl'"),
    ],
)
def test_metrics_that_are_none(block, metric, says):
    model, data, q = block
    with pytest.raises(qpass.QpassError, match=says):
        qpass.inspect(q, model, data[0], metric=metric)


def test_a_metric_that_fails_names_the_site(block):
    model, data, q = block
    calls = []

    def late(*_):
        calls.append(0)
        return 1.0 if len(calls) < 4 else float("inf")

    with pytest.raises(qpass.QpassError, match=r"metric late, with up:linear\.0 alone left float: it returned inf"):
        qpass.inspect(q, model, data[0], metric=late, alone=True)


class Other(nn.Module):
    """Another model's class, with one layer of the same name."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 96)

    def forward(self, x):
        return self.up(x)


def test_wrong_models_and_batches(block):
    model, data, q = block
    with pytest.raises(qpass.QpassError, match="this Other lacks"):
        qpass.inspect(q, Other().eval(), data)
    with pytest.raises(qpass.QpassError, match="integers stand for other values than"):
        qpass.inspect(q, FeedForward().eval(), data)
    with pytest.raises(qpass.QpassError, match="not compiled by qpass"):
        qpass.inspect(model)
    with pytest.raises(qpass.QpassError, match="compiled already"):
        qpass.inspect(q, q, data)
    with pytest.raises(qpass.QpassError, match=r"batch 1 .*raised RuntimeError"):
        qpass.inspect(q, model, [data[0], torch.randn(4, 6, 33)])
    with pytest.raises(qpass.QpassError, match=r"batch 0\['y'\]|batch 0 does not fit"):
        qpass.inspect(q, model, [{"y": data[0]}])
    with pytest.raises(qpass.QpassError, match="batches is a int"):
        qpass.inspect(q, model, 3)
    with pytest.raises(qpass.QpassError, match=r"up:linear\.0\.input: a value is not finite"):
        qpass.inspect(q, model, data[0] * float("nan"))


def test_what_is_lacking_is_said(block):
    model, data, q = block
    spent = iter(data)
    list(spent)
    with pytest.raises(qpass.QpassError, match="a generator gives its batches once"):
        qpass.inspect(q, model, spent)
    with pytest.raises(qpass.QpassError, match="got reference without batches"):
        qpass.inspect(q, model)
    with pytest.raises(qpass.QpassError, match="got batches without reference"):
        qpass.inspect(q, None, data)
    with pytest.raises(qpass.QpassError, match="need the float model and batches"):
        qpass.inspect(q, alone=True)


def test_a_site_that_no_longer_exists(report):
    with pytest.raises(qpass.QpassError, match=r"no site 'upp:linear\.0'.*Did you mean"):
        report.explain("upp:linear.0")


def test_a_site_that_no_batch_comes_to_is_noted():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, often: bool):
            return self.a(x) if often else self.b(x)

    torch.manual_seed(0)
    model, x = Sometimes().eval(), torch.randn(4, 8)
    q = qpass.compile(model, plan=qpass.analyze(model, "w8a16"), backend="reference")
    report = qpass.inspect(q, model, (x, True))
    assert report.measured.notes == ("b:linear.0 is quantized, but no batch came to it",)
    assert "no batch came to it" in str(report)
    check(report.document())

"""The report's document and its files: one schema, every key there, names escaped, wrong paths refused."""

import csv
import dataclasses
import importlib.resources
import io
import json
import re
from pathlib import Path

import jsonschema
import networkx
import pytest
import torch
from torch import nn

import qpass
from qpass.inspect import document as documents
from qpass.inspect import levels
from qpass.inspect.report import Report
from qpass.inspect.tables import COLUMNS
from qpass.pipeline import Step
from qpass.source_lines import source_line
from tests.models import FeedForward, batches

SCHEMA = json.loads(importlib.resources.files("qpass.inspect").joinpath("schema.json").read_text())


@pytest.fixture(scope="module")
def block():
    torch.manual_seed(0)
    model, data = FeedForward().eval(), batches(4)
    q = qpass.compile(model, "w8a8", example_inputs=data[0], calibration=data, backend="reference")
    return model, data, q


@pytest.fixture(scope="module")
def report(block):
    model, data, q = block
    return qpass.inspect(q, model, data, alone=True, times=True)


@pytest.fixture(scope="module")
def found(report):
    return report.document()


def check(document):
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    json.dumps(document, allow_nan=False)


def test_the_schema_is_one_and_the_document_follows_it(found):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    check(found)
    with pytest.raises(jsonschema.ValidationError):
        check(found | {"more": 1})


def test_documents_of_what_was_not_measured(block):
    bare = qpass.inspect(block[2]).document()
    check(bare)
    assert {site["sqnr"] for site in bare["sites"]} == {None}
    assert bare["summary"]["batches"] == 0
    check(Report(qpass.inspect(block[2]).plan, (), "none").document())


def test_figures_of_the_summary(found):
    summary, weights = found["summary"], 2 * 32 * 96
    assert summary["model"] == "FeedForward"
    assert summary["metric"] == "squared error"
    assert summary["loss"] > 0
    assert summary["parameters"] == {"all": weights + 64 + 96 + 32, "quantized": weights}
    assert summary["multiply_adds"] == {"all": 24 * weights, "quantized": 24 * weights}
    packed = weights + 4 * (96 + 32)  # codes, and a scale a row
    assert summary["bytes"] == {"float": 4 * (weights + 192), "quantized": 4 * 192 + packed}
    assert summary["sites"] == {"quantized": 2, "float": 0}
    assert min(summary["milliseconds"].values()) > 0


def test_figures_of_a_site(block, found):
    up, down = found["sites"]
    assert (up["module"], up["weight_type"], up["input_type"], up["shape"]) == ("up", "i8/c0", "u8/t", [96, 32])
    channels, weight = up["weight_channels"], block[0].up.weight
    assert channels["of"] == len(channels["lo"]) == 96
    packed = qpass.inspect(block[2]).plan["up:linear.0"].packed
    if packed.in_mul is None:
        assert channels["lo"] == pytest.approx(weight.amin(1).tolist())
        assert sum(up["weight_histogram"]["counts"]) == weight.numel()
    assert channels["scale"] == pytest.approx(packed.scale.flatten().tolist())
    assert up["source"]["file"] == "models.py"
    assert "self.down(self.act(self.up(self.norm(x))))" in up["source"]["code"]
    assert "residual" in down["rules"]
    assert any(miss["rule"] == "requantize" for miss in up["missed"])
    assert 0 < up["roofline"] <= 1
    assert up["milliseconds"] > 0


def test_levels_hold_the_graph(found, report):
    graph = found["graphs"][0]
    assert [level["level"] for level in graph["levels"]] == ["float", "annotated", "qdq", "fused", "lowered"]
    for level in graph["levels"]:
        ids = [node["id"] for node in level["nodes"]]
        assert ids == list(range(len(ids)))
        assert all(source < node["id"] for node in level["nodes"] for source in node["inputs"])
        calls = [node for node in level["nodes"] if node["kind"] == "call"]
        assert len(calls) == len(re.findall(r"^  %", report.graph(level["level"]), re.MULTILINE))
    annotated = {node["site"]: node for node in graph["levels"][1]["nodes"] if node["site"]}
    up = annotated["up:linear.0"]
    assert (up["op"], up["module"], up["dtype"], up["shape"][-1]) == ("aten.linear", "up", "float32", 96)
    sources = [graph["levels"][1]["nodes"][i] for i in up["inputs"]]
    assert [(s["kind"], s["op"]) for s in sources] == [("call", "aten.layer_norm"), *[("parameter", "parameter")] * 2]
    assert any(node["rule"] for node in graph["levels"][-1]["nodes"])


def test_collapsing_keeps_what_is_outside():
    step = Step("capture", "float", "graph(%x0):\n  %0 = aten.linear(%x0, @a.b.w)   # float32[2]\n"
                "  %1 = aten.relu(%0)\n  %2 = aten.add(%1, %x0)\n  return (%2)", 0, 0.0, ("a.b", "a.c", ""))  # fmt: skip
    made = levels.collapsed(levels.nodes(step), 1)
    assert [(node.kind, node.op, node.module, node.inputs) for node in made] == [
        ("input", "input", "", ()),
        ("call", "module", "a", (0,)),
        ("call", "aten.add", "", (1, 0)),
        ("output", "output", "", (2,)),
    ]


def test_files(report, tmp_path):
    assert json.loads(report.to_json(tmp_path / "r.json")) == json.loads((tmp_path / "r.json").read_text())
    rows = list(csv.DictReader(io.StringIO(report.to_csv(tmp_path / "r.csv"))))
    assert tuple(rows[0]) == COLUMNS
    assert float(rows[0]["sqnr"]) == report.errors["up:linear.0"].sqnr
    assert report.to_dot().startswith("digraph")
    assert report.to_dot(depth=1).count("label=") < report.to_dot().count("label=")
    report.to_graphml(tmp_path / "r.graphml", "float")
    graph = networkx.read_graphml(tmp_path / "r.graphml")
    assert "aten.gelu" in {data["op"] for _, data in graph.nodes(data=True)}


def test_text_and_notebook_show_the_worst_first(report):
    lines = str(report).splitlines()
    at = lines.index("  the worst sites:")
    worst = max(report.errors.values(), key=lambda e: e.loss_alone)
    assert lines[at + 2].split()[0] == worst.site
    assert report._repr_html_().index(worst.site) < 1500
    assert "beyond the grid" in report.explain("up")
    assert "source  models.py, line" in report.explain("up")


def test_names_are_escaped(report):
    script = "<script>alert(1)</script>"
    sites = {script: dataclasses.replace(report.plan["up:linear.0"], site=script, note=script)}
    plan = qpass.Plan(report.plan.scheme, sites, 1)
    evil = Report(plan, (), "none", model=script)
    assert "<script" not in evil._repr_html_()
    measured = dataclasses.replace(
        report.measured, errors={script: dataclasses.replace(report.errors["up:linear.0"], site=script)}
    )
    assert "<script" not in dataclasses.replace(evil, measured=measured)._repr_html_()
    formula = '=1+1"x:linear.0'
    plan = qpass.Plan(report.plan.scheme, {formula: dataclasses.replace(report.plan["up:linear.0"], site=formula)}, 1)
    (row,) = csv.DictReader(io.StringIO(Report(plan, (), "none").to_csv()))
    assert row["site"] == "'" + formula


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
        return 1.0 if len(calls) < 3 else float("inf")

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


def test_source_lines_skip_torch_and_the_front_end():
    trace = (
        '  File "/a/nets.py", line 3, in forward\n    return self.net(x)\n'
        '  File "/b/torch/nn/modules/container.py", line 9, in forward\n    input = module(input)\n'
    )
    assert vars(source_line(trace)) == {"file": "nets.py", "line": 3, "code": "return self.net(x)"}
    assert source_line("") is source_line(None) is source_line("no frames") is None

"""The report's document and its files: one schema, every key there, names escaped, wrong paths refused."""

import csv
import dataclasses
import importlib.resources
import io
import json
import re

import jsonschema
import networkx
import pytest
import torch

import qpass
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
    packed = weights + 4 * (96 + 32 + 32)  # codes, a scale a row, a factor a column of the first
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
    kinds = [(node["kind"], node["op"]) for node in (graph["levels"][1]["nodes"][i] for i in up["inputs"])]
    assert kinds == [("call", "aten.layer_norm"), ("call", "qpass.dequantize"), ("parameter", "parameter")]
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


def test_source_lines_skip_torch_and_the_front_end():
    trace = (
        '  File "/a/nets.py", line 3, in forward\n    return self.net(x)\n'
        '  File "/b/torch/nn/modules/container.py", line 9, in forward\n    input = module(input)\n'
    )
    assert vars(source_line(trace)) == {"file": "nets.py", "line": 3, "code": "return self.net(x)"}
    assert source_line("") is source_line(None) is source_line("no frames") is None

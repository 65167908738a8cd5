"""python -m qpass inspect: what is measured, and each form it is shown in; wrong input gets a sentence."""

# ruff: noqa: F401, F811 (fixtures of another file)

import json

import networkx
import pytest
import torch

import qpass
from qpass.cli import inspecting
from tests.models import FeedForward, batches
from tests.test_cli import fails, nets, run

REFERENCE = "--backend reference"
METRIC = """
def apart(output, wanted):
    return (output - wanted).abs().max()

def broken(output, wanted):
    return output.missing
"""


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    model, data = FeedForward().eval(), batches()
    q = qpass.compile(model, "w8a8", data[0], data, backend="reference")
    return qpass.inspect(q, model, data, alone=True)


@pytest.fixture
def known(report, monkeypatch):
    """Every command shows this report; how it is made is not what is tested."""
    monkeypatch.setattr(inspecting, "_report", lambda options: report)


@pytest.mark.usefixtures("known")
def test_forms(run, report, tmp_path):
    heads, first, *_ = run("inspect nets:net --worst 1").splitlines()
    assert heads.split()[:3] == ["site", "weight", "input"]
    assert first.split()[0] == max(report.errors.values(), key=lambda e: e.loss_alone).site
    tree = run("inspect nets:net --tree").splitlines()
    assert tree[0].startswith("FeedForward  24,576 > ")
    assert any(line.split()[1] == "up" and "SQNR" in line for line in tree)
    assert json.loads(run("inspect nets:net --json"))["format"] == "qpass-report"
    assert run("inspect nets:net --json r.json") == "wrote r.json\n"
    assert run("inspect nets:net --csv -").splitlines()[0].startswith("site,operation,")
    assert run("inspect nets:net --csv r.csv") == "wrote r.csv\n"
    assert run("inspect nets:net --dot --level float").startswith("digraph")
    assert run("inspect nets:net --graphml r.graphml --depth 1") == "wrote r.graphml\n"
    assert "module" in {data["op"] for _, data in networkx.read_graphml(tmp_path / "r.graphml").nodes(data=True)}
    assert {path.name for path in tmp_path.iterdir()} >= {"r.json", "r.csv", "r.graphml"}
    found = run("inspect nets:net --diff float lowered").splitlines()
    assert any(line.startswith("+ ") and "qpass.linear" in line for line in found)
    assert "at the model's output" in run("inspect nets:net --explain up")


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--worst 0", "--worst 0 is not a positive number"),
        ("--json no/such/r.json", "cannot write no/such/r.json"),
        ("--csv no/such/r.csv", "cannot write no/such/r.csv"),
        ("--graphml no/such/r", "cannot write no/such/r"),
        ("--dot --level flot", "Did you mean 'float'?"),
        ("--dot --depth 0", "depth=0 is not a positive number"),
    ],
)
def test_wrong_forms(fails, line, says):
    assert says in fails(f"inspect nets:net {line}")


def test_a_metric_of_a_module(run, fails, tmp_path):
    (tmp_path / "own.py").write_text(METRIC)
    found = run(f"inspect nets:net --metric own:apart --alone {REFERENCE}")
    assert "apart of the output, all sites: " in found
    assert "on 4 batches" in found
    assert "metric broken, with all sites quantized: it raised AttributeError" in fails(
        f"inspect nets:net --metric own:broken {REFERENCE}"
    )


def test_what_cannot_be_measured(run, fails):
    assert "brings no inputs to measure with" in fails(f"inspect nets:bare --alone {REFERENCE}")
    assert "brings no inputs to measure errors on" in fails(f"inspect nets:bare --worst 3 {REFERENCE}")
    run("compile nets:bare --scheme w8a16 -o net.qpass --backend reference")
    assert "give the float model it was made from" in fails("inspect net.qpass --times")

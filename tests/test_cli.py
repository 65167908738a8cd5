"""python -m qpass, in this process: what each command prints, and what wrong input gets (a sentence, status 2)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qpass
from qpass.cli import inspecting, main
from qpass.passes import ORDER

FACTORY = """
import torch
from tests.models import FeedForward, batches

def net():
    torch.manual_seed(0)
    data = batches()
    return FeedForward().eval(), data[0], data

def bare():
    return net()[0]

def with_inputs():
    return net()[:2]

def broken():
    return net().missing

def wrong():
    return 3

MODEL = FeedForward().eval()
NUMBER = 7
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    """A module of factories on the path, and a folder to write to as the current one."""
    (tmp_path / "nets.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("nets", None)


@pytest.fixture
def run(capsys):
    """Runs a command line that must succeed; returns what it printed."""

    def call(line):
        assert main(line.split()) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return call


@pytest.fixture
def fails(capsys):
    """Runs a command line that must be refused; returns its one sentence."""

    def call(line):
        assert main(line.split()) == 2
        out, err = capsys.readouterr()
        assert not out
        assert "Traceback" not in err
        return err

    return call


REFERENCE = "--backend reference"


def test_passes_and_rules_without_a_model(run):
    listed = [line.split()[0] for line in run("inspect --passes").splitlines()[1:]]
    assert listed == [each.name for each in ORDER]
    assert "requantize" in run("inspect --rules")


def test_passes_and_rules_of_a_model(run):
    edits = {line.split()[0]: line.split()[3] for line in run(f"inspect nets:net --passes {REFERENCE}").splitlines()}
    assert (edits["insert-qdq"], edits["simplify"]) == ("2", "0")
    hits = {line.split()[0]: line.split()[1] for line in run(f"inspect nets:net --rules {REFERENCE}").splitlines()}
    assert (hits["integer_linear"], hits["linear_gelu"], hits["linear_relu"]) == ("2", "1", "0")


@pytest.fixture(scope="module")
def reports():
    """Reports by what they are of."""
    return {}


@pytest.mark.parametrize(
    "name", [*(each.name for each in ORDER), "capture", "float", "annotated", "qdq", "fused", "lowered"]
)
def test_a_graph_after_each_pass_and_level(run, reports, monkeypatch, name):
    """The first command makes the report; the others show another graph of it."""
    make = inspecting._report
    monkeypatch.setattr(
        inspecting, "_report", lambda options: reports.get("net") or reports.setdefault("net", make(options))
    )
    assert run(f"inspect nets:net --after {name} {REFERENCE}").startswith("graph(%x0")


def test_difference_of_two_levels(run):
    found = run(f"inspect nets:net --diff qdq fused {REFERENCE}").splitlines()
    assert any(line.startswith("- ") and "qpass.dequantize" in line for line in found)
    assert any(line.startswith("+ ") and "qpass.linear" in line for line in found)
    assert run(f"inspect nets:net --diff fused fused {REFERENCE}").strip() == ""


def test_explain_says_everything_of_a_site(run):
    found = run(f"inspect nets:net --explain up:linear.0 {REFERENCE}")
    for wanted in ("weight [96, 32] of up.weight", "i8/c0", "12,288 bytes in float32", "u8/t, seen", "zero point",
                   "SQNR", "qpass.linear(", "missed  requantize"):  # fmt: skip
        assert wanted in found
    assert "down:linear.0" not in found.partition("\n")[0]
    glob = run(f"inspect nets:net --explain * {REFERENCE}")
    assert glob.count("SQNR") == 2


def test_explain_says_why_a_site_is_float(run):
    run("compile nets:net --scheme w8a8 --recipe up=float -o net.qpass --backend reference")
    found = run("inspect net.qpass --explain up:linear.0")
    assert "float (12,288 bytes in float32): the recipe leaves it in float" in found


def test_plan_and_json(run):
    rows = run(f"inspect nets:net --plan {REFERENCE}").splitlines()
    assert rows[1].split()[:2] == ["up:linear.0", "96x32"]
    data = json.loads(run(f"inspect nets:net --json {REFERENCE}"))
    assert [site["site"] for site in data["sites"]] == ["up:linear.0", "down:linear.0"]
    assert data["sites"][0]["sqnr"] > 10


def test_compile_saves_what_load_reads(run):
    printed = run("compile nets:net -o net.qpass --save-plan net.plan --backend reference")
    assert "w8a8: 2 of 2 sites" in printed
    assert "wrote net.qpass" in printed
    from nets import net

    model, x, _ = net()
    q = qpass.load("net.qpass", model, backend="reference")
    again = qpass.compile(model, plan=qpass.Plan.load("net.plan"), backend="reference")
    with torch.no_grad():
        assert torch.equal(q(x), again(x))
    assert "2 of 2 sites" in run("inspect net.qpass")
    assert "up:linear.0" in run("inspect net.plan --plan")
    assert run("inspect net.qpass --model nets:net --after fused --backend reference").startswith("graph(")
    assert run("inspect net.plan --model nets:net --after fused --backend reference").startswith("graph(")
    assert "2 of 2 sites" in run("compile nets:net --plan net.plan -o other.qpass --backend reference")


def test_models_without_calibration_and_without_inputs(run):
    assert "w8a8-dynamic: 2 of 2" in run(f"inspect nets:with_inputs {REFERENCE}")
    assert "w8a8-dynamic: 2 of 2" in run(f"inspect nets:bare {REFERENCE}")
    assert "w8a16: 2 of 2" in run(f"inspect nets:MODEL --scheme w8a16 {REFERENCE}")


def test_bench(run):
    found = run("bench nets:net --rounds 2 --scheme w8a16 --backend reference").splitlines()
    assert [line.split("  ")[0] for line in found[1:]] == ["float", "float, torch.compile", "qpass w8a16"]
    assert float(found[-1].split()[-1]) < 0.03


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("inspect mpl", "Did you mean 'mlp'?"),
        ("inspect nowhere:net", "there is no module 'nowhere'"),
        ("inspect nets:nett", "Did you mean 'net'?"),
        ("inspect nets:", "needs a module and a name in it"),
        ("inspect nets:broken", "AttributeError"),
        ("inspect nets:wrong", "returned a int"),
        ("inspect nets:NUMBER", "is a int; expected a model"),
        ("inspect nets.py", "cannot be read"),
        ("inspect mlp --model nets:net", "--model goes with a saved file"),
        (f"inspect nets:net --scheme w8a9 {REFERENCE}", "2 to 8"),
        ("inspect nets:net --backend gpu", "is not one of auto, cpu, reference"),
        (f"inspect nets:bare --after fuse {REFERENCE}", "let its factory return (model, example_inputs)"),
        (f"inspect nets:net --after fusee {REFERENCE}", "Did you mean 'fuse'?"),
        (f"inspect nets:net --explain up:linar.0 {REFERENCE}", "Did you mean 'up:linear.0'?"),
        (f"inspect nets:net --after fuse --graph 9 {REFERENCE}", "there is no graph 9"),
        ("compile nets:with_inputs --scheme w8a8 -o x.qpass", "needs calibration"),
        ("compile nets:net --recipe up -o x.qpass", "is not GLOB=SCHEME"),
        ("compile nets:net --recipe pu=float -o x.qpass", "Did you mean 'up'?"),
        ("compile nets:net --plan nothing.plan -o x.qpass", "there is no file nothing.plan"),
        ("compile nets:net --plan p --scheme w8a8 -o x.qpass", "give it alone"),
        ("bench nets:bare", "brings no inputs to time it with"),
        ("bench nets:net --rounds 0", "is not a positive number"),
        ("demo --scheme w8b8", "Did you mean 'w8a8'?"),
    ],
)
def test_wrong_input_gets_a_sentence(fails, line, says):
    assert says in fails(line)


@pytest.mark.parametrize(
    "line",
    ["", "inspekt", "compile nets:net", "inspect --graph x", "inspect mlp --plan --rules", "bench --rounds many"],
)
def test_wrong_command_lines_get_usage(fails, line):
    assert "usage: python -m qpass" in fails(line)


def test_a_saved_file_without_its_model_has_no_graph(run, fails):
    run("compile nets:net -o net.qpass --backend reference")
    assert "give the float model it was made from" in fails("inspect net.qpass --after fused")
    assert "has its scheme already" in fails("inspect net.qpass --scheme w8a8")
    assert "cannot write" in fails("compile nets:net --backend reference -o no/such/folder/net.qpass")


@pytest.mark.parametrize("command", ["inspect", "compile", "bench", "demo"])
def test_help_has_examples(run, command):
    assert f"examples:\n  python -m qpass {command}" in run(f"{command} --help")


def test_in_a_pipe():
    """A reader that stops early is no error, and nothing is cut to a terminal's width."""
    line = f"{sys.executable} -m qpass inspect --passes | head -1; exit ${{PIPESTATUS[0]}}"
    root = Path(qpass.__file__).resolve().parents[1]
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=root, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:3] == ["pass", "needs", "leaves"]


@pytest.mark.slow
def test_minilm(run):
    found = run("inspect minilm --scheme w8a8-dynamic --explain *.layer.0.attention.self.key --backend reference")
    assert "weight [384, 384] of encoder.layer.0.attention.self.key.weight" in found
    assert "shared with encoder.layer.0.attention.self.query:linear.0" in found
    assert "merge_siblings" in found


@pytest.mark.slow
def test_demo(run, monkeypatch):
    from qpass import demo

    for name, value in {"SHAPES": ((1, 16),), "SCORED": 32, "CALIBRATED": 16, "REPEATS": 1}.items():
        monkeypatch.setattr(demo, name, value)
    found = run("demo")
    for wanted in ("of multiply-adds", "MB in float32", "latency, side by side", "fp32", "bf16", "qpass w8a8",
                   "same nearest neighbour", "the ten sites with the largest error", "SQNR"):  # fmt: skip
        assert wanted in found

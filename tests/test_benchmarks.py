"""What the benchmark scripts compute and write, without timing anything."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from qpass.timing import interleaved

FOLDER = Path(__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("minilm_benchmark", FOLDER / "minilm.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def test_rounds_are_interleaved_and_turned():
    order = []
    times = interleaved({name: lambda n=name: order.append(n) for name in "abc"}, rounds=2, warm_up=1)
    assert "".join(order) == "abc" + "abc" + "cba"
    assert set(times) == set("abc")


def test_ratios_are_against_the_best_peer_of_each_shape(script):
    shapes = ((1, 16), (8, 128))
    figures = {"bf16 inductor": (4.0, 10.0), "torchao int8 dynamic": (2.0, 20.0), "fp32 eager": (1.0, 1.0),
               "qpass w8a8": (1.0, 5.0)}  # fmt: skip
    times = {(name, shape): ms for name, row in figures.items() for shape, ms in zip(shapes, row, strict=True)}
    head, *rows = script.ratios(times, list(figures))
    assert head[1:] == ("torchao int8 dynamic", "bf16 inductor")
    assert rows == [("qpass w8a8", "0.50", "0.50")]
    assert script.ratios(times, ["fp32 eager", "qpass w8a8"]) == []


def test_write_replaces_the_table_between_the_markers(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "tests/benchmarks/results").mkdir(parents=True)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{script.BEGIN}old\n{script.END}\nafter\n")
    for _ in range(2):  # the second run finds its own table
        script.write([script.markdown([("a", "b"), ("1", "2")]), "ratios"])
    text = readme.read_text()
    assert text.startswith(f"before\n{script.BEGIN}| a | b |\n| --- | --- |\n| 1 | 2 |\n")
    assert text.endswith(f"{script.END}\nafter\n")
    assert "old" not in text
    (result,) = (tmp_path / "tests/benchmarks/results").iterdir()
    assert "ratios" in result.read_text()
    assert torch.__version__.partition("+")[0] in result.read_text()


def test_the_readme_has_the_markers(script):
    text = (FOLDER.parents[1] / "README.md").read_text()
    assert text.index(script.BEGIN) < text.index(script.END)


def test_every_variant_is_named_once(script):
    names = [name for name, *_ in script.VARIANTS]
    assert len(set(names)) == len(names)
    assert set(script.PEERS) < set(names)


@pytest.fixture
def records(script, tmp_path, monkeypatch):
    """training_records, its file and its page in an empty folder."""
    module = importlib.import_module("training_records")
    monkeypatch.setattr(module, "KEPT", tmp_path / "training.json")
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    marks = "".join(f"<!-- tables of the {part}: {m} -->\n" for part in ("CNNs", "byte GPT") for m in ("begin", "end"))
    module.PAGE.write_text(f"before\n{marks}behind\n")
    return module


def test_training_tables_grow_by_seeds(records):
    """A second run of a seed takes the place of the first; increases are over the control of the same run."""
    task = importlib.import_module("training_tasks").digits("plain")
    how, curve = ("lsq+", True), [{"step": 25.0, "loss": 0.123456789}]
    for seed, base, score in ((0, 99.0, 90.0), (0, 99.0, 98.5), (1, 98.0, 98.25)):
        runs = [records.record(task, seed, "float", ("", False), (base, base), curve)]
        records.keep([*runs, records.record(task, seed, "w2a2", how, (score, base), curve)])
    assert len(records.kept()) == 4
    assert records.kept()[0]["curve"] == [{"step": 25.0, "loss": 0.12346}]
    records.report([task])
    page = records.PAGE.read_text()
    assert "| w2a2 | 0.1250 | -0.2500 .. 0.5000 | 1.0 | 2 |" in page
    assert page.startswith("before")
    assert page.endswith("behind\n")
    assert "| float | 98.5000 itself |" in page
    records.report([task])
    assert records.PAGE.read_text() == page
    records.keep([records.record(task, 0, "float", ("", False), (50.0, 50.0), curve)])  # on another machine, say
    records.report([task])
    assert "| w2a2 | 0.1250 | -0.2500 .. 0.5000 | 1.0 | 2 |" in records.PAGE.read_text()

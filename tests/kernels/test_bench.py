"""The benchmark without a GPU: its tables and files, what it says of kernels that fail or are wrong, how it ends."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, checks, clocks, end_to_end, flow, peers, run, tables
from qpass_kernels import samples, timing

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def dry(folder, *options):
    return run.main(["--dry", "--out", str(folder), *options])


def rows_of(folder, name="kernels"):
    with (folder / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_dry_run(tmp_path, capsys):
    """As a script, the way it is run; every row is a time or says why there is none."""
    command = [sys.executable, ROOT / "kernels/bench/run.py", "--dry", "--out", tmp_path]
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=own)
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path)
    assert {row["measured"] for row in rows} == {tables.DRY}
    assert all(row["us"] or row["verdict"].startswith("failed: ") for row in rows)
    mine = [row for row in rows if row["by"].startswith("qpass")]
    assert {row["scheme"] for row in mine} == {*cases.KINDS, "int8", "int8, one scale", "silu, mul, int8"}
    assert all(row["us"] and float(row["error"]) <= float(row["allowed"]) for row in mine)
    asked = [row for row in rows if row["goal"]]
    assert [row["verdict"] for row in asked] == ["missed", "met", "missed", "missed"]
    text = (tmp_path / "kernels.md").read_text(encoding="utf-8")
    assert tables.DRY in text.splitlines()[0]
    assert "Nothing was timed" in text
    assert "- torch: " in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: f"{peer.name} {peer.scheme}")
def test_peers_that_are_missing_say_so(peer, monkeypatch):
    for package in ("humming", "gemlite", "torchao", "fbgemm_gpu"):
        monkeypatch.setitem(sys.modules, package, None)
    given = cases.problem(32, 64, 128, CPU, torch.float16)
    row = tables.Row("64x128", 32, peer.scheme, peer.name)
    clock = clocks.DryClock()
    flow.timed([(row, lambda: cases.theirs(peer, given))], clock, clocks.Ceilings(1e9, {}, {}), 1.0, CPU)
    assert row.us is not None or row.verdict.startswith("failed: ")
    assert (row.us is not None) == (peer.name.startswith("torch ") and "int4" not in peer.name)


def test_packages_of_peers_are_named():
    about = tables.machine(CPU)
    assert {*peers.PACKAGES} <= {*about}


def test_4_bit_groups():
    w = torch.randn(8, 256)
    codes, scale, least = peers.groups_of_4_bits(w)
    back = codes.reshape(8, 2, 128) * scale[..., None] + least[..., None]
    assert int(codes.max()) <= 15
    assert float((back.reshape(8, 256) - w).abs().max()) <= float(scale.max()) / 2 + 1e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    for options in ([], ["--check"], ["--end-to-end"]):
        assert run.main(options) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_dry_run_is_not_written_under_docs(capsys):
    for folder in (ROOT / "docs", ROOT / "docs" / "benchmarks" / "x"):
        with pytest.raises(SystemExit):
            run.main(["--dry", "--out", str(folder)])
    assert "no measurement" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--kinds", "w3a3"])


def test_wrong_results_end_with_1(tmp_path, monkeypatch):
    """A wrong result has no time, and its goal is not met."""
    right = samples.run
    monkeypatch.setattr(samples, "run", lambda s, config=None: right(s, config) * 1.01)
    assert dry(tmp_path, "--no-peers", "--kinds", "w4a16", "--only", "64x128") == 1
    mine = [row for row in rows_of(tmp_path) if row["by"] == "qpass"]
    assert {(row["verdict"], row["us"]) for row in mine} == {("wrong", "")}


def test_kernels_that_fail_are_rows(tmp_path, monkeypatch):
    def fails(sample, config=None):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory\nand much more")

    monkeypatch.setattr(samples, "run", fails)
    assert dry(tmp_path, "--no-peers", "--kinds", "w4a16", "--only", "64x128") == 0
    mine = [row for row in rows_of(tmp_path) if row["by"] == "qpass"]
    assert {row["verdict"] for row in mine} == {"failed: OutOfMemoryError: CUDA out of memory"}


@pytest.mark.parametrize("error", [timing.Lost("the CUDA context is lost"), KeyboardInterrupt()], ids=repr)
def test_what_was_measured_before_the_end_is_written(tmp_path, monkeypatch, error):
    right = samples.run

    def second(sample, config=None):
        if sample.size[0] > 2:
            raise error
        return right(sample, config)

    monkeypatch.setattr(samples, "run", second)
    assert dry(tmp_path, "--no-peers", "--kinds", "w4a16") == 1
    rows = rows_of(tmp_path)
    assert any(row["us"] for row in rows)
    assert any(row["verdict"] == "failed: the run was stopped before it" for row in rows)
    assert "- stopped: " in (tmp_path / "kernels.md").read_text(encoding="utf-8")


def test_a_failed_kernel_that_took_the_context_is_named(monkeypatch):
    def gone(device):
        raise timing.Lost("the CUDA context is lost: illegal address")

    def fails():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(timing, "alive", gone)
    row = tables.Row("64x128", 2, "w8a8", "somebody")
    with pytest.raises(timing.Lost, match="64x128, 2 rows, w8a8 by somebody: failed: RuntimeError: an illegal"):
        flow.timed([(row, fails)], clocks.DryClock(), clocks.Ceilings(1e9, {}, {}), 1.0, CPU)


def test_check(capsys, monkeypatch):
    assert run.main(["--dry", "--check", "--kinds", "w8a8", "--repeat", "2"]) == 0
    assert "4 of 4 configurations right, 0 did not run" in capsys.readouterr().out
    lines, right, count = [], samples.run, []

    def restless(sample, config=None):
        count.append(1)
        y = right(sample, config)
        y[0, 0] += 0.002 * y[0, 0] * (len(count) % 2)
        return y

    monkeypatch.setattr(samples, "run", restless)
    assert checks.check(["w8a8"], CPU, torch.float16, ((2, 32, 128),), 3, 1, lines.append) == 1
    assert "gave other bits in 1 places" in lines[0]

    def fails(sample, config=None):
        raise RuntimeError("too much shared memory")

    monkeypatch.setattr(samples, "run", fails)
    assert checks.check(["w8a8"], CPU, torch.float16, ((2, 32, 128),), 3, 2, lines.append) == 1
    assert "did not run: RuntimeError: too much shared memory" in lines[2]


def test_goals_are_those_asked_for():
    """Ratios at one token, by shape, and with many tokens; all kinds that have one are measured."""
    assert cases.GOALS[4096, 4096, 1] == {"w8a8": 1.75, "w4a16": 2.5, "w4a8": 2.5}
    assert cases.GOALS[28672, 8192, 1]["w4a8"] == 3.7
    assert {m for n, _, m in cases.GOALS if n == 14336} == {1, 16, 64, 2048, 8192}
    assert {kind for goals in cases.GOALS.values() for kind in goals} < {*cases.KINDS}
    assert {*end_to_end.DECODE, *end_to_end.PREFILL} <= {*end_to_end.SCHEMES}


def test_bounds():
    tops = clocks.Ceilings(4e12, {"int8": 1e15, "fp8": None}, {})
    assert tops.bound(4e6, 1e6, "int8") == (pytest.approx(1.0), "copy")
    assert tops.bound(4e6, 1e10, "int8") == (pytest.approx(10.0), "int8")
    assert tops.bound(4e6, 1e10, "fp8") == (pytest.approx(1.0), "copy")


def test_enough_copies(monkeypatch):
    """More than three times the cache, and not without end."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 50 << 20)
    for size in (4096 * 4096 // 2, 14336 * 4096, 28672 * 8192 * 2, 1000):
        count = timing.copies_of(size, CPU)
        assert 2 <= count <= 64
        assert count == 64 or count * size > 3 * 50 << 20


def test_summary_of_times():
    found = timing.summary([float(i) for i in range(101)])
    assert found == timing.Times(50.0, 10.0, 90.0)
    assert timing.summary([3.0]) == timing.Times(3.0, 3.0, 3.0)
    assert timing.reason(ValueError("one\ntwo")) == "ValueError: one"
    assert timing.reason(AssertionError()) == "AssertionError: no message"


@pytest.mark.parametrize("kind", cases.QUANTIZED)
def test_quantize_and_product(kind):
    given = cases.problem(3, 32, 128, CPU, torch.float16)
    ready = cases.ours(kind, True, given)
    error, allowed = ready.judge()
    assert error <= allowed
    assert len(ready.calls) == 2
    assert not torch.equal(ready.calls[0](), torch.zeros(3, 32))


@pytest.mark.parametrize("fused", [True, False])
def test_norm(fused):
    error, allowed = cases.norm(5, 96, CPU, torch.float16, fused).judge()
    assert 0.3 < error <= allowed


def test_plots(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not tables.plot(tmp_path / "x.png", [], True)
    assert "pip install matplotlib" in capsys.readouterr().out


def test_llama_steps():
    """A step of decoding gives the same logits again after the cache was set back, those of a prefill of all tokens."""
    pytest.importorskip("transformers")
    model = end_to_end.llama(CPU, end_to_end.DRY_SIZES)
    with torch.no_grad():
        call, back = end_to_end.decode(model, 8, CPU)
        first = call().float()
        back()
        torch.testing.assert_close(call().float(), first)
        whole = end_to_end.prefill(model, 9, CPU)[0]().float()
    torch.testing.assert_close(first, whole, atol=0.05, rtol=0.05)


def test_end_to_end_rows(tmp_path, monkeypatch):
    """A scheme that cannot be had, and one that quantizes nothing, are rows that say so."""
    pytest.importorskip("transformers")

    def quantized(model, scheme):
        if scheme == "fp8":
            raise RuntimeError("0 of 15 sites quantized")
        return model

    monkeypatch.setattr(end_to_end, "quantized", quantized)
    assert end_to_end.main(tmp_path, CPU, True) == 0
    rows = rows_of(tmp_path, "end_to_end")
    assert {row["scheme"] for row in rows} == {"float", *end_to_end.SCHEMES}
    assert {row["verdict"] for row in rows if row["scheme"] == "fp8"} == {
        "failed: RuntimeError: 0 of 15 sites quantized"
    }
    assert {row["verdict"] for row in rows if row["goal"] and row["us"]} == {"missed"}

"""The benchmark of convolutions, quantizes and image networks without a GPU."""

import csv
import math

import pytest
import torch

from bench import convolutions, flow, networks, quantizes, run
from qpass_kernels import layers, measured, timing
from qpass_kernels.configs import Config, bucket
from qpass_kernels.launch import INTERPRETER
from qpass_kernels.measured import remember

CPU = torch.device("cpu")


def rows_of(folder, name):
    with (folder / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_of_convolutions(tmp_path):
    assert run.main(["--dry", "--out", str(tmp_path), "--kinds", "conv,rows"]) == 0
    rows = rows_of(tmp_path, "kernels")
    for layer in convolutions.DRY_LAYERS:
        mine = [row for row in rows if row["case"] == str(layer)]
        assert [(row["scheme"], row["by"]) for row in mine] == [("bf16", "torch F.conv2d"), ("int8", "qpass")]
        assert all(float(row["us"]) and float(row["ratio"]) and not row["verdict"] for row in mine)
        assert float(mine[1]["error"]) <= 1
    codes = [row for row in rows if row["case"].startswith("rows of")]
    assert len(codes) == 2 * len(quantizes.QUANTIZES)
    pools = [row for row in rows if row["case"].startswith("max pool")]
    assert [(row["by"], row["error"], row["verdict"]) for row in pools] == [
        ("torch F.max_pool2d", "0.0", ""),
        ("qpass", "0.0", ""),
    ]
    assert not any("x" in row["case"] and row["scheme"] == "w8a8" for row in rows)
    assert all(float(row["error"]) <= float(row["allowed"]) for row in codes)


@pytest.mark.parametrize("layer", convolutions.DRY_LAYERS, ids=str)
def test_what_is_moved_and_computed(layer):
    made = convolutions.ours(layer, 2, CPU)
    deep = layer.c // layer.groups
    outputs = 2 * layer.out**2 * layer.n
    assert convolutions.operations(layer, 2) == 2 * outputs * deep * layer.kernel**2
    least = 2 * layer.size**2 * layer.c + outputs + layer.n * deep * layer.kernel**2
    assert least <= made.bytes < 1.2 * least + 4 * 343 * layer.n


def test_a_wrong_convolution_has_no_time(tmp_path, monkeypatch):
    right = layers.Images.run
    monkeypatch.setattr(layers.Images, "run", lambda self, config=None: (right(self, config).int() // 2).to(torch.int8))
    assert run.main(["--dry", "--out", str(tmp_path), "--kinds", "conv"]) == 1
    rows = [row for row in rows_of(tmp_path, "kernels") if row["scheme"] == "int8" and row["by"] == "qpass"]
    assert {(row["verdict"], row["us"]) for row in rows if "max pool" not in row["case"]} == {("wrong", "")}


def test_tunes_what_a_row_is_looked_up_by(tmp_path, monkeypatch):
    """A layer that is called as a matmul as w8a8; what is known is not tuned again."""
    made = []
    monkeypatch.setattr(flow, "tune", lambda *key, device, seconds, report: made.append((key, seconds)))
    monkeypatch.setattr(flow, "tune_layer", lambda layer, batch, device, seconds, report: made.append((layer, batch)))
    line = ["--dry", "--out", str(tmp_path), "--kinds", "conv", "--tune", "3"]
    assert run.main(line) == 0
    first, matmul, _ = convolutions.DRY_LAYERS
    assert made == [(first, 2), (("w8a8", 50, 16, 8), 3.0)]
    kind, m, n, k = layers.key(first, 2)
    remember({(kind, bucket(m, kind), n, k): (Config(bm=16, bn=16, bk=32), 1.0)}, INTERPRETER)
    remember({("w8a8", bucket(50), 16, 8): (Config(), 1.0)}, INTERPRETER)
    measured.forget()
    assert run.main(line) == 0
    assert len(made) == 2
    mine = {row["case"]: row["note"] for row in rows_of(tmp_path, "kernels") if row["by"] == "qpass"}
    assert mine[str(first)].startswith("streamed 16x16x32")
    assert mine[str(matmul)].startswith("as a matmul of pixels: streamed 16x128x128")


def test_images(tmp_path):
    assert run.main(["--dry", "--images", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "images")
    assert [row["scheme"] for row in rows] == ["bf16, torch.compile", "bf16", "w8a8"]
    assert rows[2]["verdict"] == "missed"
    assert rows[2]["goal"] == "1.50 x"
    assert all(float(row["error"]) < 0.32 for row in rows)
    assert rows[2]["note"] == f"SQNR {-20 * math.log10(float(rows[2]['error'])):.1f} dB"


def test_a_network_that_is_far_off_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "quantized", lambda net, device, dry: lambda x: -net(x))
    assert networks.main(tmp_path, CPU, True) == 1
    assert rows_of(tmp_path, "images")[2]["verdict"] == "wrong"


def test_a_network_that_fails_is_a_row(tmp_path, monkeypatch):
    def fails(net, device, dry):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(networks, "quantized", fails)
    assert networks.main(tmp_path, CPU, True) == 0
    assert rows_of(tmp_path, "images")[2]["verdict"] == "failed: OutOfMemoryError: CUDA out of memory"


def test_a_stopped_run_is_written(tmp_path, monkeypatch):
    def lost(net, device, dry):
        raise KeyboardInterrupt

    monkeypatch.setattr(networks, "quantized", lost)
    monkeypatch.setattr(timing, "reason", lambda error: "stopped by hand")
    assert networks.main(tmp_path, CPU, True) == 1
    rows = rows_of(tmp_path, "images")
    assert rows[0]["us"]
    assert rows[2]["verdict"] == "failed: stopped: stopped by hand"


def test_no_time_of_the_compiled_network(tmp_path, monkeypatch):
    """Then nothing else stands in for it: no ratios, and the goal is not said to be met."""
    right, calls = networks.replayed_call, []

    def fails_first(*args):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("cannot be captured")
        return right(*args)

    monkeypatch.setattr(networks, "replayed_call", fails_first)
    monkeypatch.setattr(networks, "quantized", lambda net, device, dry: net)
    assert networks.main(tmp_path, CPU, True) == 0
    rows = rows_of(tmp_path, "images")
    assert [row["verdict"] for row in rows] == [
        "failed: RuntimeError: cannot be captured",
        "",
        "failed: nothing to compare with",
    ]
    assert {row["ratio"] for row in rows} == {""}
    assert rows[2]["us"]

"""The benchmark of convolutions, quantizes and image networks without a GPU."""

import csv

import pytest
import torch

from bench import checks, convolutions, networks, quantizes, run
from qpass_kernels import conv, layers, timing

CPU = torch.device("cpu")


def rows_of(folder, name):
    with (folder / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_of_convolutions(tmp_path):
    assert run.main(["--dry", "--out", str(tmp_path), "--no-peers", "--kinds", "w8a8"]) == 0
    rows = rows_of(tmp_path, "kernels")
    for layer in convolutions.DRY_LAYERS:
        mine = [row for row in rows if row["case"] == str(layer)]
        assert [(row["scheme"], row["by"]) for row in mine] == [("bf16", "torch F.conv2d"), ("int8", "qpass")]
        assert all(float(row["us"]) and float(row["ratio"]) and not row["verdict"] for row in mine)
        assert float(mine[1]["error"]) <= 1
    codes = [row for row in rows if row["case"].startswith("rows of")]
    assert len(codes) == 2 * len(quantizes.QUANTIZES)
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
    assert run.main(["--dry", "--out", str(tmp_path), "--no-peers", "--kinds", "w8a8"]) == 1
    rows = [row for row in rows_of(tmp_path, "kernels") if row["scheme"] == "int8" and row["by"] == "qpass"]
    assert {(row["verdict"], row["us"]) for row in rows if ">" in row["case"]} == {("wrong", "")}


def test_check(capsys, monkeypatch):
    said = []
    assert checks.check_layers(CPU, True, 1, 3, said.append) == 0
    assert checks.check_rows(CPU, torch.float16, True, 1, said.append) == 0
    assert any("3 of 3 configurations right" in line for line in said)
    right = conv.convolve

    def other(x, weight, correction, window, after, groups, config=None):
        y = right(x, weight, correction, window, after, groups, config)
        return y if config is None or config.bm != 64 else -y

    monkeypatch.setattr(conv, "convolve", other)
    assert checks.check_layers(CPU, True, 1, 3, said.append) > 0
    assert any("64x" in line and "WRONG" in line for line in said)


def test_images(tmp_path):
    assert run.main(["--dry", "--images", "--out", str(tmp_path)]) == 0
    rows = rows_of(tmp_path, "images")
    assert [row["scheme"] for row in rows] == ["bf16, torch.compile", "bf16", "w8a8"]
    assert rows[2]["verdict"] == "missed"
    assert rows[2]["goal"] == "1.50 x"
    assert all(float(row["error"]) < 0.32 for row in rows)


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

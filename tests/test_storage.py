"""Save and load: bit for bit, and each damaged file refused with a sentence."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qpass
from qpass.errors import QpassError
from tests.models import batches, encoder


@pytest.fixture
def compiled():
    data = batches()
    model = encoder()
    return model, data, qpass.compile(model, "w8a8", example_inputs=data[0], calibration=data, backend="reference")


def test_loads_bit_for_bit(compiled, tmp_path):
    _, data, q = compiled
    path = tmp_path / "model.qpass"
    qpass.save(q, path)
    loaded = qpass.load(path, encoder(), backend="reference")
    with torch.no_grad():
        assert torch.equal(loaded(data[1]), q(data[1]))
    assert {k for k in loaded.state_dict()} == {k for k in q.state_dict()}
    assert [p.name for p in tmp_path.iterdir()] == ["model.qpass"]


def test_plan_loads_and_compiles_the_same(compiled, tmp_path):
    model, data, q = compiled
    plan = qpass.inspect(q).plan
    plan.save(tmp_path / "plan")
    loaded = qpass.Plan.load(tmp_path / "plan")
    assert str(loaded) == str(plan)
    again = qpass.compile(model, plan=loaded, backend="reference")
    with torch.no_grad():
        assert torch.equal(again(data[0]), q(data[0]))


def test_damaged_files_are_refused(compiled, tmp_path):
    _, _, q = compiled
    path = tmp_path / "model"
    qpass.save(q, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(QpassError, match="truncated or damaged"):
        qpass.load(path, encoder())
    path.write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    with pytest.raises(QpassError, match="checksum"):
        qpass.load(path, encoder())
    with pytest.raises(QpassError, match="no file"):
        qpass.load(tmp_path / "nothing", encoder())
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign")
    with pytest.raises(QpassError, match="not one that qpass wrote"):
        qpass.load(tmp_path / "foreign", encoder())


def test_newer_version_and_other_kind_are_refused(compiled, tmp_path):
    _, _, q = compiled
    qpass.save(q, tmp_path / "model")
    with safe_open(str(tmp_path / "model"), "pt") as file:
        header = json.loads(file.metadata()["qpass"])
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    save_file(tensors, tmp_path / "newer", metadata={"qpass": json.dumps(header | {"version": 99})})
    with pytest.raises(QpassError, match="version 99"):
        qpass.load(tmp_path / "newer", encoder())
    with pytest.raises(QpassError, match="expected a plan"):
        qpass.Plan.load(tmp_path / "model")


def test_another_architecture_is_refused(compiled, tmp_path):
    _, _, q = compiled
    qpass.save(q, tmp_path / "model")
    with pytest.raises(QpassError, match=r"lacks|in this Sequential"):
        qpass.load(tmp_path / "model", encoder(width=64))


def test_nowhere_to_write(compiled, tmp_path):
    _, _, q = compiled
    with pytest.raises(QpassError, match="cannot write"):
        qpass.save(q, tmp_path / "no such folder" / "model")


def test_a_float_model_cannot_be_saved(tmp_path):
    with pytest.raises(QpassError, match="not compiled by qpass"):
        qpass.save(encoder(), tmp_path / "model")

"""Save and load: bit for bit, and each damaged file refused with a sentence."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qpass
from qpass.errors import QpassError
from qpass.storage import plan_from_data, plan_to_data
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


@pytest.mark.parametrize("scheme", ["w4a16-g32", "w3a16-c", "w2a16-g32"])
def test_two_codes_share_a_byte_of_the_file(scheme, tmp_path):
    model = encoder()
    plan = qpass.analyze(model, scheme)
    plan.save(tmp_path / "plan")
    loaded = qpass.Plan.load(tmp_path / "plan")
    codes = 0
    for decision in plan.quantized:
        was, now = decision.packed, loaded[decision.site].packed
        codes += was.data.numel()
        for key in ("data", "scale", "zero"):
            before, after = getattr(was, key), getattr(now, key)
            assert (before is None) == (after is None)
            assert before is None or (torch.equal(before, after) and before.dtype is after.dtype)
    with safe_open(str(tmp_path / "plan"), "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sum(t.numel() for name, t in kept.items() if name.endswith("|data")) == codes // 2
    assert all(t.dtype is torch.uint8 for name, t in kept.items() if name.endswith("|zero"))


def test_a_file_of_version_1_has_one_code_a_byte(tmp_path):
    plan = qpass.analyze(encoder(), "w4a16-g32")
    data, tensors = plan_to_data(plan)
    for entry in data["decisions"]:
        del entry["halves"]
        tensors[f"{entry['site']}|data"] = plan[entry["site"]].packed.data
    loaded = plan_from_data(data, tensors)
    for decision in plan.quantized:
        assert torch.equal(loaded[decision.site].packed.data, decision.packed.data)

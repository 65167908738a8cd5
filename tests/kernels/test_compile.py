"""Every configuration that the rules give compiles for chips that are not here, within what the chip has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.gate import RECORD, made_of
from tests.kernels.gate_cases import CASES, CHIPS, budget

ROOT = Path(__file__).resolve().parents[2]
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}


def gate(*options):
    """What the gate prints, in a process whose kernels are not interpreted."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.gate", "--json", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def names(cases):
    return [f"{case['name']} {case['chip']}" for case in cases]


def compiles(found):
    assert len(found) == len(CASES)
    assert not names(f for f in found if f["registers"] < 16), "compiled to a trap"
    assert not names(f for f in found if f["spills"])
    assert not names(f for f in found if f["shared"] > CHIPS[f["chip"]].shared)


def tensor_cores(found):
    """Each matmul uses its chip's own instruction, on the type of its operands: no integers or float8 as float16."""
    products = [f for f in found if f["weights"] or "persistent" in f["name"] or f["name"].startswith("conv")]
    assert len(products) > 80
    for f in products:
        assert f["instructions"], f
        assert all(TENSOR_CORES[f["chip"]] in name for name in f["instructions"]), f
        assert all(operands(f) in name for name in f["instructions"]), f


def operands(f):
    """How an instruction spells the type of its operands."""
    kind = f["name"].split()[0]
    if f["chip"] == "sm_100":
        return {"w8a8": "kind::i8", "w4a8": "kind::i8", "conv": "kind::i8", "fp8": "kind::f8f6f4"}.get(
            kind, "kind::f16"
        )
    floats = "f32.bf16" if " bf16 " in f["name"] else "f32.f16"
    return {"w8a8": ".s8.s8", "w4a8": ".s8.s8", "conv": ".s8.s8", "fp8": ".e4m3.e4m3"}.get(kind, floats)


def instructions_a_weight(found):
    counted = 0
    for f in found:
        most = budget(f["name"], f["chip"])
        if not f["weights"] or most is None:
            continue
        counted += 1
        assert 0 < f["loop"] * f["threads"] / f["weights"] <= most, f
    assert counted >= 8


def recorded():
    """What the whole gate found, where the kernels, their rules and triton are those that it compiled; else None."""
    record = json.loads(RECORD.read_text())
    return record["found"] if record["made of"] == made_of() else None


@pytest.mark.slow
def test_every_configuration():
    """One test, since compilations take minutes. What compiled as it is now is sampled, and compiles the same."""
    known = recorded()
    found = gate() if known is None else known
    compiles(found)
    tensor_cores(found)
    instructions_a_weight(found)
    if known is not None:
        again = gate("--sample")
        assert len(again) > len(CHIPS)
        of = {(f["name"], f["chip"]): f for f in known}
        assert [f for f in again if f != of[f["name"], f["chip"]]] == []

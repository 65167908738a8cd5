"""What the benchmark and its checks call right and wrong, in the interpreter: convolutions, pools and codes of rows."""

import pytest
import torch

from bench import cases, checks, convolutions, quantizes, run, tables
from qpass_kernels import conv, conv_depthwise, pool
from qpass_kernels.matmul import KERNELS
from qpass_kernels.timing import Times

CPU = torch.device("cpu")


def layers_checked():
    said = []
    return checks.check_layers(CPU, True, 1, 2, said.append), said


def test_all_is_right(capsys):
    assert run.main(["--dry", "--check", "--kinds", "conv,rows", "--repeat", "2"]) == 0
    out = capsys.readouterr().out
    for line in (
        "8>16 1x1 at 5: 5 of 5",
        "depthwise 3x3 at 6: 1 of 1",
        "6>14/2 3x3 at 5: 5 of 5",
        "max pool of 8, 3x3/2",
    ):
        assert line in out
    for name in ("norm", *(kind.name for kind in quantizes.QUANTIZES)):
        assert f"{name} 3 x 99: 1 of 1 configurations right" in out
    assert "w8a8" not in out


def test_one_kind_is_checked_alone(capsys):
    assert run.main(["--dry", "--check", "--kinds", "w8a8", "--repeat", "0", "--most", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {"w8a8"}
    assert all("2 of 2 configurations right" in line for line in lines)


def test_a_wrong_configuration_is_named(monkeypatch):
    right = conv.convolve

    def other(x, weight, correction, window, after, groups, config=None):
        y = right(x, weight, correction, window, after, groups, config)
        if config is not None and config.bm == 64:
            y[-1, -1, -1, -1] ^= 4
        return y

    monkeypatch.setattr(conv, "convolve", other)
    bad, said = layers_checked()
    wrong = [line for line in said if "WRONG: 4 steps off" in line]
    assert bad == len(wrong) > 0
    assert all(" streamed 64x" in line for line in wrong)


@pytest.mark.parametrize(
    ("module", "name", "case"), [(conv_depthwise, "convolve", "depthwise"), (pool, "pool", "max pool")]
)
def test_wrong_kernels_without_configurations(module, name, case, monkeypatch):
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **options: right(*args, **options).clamp(max=0) + 3)
    bad, said = layers_checked()
    assert bad == 1
    assert next(line for line in said if "WRONG" in line).startswith(f"  {case}")


def test_other_bits_are_found(monkeypatch):
    right, count = conv_depthwise.convolve, []

    def restless(*args):
        count.append(1)
        y = right(*args)
        y[0, 0, 0, 0] += len(count) % 2
        return y

    monkeypatch.setattr(conv_depthwise, "convolve", restless)
    bad, said = layers_checked()
    assert bad == 1
    assert any("depthwise" in line and "gave other bits in 1 places" in line for line in said)


@pytest.mark.parametrize("name", ["quantize_rows", "quantize_tensor", "act_quantize", "norm_quantize"])
def test_wrong_codes_of_rows(name, monkeypatch):
    """The kernels themselves are checked, also on a CPU; and one that does not run counts."""
    right, said = KERNELS[name], []

    def off(*args):
        found = right(*args)
        for codes in (found,) if torch.is_tensor(found) else found:
            if codes.itemsize == 1 and codes.numel():
                codes.view(torch.int8)[-1, -1] ^= 2
        return found

    monkeypatch.setitem(KERNELS, name, off)
    assert checks.check_rows(CPU, torch.float16, True, 1, said.append) == (4 if name == "quantize_rows" else 2)
    assert sum("WRONG" in line for line in said) == (4 if name == "quantize_rows" else 2)

    def fails(*args):
        raise RuntimeError("too many registers")

    monkeypatch.setitem(KERNELS, name, fails)
    assert checks.check_rows(CPU, torch.float16, True, 1, said.append) == (4 if name == "quantize_rows" else 2)
    assert "did not run: RuntimeError: too many registers" in "".join(said)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_right_rows_are_not_called_wrong(dtype, fused, monkeypatch):
    """In the floats of a GPU run too, of which one step of a large value is more than half a step of a code."""
    for name in ("quantize_rows", "quantize_tensor", "act_quantize", "norm_quantize"):
        monkeypatch.setitem(KERNELS, name, getattr(torch.ops.qpass_kernels, name))  # the interpreter cuts bfloat16 off
    torch.manual_seed(0)
    for kind in quantizes.QUANTIZES:
        error, allowed = quantizes.ready(kind, 300, 4096, CPU, dtype, fused).judge()
        assert 0.4 < error <= allowed < 0.6, kind.name
    error, allowed = cases.norm(300, 4096, CPU, dtype, fused).judge()
    assert 0.4 < error <= allowed < 0.6


@pytest.mark.parametrize("layer", checks.ODD_LAYERS, ids=str)
def test_odd_layers_are_right(layer):
    assert convolutions.ours(layer, 1, CPU).judge()[0] <= 1


def test_verdicts():
    def of(ratio, goal, error=0.1, verdict=""):
        return tables.verdict(tables.Row("", 1, "", "", ratio=ratio, error=error, allowed=0.2, verdict=verdict), goal)

    assert [of(2.0, 1.5), of(1.5, 1.5), of(1.4, 1.5), of(1.4, None)] == ["met", "met", "missed", ""]
    assert [of(2.0, 1.5, 0.3), of(2.0, None, float("nan"))] == ["wrong", "wrong"]
    assert [of(None, 1.5), of(2.0, 1.5, None)] == ["failed: nothing to compare with"] * 2
    assert of(2.0, 1.5, 0.1, "failed: x") == "failed: x"


def test_the_end_of_a_run():
    """A row with a time stays as it is."""
    timed, waiting = (tables.Row("", 1, "", "") for _ in range(2))
    tables.filled(timed, Times(4.0, 3.0, 5.0), 8.0, None)
    tables.end([timed, waiting], "failed: stopped")
    assert (timed.ratio, timed.verdict, waiting.verdict) == (2.0, "", "failed: stopped")

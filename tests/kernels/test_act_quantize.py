"""Activations and the quantization behind them: the kernel in Triton's interpreter, its reference, and torch op by op."""

import math

import pytest
import torch

from qpass_kernels import act_quantize as module
from qpass_kernels import rows as host
from qpass_kernels.activations import NAMES
from qpass_kernels.epilogue import ACTIVATIONS
from qpass_kernels.rows import Rows
from tests.kernels.steps import by_affine, columns, near, same

E4M3 = torch.float8_e4m3fn
FORMATS = (Rows(), Rows(symmetric=True), Rows(dtype=E4M3), Rows(out_scale=0.02, out_zero=-7))
STATIC = (Rows(out_scale=0.02, symmetric=True), Rows(out_scale=0.01, dtype=E4M3))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def with_columns(rows, k):
    mul, add = columns(k)
    return Rows(mul, add, rows.out_scale, rows.out_zero, rows.dtype, rows.symmetric)


def check(x, gate, act, rows):
    found = module.by_act(x, gate, act, rows)
    near(found, module.reference(x, gate, act, rows))
    return found


@pytest.mark.parametrize("rows", FORMATS + STATIC)
@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_sizes(floats, rows):
    for m, k in ((1, 1), (3, 7), (17, 100), (33, 129), (3, 1000)):
        x, gate = (torch.randn(2, m, k) * 2).to(floats)
        check(x, gate, "silu", rows)
        check(x, None, "gelu", with_columns(rows, k))
        check(x, gate, "", with_columns(rows, k))


@pytest.mark.parametrize("floats", FLOATS, ids=str)
@pytest.mark.parametrize("act", NAMES)
def test_activations(act, floats):
    x, gate = (torch.randn(2, 17, 129) * 4).to(floats)
    for rows in FORMATS:
        check(x, None, act, rows)
        check(x, gate, act, rows)


@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_reference(floats, act):
    """What torch computes op by op, and the formula of qpass."""
    x, gate = torch.randn(2, 17, 100).to(floats)
    for y, other in ((ACTIVATIONS[act](x), None), (ACTIVATIONS[act](x) * gate, gate)):
        near(module.reference(x, other, act, Rows()), by_affine(y, "u8"))
        near(module.reference(x, other, act, Rows(symmetric=True)), by_affine(y, "i8"))
        near(module.reference(x, other, act, Rows(dtype=E4M3)), by_affine(y, "e4m3"))


@pytest.mark.parametrize("rows", FORMATS)
def test_long_rows(monkeypatch, rows):
    monkeypatch.setattr(host, "LIMIT", 64)
    for k in (65, 300):
        x, gate = torch.randn(2, 3, k)
        check(x, gate, "gelu_tanh", with_columns(rows, k))
        check(x, None, "sigmoid", rows)


def test_longest_row():
    x = torch.randn(1, host.LIMIT + 3)
    check(x, x, "relu", Rows())


def test_halves():
    """Both halves of a wider tensor are read where they are."""
    wide = torch.randn(2, 5, 200).bfloat16()
    for x, gate in (wide.chunk(2, -1), wide.chunk(2, -1)[::-1], (wide[..., ::2], wide[..., 1::2])):
        same(check(x, gate, "silu", Rows()), module.by_act(x.contiguous(), gate.contiguous(), "silu", Rows()))
    x = wide.chunk(2, -1)[1]
    assert host.flat(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize("act", ["", "relu", "silu", "hardsigmoid", "relu6"])
def test_not_finite(act):
    """A NaN reaches the scale of its row through every activation; other rows keep theirs."""
    x = torch.randn(5, 40)
    gate = torch.ones(5, 40)
    x[1, 3], gate[2, 5], gate[3, 39] = math.nan, math.nan, math.inf
    x[3, 39] = 2.0
    for rows in FORMATS[:3]:
        _, scale, _ = found = check(x, gate, act, rows)
        assert scale.isfinite().flatten().tolist() == [True, False, False, False, True]
        near([t[:1] for t in found], module.reference(x[:1], gate[:1], act, rows))


def test_extreme_values():
    x = torch.tensor([[1e30, -1e30, 3.0], [1e-38, -1e-38, 1e-40], [0.0, 0.0, 0.0], [-1.0, -2.0, -3.0]])
    for act in NAMES:
        for rows in FORMATS + STATIC:
            check(x, None, act, rows)


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty(shape, rows):
    x = torch.empty(shape)
    codes, scale, zero = module.by_act(x, x, "silu", rows)
    assert codes.shape == shape
    assert scale.shape == zero.shape == ((0,) if rows.out_scale else (*shape[:-1], 1))


def test_op():
    x, gate = torch.randn(2, 3, 4, 10)
    op = torch.ops.qpass_kernels.act_quantize
    mul, add = columns(10)
    same(op(x, gate, "silu", mul, add, None, 0, torch.int8, False), module.reference(x, gate, "silu", Rows(mul, add)))
    torch.library.opcheck(op.default, (x, gate, "silu", mul, add, None, 0, torch.int8, False))
    torch.library.opcheck(op.default, (x, None, "gelu", None, None, 0.1, 3, torch.int8, False))


X = torch.randn(3, 4)
BAD = (
    ((X, None, "swish", Rows()), "activation 'swish' is not one of relu"),
    ((X, X[:2], "", Rows()), r"gate must be like x, \(3, 4\) torch.float32 on cpu, not \(2, 4\)"),
    ((X, X.half(), "", Rows()), "gate must be like x, .*, not .* torch.float16"),
    ((X, X.to("meta"), "", Rows()), "gate must be like x, .* on meta"),
    ((X.double(), None, "", Rows()), "x must be float32, bfloat16 or float16, not torch.float64"),
    ((X, None, "", Rows(out_zero=3)), "a zero point of 3 needs asymmetric int8 and a scale"),
    ((X, None, "", Rows(out_scale=math.nan)), "the scale must be finite"),
)


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[b[1][:30] for b in BAD])
@pytest.mark.parametrize("call", [module.by_act, module.reference])
def test_bad(call, arguments, message):
    with pytest.raises(ValueError, match=f"act_quantize: .*{message}"):
        call(*arguments)

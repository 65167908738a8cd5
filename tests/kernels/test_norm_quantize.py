"""Norms and the quantization behind them: the kernel in Triton's interpreter, its reference, and torch op by op."""

import itertools
import math

import pytest
import torch
from torch.nn import functional

from qpass_kernels import norm_quantize as module
from qpass_kernels import rows as host
from qpass_kernels.rows import Rows
from tests.kernels.steps import by_affine, columns, near, same

E4M3 = torch.float8_e4m3fn
FORMATS = (
    Rows(),
    Rows(symmetric=True),
    Rows(dtype=E4M3),
    Rows(out_scale=0.02, out_zero=-7),
    Rows(out_scale=0.01, dtype=E4M3),
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6


def with_columns(rows, k):
    mul, add = columns(k)
    return Rows(mul, add, rows.out_scale, rows.out_zero, rows.dtype, rows.symmetric)


def check(x, residual, weight, bias, rms, rows, keep=True):
    arguments = (x, residual, weight, bias, EPS, rms, keep, rows)
    found, expected = module.by_norm(*arguments), module.reference(*arguments)
    same(found[:1], expected[:1])
    near(found[1:], expected[1:])
    return found


def samples(m, k, floats):
    """(x, residual, weight, bias)."""
    x, residual = (torch.randn(2, m, k) * 3 + 1).to(floats)
    return x, residual, torch.rand(k).to(floats) + 0.5, torch.randn(k).to(floats)


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_sizes(floats, rms, rows):
    for m, k in ((1, 7), (3, 1), (17, 100), (33, 129), (3, 1000)):
        x, residual, weight, bias = samples(m, k, floats)
        check(x, residual, weight, None if rms else bias, rms, rows)
        check(x, None, weight, bias, rms, with_columns(rows, k), keep=False)


def test_choices():
    """Residual or not, weight and bias or not, keep or not: what is not asked for is empty."""
    x, residual, weight, bias = samples(5, 33, torch.float32)
    for r, w, b, rms, keep in itertools.product(
        (None, residual), (None, weight, weight.bfloat16()), (None, bias), (False, True), (False, True)
    ):
        total, kept, *_ = check(x, r, w, b, rms, Rows(), keep)
        assert total.shape == ((0,) if r is None else x.shape)
        assert kept.shape == (x.shape if keep else (0,))


@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_reference(floats):
    """What torch computes op by op, and the formula of qpass on the norm that came out."""
    x, residual, weight, bias = samples(17, 100, floats)
    for rms in (False, True):
        total, kept, *rest = module.reference(x, residual, weight, None if rms else bias, EPS, rms, True, Rows())
        assert torch.equal(total, x + residual)
        if rms:
            expected = functional.rms_norm(total, (100,), weight, EPS)
        else:
            expected = functional.layer_norm(total, (100,), weight, bias, EPS)
        near([kept], [expected])
        same(rest, by_affine(kept, "u8"))


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("rms", [False, True])
def test_long_rows(monkeypatch, rms, rows):
    monkeypatch.setattr(host, "LIMIT", 64)
    for floats, k in ((torch.float32, 65), (torch.bfloat16, 300)):
        x, residual, weight, bias = samples(3, k, floats)
        check(x, residual, weight, bias, rms, with_columns(rows, k))
        check(x, None, None, None, rms, rows, keep=False)


def test_longest_row():
    x, residual, weight, bias = samples(1, host.LIMIT + 3, torch.float32)
    check(x, residual, weight, bias, False, Rows())
    check(x, residual, weight, None, True, Rows())


@pytest.mark.parametrize("limit", [64, 16384])
def test_far_from_zero(monkeypatch, limit):
    """A mean that is large beside the variance takes no digits from it."""
    monkeypatch.setattr(host, "LIMIT", limit)
    x = torch.randn(4, 200) + 1000
    kept = module.by_norm(x, None, None, None, EPS, False, True, Rows())[1]
    expected = functional.layer_norm(x.double(), (200,), eps=EPS)
    assert (kept - expected).abs().max() < 2e-4


def test_strides():
    wide, residual = torch.randn(2, 5, 80), torch.randn(2, 40, 5).transpose(1, 2)
    for x in (wide[..., :40], wide[..., 40:], wide[..., ::2]):
        found = check(x, residual, None, None, True, Rows())
        same(found, check(x.contiguous(), residual.contiguous(), None, None, True, Rows()))


@pytest.mark.parametrize("rms", [False, True])
def test_not_finite(rms):
    """A NaN or infinity leaves the scale of its row not finite; other rows keep theirs."""
    x, residual, weight, bias = samples(5, 40, torch.float32)
    x[1, 3], residual[2, 5], x[3, 39] = math.nan, math.inf, -math.inf
    for rows in FORMATS[:3]:
        arguments = (weight, bias, EPS, rms, True, rows)
        scale = module.by_norm(x, residual, *arguments)[3]
        assert scale.isfinite().flatten().tolist() == [True, False, False, False, True]
        assert torch.equal(module.reference(x, residual, *arguments)[3].isfinite(), scale.isfinite())


@pytest.mark.parametrize("rms", [False, True])
def test_extreme_values(rms):
    x = torch.randn(6, 40)
    x[0], x[1], x[2] = 0, x[1].abs(), -x[2].abs()
    x[3] *= 1e15
    x[4] *= 1e-38
    x[5] = 3.0
    for rows in FORMATS:
        check(x, None, None, None, rms, rows)


@pytest.mark.parametrize("rows", FORMATS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)], ids=str)
def test_empty(shape, rows):
    x = torch.empty(shape)
    for call in (module.by_norm, module.reference):
        total, kept, codes, scale, zero = call(x, x, None, None, EPS, True, True, rows)
        assert total.shape == kept.shape == codes.shape == shape
        assert scale.shape == zero.shape == ((0,) if rows.out_scale else (*shape[:-1], 1))


def test_op():
    x, residual, weight, bias = samples(4, 10, torch.float32)
    op = torch.ops.qpass_kernels.norm_quantize
    mul, add = columns(10)
    dynamic = (x, residual, weight, bias, EPS, False, mul, add, None, 0, torch.int8, False, True)
    same(op(*dynamic), module.reference(x, residual, weight, bias, EPS, False, True, Rows(mul, add)))
    torch.library.opcheck(op.default, dynamic)
    static = (x, None, weight, None, EPS, True, None, None, 0.1, 3, torch.int8, False, False)
    torch.library.opcheck(op.default, static)


X = torch.randn(3, 4)
GOOD = (X, None, None, None, EPS, True, False, Rows())
BAD = (
    ({1: X[:2]}, r"residual must be like x, \(3, 4\) torch.float32 on cpu, not \(2, 4\)"),
    ({1: X.half()}, "residual must be like x, .*, not .* torch.float16"),
    ({2: torch.ones(5)}, "weight must have 4 elements, not 5"),
    ({3: torch.ones(4).double()}, "bias must be torch.float32 or .*, not torch.float64"),
    ({4: -1.0}, "eps must be finite and not negative, not -1.0"),
    ({4: math.nan}, "eps must be finite and not negative, not nan"),
    ({0: X.long()}, "x must be float32, bfloat16 or float16, not torch.int64"),
    ({7: Rows(dtype=torch.int16)}, "writes torch.int8 or torch.float8_e4m3fn, not torch.int16"),
    ({7: Rows(out_scale=0.0)}, "the scale must be finite"),
    ({7: Rows(add=torch.ones(3))}, "add must have 4 elements, not 3"),
)


@pytest.mark.parametrize(("change", "message"), BAD, ids=[b[1][:30] for b in BAD])
@pytest.mark.parametrize("call", [module.by_norm, module.reference])
def test_bad(call, change, message):
    with pytest.raises(ValueError, match=f"norm_quantize: .*{message}"):
        call(*(change.get(i, value) for i, value in enumerate(GOOD)))

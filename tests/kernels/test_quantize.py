"""Codes of rows and of tensors: the kernels in Triton's interpreter, their reference, and the formula of qpass."""

import math

import pytest
import torch

from qpass import affine
from qpass.qtype import QType
from qpass_kernels import quantize as module
from qpass_kernels import rows as host
from qpass_kernels.rows import Rows
from tests.kernels.steps import by_affine, columns, same

E4M3 = torch.float8_e4m3fn
FORMATS = ((torch.int8, False, "u8"), (torch.int8, True, "i8"), (E4M3, True, "e4m3"))
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(m, k) for m in (1, 3, 17, 33) for k in (1, 7, 100, 129, 1000)]
formats = pytest.mark.parametrize(("dtype", "symmetric", "number"), FORMATS, ids=[f[2] for f in FORMATS])


@pytest.fixture
def small(monkeypatch):
    """Rows of more than 64 columns take the loop."""
    monkeypatch.setattr(host, "LIMIT", 64)


def odd_rows(k, dtype):
    """Rows of zeros, of one sign, huge, tiny and beyond the smallest scale; all finite but in float16."""
    x = torch.randn(10, k)
    x[0] = 0
    x[1], x[2] = x[1].abs(), -x[2].abs()
    x[3] *= 1e30
    x[4] *= 1e38
    x[5] *= 1e-30  # Triton's interpreter reads no subnormal bfloat16
    x[6] *= 1e-38 if dtype == torch.float32 else 1e-20
    x[7] *= 1e-42 if dtype == torch.float32 else 1
    x[8, 0] = -0.0
    x[9] = 0.5
    return x.to(dtype)


@formats
@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_rows(floats, dtype, symmetric, number):
    for m, k in SIZES:
        x, rows = (torch.randn(m, k) * 3).to(floats), Rows(dtype=dtype, symmetric=symmetric)
        expected = rows.reference(x)
        same(module.by_row(x, rows), expected)
        same(expected, by_affine(x, number))


@formats
@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_long_rows(small, floats, dtype, symmetric, number):
    for k in (65, 129, 300):
        x, rows = torch.randn(3, k).to(floats), Rows(*columns(k), dtype=dtype, symmetric=symmetric)
        same(module.by_row(x, rows), rows.reference(x))


@formats
def test_longest_row(dtype, symmetric, number):
    x, rows = torch.randn(1, host.LIMIT + 3), Rows(dtype=dtype, symmetric=symmetric)
    same(module.by_row(x, rows), by_affine(x, number))
    same(module.by_row(x[:, :-3], rows), by_affine(x[:, :-3], number))


@formats
@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_odd_rows(floats, dtype, symmetric, number):
    x, rows = odd_rows(33, floats), Rows(dtype=dtype, symmetric=symmetric)
    found = module.by_row(x, rows)
    expected = by_affine(x, number)
    finite = expected[1].isfinite().flatten()
    assert finite.all() or floats == torch.float16
    same([t[finite] for t in found], [t[finite] for t in expected])
    same(found, rows.reference(x))


@formats
@pytest.mark.parametrize("limit", [64, 16384])
def test_not_finite(monkeypatch, limit, dtype, symmetric, number):
    """A NaN or infinity leaves the scale of its row not finite, its codes the reference's, and no other row touched."""
    monkeypatch.setattr(host, "LIMIT", limit)
    x = torch.randn(8, 150)
    x[1, 0], x[2, 149], x[3, 80] = math.nan, math.inf, -math.inf
    x[4, 70], x[4, 71], x[5, 3], x[6] = math.inf, -math.inf, -math.nan, math.nan
    rows = Rows(dtype=dtype, symmetric=symmetric)
    found = module.by_row(x, rows)
    same(found, rows.reference(x))
    assert found[1].isfinite().flatten().tolist() == [True] + 6 * [False] + [True]
    assert torch.equal(found[1].nan_to_num(nan=-1), by_affine(x, number)[1].nan_to_num(nan=-1))
    same([t[[0, 7]] for t in found], [t[[0, 7]] for t in by_affine(x, number)])
    back = (found[0].float() - found[2]) * found[1]
    assert not back[1:7].isfinite().any()


@formats
@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_columns(floats, dtype, symmetric, number):
    """Mul and add of each column come before the codes; either may be left out."""
    mul, add = columns(100)
    x = torch.randn(17, 100).to(floats)
    for m, a, y in ((mul, add, x * mul + add), (mul, None, x * mul), (None, add, x + add)):
        rows = Rows(m, a, dtype=dtype, symmetric=symmetric)
        same(module.by_row(x, rows), rows.reference(x))
        same(rows.reference(x), by_affine(y, number))


@pytest.mark.parametrize(
    ("dtype", "zero"), [(torch.int8, -128), (torch.int8, 5), (torch.int8, 127), (E4M3, 0)], ids=str
)
@pytest.mark.parametrize("scale", [0.02, 3e-30, 1e30, 2.0**-126, 3e38])
def test_tensor(scale, dtype, zero):
    """One scale: with zero + 128 that of u8/t."""
    for floats in FLOATS:
        x = (torch.randn(9, 129) * 2).to(floats)
        x[0], x[1] = odd_rows(129, floats)[3:5]
        x[2, :2], x[3, :3] = math.inf, torch.tensor([-math.inf, math.nan, 1.0])
        mul, add = columns(129)
        for m, a, y in ((None, None, x.float()), (mul, add, x * mul + add)):
            rows = Rows(m, a, scale, zero, dtype)
            found = module.by_tensor(x, rows)
            same([found], rows.reference(x)[:1])
            y[3, 1] = 1.0  # a NaN has no integer
            number = "u8/t" if dtype == torch.int8 else "e4m3/t"
            step, at = torch.tensor(scale), torch.tensor(zero + 128) if dtype == torch.int8 else None
            codes = affine.quantize(y, step, at, QType.parse(number)).float() - (128 if dtype == torch.int8 else 0)
            found, codes = found.float(), codes.clone()
            found[3, 1] = codes[3, 1] = 0
            assert torch.equal(found, codes)


@pytest.mark.parametrize("floats", FLOATS, ids=str)
def test_ties(floats):
    """Quotients halfway between two codes go to the even one, as a true division gives them."""
    x = (torch.arange(-1100, 1100) / 8).to(floats)[None]
    for scale in (0.25, 0.125 * 3, 0.1, 7.0):
        rows = Rows(out_scale=scale, out_zero=-3)
        same([module.by_tensor(x, rows)], rows.reference(x)[:1])


def test_strides():
    """Halves of a wider tensor are read where they are; others are copied."""
    wide = torch.randn(2, 5, 40)
    rows = Rows()
    for x in (
        wide[..., :20],
        wide[..., 20:],
        wide.transpose(1, 2),
        wide[..., ::2],
        wide[:, :1].expand(2, 5, 40),
        wide[0, 0],
    ):
        same(module.by_row(x, rows), rows.reference(x))
        fixed = Rows(out_scale=0.1, out_zero=3)
        same([module.by_tensor(x, fixed)], fixed.reference(x)[:1])
    half = wide[..., 20:]
    assert host.flat(half).data_ptr() == half.data_ptr()


@formats
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4), (0,), (0, 0)], ids=str)
def test_empty(shape, dtype, symmetric, number):
    rows = Rows(dtype=dtype, symmetric=symmetric)
    codes, scale, zero = module.by_row(torch.empty(shape), rows)
    assert (codes.shape, scale.shape, zero.shape) == (shape, (*shape[:-1], 1), (*shape[:-1], 1))
    assert (scale == 1).all()
    assert module.by_tensor(torch.empty(shape), Rows(out_scale=1.0, dtype=dtype)).shape == shape


def test_ops():
    x, (mul, add) = torch.randn(2, 3, 10), columns(10)
    ops = torch.ops.qpass_kernels
    same(ops.quantize_rows(x, mul, None, torch.int8, False), Rows(mul).reference(x))
    torch.library.opcheck(ops.quantize_rows.default, (x, mul, add, torch.int8, False))
    torch.library.opcheck(ops.quantize_tensor.default, (x, None, add, 0.1, 3, torch.int8))


BAD = (
    ({"x": torch.randn(3, 4).double()}, "x must be float32, bfloat16 or float16, not torch.float64"),
    ({"x": torch.tensor(1.0)}, r"x must be \[..., K\], not a scalar"),
    ({"mul": torch.ones(5)}, "mul must have 4 elements, not 5"),
    ({"add": torch.ones(4).half()}, "add must be torch.float32, not torch.float16"),
    ({"mul": torch.ones(8)[::2]}, "mul must be contiguous"),
    ({"mul": torch.ones(4, device="meta")}, "mul is on meta, the input on cpu"),
    ({"dtype": torch.uint8}, "writes torch.int8 or torch.float8_e4m3fn, not torch.uint8"),
    ({"out_scale": 0.0}, "the scale must be finite and at least 2\\^-126, not 0.0"),
    ({"out_scale": -1.0}, "not -1.0"),
    ({"out_scale": math.nan}, "not nan"),
    ({"out_scale": math.inf}, "not inf"),
    ({"out_zero": 128}, "the zero point must lie in -128 .. 127, not 128"),
    ({"out_zero": 1, "dtype": E4M3}, "a zero point of 1 needs asymmetric int8"),
)


@pytest.mark.parametrize(("change", "message"), BAD, ids=[b[1][:30] for b in BAD])
def test_bad(change, message):
    x, change = change.get("x", torch.randn(3, 4)), {name: v for name, v in change.items() if name != "x"}
    rows = Rows(**{"out_scale": 0.1, **change})
    with pytest.raises(ValueError, match=f"quantize_tensor: .*{message}"):
        module.by_tensor(x, rows)
    if "meta" not in message:  # an op with a tensor of meta takes its shapes
        with pytest.raises(ValueError, match=f"quantize_tensor: .*{message}"):
            torch.ops.qpass_kernels.quantize_tensor(x, rows.mul, rows.add, rows.out_scale, rows.out_zero, rows.dtype)
    if not {"out_scale", "out_zero"} & change.keys():
        with pytest.raises(ValueError, match=f"quantize_rows: .*{message}"):
            module.by_row(x, Rows(**change))

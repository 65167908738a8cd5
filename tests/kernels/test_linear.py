"""Every matmul kernel in Triton's interpreter against its reference in float64."""

import pytest
import torch

from qpass_kernels import matmul, ops
from qpass_kernels.activations import NAMES
from qpass_kernels.configs import Config
from qpass_kernels.layouts import pack
from tests.kernels.samples import KINDS, OPS, activations, epilogue, weights

FLOAT = 1e-6  # relative to the largest value: float32 sums
SMALL = Config("streamed", 16, 32, 128, 1)
SHAPES = ((1, 64, 128), (17, 33, 200), (33, 130, 96))


def result(kind, x, held, after, config=None):
    module = KINDS[kind]
    return matmul.run(OPS[kind], x, held, after, module.check, module.launch, config)


def reference(kind, x, held, after):
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return after.reference(KINDS[kind].sums(flat, *held)).reshape(*x.shape[:-1], held[0].shape[0])


def error(found, expected):
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30))


def configs(kind, k):
    yield None
    yield SMALL
    yield Config("streamed", 16, 32, 32 if kind in ("w8a8", "fp8") else 128, 3)
    if kind in ("w8a8", "fp8"):
        yield Config("persistent", 16, 32, 32, band=2)
    if kind in ("w8a16", "w4a16"):
        yield Config("dequantized", bn=32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, shape):
    m, n, k = shape
    held, top, column = weights(kind, n, k)
    after = epilogue(kind, m, n, top, column)
    x = activations(kind, m, k)
    expected = reference(kind, x, held, after)
    for config in configs(kind, k):
        bound = 2e-3 if config and config.how == "dequantized" else FLOAT  # weights and product rounded to float16
        found = result(kind, x, held, after, config)
        assert found.dtype == torch.float32
        assert error(found, expected) < bound, config


@pytest.mark.parametrize("group", [32, 64, 128, 256])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("kind", ["w4a16", "w4a8"])
def test_groups(kind, group, blocks):
    """Rows of whole groups that fill whole blocks of 128, and rows that do not."""
    m, n, k = 5, 40, group * blocks
    held, top, column = weights(kind, n, k, group)
    after = epilogue(kind, m, n, top, column)
    x = activations(kind, m, k)
    expected = reference(kind, x, held, after)
    for config in configs(kind, k):
        bound = 2e-3 if config and config.how == "dequantized" else FLOAT
        assert error(result(kind, x, held, after, config), expected) < bound, config


@pytest.mark.parametrize("act", NAMES)
@pytest.mark.parametrize("kind", ["w8a8", "w4a16"])
def test_activations(kind, act):
    m, n, k = 3, 32, 128
    held, top, column = weights(kind, n, k)
    x = activations(kind, m, k)
    after = epilogue(kind, m, n, top, column, act=act)
    for config in (SMALL, Config("persistent", 16, 32, 32)) if kind == "w8a8" else (SMALL,):
        assert error(result(kind, x, held, after, config), reference(kind, x, held, after)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_products(kind, dtype):
    """Without bias, residual and row scales, in each dtype; bfloat16 is rounded once, from float32."""
    m, n, k = 4, 48, 160
    held, top, column = weights(kind, n, k)
    after = epilogue(kind, m, n, top, column, everything=False, out_dtype=dtype)
    x = activations(kind, m, k)
    expected = reference(kind, x, held, after)
    found = result(kind, x, held, after)
    assert found.dtype == dtype
    bound = FLOAT if dtype == torch.float32 else torch.finfo(dtype).eps  # a step, where the sum lies between two
    assert error(found, expected) <= bound


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_codes(kind, dtype):
    m, n, k = 17, 48, 144
    held, top, column = weights(kind, n, k)
    x = activations(kind, m, k)
    real = epilogue(kind, m, n, top, column)
    scale = float(reference(kind, x, held, real).abs().max()) / (100 if dtype == torch.int8 else 400)
    zero = 7 if dtype == torch.int8 else 0
    after = epilogue(kind, m, n, top, column, out_scale=scale, out_zero=zero, out_dtype=dtype, act="relu")
    expected = reference(kind, x, held, after).double()
    assert expected.unique().numel() > 20
    for config in configs(kind, k):
        found = result(kind, x, held, after, config).double()
        off = (found - expected).abs() > (0 if dtype == torch.int8 else 1e-9)
        step = 1 if dtype == torch.int8 else 32
        share = 0.05 if config and config.how == "dequantized" else 0.005
        assert float(off.double().mean()) < share
        assert float((found - expected).abs().max()) <= step


@pytest.mark.parametrize("kind", ["w8a8", "w4a8"])
def test_integer_sums_are_exact_at_the_extremes(kind):
    m, n, k = 2, 16, 384
    low = -127 if kind == "w8a8" else -8
    x = torch.full((m, k), -128, dtype=torch.int8)
    codes = torch.full((n, k), low, dtype=torch.int8)
    held = (codes,) if kind == "w8a8" else (pack(codes, kind), None)
    after = epilogue(kind, m, n, torch.full((n,), 100.0 if kind == "w8a8" else 100.0 / 16), None, everything=False)
    found = result(kind, x, held, after, Config("streamed", 16, 32, 128, 3))
    assert torch.equal(found, torch.full((m, n), float(-128 * low * k)))


@pytest.mark.parametrize("kind", KINDS)
def test_empty_and_strided(kind):
    n, k = 16, 128
    held, top, column = weights(kind, n, k)
    for rows in ((0,), (2, 0), (0, 3)):
        x = activations(kind, 1, k)[:0].reshape(*rows, k)
        found = result(kind, x, held, epilogue(kind, 0, n, top, column))
        assert found.shape == (*rows, n)
    x = activations(kind, 6, 2 * k)[:, ::2].reshape(2, 3, k).transpose(0, 1)
    after = epilogue(kind, 6, n, top, column, everything=False)
    assert error(result(kind, x, held, after), reference(kind, x, held, after)) < FLOAT


def test_no_inputs():
    x, weight = torch.zeros(3, 0, dtype=torch.int8), torch.zeros(4, 0, dtype=torch.int8)
    after = epilogue("w8a8", 3, 4, torch.ones(4), torch.zeros(4, dtype=torch.int32), act="relu")
    assert torch.equal(result("w8a8", x, (weight,), after), reference("w8a8", x, (weight,), after))


@pytest.mark.parametrize("kind", KINDS)
def test_split_sums_do_not_depend_on_the_launch(kind):
    """The counters come back to 0, and slices are added in their order."""
    m, n, k = 3, 40, 512
    held, top, column = weights(kind, n, k)
    after = epilogue(kind, m, n, top, column)
    x = activations(kind, m, k)
    config = Config("streamed", 16, 32, 128, 4)
    first = result(kind, x, held, after, config)
    assert all(torch.equal(first, result(kind, x, held, after, config)) for _ in range(3))


@pytest.mark.parametrize("kind", KINDS)
def test_op(kind):
    """The registered op: reference on CPU, shapes without running, what torch asks of an op."""
    m, n, k = 4, 16, 128
    held, top, column = weights(kind, n, k)
    after = epilogue(kind, m, n, top, column)
    x = activations(kind, m, k, torch.bfloat16).reshape(2, 2, k)
    fields = ("alpha", "beta", "offset", "row_scale", "row_zero", "other", "act", "out_scale", "out_zero", "out_dtype")
    args = (x, *held, *(getattr(after, name) for name in fields))
    op = getattr(torch.ops.qpass_kernels, OPS[kind]).default
    assert torch.equal(op(*args), reference(kind, x, held, after))
    checks = ["test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    if kind != "fp8":  # torch has no product of float8 to compare arguments by
        checks.append("test_schema")
    torch.library.opcheck(op, args, test_utils=checks)
    assert KINDS[kind] in ops.LINEARS


def test_rows_that_no_descriptor_takes():
    """Descriptors need addresses that are multiples of 16."""
    m, n, k = 17, 33, 64
    held, top, column = weights("w8a8", n, k)
    x = torch.cat([activations("w8a8", 1, 3), activations("w8a8", 1, m * k)], 1).flatten()[3:].view(m, k)
    assert x.is_contiguous()
    assert x.data_ptr() % 16
    after = epilogue("w8a8", m, n, top, column)
    found = result("w8a8", x, held, after, Config("persistent", 16, 32, 32))
    assert error(found, reference("w8a8", x, held, after)) < FLOAT

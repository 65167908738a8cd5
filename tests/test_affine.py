"""The affine formula: its error bound, its edge cases, its dtypes, and that it can be traced."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from qpass.affine import (
    MIN_SCALE,
    choose_dynamic,
    choose_qparams,
    dequantize,
    expand,
    fake_quantize,
    limits,
    quantize,
)
from qpass.errors import QpassError
from qpass.qtype import QType, scale_shape

INTEGERS = [f"{sign}{bits}" for sign in "iu" for bits in range(2, 9)]
FLOAT_MAX = torch.finfo(torch.float32).max
FLOATS = st.floats(-FLOAT_MAX, FLOAT_MAX, width=32, allow_nan=False)
TYPES = ["i8/t", "u8/t", "i8/c0", "i4/c1", "u4/g4", "u8/token", "i8/token", "e4m3/token", "e5m2/c0"]


def scalar(value, dtype=torch.float32):
    return torch.tensor(value, dtype=dtype)


def round_trip(x, text):
    t = QType.parse(text)
    return fake_quantize(x, choose_qparams(*limits(x, t), t).check())


@given(st.sampled_from(INTEGERS), FLOATS, FLOATS, st.floats(0, 1))
def test_error_is_at_most_half_a_step_inside_the_range(number, a, b, where):
    lo, hi = min(a, b, 0.0), max(a, b, 0.0)
    t = QType.parse(f"{number}/t")
    params = choose_qparams(scalar(lo), scalar(hi), t).check()
    x = scalar(lo + where * (hi - lo), torch.float64).clamp(lo, hi)
    error = (fake_quantize(x, params) - x).abs().item()
    assert error <= params.scale.double().item() * (0.5 + 1e-4)


@given(st.sampled_from([*INTEGERS, "e4m3", "e5m2"]), FLOATS, FLOATS)
def test_zero_is_exact_in_every_range(number, a, b):
    params = choose_qparams(scalar(min(a, b)), scalar(max(a, b)), QType.parse(f"{number}/t")).check()
    assert fake_quantize(scalar(0.0), params).item() == 0.0


@given(st.sampled_from([*INTEGERS, "e4m3", "e5m2"]), FLOATS, FLOATS)
def test_scale_and_its_inverse_are_finite(number, a, b):
    params = choose_qparams(scalar(min(a, b)), scalar(max(a, b)), QType.parse(f"{number}/t")).check()
    assert params.scale.item() >= MIN_SCALE
    assert (1 / params.scale).isfinite()


@given(st.sampled_from(INTEGERS), st.integers(0, 255), st.floats(2.0**-100, 2.0**100, width=32))
def test_codes_round_trip(number, code, scale):
    t = QType.parse(f"{number}/t")
    q = torch.arange(t.qmin, t.qmax + 1).to(t.storage)
    zero = None if t.symmetric else scalar(code % t.levels, torch.int32)
    values = dequantize(q, scalar(scale), zero, t)
    assert torch.equal(quantize(values, scalar(scale), zero, t), q)


@given(st.sampled_from(["i8/t", "u8/t", "u4/t", "e4m3/t"]), st.lists(FLOATS, min_size=1, max_size=20))
def test_quantizing_twice_changes_nothing(text, values):
    x = torch.tensor(values)
    t = QType.parse(text)
    params = choose_qparams(*limits(x, t), t)
    once = fake_quantize(x, params)
    assume(once.isfinite().all())
    assert torch.equal(fake_quantize(once, params), once)


def test_rounds_half_to_even_and_saturates():
    t = QType.parse("i8/t")
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1e30, -1e30, float("inf"), -float("inf")])
    assert quantize(x, scalar(1.0), None, t).tolist() == [0, 2, 2, 0, -2, 127, -127, 127, -127]


def test_asymmetric_by_hand():
    params = choose_qparams(scalar(-1.0), scalar(1.55), QType.parse("u8/t"))
    assert params.zero.item() == 100
    assert params.zero.dtype == torch.int32
    q = quantize(torch.tensor([-1.0, 0.0, 1.55, 9.0]), params.scale, params.zero, params.type)
    assert q.tolist() == [0, 100, 255, 255]


@pytest.mark.parametrize("text", ["i8/t", "u8/t", "u2/t", "e4m3/t"])
def test_an_empty_range_has_scale_one(text):
    for empty in (0.0, -0.0):
        params = choose_qparams(scalar(empty), scalar(empty), QType.parse(text)).check()
        assert params.scale.item() == 1.0


@pytest.mark.parametrize("text", ["i8/t", "u8/t", "u2/t", "e4m3/t"])
@pytest.mark.parametrize("value", [5.0, -5.0, 1e-45, -1e-45, 1e-38, 1e30, -1e30, 3e38])
def test_a_constant_survives(text, value):
    x = torch.full((3,), value)
    error = (round_trip(x, text) - x).abs().max().item()
    assert error <= max(abs(value) * 1e-6, MIN_SCALE / 2)


def test_a_float64_range_below_float32_is_empty():
    params = choose_qparams(scalar(0.0, torch.float64), scalar(1e-300, torch.float64), QType.parse("u8/t"))
    assert params.check().scale.item() == 1.0


def test_a_float64_range_above_float32_is_refused():
    with pytest.raises(QpassError, match="not finite"):
        choose_qparams(scalar(0.0), scalar(1e300, torch.float64), QType.parse("u8/t")).check()


@pytest.mark.parametrize("text", ["u8/token", "i8/token", "e4m3/token"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_visible_and_in_its_row(text, bad):
    x = torch.randn(3, 8)
    clean = round_trip(x, text)
    x[1, 2] = bad
    t = QType.parse(text)
    scale, zero = choose_dynamic(x, t)
    back = dequantize(quantize(x, scale, zero, t), scale, zero, t)
    assert not back[1].isfinite().all()
    assert torch.equal(back[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("text", TYPES)
def test_scales_have_the_shape_the_type_says(text):
    t, x = QType.parse(text), torch.randn(6, 8)
    scale, zero = choose_dynamic(x, t)
    assert scale.shape == scale_shape(t, x.shape)
    assert scale.dtype == torch.float32
    assert (zero is None) == t.symmetric
    q = quantize(x, scale, zero, t)
    assert (q.dtype, q.shape) == (t.storage, x.shape)
    assert expand(scale, t, x.ndim).broadcast_to(x.shape).shape == x.shape


@pytest.mark.parametrize("text", TYPES)
def test_each_scale_covers_exactly_its_own_values(text):
    t, x = QType.parse(text), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    lo, hi = limits(x, t)
    assert torch.equal(torch.maximum(expand(lo, t, 2), x), x)
    assert torch.equal(torch.minimum(expand(hi, t, 2), x), x)
    steps = expand(choose_qparams(lo, hi, t).scale, t, 2)
    bound = steps / 2 if not t.is_float else x.abs() * 2.0 ** -(t.mantissa + 1) + steps * 2.0**-9
    assert ((round_trip(x, text) - x).abs() <= bound * (1 + 1e-4)).all()


def test_limits_of_one_axis():
    x = torch.tensor([1.0, -2.0])
    assert [v.tolist() for v in limits(x, QType.parse("i8/c0"))] == [[1.0, -2.0], [1.0, -2.0]]
    with pytest.raises(QpassError, match="2 axes"):
        limits(x, QType.parse("i8/c1"))
    with pytest.raises(QpassError, match="2 axes"):
        expand(x, QType.parse("i8/c1"), 1)


def test_a_batch_of_no_rows():
    assert round_trip(torch.empty(0, 8), "u8/token").shape == (0, 8)


@pytest.mark.parametrize("text", TYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_computed_in_float32(text, dtype):
    t = QType.parse(text)
    x = torch.randn(4, 8).to(dtype)
    params = choose_qparams(*limits(x, t), t)
    wide = choose_qparams(*limits(x.float(), t), t)
    assert torch.equal(params.scale, wide.scale)
    assert torch.equal(fake_quantize(x, params), fake_quantize(x.float(), params).to(dtype))
    assert fake_quantize(x, params).dtype == dtype


def test_float64_is_computed_in_float64():
    t = QType.parse("i8/t")
    scale = scalar(0.1)
    x = torch.tensor([12.65 * 1.000000001], dtype=torch.float64)
    exact = x / scale.double()
    assert quantize(x, scale, None, t).item() == round(exact.item())
    back = dequantize(torch.tensor([3], dtype=torch.int8), scale, None, t, torch.float64)
    assert back.dtype == torch.float64
    assert back.item() == 3 * scale.double().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_returns_the_dtype_asked_for(dtype):
    t = QType.parse("u8/t")
    x = dequantize(torch.tensor([7], dtype=torch.uint8), scalar(0.5), scalar(3, torch.int32), t, dtype)
    assert (x.dtype, x.item()) == (dtype, 2.0)


@pytest.mark.parametrize("text", TYPES)
def test_can_be_traced_with_symbolic_shapes(text):
    t = QType.parse(text)

    def program(x):
        scale, zero = choose_dynamic(x, t)
        return dequantize(quantize(x, scale, zero, t), scale, zero, t, x.dtype)

    graph = make_fx(program, tracing_mode="symbolic")(torch.randn(6, 8))
    for shape in ((6, 8), (10, 8), (3, 12)):
        x = torch.randn(shape)
        assert torch.equal(graph(x), program(x))


@pytest.mark.parametrize("text", TYPES)
def test_static_parameters_can_be_traced_with_symbolic_shapes(text):
    t = QType.parse(text)

    def program(x, lo, hi):
        return fake_quantize(x, choose_qparams(lo, hi, t))

    x = torch.randn(6, 8)
    graph = make_fx(program, tracing_mode="symbolic")(x, *limits(x, t))
    y = torch.randn(12, 16)
    assert torch.equal(graph(y, *limits(y, t)), program(y, *limits(y, t)))

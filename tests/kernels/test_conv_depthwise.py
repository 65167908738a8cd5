"""The depthwise kernel in Triton's interpreter against the op's reference, and that against torch on real values."""

import pytest
import torch

from qpass import conv_ops
from qpass_kernels import conv_depthwise
from qpass_kernels.activations import NAMES
from qpass_kernels.configs import Config
from qpass_kernels.conv_finish import SLOPED, Finish
from qpass_kernels.conv_weights import Window, pack_depthwise, unpack_depthwise
from qpass_kernels.epilogue import OUTPUTS
from tests.kernels.images import check_same, codes, convolved, epilogue_case, finish, values

GEOMETRIES = (  # batch, channels, rows, columns, kernel, stride, padding, dilation
    (1, 3, 9, 7, (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 16, 5, 9, (3, 3), (2, 2), (1, 1), (1, 1)),
    (1, 33, 7, 7, (3, 3), (2, 1), (0, 1), (1, 1)),
    (1, 48, 7, 5, (5, 5), (1, 1), (2, 2), (1, 1)),
    (1, 32, 5, 5, (7, 7), (1, 1), (3, 3), (1, 1)),
    (1, 160, 5, 7, (1, 3), (1, 2), (0, 1), (1, 1)),
    (3, 5, 9, 9, (3, 3), (1, 1), (2, 2), (2, 2)),
    (1, 16, 5, 5, (1, 1), (1, 1), (2, 1), (1, 1)),
    (1, 16, 9, 7, (3, 3), (2, 2), (0, 1, 2, 1), (1, 1)),
)


def problem(geometry):
    """(x, weight [C, 1, KH, KW], window)."""
    b, c, h, w, *window = geometry
    return codes(b, c, h, w), codes(c, 1, *window[0]), Window(*window)


def reference(x, weight, zero, window, after, groups):
    listed = (list(getattr(window, name)) for name in Window.__dataclass_fields__)
    return torch.ops.qpass_kernels.depthwise2d(x, weight, zero, *listed, *values(after), groups)


@pytest.mark.parametrize("zero", [-128, 0, 5])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry, zero):
    x, weight, window = problem(geometry)
    sums = convolved(x.double() - zero, weight.double(), window, x.shape[1])
    after = finish(sums)
    held = x, pack_depthwise(weight), zero, window, after, x.shape[1]
    real = sums * after.alpha.double()[:, None, None] + after.beta.double()[:, None, None]
    expected = reference(*held)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(expected.double(), real, rtol=0, atol=1e-6 * float(real.abs().max()))
    for config in (None, Config(bm=16, bn=16)):
        check_same(conv_depthwise.convolve(*held, config), expected)


EPILOGUES = (
    *((act, "codes", torch.float32) for act in (*NAMES, *SLOPED)),
    *(("relu", residual, dtype) for residual in ("", "codes", "bfloat16") for dtype in OUTPUTS),
)


@pytest.mark.parametrize(("act", "residual", "dtype"), EPILOGUES, ids=str)
def test_epilogues(act, residual, dtype):
    x, weight, window = problem((3, 7, 7, 9, (3, 3), (2, 2), (1, 1), (1, 1)))
    after = epilogue_case(act, residual, dtype)
    held = x, pack_depthwise(weight), 5, window, after, 7
    check_same(conv_depthwise.convolve(*held), reference(*held))


@pytest.mark.parametrize(("x_code", "weight_code"), [(127, -128), (-128, -128), (-128, 127)])
@pytest.mark.parametrize("zero", [-128, 127])
def test_extremes_are_exact(x_code, weight_code, zero):
    x = torch.full((1, 16, 5, 5), x_code, dtype=torch.int8)
    weight = torch.full((16, 1, 5, 5), weight_code, dtype=torch.int8)
    window = Window((5, 5), (1, 1), (2, 2), (1, 1))
    held = x, pack_depthwise(weight), zero, window, Finish(torch.ones(16)), 16
    expected = convolved(x.double() - zero, weight.double(), window, 16)
    assert torch.equal(reference(*held).double(), expected)
    assert torch.equal(conv_depthwise.convolve(*held).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_fp8(dtype):
    _, _, window = problem(GEOMETRIES[1])
    x, weight = torch.randn(3, 16, 5, 9).to(torch.float8_e4m3fn), torch.randn(16, 1, 3, 3).to(torch.float8_e4m3fn)
    after = finish(torch.randn(3, 16, 3, 5), out_dtype=dtype, out_scale=0.02 if dtype != torch.float32 else 1.0)
    held = x, pack_depthwise(weight), 0, window, after, 16
    check_same(conv_depthwise.convolve(*held), reference(*held))


def test_means_what_qpass_conv_means():
    x, weight, window = problem((1, 7, 7, 9, (3, 3), (2, 2), (1, 1), (1, 1)))
    scale, bias = torch.rand(7) * 0.01 + 0.01, torch.randn(7)
    up = lambda q: (q.int() + 128).to(torch.uint8)
    expected = conv_ops.conv(
        up(x), torch.tensor(0.02), torch.tensor(133), "u8/t", weight, scale, "i8/c0", bias, None, None, None, "", "relu6",
        None, torch.tensor(0.02), torch.tensor(0), "u8/t", torch.float32, [2, 2], [1, 1], [1, 1], False, [0, 0], 7,
    )  # fmt: skip
    after = Finish(scale * 0.02, bias, act="relu6", out_scale=0.02, out_zero=-128, out_dtype=torch.int8)
    found = conv_depthwise.convolve(x, pack_depthwise(weight), 5, window, after, 7)
    check_same(up(found).to(torch.int16).contiguous(), expected.to(torch.int16))


def test_nothing_to_do():
    held = codes(0, 16, 5, 5), codes(9, 16), 0, Window((3, 3), (1, 1), (1, 1), (1, 1)), Finish(torch.ones(16)), 16
    for run in (conv_depthwise.convolve, reference):
        assert run(*held).shape == (0, 16, 5, 5)


def test_packing():
    weight = codes(6, 1, 3, 2)
    assert pack_depthwise(weight).shape == (6, 6)
    assert torch.equal(unpack_depthwise(pack_depthwise(weight), (3, 2)), weight)


def test_opcheck():
    x, weight, _ = problem((1, 7, 5, 7, (3, 3), (1, 2), (1, 1), (1, 1)))
    after = epilogue_case("cap", "codes", torch.int8, (1, 7, 5, 4))
    args = x, pack_depthwise(weight), 5, [3, 3], [1, 2], [1, 1], [1, 1], *values(after), 7
    torch.library.opcheck(torch.ops.qpass_kernels.depthwise2d.default, args)


BAD = (
    ({"weight": codes(9, 32)}, r"one group and one output for each of 16 channels.* not 16 groups and \(9, 32\)"),
    ({"groups": 4}, "one group and one output for each of 16 channels.* not 4 groups"),
    ({"weight": codes(25, 16)}, r"weight \(9, 16\), not 16 groups and \(25, 16\)"),
    ({"x": torch.randn(1, 16, 5, 5)}, "both int8 or float8_e4m3fn"),
    ({"x_zero": 128}, "x_zero must lie in -128 .. 127, and be 0 unless x is int8: 128"),
    ({"window": Window((3, 3), (1, 1), (1,), (1, 1))}, "padding must be 2 or 4 numbers"),
    ({"after": Finish(torch.ones(8))}, "alpha must have 16 elements, not 8"),
)


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[says[:30] for _, says in BAD])
def test_bad_input(changes, says):
    fits = {"x": codes(1, 16, 5, 5), "weight": codes(9, 16), "x_zero": 0, "groups": 16, "after": Finish(torch.ones(16))}
    held = {**fits, "window": Window((3, 3), (1, 1), (1, 1), (1, 1)), **changes}
    for run in (conv_depthwise.convolve, reference):
        with pytest.raises(ValueError, match=f"depthwise2d: .*{says}"):
            run(*(held[name] for name in ("x", "weight", "x_zero", "window", "after", "groups")))

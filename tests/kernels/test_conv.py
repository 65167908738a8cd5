"""The convolution kernel in Triton's interpreter against the op's reference, and that against torch on real values."""

import itertools

import pytest
import torch
from torch.nn import functional

from qpass import conv_ops
from qpass_kernels import conv
from qpass_kernels.activations import NAMES
from qpass_kernels.configs import Config
from qpass_kernels.conv_weights import SLOPED, Finish, Window, correction, depth, pack, ranges, states, unpack
from qpass_kernels.epilogue import OUTPUTS
from qpass_kernels.launch import Chip

FLOAT = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # of the largest value; bfloat16 is cut off here
SMALL = Config(bm=16, bn=16, bk=32, band=2)
GEOMETRIES = (  # batch, channels, rows, columns, outputs, kernel, stride, padding, dilation, groups
    (1, 3, 9, 7, 16, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (3, 16, 5, 9, 7, (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (1, 32, 7, 7, 33, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (1, 32, 5, 7, 33, (3, 3), (1, 2), (2, 1), (1, 1), 1),
    (3, 48, 5, 5, 16, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 5, 5, 7, 7, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    (1, 16, 7, 5, 33, (1, 1), (2, 1), (0, 0), (1, 1), 1),
    (1, 16, 5, 5, 7, (1, 1), (1, 1), (1, 2), (1, 1), 1),
    (1, 5, 9, 9, 7, (5, 5), (1, 1), (2, 2), (1, 1), 1),
    (3, 3, 9, 9, 16, (7, 7), (2, 2), (3, 3), (1, 1), 1),
    (1, 5, 5, 5, 7, (7, 7), (1, 1), (3, 3), (1, 1), 1),
    (1, 16, 7, 9, 16, (1, 3), (1, 2), (0, 1), (1, 1), 1),
    (1, 32, 9, 9, 7, (3, 3), (1, 1), (2, 2), (2, 2), 1),
    (1, 5, 7, 9, 16, (3, 3), (2, 1), (3, 2), (1, 2), 1),
    (1, 16, 9, 7, 16, (3, 3), (1, 1), (0, 1, 2, 1), (1, 1), 1),
    (1, 32, 7, 7, 66, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (3, 64, 5, 5, 32, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    (1, 6, 5, 7, 14, (3, 3), (2, 2), (1, 1), (1, 1), 2),
)


def codes(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def problem(geometry, zero):
    """(x, weight [N, C / groups, KH, KW], window, groups) and the arguments that kernels take of them."""
    b, c, h, w, n, kernel, stride, padding, dilation, groups = geometry
    x, weight = codes(b, c, h, w), codes(n, c // groups, *kernel)
    return (x, weight, Window(kernel, stride, padding, dilation), groups), (x, pack(weight), correction(weight, zero))


def convolved(x, weight, window, groups):
    top, left, bottom, right = (*window.padding, *window.padding)[:4]
    held = functional.pad(x, (left, right, top, bottom))
    return functional.conv2d(held, weight, None, window.stride, 0, window.dilation, groups)


def finish(y, **options):
    """An epilogue for a result like y, float64, with beta."""
    n = y.shape[1]
    alpha = (torch.rand(n) + 0.5) * 4 / float(y.double().std().clamp(min=1e-6))
    return Finish(alpha, torch.randn(n), **options)


def values(after):
    return [getattr(after, name) for name in Finish.__dataclass_fields__]


def reference(x, weight, zero, window, after, groups):
    listed = (list(getattr(window, name)) for name in Window.__dataclass_fields__)
    return torch.ops.qpass_kernels.conv2d(x, weight, zero, *listed, *values(after), groups)


def check_same(found, expected):
    """Codes differ by a step in less than 1 %, floats by their rounding."""
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    assert found.dtype == expected.dtype
    off = (found.double() - expected.double()).abs()
    if found.dtype in FLOAT:
        assert off.max() <= FLOAT[found.dtype] * expected.double().abs().max()
        return
    step = 1 if found.dtype == torch.int8 else expected.double().abs().clamp(min=2**-6) / 8
    assert (off <= step).all()
    assert (off > 0).sum() <= max(1, found.numel() // 100)


@pytest.mark.parametrize("zero", [-128, 0, 5])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(geometry, zero):
    (x, weight, window, groups), held = problem(geometry, zero)
    sums = convolved(x.double() - zero, weight.double(), window, groups)
    after = finish(sums)
    real = sums * after.alpha.double()[:, None, None] + after.beta.double()[:, None, None]
    expected = reference(*held, window, after, groups)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(expected.double(), real, rtol=0, atol=1e-6 * float(real.abs().max()))
    for config in (None, SMALL):
        check_same(conv.convolve(*held, window, after, groups, config), expected)


@pytest.mark.parametrize(
    "config",
    [
        Config(bm=16, bn=16, bk=32, split=3, band=2),
        Config(bm=64, bn=32, bk=64, split=2),
        Config(bm=16, bn=256, bk=128, band=3),
        Config(bm=16, bn=64, bk=32, split=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("groups", [1, 2])
def test_tiles(config, groups):
    (x, weight, window, groups), held = problem((1, 64, 5, 7, 300, (3, 3), (1, 1), (1, 1), (1, 1), groups), 5)
    after = finish(convolved(x.double(), weight.double(), window, groups), act="relu")
    expected = reference(*held, window, after, groups)
    check_same(conv.convolve(*held, window, after, groups, config), expected)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_rule(capability):
    chip = Chip("", capability, 132, 101376 if capability[0] == 12 else 166912)
    for m, n, c in itertools.product((1, 49, 3136, 25088, 401408), (1, 16, 24, 64, 256, 512), (4, 16, 24, 32, 96, 256)):
        config = conv.rule(m, n, c, 9 * c, 1, chip)
        assert config.stages * config.bk * (config.bm + config.bn) <= chip.shared
        assert config.bm >= 64
        assert config.bk >= 32
        assert config.bn >= min(n, 64)
        assert c % config.bk == 0 or c % 32
        assert config.bn < 256 or (config.split == 1 and capability[0] in (9, 10))


def epilogue_case(act="", residual="", dtype=torch.float32, shape=(3, 7, 4, 5)):
    """An epilogue for sums of `shape` with standard deviation 30000."""
    options = {"act": act, "slope": torch.rand(shape[1]) * 2 if act in SLOPED else None, "out_dtype": dtype}
    if residual == "codes":
        options |= {"other": codes(*shape), "other_scale": 0.03, "other_zero": -7}
    elif residual:
        options["other"] = torch.randn(shape).to(getattr(torch, residual))
    if dtype == torch.int8:
        options |= {"out_scale": 0.05, "out_zero": -20}
    elif dtype == torch.float8_e4m3fn:
        options["out_scale"] = 0.01
    return finish(torch.randn(shape) * 3e4, **options)


EPILOGUES = (
    *(((act, "codes", torch.float32)) for act in (*NAMES, *SLOPED)),
    *(((act, "", torch.int8)) for act in (*NAMES, *SLOPED)),
    *((("relu", residual, dtype)) for residual in ("", "codes", "float32", "bfloat16", "float16") for dtype in OUTPUTS),
)


@pytest.mark.parametrize(("act", "residual", "dtype"), EPILOGUES, ids=str)
def test_epilogues(act, residual, dtype):
    (x, weight, window, groups), held = problem((3, 8, 7, 9, 7, (3, 3), (2, 2), (1, 1), (1, 1), 1), 5)
    after = epilogue_case(act, residual, dtype)
    expected = reference(*held, window, after, groups)
    check_same(conv.convolve(*held, window, after, groups), expected)
    real = convolved(x.double() - 5, weight.double(), window, groups) * after.alpha.double()[:, None, None]
    real = real + after.beta.double()[:, None, None]
    if residual:
        other = after.other.double()
        real = real + ((other + 7) * 0.03 if residual == "codes" else other)
    real = conv_ops.activate(real, act, after.slope)
    if dtype == torch.int8:
        real = (torch.round(real / 0.05) - 20).clamp(-128, 127)
    elif dtype == torch.float8_e4m3fn:
        real = (real / 0.01).clamp(-448, 448).float()
    check_same(real.to(dtype).contiguous(memory_format=torch.channels_last), expected)


@pytest.mark.parametrize("residual", ["", "float32"])
def test_one_by_one_is_a_matmul(residual, monkeypatch):
    (*_, window, groups), held = problem((3, 16, 4, 5, 7, (1, 1), (1, 1), (0, 0), (1, 1), 1), 5)
    after = epilogue_case("relu", residual, torch.int8)
    monkeypatch.setattr(conv, "implicit", None)
    check_same(conv.convolve(*held, window, after, groups), reference(*held, window, after, groups))


def test_what_is_no_matmul():
    plain = Window((1, 1), (1, 1), (0, 0), (1, 1))
    assert conv.is_matmul(plain, epilogue_case(), 1)
    assert not conv.is_matmul(plain, epilogue_case(residual="codes"), 1)
    assert not conv.is_matmul(plain, epilogue_case("prelu"), 1)
    assert not conv.is_matmul(plain, epilogue_case(), 2)
    for changed in (((1, 1), (2, 1), (0, 0)), ((1, 1), (1, 1), (0, 1)), ((1, 2), (1, 1), (0, 0))):
        assert not conv.is_matmul(Window(*changed, (1, 1)), epilogue_case(), 1)


@pytest.mark.parametrize(("x_code", "weight_code"), [(127, -128), (-128, -128), (127, 127), (-128, 127)])
@pytest.mark.parametrize("zero", [-128, 127])
def test_extremes_are_exact(x_code, weight_code, zero):
    x = torch.full((1, 16, 5, 5), x_code, dtype=torch.int8)
    weight = torch.full((7, 16, 3, 3), weight_code, dtype=torch.int8)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1))
    held = x, pack(weight), correction(weight, zero), window, Finish(torch.ones(7)), 1
    expected = convolved(x.double() - zero, weight.double(), window, 1)
    assert torch.equal(reference(*held).double(), expected)
    assert torch.equal(conv.convolve(*held).double(), expected)
    assert torch.equal(conv.convolve(*held, SMALL).double(), expected)


@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (0, 2, 4, 15)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_fp8(geometry, dtype):
    (x, weight, window, groups), _ = problem(geometry, 0)
    x, weight = (torch.randn(t.shape).to(torch.float8_e4m3fn) for t in (x, weight))
    sums = convolved(x.double(), weight.double(), window, groups)
    after = finish(sums, out_dtype=dtype, out_scale=0.02 if dtype == torch.float8_e4m3fn else 1.0)
    held = x, pack(weight), None, window, after, groups
    expected = reference(*held)
    check_same(conv.convolve(*held), expected)
    if dtype == torch.float32:
        real = sums * after.alpha.double()[:, None, None] + after.beta.double()[:, None, None]
        torch.testing.assert_close(expected.double(), real, rtol=0, atol=1e-6 * float(real.abs().max()))


def test_means_what_qpass_conv_means():
    (x, weight, window, groups), held = problem((1, 16, 7, 9, 7, (3, 3), (2, 2), (1, 1), (1, 1), 1), 5)
    scale, out_scale = torch.rand(7) * 0.01 + 0.01, torch.tensor(0.1)
    other, bias = codes(1, 7, 4, 5), torch.randn(7)
    after = Finish(scale * 0.02, bias, other, 0.03, -7, "relu", None, 0.1, -128, torch.int8)
    up = lambda q: (q.int() + 128).to(torch.uint8)
    expected = conv_ops.conv(
        up(x), torch.tensor(0.02), torch.tensor(133), "u8/t", weight, scale, "i8/c0", bias, up(other), torch.tensor(0.03),
        torch.tensor(121), "u8/t", "relu", None, out_scale, torch.tensor(0), "u8/t", torch.float32, [2, 2], [1, 1], [1, 1],
        False, [0, 0], 1,
    )  # fmt: skip
    check_same(up(conv.convolve(*held, window, after, groups)).to(torch.int16).contiguous(), expected.to(torch.int16))


def test_layout_of_the_input_does_not_matter():
    (x, _, window, groups), held = problem(GEOMETRIES[2], 5)
    after, last = finish(torch.randn(1, 33, 5, 5) * 500), x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        conv.convolve(*held, window, after, groups), conv.convolve(last, *held[1:], window, after, groups)
    )


def test_channels_padded_before():
    (x, _, window, groups), held = problem(GEOMETRIES[0], 5)
    after, wide = finish(torch.randn(1, 16, 9, 7) * 500), functional.pad(x, (0, 0, 0, 0, 0, 1), value=77)
    assert torch.equal(
        conv.convolve(*held, window, after, groups), conv.convolve(wide, *held[1:], window, after, groups)
    )


@pytest.mark.parametrize("shape", [(0, 16, 5, 5), (2, 16, 5, 5)])
def test_nothing_to_do(shape):
    n = 7 if shape[0] == 0 else 0
    held = codes(*shape), codes(n, 144), None, Window((3, 3), (1, 1), (1, 1), (1, 1)), Finish(torch.ones(n)), 1
    for run in (conv.convolve, reference):
        assert run(*held).shape == (shape[0], n, 5, 5)


def test_packing():
    for c in (1, 3, 4, 5, 16):
        weight = codes(6, c, 3, 2)
        assert depth(c) % 4 == 0
        assert torch.equal(unpack(pack(weight), c, (3, 2)), weight)
    assert [states(taps) for taps in (1, 3, 7)] == [len(ranges(taps)) for taps in (1, 3, 7)] == [2, 7, 29]
    assert correction(codes(6, 3, 3, 2), 0) is None


def test_opcheck():
    (*_, groups), held = problem((1, 16, 5, 7, 7, (3, 3), (1, 2), (1, 1), (1, 1), 1), 5)
    after = epilogue_case("prelu", "codes", torch.int8, (1, 7, 5, 4))
    args = *held, [3, 3], [1, 2], [1, 1], [1, 1], *values(after), groups
    torch.library.opcheck(torch.ops.qpass_kernels.conv2d.default, args)


ONES = torch.ones(7)
BAD = (
    ({"x": torch.randn(1, 16, 5, 5)}, "both int8 or float8_e4m3fn, not .*float32 and torch.int8"),
    ({"x": codes(16, 5, 5)}, r"x must be \[B, C, H, W\].*\(16, 5, 5\)"),
    ({"x": codes(1, 24, 5, 5)}, "of 24 channels has 216 values, not 144"),
    ({"x": codes(1, 16, 0, 5)}, "does not fit on an image of 0 x 5"),
    ({"x": codes(1, 0, 5, 5)}, "1 groups do not divide 0 channels and 7 outputs"),
    ({"weight": codes(144, 7).t()}, "weight must be contiguous"),
    ({"groups": 2}, "2 groups do not divide 16 channels and 7 outputs"),
    ({"correction": torch.zeros(9, 7, dtype=torch.int32)}, "correction must have 343 elements, not 63"),
    ({"correction": torch.zeros(49, 7)}, "correction must be torch.int32, not torch.float32"),
    ({"correction": torch.zeros(7, 49, dtype=torch.int32)}, "correction must have 49 rows, of int8, not 7"),
    ({"window": Window((3,), (1, 1), (1, 1), (1, 1))}, r"kernel must be 2 numbers from 1 on, not \[3\]"),
    ({"window": Window((3, 3), (1, 1), (1, -1), (1, 1))}, r"padding must be 2 or 4 numbers from 0 on, not \[1, -1\]"),
    ({"window": Window((3, 3), (0, 1), (1, 1), (1, 1))}, "stride must be 2 numbers from 1 on"),
    ({"window": Window((3, 3), (1, 1), (1, 1), (5, 1))}, "does not fit on an image of 5 x 5"),
    ({"after": Finish(torch.ones(8))}, "alpha must have 7 elements, not 8"),
    ({"after": Finish(ONES, act="prelu")}, "prelu and cap need slope"),
    ({"after": Finish(ONES, act="relu", slope=ONES)}, "prelu and cap need slope, .*: activation 'relu'"),
    ({"after": Finish(ONES, act="cap", slope=torch.ones(2))}, "slope must have 7 elements, not 2"),
    ({"after": Finish(ONES, act="tanh")}, "activation 'tanh' is not one of"),
    ({"after": Finish(ONES, other=torch.ones(1, 7, 5, 4))}, r"other must be \(1, 7, 5, 5\), not \(1, 7, 5, 4\)"),
    (
        {"after": Finish(ONES, other=codes(1, 7, 5, 5).int())},
        "other must be float32, bfloat16 or float16, not torch.int32",
    ),
    ({"after": Finish(ONES, other=codes(1, 7, 5, 5), other_scale=0.0)}, "codes as other must be on cpu .* 0.0 and 0"),
    ({"after": Finish(ONES, out_dtype=torch.int32)}, "writes .* not torch.int32"),
)


@pytest.mark.parametrize(("changes", "says"), BAD, ids=[says[:30] for _, says in BAD])
def test_bad_input(changes, says):
    fits = {"x": codes(1, 16, 5, 5), "weight": codes(7, 144), "correction": None, "groups": 1}
    held = {**fits, "window": Window((3, 3), (1, 1), (1, 1), (1, 1)), "after": Finish(ONES), **changes}
    for run in (conv.convolve, reference):
        with pytest.raises(ValueError, match=f"conv2d: .*{says}"):
            run(*(held[name] for name in ("x", "weight", "correction", "window", "after", "groups")))

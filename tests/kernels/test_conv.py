"""The convolution kernel in Triton's interpreter against the op's reference, and that against torch on real values."""

import itertools

import pytest
import torch
from torch.nn import functional

from qpass import conv_ops
from qpass_kernels import conv
from qpass_kernels.configs import Config
from qpass_kernels.conv_weights import Finish, Window, correction, depth, pack, ranges, states, unpack
from qpass_kernels.launch import Chip
from tests.kernels.images import check_same, codes, convolved, epilogue_case, finish, problem, reference, values

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

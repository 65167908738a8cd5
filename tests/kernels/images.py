"""Convolutions of random codes for kernels, and what they must give."""

import torch
from torch.nn import functional

from qpass_kernels.conv_finish import SLOPED, Finish
from qpass_kernels.conv_weights import Window, correction, pack

FLOAT = {
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}  # of the largest value; bfloat16 is cut off here


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

"""Activations inside kernels, by the names that `qpass.linear` and `qpass.conv` use. float32 in, float32 out; NaN stays."""

import triton
import triton.language as tl

NAMES = ("", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish", "hardsigmoid", "sigmoid")


@triton.jit
def activate(y, ACT: tl.constexpr):
    """The activation of a name in NAMES; tanh(z) is 2 sigmoid(2 z) - 1, which needs no library of the device."""
    if ACT == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACT == "silu":
        y = y * tl.sigmoid(y)
    elif ACT == "relu6":
        y = tl.clamp(y, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "hardswish":
        y = y * tl.clamp(y + 3.0, 0.0, 6.0) * (1.0 / 6.0)
    elif ACT == "hardsigmoid":
        y = tl.clamp(y + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    elif ACT == "sigmoid":
        y = tl.sigmoid(y)
    return y

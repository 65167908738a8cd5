"""Nested linears on the kernel of 4-bit weights, w4a16_linear: once, or twice for 8 bits, as the bits of now say.

    4, 2 bits    w4a16_linear(x, w4)                                                   2 bits lie in words of 4 here
    8 bits       w4a16_linear(x, w8 - w4, bias, other = w4a16_linear(x, w4))           the first of them in float32

Each width's codes are laid out once, as the kernel reads them, and shared by all that reads them.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.backends.triton.linear import FLOATS, OUTPUTS
from qpass.backends.triton.package import kernels, too_old
from qpass.graphs import add_call, add_constant, constant
from qpass.nested import FEW, plane, type_at, unquartered
from qpass.nested_ops import bits_now
from qpass.nested_words import HALF
from qpass.ops import define
from qpass.packing import whole
from qpass.qtype import QType

Q = torch.ops.qpass
EACH = 4  # tensors of a width: words, scale of groups or None, zero points, alpha


def kernel_nested(
    x: Tensor, held: list[Tensor | None], bits: Tensor, type: str, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """X @ w.T + bias [..., N] in `dtype`, at the bits of now. x: bfloat16 or float16 [..., K]; held: EACH for each width."""
    widths, width = QType.parse(type).widths, bits_now(bits)

    def product(bits: int, bias: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> Tensor:
        at = EACH * widths.index(bits)
        words, scale, zero, alpha = held[at : at + EACH]
        after = (alpha, bias, None, None, None, other, "", 1.0, 0, dtype)
        return torch.ops.qpass_kernels.w4a16_linear(x, words, scale, zero, *after)

    other = product(HALF, None, None, torch.float32) if width > HALF else None
    return product(width, bias, other, dtype)


def _fake(x, held, bits, type, bias, dtype):
    return x.new_empty((*x.shape[:-1], held[0].shape[0]), dtype=dtype)


define(
    "kernel_nested(Tensor x, Tensor?[] held, Tensor bits, str type, Tensor? bias, ScalarType dtype) -> Tensor",
    kernel_nested,
    _fake,
)


def why_not(node: fx.Node) -> str | None:
    """None where the kernel runs a nested linear, or the sentence that says why not."""
    x, planes, scale, zero, _, text, bias, dtype = node.args
    value, group = x.meta["val"], QType.parse(text).group
    if any(constant(held) is None for held in (planes, scale, zero)) or (bias is not None and constant(bias) is None):
        return "its weight is not a constant of the graph"
    if value.dtype not in FLOATS or dtype not in OUTPUTS:
        return f"the triton kernels multiply bfloat16 and float16 by packed weights, not {value.dtype}"
    too = too_old(value.device, False)
    return too or (None if group is None else kernels().layouts.why_no_group("w4a16", group, int(value.shape[-1])))


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One qpass.kernel_nested in front of `node`; the bits stay an input."""
    x, planes, scale, zero, bits, text, bias, dtype = node.args
    qtype, name = QType.parse(text), node.meta.get("site", "linear")

    def hold(key: str, value: Tensor | None) -> fx.Node | None:
        return None if value is None else add_constant(gm, f"{name}_{key}", value.detach().contiguous(), node)

    held = []
    for row, width in enumerate(qtype.widths):
        tensors = _laid_out(constant(planes), constant(scale)[row], constant(zero)[row], qtype, width)
        held += [hold(f"{key}{width}", t) for key, t in zip(("packed", "scale", "zero", "alpha"), tensors, strict=True)]
    beta = None if bias is None else hold("beta", constant(bias).float())
    return add_call(gm, Q.kernel_nested.default, (x, held, bits, text, beta, dtype), node)


def _laid_out(planes: Tensor, scale: Tensor, zero: Tensor, qtype: QType, bits: int) -> tuple[Tensor | None, ...]:
    """EACH tensors of a width."""
    layouts, data = kernels().layouts, plane(planes, qtype, bits)
    codes = whole(unquartered(data) if bits == FEW else data, type_at(qtype, bits))
    groups, alpha = layouts.group_scales(scale.float()) if qtype.group else (None, scale.float())
    return layouts.pack(codes, "w4a16"), groups, zero.reshape(len(codes), -1).t().contiguous(), alpha

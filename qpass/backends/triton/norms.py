"""Norms over the last axis, as one operation or as the chain that models write.

    aten.rms_norm, aten.layer_norm
    weight * (float(x) * rsqrt(mean(float(x)^2) + eps)).to(dtype)        LlamaRMSNorm and its kin; x in 16 bits or in float32

The chain rounds before it multiplies by the weight and the kernel after it, which is the more exact of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qpass.backends.quantized_input import column
from qpass.graphs import constant

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """The norm of x over its last axis; weight, bias: constants [K] or None."""

    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    eps: float
    rms: bool


def norm_of(node: fx.Node) -> Norm | None:
    """The norm that a node is the result of, or None."""
    if node.target is aten.rms_norm.default:
        x, axes, weight, eps = node.args
        return _whole(node, Norm(x, weight, None, torch.finfo(torch.float32).eps if eps is None else eps, True), axes)
    if node.target is aten.layer_norm.default:
        x, axes, weight, bias, eps = node.args[:5]
        return _whole(node, Norm(x, weight, bias, eps, False), axes)
    return _chain(node)


def _whole(node: fx.Node, norm: Norm, axes: list[int]) -> Norm | None:
    held = all(t is None or constant(t) is not None for t in (norm.weight, norm.bias))
    same = norm.x.meta["val"].dtype is node.meta["val"].dtype
    return norm if len(axes) == 1 and held and same else None


def _chain(node: fx.Node) -> Norm | None:
    """The norm of a chain that ends in its product with the weight."""
    if node.target is not aten.mul.Tensor:
        return None
    weight, value = node.args[:2] if column(node.args[0]) is not None else node.args[1::-1]
    if (
        column(weight) is None
        or not isinstance(value, fx.Node)
        or weight.meta["val"].dtype is not value.meta["val"].dtype
    ):
        return None
    unit = _uncast(value)
    if unit.target is not aten.mul.Tensor or len(unit.users) != 1 or len(value.users) != 1:
        return None
    wide, factor = unit.args[:2]
    if not isinstance(factor, fx.Node) or factor.target is not aten.rsqrt.default:
        return None
    shifted = factor.args[0]
    if shifted.target is not aten.add.Tensor or isinstance(shifted.args[1], fx.Node):
        return None
    mean = shifted.args[0]
    squares = mean.args[0] if mean.target is aten.mean.dim and list(mean.args[1]) == [-1] and mean.args[2] else None
    if (
        squares is None
        or squares.target is not aten.pow.Tensor_Scalar
        or squares.args[0] is not wide
        or squares.args[1] != 2
    ):
        return None
    x = _uncast(wide)
    fits = isinstance(x.meta.get("val"), Tensor) and x.meta["val"].dtype is node.meta["val"].dtype
    return Norm(x, weight, None, float(shifted.args[1]), True) if fits else None


def _uncast(node: fx.Node) -> fx.Node:
    return node.args[0] if node.target is aten.to.dtype else node

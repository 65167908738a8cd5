"""Every convolution is spelled `aten.convolution(x, w, b, stride, padding, dilation, transposed, output_padding, groups)`.

    conv1d, conv2d, conv3d                          ->   convolution(..., transposed=False)
    conv2d(x, w, b, padding="same")                 ->   convolution, of a padded x where the padding is uneven
    conv_transpose1d, conv_transpose2d, ...3d       ->   convolution(..., transposed=True)
    conv2d of [C, H, W], without a batch            ->   squeeze(convolution(unsqueeze(x, 0), ...), 0)

A named padding of a kernel whose size is not known stays as it is. The lists have one number for each spatial axis.
Padding modes other than zeros are pads of their own in front already.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from qpass.arity import full_arity
from qpass.geometry import Geometry
from qpass.graphs import add_call
from qpass.products import aten

PLAIN = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
NAMED_PADDING = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
CONVOLUTION = aten.convolution.default
MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def geometry(node: fx.Node) -> Geometry:
    """The geometry of a canonical convolution."""
    _, weight, _, stride, padding, dilation, transposed, output_padding, groups = node.args
    lists = (tuple(values) for values in (weight.meta["val"].shape[2:], stride, padding, dilation))
    return Geometry(*lists, bool(transposed), tuple(output_padding), int(groups))


def geometry_of_module(module: nn.Module) -> Geometry:
    """The geometry of the convolution that a module of MODULES computes, without pads of its own (padding_mode)."""
    padding = module.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        padding = tuple(r // 2 if padding == "same" else 0 for r in reach)
    lists = (tuple(values) for values in (module.kernel_size, module.stride, padding, module.dilation))
    return Geometry(*lists, module.transposed, tuple(module.output_padding), module.groups)


def is_convolution(node: object) -> bool:
    """Whether a node is a canonical convolution."""
    return isinstance(node, fx.Node) and node.target is CONVOLUTION


def to_convolution(gm: fx.GraphModule, node: fx.Node) -> None:
    """Rewrites one node of a graph to the canonical convolution, in place, where it is one."""
    if node.target not in (*PLAIN, *NAMED_PADDING, *TRANSPOSED, CONVOLUTION):
        return
    args, _ = full_arity(node.target, node.args, node.kwargs)
    x, weight, bias = args[:3]
    axes = weight.meta["val"].dim() - 2
    zeros = [0] * axes
    if node.target in NAMED_PADDING and not all(isinstance(size, int) for size in weight.meta["val"].shape[2:]):
        return
    if node.target in TRANSPOSED:
        stride, padding, output_padding, groups, dilation = args[3:8]
        rest = (
            _each(stride, axes),
            _each(padding, axes),
            _each(dilation, axes),
            True,
            _each(output_padding, axes),
            groups,
        )
    elif node.target is CONVOLUTION:
        stride, padding, dilation, transposed, output_padding, groups = args[3:9]
        lists = (_each(values, axes) for values in (stride, padding, dilation))
        rest = (*lists, transposed, _each(output_padding, axes), groups)
    else:
        stride, padding, dilation, groups = args[3:7]
        if isinstance(padding, str):
            x, padding = _named_padding(gm, node, x, weight.meta["val"], padding, _each(dilation, axes))
        rest = (_each(stride, axes), _each(padding, axes), _each(dilation, axes), False, zeros, groups)
    if x.meta["val"].dim() == axes + 2:
        node.target, node.args, node.kwargs = CONVOLUTION, (x, weight, bias, *rest), {}
        return
    batched = add_call(gm, aten.unsqueeze.default, (x, 0), node)
    y = add_call(gm, CONVOLUTION, (batched, weight, bias, *rest), node)
    node.target, node.args, node.kwargs = aten.squeeze.dim, (y, 0), {}


def _each(values: Any, axes: int) -> list[int]:
    values = [values] if isinstance(values, int) else list(values)
    return values * axes if len(values) == 1 else values


def _named_padding(gm: fx.GraphModule, node: fx.Node, x: fx.Node, weight: Tensor, name: str, dilation: list[int]):
    """Padding as numbers; where "same" needs more on the right than on the left, the difference is a pad of its own."""
    if name == "valid":
        return x, [0] * len(dilation)
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    left = [t // 2 for t in total]
    if any(t % 2 for t in total):
        more = [amount for t in reversed(total) for amount in (0, t % 2)]
        x = add_call(gm, aten.pad.default, (x, more), node)
    return x, left

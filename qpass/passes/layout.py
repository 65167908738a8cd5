"""Lay images out as the backend's kernels read and write them: channels last, from the first layer to the last.

    quantize(x)                       ->   turn back(quantize(turn(x)))          turn: [B, C, H, W] -> [B, H, W, C], a view
    qpass.pad(q)                      ->   turn back(qpass.pad(turn(q)))
    channel_shuffle(x, g)             ->   turn back(reshape(transpose(view(turn(x), [B, H, W, g, C / g]), 3, 4)))
    anything else of another layout   ->   a copy in front of the kernel

Where no kernel runs some qpass.conv, its reference does, which writes contiguous memory whatever the float operation did:
then all values are made anew, as they were taken over from the float ones.

A quantize writes its codes in the order of its argument's axes, so the turn costs nothing: the first quantize of an
image reads it once and writes it channels last. Values keep their logical shape [B, C, ...]; their strides are those
of the other order.
Afterwards every value's `meta` tells the strides it really has, which the generated kernels rely on.

1. only where the backend has kernels that want channels last (`Backend.channels_last`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qpass.graphs import add_call, set_value
from qpass.passes.lower import IMAGES
from qpass.passes.strides import follow, is_opaque

aten = torch.ops.aten
Q = torch.ops.qpass


def layout(gm: fx.GraphModule, context) -> int:
    """Returns the number of values laid out anew."""
    wanted = context.backend.channels_last()
    targets = {node.target for node in gm.graph.nodes}
    if not wanted or targets.isdisjoint((*wanted, *IMAGES)):
        return 0
    stale = not targets.isdisjoint(IMAGES)
    edits = 0
    moved: set[fx.Node] = set()  # values whose strides are not what they were
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is aten.channel_shuffle.default and _is_tensor(node):
            made = _shuffled(gm, node)
            node.replace_all_uses_with(made)
            moved.add(made)
            edits += 1
        elif node.target in wanted:
            parts = node.target in context.backend.reads_parts
            edits += sum(_turn(gm, i, node, parts, moved) for i in list(node.all_input_nodes) if _is_image(i, node))
            moved.add(node)
        elif (stale or any(i in moved for i in node.all_input_nodes)) and not is_opaque(node):
            follow(gm, node, moved)
            if _is_elementwise(node):  # made with its kernel, in the kernel's own layout
                moved.add(node)
    gm.graph.eliminate_dead_code()
    return edits


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _is_image(value: fx.Node, node: fx.Node) -> bool:
    """Whether an input is an image or the residual added to one: of as many axes as the result."""
    held, result = value.meta.get("val"), node.meta["val"]
    if value.op == "get_attr" or not isinstance(held, Tensor):
        return False
    return held.dim() == result.dim() and held.numel() != held.shape[0]


def is_channels_last(value: Tensor) -> bool:
    """Whether [B, C, ...] lies in memory as [B, ..., C]."""
    return value.movedim(1, -1).is_contiguous()


def is_part(value: Tensor) -> bool:
    """Whether [B, C, ...] is some channels of a wider image that lies channels last."""
    strides, sizes = value.stride(), value.shape
    inner = value.dim() - 1
    if strides[1] != 1 or not isinstance(strides[inner], int) or strides[inner] < sizes[1]:
        return False
    expected = strides[inner]
    for axis in (*range(inner, 1, -1), 0):
        if str(strides[axis]) != str(expected):
            return False
        expected = expected * sizes[axis]
    return True


def _turn(gm: fx.GraphModule, value: fx.Node, before: fx.Node, parts: bool, moved: set[fx.Node]) -> int:
    """Makes what `before` reads of `value` channels last; returns 0 where it is, or can be read where it lies."""
    held = value.meta["val"]
    if is_channels_last(held) or (parts and value is before.args[0] and is_part(held)):
        return 0
    if value.target is Q.quantize.default:
        codes = add_call(gm, value.target, (turned(gm, value.args[0], value), *value.args[1:]), value)
    elif value.target is Q.pad.default:
        inner = (turned(gm, value.args[0], value), _turned_widths(value), *value.args[2:])
        codes = add_call(gm, value.target, inner, value)
    elif _is_elementwise(value):
        return _turn_source(gm, value, parts, moved)
    else:
        codes = add_call(
            gm, aten.clone.default, (turned(gm, value, before),), before, memory_format=torch.contiguous_format
        )
        before.replace_input_with(value, turned_back(gm, codes, before))
        return 1
    made = turned_back(gm, codes, value)
    made.meta |= {key: value.meta[key] for key in ("site", "rule") if key in value.meta}
    value.replace_all_uses_with(made)
    moved.add(made)
    return 1


def _is_elementwise(value: fx.Node) -> bool:
    """Whether a value is one other value, element by element, in its layout: codes that are shifted."""
    target = value.target
    return (
        isinstance(target, torch._ops.OpOverload) and target.namespace == "qpass" and torch.Tag.pointwise in target.tags
    )


def _turn_source(gm: fx.GraphModule, value: fx.Node, parts: bool, moved: set[fx.Node]) -> int:
    edits = _turn(gm, value.args[0], value, parts, moved)
    set_value(gm, value)
    moved.add(value)
    return edits


def turned(gm: fx.GraphModule, value: fx.Node, before: fx.Node) -> fx.Node:
    """[B, C, ...] seen as [B, ..., C]."""
    axes = value.meta["val"].dim()
    return add_call(gm, aten.permute.default, (value, [0, *range(2, axes), 1]), before)


def _turned_widths(pad: fx.Node) -> list[int]:
    """The widths of a pad of [B, C, ...], last axis first, for [B, ..., C]."""
    widths: Any = pad.args[1]
    spatial = 2 * (pad.meta["val"].dim() - 2)
    images, channels, batch = widths[:spatial], widths[spatial : spatial + 2], widths[spatial + 2 :]
    return [*(channels or (0, 0)), *images, *([0] * (spatial - len(images)) if batch else ()), *batch]


def turned_back(gm: fx.GraphModule, value: fx.Node, before: fx.Node) -> fx.Node:
    """[B, ..., C] seen as [B, C, ...]."""
    axes = value.meta["val"].dim()
    return add_call(gm, aten.permute.default, (value, [0, axes - 1, *range(1, axes - 1)]), before)


def _shuffled(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    x, groups = node.args
    flat = turned(gm, x, node)
    channels = x.meta["val"].shape[1]
    split = add_call(gm, aten.unflatten.int, (flat, -1, [groups, channels // groups]), node)
    swapped = add_call(gm, aten.transpose.int, (split, -1, -2), node)
    joined = add_call(gm, aten.flatten.using_ints, (swapped, -2, -1), node)
    return turned_back(gm, joined, node)

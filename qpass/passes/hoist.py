"""Move quantizes up to where the values are made, and cancel what they undo.

    quantize(move(x), s, z)               ->   move(quantize(x, s, z))     cat, views, slices, shuffles, nearest upsampling
    quantize(max_pool(x), s, z)           ->   qpass.max_pool(quantize(x, s, z))
    quantize(relu(x), s, z)               ->   quantize(x, s, z)           where z is the smallest code: it clamps so
    quantize(pad(x, 0), s, z)             ->   qpass.pad(quantize(x, s, z), z)
    quantize(dequantize(q, s, z), s, z)   ->   q
    max_pool(dequantize(q, s, z))         ->   dequantize(qpass.max_pool(q), s, z)     one for each reader: a residual fuses

Rounding is monotonic and the same for each value, so all of this is exact. Quantizes of one value with one scale are one, and
so are equal moves of it.

1. scale and zero point are constants, the type is per tensor;
2. every value that would be quantized is made by a convolution or is quantized with this scale already, so that nothing is
   quantized twice that was quantized once; nor does it matter who made what only this quantize reads padded.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from qpass.graphs import PADS, add_call, constant, pads_zeros, single_user

aten = torch.ops.aten
Q = torch.ops.qpass
MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.upsample_nearest2d.vec,
)
PARTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
POOLS = (aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
SWEEPS = 8
Key = tuple[float, int, str]


def hoist(gm: fx.GraphModule, context=None) -> int:
    """Moves and cancels until nothing changes; returns the number of edits."""
    edits = 0
    for _ in range(SWEEPS):
        found = _merge(gm)
        for node in reversed(list(gm.graph.nodes)):
            if node.target is Q.quantize.default and not node._erased and (key := key_of(node)) is not None:
                found += _cancel(gm, node, key) or _move(gm, node, key)
            elif node.target in POOLS:
                found += _pool_codes(gm, node)
        gm.graph.eliminate_dead_code()
        edits += found
        if not found:
            break
    return edits


def key_of(node: fx.Node) -> Key | None:
    """(scale, zero point, type) of a quantize or dequantize per tensor with constants; None for others."""
    scale, zero = constant(node.args[1]), constant(node.args[2])
    if scale is None or zero is None or not node.args[3].endswith("/t"):
        return None
    return float(scale), int(zero), node.args[3]


def _merge(gm: fx.GraphModule) -> int:
    """Equal quantizes of one value become one, and equal moves of it."""
    known: dict[Any, fx.Node] = {}
    edits = 0
    for node in list(gm.graph.nodes):
        if (same := _identity(node)) is None:
            continue
        first = known.setdefault(same, node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            edits += 1
    return edits


def _identity(node: fx.Node) -> Any:
    """Equal for nodes that compute the same; None where nothing of the kind is moved."""
    if node.target is Q.quantize.default:
        key = key_of(node)
        return None if key is None else (node.args[0], key)
    if node.op != "call_function" or node.target not in (
        *MOVES,
        *PARTS,
        aten.cat.default,
        Q.max_pool.default,
        operator.getitem,
    ):
        return None
    return str(node.target), str(node.args), str(node.kwargs)


def _cancel(gm: fx.GraphModule, node: fx.Node, key: Key) -> int:
    x = node.args[0]
    if x.target is Q.dequantize.default and key_of(x) == key:
        return _become(gm, node, x.args[0])
    clamps = x.target is aten.relu.default and key[1] == 0 and key[2].startswith("u") and single_user(x) is node
    if clamps and not _product(x.args[0]):
        node.update_arg(0, x.args[0])
        return 1
    return 0


def _become(gm: fx.GraphModule, node: fx.Node, other: fx.Node) -> int:
    node.replace_all_uses_with(other)
    gm.graph.erase_node(node)
    return 1


def _move(gm: fx.GraphModule, node: fx.Node, key: Key) -> int:
    x = node.args[0]
    if x.op != "call_function" or not all(_known(user, key) for user in x.users):
        return 0
    if not _movable(x, key) and not (pads_zeros(x) and single_user(x) is node):
        return 0
    made = _moved(gm, x, node)
    return _become(gm, node, made) if made is not None else 0


def _movable(x: fx.Node, key: Key) -> bool:
    """Whether every value behind a move ends up as integers at no cost."""
    if x.target in PADS and not pads_zeros(x):
        return False
    if x.target not in (*MOVES, *POOLS, *PADS, aten.cat.default, operator.getitem):
        return False
    if x.target is operator.getitem and x.args[0].target not in PARTS:
        return False
    return all(_suits(source, key) for source in _sources(x))


def _sources(x: fx.Node) -> list[fx.Node]:
    if x.target is aten.cat.default:
        return list(x.args[0])
    return [x.args[0].args[0] if x.target is operator.getitem else x.args[0]]


def _suits(value: fx.Node, key: Key) -> bool:
    """A value that is integers already, or that a convolution can write as such, or that only moves such values."""
    if value.target is Q.dequantize.default:
        return key_of(value) == key
    if any(user.target is Q.quantize.default and key_of(user) == key for user in value.users):
        return True
    if value.op == "call_function" and _movable(value, key):
        return True
    return _product(value) and all(_known(user, key) for user in value.users)


def _known(user: fx.Node, key: Key) -> bool:
    return user.target is not Q.quantize.default or key_of(user) == key


def _product(value: fx.Node) -> bool:
    """Whether a value ends a chain that begins with a quantized convolution."""
    for _ in range(4):
        if value.op != "call_function" or value.target is aten.convolution.default:
            break
        if not isinstance(value.args[0] if value.args else None, fx.Node) or value.target in MOVES:
            return False
        value = value.args[0]
    return value.target is aten.convolution.default and value.args[0].target is Q.dequantize.default


def _moved(gm: fx.GraphModule, x: fx.Node, node: fx.Node) -> fx.Node | None:
    """The integers that a move of quantized values leaves, in front of `node`."""

    def codes(value: fx.Node) -> fx.Node:
        return add_call(gm, Q.quantize.default, (value, *node.args[1:]), node)

    if x.target is aten.cat.default:
        parts: Any = x.args[0]
        return add_call(gm, x.target, ([codes(v) for v in parts], *x.args[1:]), node)
    if x.target in POOLS:
        return _pooled(gm, x, codes(x.args[0]), node)
    if x.target in PADS:
        zero = int(_constant(node.args[2]))
        return add_call(gm, Q.pad.default, (codes(x.args[0]), x.args[1], zero), node)
    if x.target is operator.getitem:
        whole = x.args[0]
        parts = add_call(gm, whole.target, (codes(whole.args[0]), *whole.args[1:]), node)
        return add_call(gm, operator.getitem, (parts, x.args[1]), node)
    return add_call(gm, x.target, (codes(x.args[0]), *x.args[1:]), node)


def _pooled(gm: fx.GraphModule, pool: fx.Node, codes: fx.Node, before: fx.Node) -> fx.Node:
    kernel, stride, padding, dilation, ceil = pool.args[1:6]
    return add_call(gm, Q.max_pool.default, (codes, kernel, stride, padding, dilation, bool(ceil)), before)


def _pool_codes(gm: fx.GraphModule, pool: fx.Node) -> int:
    """Readers of a pool of dequantized values read dequantized values of a pool of integers."""
    real = pool.args[0]
    if not pool.users or real.target is not Q.dequantize.default or key_of(real) is None:
        return 0
    codes = _pooled(gm, pool, real.args[0], pool)
    for user in list(pool.users):
        user.replace_input_with(pool, add_call(gm, Q.dequantize.default, (codes, *real.args[1:]), user))
    return 1


def _constant(node: Any) -> Tensor:
    value = constant(node)
    assert value is not None
    return value

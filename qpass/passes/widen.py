"""Codes of fewer than 8 bits as bytes, where the backend has a kernel for bytes and none for them.

    linear(q u4/t, ...)       ->   linear(q u8/t, ...)                        the same codes, step and zero point
    linear(... -> u4/t)       ->   quantize(linear(... -> float32), u4/t)

Exact: x = (q - z) s says nothing of how far q could have gone. Convolutions likewise, with the codes that they add.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qpass.graphs import add_call

Q = torch.ops.qpass


@dataclass(frozen=True)
class Places:
    """Of a fused op's arguments: the types it reads, the step (zero point and type are behind it) and dtype it writes."""

    read: tuple[int, ...]
    step: int
    dtype: int


PLACES = {Q.linear.default: Places((3,), 10, 13), Q.conv.default: Places((3, 11), 14, 17)}


def widen(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """(the op on bytes, what gives the value of `node`), in front of it; None where all of its codes are bytes already."""
    places = PLACES.get(node.target)
    if places is None:
        return None
    args, end = list(node.args), node.args[places.step : places.step + 3]
    for i in places.read:
        args[i] = carrier(args[i])
    narrow = carrier(end[2]) != end[2]
    if narrow:
        args[places.step : places.step + 3] = None, None, ""
        args[places.dtype] = torch.float32
    if args == list(node.args):
        return None
    wide = add_call(gm, node.target, tuple(args), node)
    wide.meta |= {key: value for key, value in node.meta.items() if key != "val"}
    wide.meta["codes"] = node.args[places.read[0]]  # the type whose codes the bytes hold
    return wide, add_call(gm, Q.quantize.default, (wide, *end), node) if narrow else wide


def carrier(text: str) -> str:
    """The type of bytes that holds the codes of an unsigned one of fewer bits; of any other, itself.
    >>> carrier("u4/token"), carrier("i4/t"), carrier("")
    ('u8/token', 'i4/t', '')
    """
    number, _, rest = text.partition("/")
    return f"u8/{rest}" if number in ("u2", "u3", "u4", "u5", "u6", "u7") else text

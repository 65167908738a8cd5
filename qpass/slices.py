"""Rows of a parameter that a product reads as a matrix of their own: `self_attn.in_proj_weight[256:768]`.

    linear(x, split(w, [256, 512])[1])     attention between two sequences: nn.MultiheadAttention keeps three matrices in one
    linear(x, chunk(w, 3)[0])              queries and keys of one sequence, values of another (DETR)

Each such slice is a weight by itself, with types, codes and steps of its own, under the name of the parameter and its rows.
In a graph it is spelled `slice(w, 0, first, last, 1)`. The parameter is packed as what its slices are packed as, one after
another (install.py); a slice of that is one of these again.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from qpass.arity import full_arity
from qpass.products import is_parameter

aten = torch.ops.aten
NAME = re.compile(r"(.+)\[(\d+):(\d+)\]")
OVERLAP = "{} reads other rows of the same weight, and some of these too: one row has one set of integers"
Rows = tuple[int, int]


def slice_name(path: str, rows: Rows | None) -> str:
    """The name of some rows of a parameter, or of the whole."""
    return path if rows is None else f"{path}[{rows[0]}:{rows[1]}]"


def slice_of(name: str) -> tuple[str, Rows | None]:
    """The path of a parameter, and the rows that a name means; None: all."""
    found = NAME.fullmatch(name)
    return (name, None) if found is None else (found[1], (int(found[2]), int(found[3])))


def tensor_of(named: Mapping[str, Tensor], name: str) -> Tensor | None:
    """The tensor of a name, or a view of some rows of one; None where there is none."""
    path, rows = slice_of(name)
    if name in named or rows is None:
        return named.get(name)
    whole = named.get(path)
    return None if whole is None or whole.dim() == 0 or rows[1] > len(whole) else whole[rows[0] : rows[1]]


def with_slices(named: Mapping[str, Tensor], names: Iterable[str | None]) -> dict[str, Tensor]:
    """The tensors, and the slices of them that are among some names."""
    wanted = {name for name in names if name and slice_of(name)[1] is not None}
    views = {name: tensor_of(named, name) for name in sorted(wanted)}
    return {**named, **{name: view for name, view in views.items() if view is not None}}


def overlapping(weights: Mapping[str, str]) -> dict[str, str]:
    """Site -> why it stays float, where it shares rows with a site before it. weights: site -> weight, in order."""
    readers: dict[str, dict[Rows | None, str]] = {}
    found: dict[str, str] = {}
    for site, weight in weights.items():
        path, rows = slice_of(weight)
        before = readers.setdefault(path, {})
        other = next((name for others, name in before.items() if rows != others and _meet(rows, others)), None)
        if other is None:
            before.setdefault(rows, site)
        else:
            found[site] = OVERLAP.format(other)
    return found


def _meet(rows: Rows | None, others: Rows | None) -> bool:
    return rows is None or others is None or (rows[0] < others[1] and others[0] < rows[1])


def to_slice(node: fx.Node) -> None:
    """split(w, sizes, 0)[i], and chunk: rewritten to slice(w, 0, first, last, 1) in place, where w is of the model."""
    if node.target is aten.narrow.default and is_parameter(node) and node.args[1] == 0:
        whole, _, first, _ = cast("tuple[Any, ...]", node.args)
        _become(node, whole, first)
    if node.target is not operator.getitem or not is_parameter(node):
        return
    parts, index = cast("tuple[Any, int]", node.args)
    if parts.target not in (aten.split_with_sizes.default, aten.split.Tensor, aten.split.sizes, aten.chunk.default):
        return
    whole, _, axis = full_arity(parts.target, parts.args, parts.kwargs)[0]
    if axis == 0:
        _become(node, whole, sum(len(part) for part in parts.meta["val"][:index]))


def _become(node: fx.Node, whole: fx.Node, first: int) -> None:
    node.target, node.kwargs = aten.slice.Tensor, {}
    node.args = (whole, 0, first, first + len(node.meta["val"]), 1)


def rows_of(node: fx.Node) -> Rows | None:
    """The rows that a node reads of what it is a slice of; None for other nodes."""
    if node.target is not aten.slice.Tensor:
        return None
    whole, axis, first, last, step = full_arity(node.target, node.args, node.kwargs)[0]
    if axis != 0 or step != 1 or not all(isinstance(n, int) or n is None for n in (first, last)):
        return None
    start, stop, _ = slice(first, last).indices(len(whole.meta["val"]))
    return start, stop


def piece_of(node: fx.Node) -> fx.Node | None:
    """What a slice of parameters is anyway: the part of a concatenation, its rows written down as meta["rows"], or the whole.

    None for other nodes.
    """
    rows = rows_of(node) if is_parameter(node) else None
    if rows is None:
        return None
    joined: Any = node.args[0]
    if rows == (0, len(joined.meta["val"])):
        return joined
    if joined.target is not aten.cat.default or (len(joined.args) > 1 and joined.args[1] != 0):
        return None
    first = 0
    for part in joined.args[0]:
        last = first + len(part.meta["val"])
        if (first, last) == rows:
            part.meta["rows"] = rows
            return part
        first = last
    return None

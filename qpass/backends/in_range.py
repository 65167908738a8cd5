"""Ids are looked at before a generated kernel reads a table with them: inside it, one beyond the table ends the process."""

from __future__ import annotations

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def in_range(index: Tensor, rows: int) -> Tensor:
    """The same ids, int64 or int32 of any shape, all of them from 0 to rows - 1; IndexError otherwise."""
    if index.numel():
        low, high = (int(value) for value in index.aminmax())
        if low < 0 or high >= rows:
            raise IndexError(
                f"index {low if low < 0 else high} is out of range for a table of {rows} rows: an id beyond the "
                "vocabulary, or a sequence longer than the model's positions."
            )
    return index


def check_lookups(gm: fx.GraphModule) -> int:
    """Puts the check in front of every lookup, once for the same ids and rows; returns their number."""
    checked: dict[tuple, fx.Node] = {}
    for node in list(gm.graph.nodes):
        if node.target is not aten.embedding.default or not isinstance(node.args[0].meta["val"].shape[0], int):
            continue
        index, rows = node.args[1], node.args[0].meta["val"].shape[0]
        if (index, rows) not in checked:
            with gm.graph.inserting_before(node):
                checked[index, rows] = gm.graph.call_function(in_range, (index, rows))
            checked[index, rows].meta = {"val": index.meta["val"]}
        node.update_arg(1, checked[index, rows])
    return len(checked)

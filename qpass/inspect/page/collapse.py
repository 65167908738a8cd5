"""How many nodes a page can hold, and the graph with each deep module made one node: with depth 2,
`%3 = aten.linear(%2)` of layers.0.mlp.up and `%4 = aten.gelu(%3)` of layers.0.mlp.act become `layers.0: 2 operations`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qpass.errors import QpassError

NODES = 300_000  # of all levels of all graphs: about 80 MB of page

Node = dict[str, Any]


def collapsed(document: dict[str, Any], depth: int | None) -> dict[str, Any]:
    """The document with every module of `depth` names made one node; refused where it is too large for a page."""
    if depth is not None and (isinstance(depth, bool) or not isinstance(depth, int) or depth < 1):
        raise QpassError(f"depth is {depth!r}; expected a whole number of module names, 1 or more, or None.")
    count = total(document, len if depth is None else lambda nodes: _kept(nodes, depth))
    if count > NODES:
        raise QpassError(_too_many(count, depth))
    if depth is None:
        return document
    graphs = [
        {**graph, "levels": [{**level, "nodes": merged(level["nodes"], depth)} for level in graph["levels"]]}
        for graph in document["graphs"]
    ]
    return {**document, "graphs": graphs}


def total(document: dict[str, Any], count: Callable[[list[Node]], int]) -> int:
    """The nodes of all levels of all graphs, each level counted by `count`."""
    return sum(count(level["nodes"]) for graph in document["graphs"] for level in graph["levels"])


def merged(nodes: list[Node], depth: int) -> list[Node]:
    """A level's nodes with those of each module of `depth` names made one, which has the id of its first."""
    kept: dict[int | str, Node] = {}
    inside: dict[str, list[Node]] = {}
    owner: dict[int, int] = {}
    for node in nodes:
        module = _deep(node["module"], depth)
        if module is None:
            kept[node["id"]] = {**node}
            owner[node["id"]] = node["id"]
        else:
            group = inside.setdefault(module, [])
            group.append(node)
            kept.setdefault(module, node)
            owner[node["id"]] = group[0]["id"]
    return [
        _as_one(key, inside[key], owner) if isinstance(key, str) else {**node, "inputs": _inputs(node, owner)}
        for key, node in kept.items()
    ]


def _as_one(module: str, nodes: list[Node], owner: dict[int, int]) -> Node:
    parent, _, name = module.rpartition(".")
    own = nodes[0]["id"]
    inputs = dict.fromkeys(i for node in nodes for i in _inputs(node, owner) if i != own)
    text = f"{module}: {len(nodes)} operation{'s' * (len(nodes) > 1)}"
    empty = dict.fromkeys(("site", "rule", "dtype", "shape"))
    return {"id": own, "op": name, "text": text, "module": parent, "inputs": list(inputs), "kind": "call", **empty}


def _inputs(node: Node, owner: dict[int, int]) -> list[int]:
    return list(dict.fromkeys(owner.get(i, i) for i in node["inputs"]))


def _kept(nodes: list[Node], depth: int) -> int:
    modules = [_deep(node["module"], depth) for node in nodes]
    return modules.count(None) + len(set(modules) - {None})


def _deep(module: str, depth: int) -> str | None:
    """The first `depth` names of a module that has so many, else None."""
    names = module.split(".", depth)[:depth] if module else []
    return ".".join(names) if len(names) == depth else None


def _too_many(count: int, depth: int | None) -> str:
    said = f"the report's graphs have {count:,} nodes; a page holds at most {NODES:,}."
    if depth is None:
        return f"{said} Pass depth=2, say, to make each module of two names one node (depth=1 makes the fewest)."
    if depth > 1:
        return f"{said} Pass a smaller depth than {depth} (depth=1 makes the fewest)."
    return f"{said} So many lie outside every module that no depth helps; to_json writes them all."

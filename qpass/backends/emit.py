"""A lowered graph as one Python function: a line a call, constants bound by name, values dropped after their last use."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from qpass.canonical import is_impure
from qpass.graphs import constant

Call = tuple[Callable[..., Any], tuple[Any, ...]]


def emit(gm: fx.GraphModule, calls: Mapping[fx.Node, Call]) -> Callable[..., Any]:
    """A function of the graph's inputs, in placeholder order.

    calls: for nodes that are not run as their target, the function that is, and which of their arguments it is given.
    """
    scope: dict[str, Any] = {}
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    reads = _reads(gm, calls)
    last_use = _last_uses(reads)
    inputs: list[str] = []
    for node in reads:
        name = names[node] = f"v{len(names)}"
        if node.op == "placeholder":
            inputs.append(name)
        elif node.op == "get_attr":
            scope[name] = constant(node)
        elif node.op == "output":
            lines.append(f"return {_source(node.args[0], names, scope)}")
        else:
            lines.append(f"{name} = {_call(node, calls, names, scope)}")
        dead = [names[n] for n in last_use.get(node, ()) if n.op != "get_attr"]
        if dead and node.op != "output":
            lines.append(f"{' = '.join(dead)} = None")
    body = "\n    ".join(lines)
    exec(f"def run({', '.join(inputs)}):\n    {body}\n", scope)
    run = scope["run"]
    run.source = body
    return run


def _call(node: fx.Node, calls: Mapping[fx.Node, Call], names, scope) -> str:
    function, given = calls.get(node, (node.target, node.args))
    args = [_source(a, names, scope) for a in given]
    if function is operator.getitem:
        return f"{args[0]}[{args[1]}]"
    scope[f"f{names[node]}"] = function
    args += [f"{key}={_source(value, names, scope)}" for key, value in node.kwargs.items()]
    return f"f{names[node]}({', '.join(args)})"


def _source(value: Any, names: Mapping[fx.Node, str], scope: dict[str, Any]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, tuple | list):
        parts = ", ".join(_source(v, names, scope) for v in value)
        return f"({parts}{',' if len(value) == 1 else ''})" if isinstance(value, tuple) else f"[{parts}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_source(v, names, scope)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({', '.join(_source(v, names, scope) for v in (value.start, value.stop, value.step))})"
    if value is None or type(value) in (bool, int, str):
        return repr(value)
    name = f"k{len(scope)}"
    scope[name] = value
    return name


def _reads(gm: fx.GraphModule, calls: Mapping[fx.Node, Call]) -> dict[fx.Node, list[fx.Node]]:
    """The nodes that have to run, in order, each with the values it reads: views that a kernel reads through are not run."""
    reads: dict[fx.Node, list[fx.Node]] = {}
    needed: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node not in needed and not is_impure(node):
            continue
        found: list[fx.Node] = []
        given = calls[node][1] if node in calls else node.args
        fx.map_arg((given, node.kwargs), found.append)
        reads[node] = found
        needed.update(found)
    return dict(reversed(reads.items()))


def _last_uses(reads: Mapping[fx.Node, list[fx.Node]]) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the values that nobody reads after it."""
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(reads):
        for source in reads[node]:
            if source not in seen:
                seen.add(source)
                last.setdefault(node, []).append(source)
    return last

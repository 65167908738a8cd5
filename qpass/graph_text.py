"""A graph as text that reads and diffs: one line a node, numbered in order, parameters by path.

graph(%x):
%0 = qpass.linear(%x, @up_q, @up_scale, @up.bias, i8/c0, relu)   # float32[s0, 128]  up:linear.0  <- linear_relu
return %0
"""

from __future__ import annotations

import difflib
import re
from typing import Any

import torch
from torch import Tensor, fx


def text(gm: fx.GraphModule) -> str:
    """The graph, deterministic: no identities, no names a tracer made up."""
    names: dict[fx.Node, str] = {}
    lines: list[str] = []
    inputs: list[str] = []
    count = 0
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            names[node] = f"@{node.meta['fqn']}" if "fqn" in node.meta else f"%x{len(inputs)}"
            if "fqn" not in node.meta:
                inputs.append(names[node])
        elif node.op == "get_attr":
            names[node] = f"@{node.target}"
        elif node.op == "call_function":
            names[node] = f"%{count}"
            count += 1
            lines.append(f"  {names[node]} = {_call(node, names)}{_comment(node)}")
        else:
            lines.append(f"  return {_argument(node.args[0], names)}")
    return "\n".join([f"graph({', '.join(inputs)}):", *lines])


def _call(node: fx.Node, names: dict[fx.Node, str]) -> str:
    arguments = [_argument(a, names) for a in node.args[: _given(node)]]
    arguments += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items() if not _is_default(node, k, v)]
    return f"{operator_name(node.target)}({', '.join(arguments)})"


def operator_name(target: Any) -> str:
    """`aten.linear`, `aten.sum.dim_IntList`: the overload only where it is not the usual one."""
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name = target._schema.name.replace("::", ".")
    return name if target._overloadname in ("default", "Tensor") else f"{name}.{target._overloadname}"


def _given(node: fx.Node) -> int:
    """How many positional arguments to print: defaults at the end are left out."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return len(node.args)
    schema = node.target._schema.arguments
    last = len(node.args)
    while last and schema[last - 1].has_default_value() and _same(node.args[last - 1], schema[last - 1].default_value):
        last -= 1
    return last


def _is_default(node: fx.Node, key: str, value: Any) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(
        a.name == key and a.has_default_value() and _same(value, a.default_value) for a in node.target._schema.arguments
    )


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and not isinstance(value, fx.Node) and value == default


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        inner = ", ".join(_argument(v, names) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_argument(v, names)}" for k, v in value.items()) + "}"
    return str(value).removeprefix("torch.") if value != "" else "''"


def _comment(node: fx.Node) -> str:
    value = node.meta.get("val")
    kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, Tensor) else ""
    made = f"<- {node.meta['rule']}" if "rule" in node.meta else ""
    parts = [part for part in (kind, node.meta.get("site", ""), made) if part]
    return f"   # {'  '.join(parts)}" if parts else ""


def diff(before: str, after: str) -> str:
    """What changed from one text to the next; numbers of nodes that merely moved are not a change."""
    a, b = (re.sub(r"%\d+", "%", t).splitlines() for t in (before, after))
    shown, out = {"-": before.splitlines(), "+": after.splitlines()}, []
    for tag, i1, i2, j1, j2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag == "equal":
            continue
        out += [f"- {line.strip()}" for line in shown["-"][i1:i2]]
        out += [f"+ {line.strip()}" for line in shown["+"][j1:j2]]
        out.append("")
    return "\n".join(out)

"""A graph as text that reads and diffs."""
from __future__ import annotations
import difflib
import torch
from torch import Tensor, fx

def _arg(a, names):
    if isinstance(a, fx.Node): return names[a]
    if isinstance(a, (list, tuple)):
        inner = ", ".join(_arg(x, names) for x in a)
        return f"[{inner}]" if isinstance(a, list) else f"({inner})"
    if isinstance(a, torch.dtype): return str(a).removeprefix("torch.")
    return str(a)

def text(gm):
    names, lines, n = {}, [], 0
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            names[node] = "@" + node.meta["fqn"] if "fqn" in node.meta else f"%{node.name}"
        elif node.op == "get_attr": names[node] = f"@{node.target}"
        elif node.op == "call_function":
            names[node] = f"%{n}"; n += 1
            t = node.target
            tn = f"{t._schema.name.replace('::','.')}" + ("" if t._overloadname in ("default","Tensor") else "."+t._overloadname) if hasattr(t, "_schema") else getattr(t, "__name__", str(t))
            args = [_arg(a, names) for a in node.args] + [f"{k}={_arg(v, names)}" for k, v in node.kwargs.items()]
            v = node.meta.get("val")
            kind = f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}" if isinstance(v, Tensor) else ""
            lines.append(f"  {names[node]} = {tn}({', '.join(args)})   # {kind} {node.meta.get('site','')} {node.meta.get('rule','')}".rstrip())
        elif node.op == "output": lines.append(f"  return {_arg(node.args[0], names)}")
    ph = ", ".join(f"%{n.name}" for n in gm.graph.nodes if n.op == "placeholder" and "fqn" not in n.meta)
    return "\n".join([f"graph({ph}):", *lines])

def diff(a, b):
    return "\n".join(difflib.unified_diff(a.splitlines(), b.splitlines(), lineterm=""))

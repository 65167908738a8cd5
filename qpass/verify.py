"""What must hold of a graph at each level; checked after every pass. A check returns None, or what is wrong and where."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx

from qpass.arity import full_arity
from qpass.errors import QpassError
from qpass.qtype import QType

LEVELS = ("float", "annotated", "qdq", "fused", "lowered")
Q = torch.ops.qpass
SYMBOLIC = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)


def only_known_nodes(node: fx.Node) -> str | None:
    """Placeholders, constants, calls of operators and the output: nothing else."""
    if node.op in ("placeholder", "get_attr", "output"):
        return None
    if node.op != "call_function":
        return f"{node.op} nodes are not canonical; a call_function was expected"
    if isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator) or node.target in SYMBOLIC:
        return None
    module = getattr(node.target, "__module__", "") or ""
    known = module in ("_operator", "math") or module.startswith("torch")
    return None if known else f"{node.target} is neither an operator nor arithmetic on sizes"


def at_full_arity(node: fx.Node) -> str | None:
    """Every argument is written out in its place."""
    if node.op != "call_function" or node.target in SYMBOLIC:
        return None
    args, kwargs = full_arity(node.target, node.args, node.kwargs)
    return (
        None if len(args) == len(node.args) and len(kwargs) == len(node.kwargs) else "arguments are not at full arity"
    )


def has_value(node: fx.Node) -> str | None:
    """Every tensor's shape and dtype is known."""
    return "it has no value (meta['val'])" if node.op == "call_function" and "val" not in node.meta else None


def nothing_fused(node: fx.Node) -> str | None:
    """Before fuse nothing computes with integers: an exported program may hold quantize and dequantize from the start."""
    return f"{node.target} before fuse" if node.target in (Q.linear.default, Q.conv.default) else None


def types_agree(node: fx.Node) -> str | None:
    """Dequantize reads what its type stores."""
    if node.target is not Q.dequantize.default:
        return None
    value, qtype = node.args[0].meta.get("val"), QType.parse(node.args[3])
    if isinstance(value, Tensor) and value.dtype != qtype.storage:
        return f"it reads {value.dtype} as {qtype}, which is stored as {qtype.storage}"
    return None


CHECKS: tuple[tuple[str, str, Callable[[fx.Node], str | None]], ...] = (
    ("float", "lowered", only_known_nodes),
    ("float", "fused", at_full_arity),
    ("float", "lowered", has_value),
    ("float", "qdq", nothing_fused),
    ("qdq", "fused", types_agree),
)


def verify(gm: fx.GraphModule, level: str) -> None:
    """Raises QpassError with the first node that breaks a rule of its level."""
    gm.graph.lint()
    rank = LEVELS.index(level)
    active = [check for lowest, highest, check in CHECKS if LEVELS.index(lowest) <= rank <= LEVELS.index(highest)]
    for node in gm.graph.nodes:
        for check in active:
            why = check(node)
            if why:
                raise QpassError(f"graph at level {level}: {node.name} ({node.format_node()}): {why}.")

"""Rewrite rules: a pattern, a check and a replacement, three plain functions over operators.

    @rule
    def linear_relu(x, w, b):                         what to find; every parameter binds a node or a literal
        return aten.relu.default(aten.linear.default(x, w, b))

    @linear_relu.check                                None for yes, a sentence for no (optional)
    def _(w, **_): ...

    @linear_relu.to                                   what to put in its place
    def _(x, w, b): ...

Pattern and replacement also run eagerly on tensors, which is how a rule is tested. A rule that does not match says why
in a sentence; the best of these (the one that got furthest) is kept for each place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from qpass.arity import full_arity
from qpass.graphs import set_value

aten = torch.ops.aten
COMMUTATIVE = (aten.add.Tensor, aten.mul.Tensor)
KEPT = ("nn_module_stack", "site", "decision")


@dataclass
class Match:
    """One place a pattern fits: the root, the nodes it covers, and what its parameters stand for."""

    root: fx.Node
    nodes: list[fx.Node]
    bound: dict[str, Any]


@dataclass(frozen=True)
class Miss:
    """Why a rule does not apply at a node; depth is how many nodes of the pattern fitted before; sites: whose business
    it is.
    """

    rule: str
    at: str
    why: str
    depth: int
    sites: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.rule} at {self.at}: {self.why}"


@dataclass
class RuleLog:
    """What the rules did to a graph: hits, and the best near-miss of each rule at each root."""

    hits: list[tuple[str, str]] = field(default_factory=list)
    misses: dict[tuple[str, str], Miss] = field(default_factory=dict)

    def miss(self, miss: Miss) -> None:
        """Keeps a miss where it got further than the one known."""
        known = self.misses.get((miss.rule, miss.at))
        if known is None or miss.depth > known.depth:
            self.misses[(miss.rule, miss.at)] = miss

    def lines(self) -> list[str]:
        """Hits, then near-misses (those that fitted more than their root), as text."""
        return [f"hit   {rule} at {node}" for rule, node in self.hits] + [f"miss  {miss}" for miss in self.near()]

    def hit(self, rule: str, match: Match) -> None:
        """Keeps a hit; what was missed before at the nodes it covers is settled."""
        self.hits.append((rule, match.root.name))
        gone = {node.name for node in match.nodes}
        self.misses = {key: miss for key, miss in self.misses.items() if miss.at not in gone}

    def near(self) -> list[Miss]:
        """The misses that fitted more than nothing."""
        return [miss for miss in self.misses.values() if miss.depth]


class Rule:
    """A rule made by `rule`; see the module docstring."""

    def __init__(self, pattern: Callable[..., Any], name: str = "") -> None:
        self.name = name or pattern.__name__
        self.pattern = pattern
        self.replacement: Callable[..., Any] | None = None
        self.condition: Callable[..., str | None] | None = None
        self.__doc__ = pattern.__doc__

    def to(self, replacement: Callable[..., Any]) -> Rule:
        """Sets the replacement."""
        self.replacement = replacement
        return self

    def check(self, condition: Callable[..., str | None]) -> Rule:
        """Sets the check."""
        self.condition = condition
        return self

    @cached_property
    def root(self) -> fx.Node:
        """The last node of the pattern, traced and canonical."""
        graph = fx.Graph()
        tracer = fx.proxy.GraphAppendingTracer(graph)
        names = list(inspect.signature(self.pattern).parameters)
        result = self.pattern(*(fx.Proxy(graph.placeholder(name), tracer) for name in names))
        for node in graph.nodes:
            if node.op == "call_function":
                node.args, node.kwargs = full_arity(node.target, node.args, node.kwargs)
        return result.node

    def refuse(self, match: Match) -> str | None:
        """The check's answer for a match; it gets `match` and the bound values it names."""
        if self.condition is None:
            return None
        wanted = inspect.signature(self.condition).parameters
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in wanted.values())
        values = {"match": match, **match.bound}
        return self.condition(**{k: v for k, v in values.items() if everything or k in wanted})


def rule(pattern: Callable[..., Any]) -> Rule:
    """Makes a rule of a pattern function."""
    return Rule(pattern)


def find(rule: Rule, root: fx.Node) -> Match | Miss:
    """The match of a rule at a node, or why there is none."""
    nodes: list[fx.Node] = []
    bound: dict[str, Any] = {}
    why = _fit(rule.root, root, bound, nodes, True)
    match = Match(root, nodes, bound)
    why = why or rule.refuse(match)
    return Miss(rule.name, root.name, why, len(nodes), _sites(root)) if why else match


def _sites(root: fx.Node) -> tuple[str, ...]:
    """The sites a node belongs to: its own, and those whose results it reads."""
    makers = (node for node in root.all_input_nodes if "decision" in node.meta)
    return tuple(dict.fromkeys(node.meta["site"] for node in (root, *makers) if node.meta.get("site")))


def _fit(pattern: Any, value: Any, bound: dict[str, Any], nodes: list[fx.Node], root: bool = False) -> str | None:
    """None where value fits the pattern, with its variables bound; else why not."""
    if isinstance(pattern, fx.Node):
        if pattern.op == "placeholder":
            return _bind(pattern.name, value, bound)
        return _fit_call(pattern, value, bound, nodes, root)
    if isinstance(pattern, tuple | list):
        if not isinstance(value, tuple | list) or len(pattern) != len(value):
            return f"expected {len(pattern)} values, found {value}"
        return _first(_fit(p, v, bound, nodes) for p, v in zip(pattern, value, strict=True))
    same = type(pattern) is type(value) and pattern == value
    return None if same else f"expected {pattern!r}, found {value!r}"


def _first(reasons) -> str | None:
    return next((why for why in reasons if why), None)


def _bind(name: str, value: Any, bound: dict[str, Any]) -> str | None:
    if name not in bound:
        bound[name] = value
        return None
    known = bound[name]
    same = known is value or (not isinstance(value, fx.Node) and type(known) is type(value) and known == value)
    return None if same else f"{name} stands for {known} and for {value}"


def _fit_call(pattern: fx.Node, value: Any, bound: dict[str, Any], nodes: list[fx.Node], root: bool) -> str | None:
    if not isinstance(value, fx.Node) or value.target is not pattern.target:
        return f"expected {pattern.target}, found {getattr(value, 'target', value)}"
    if not root and len(value.users) != 1:
        return f"{value.name} has {len(value.users)} users, a fused value must have one"
    nodes.append(value)
    orders = [value.args]
    if value.target in COMMUTATIVE:
        orders.append((value.args[1], value.args[0], *value.args[2:]))
    misses: list[tuple[int, str, list[fx.Node]]] = []
    for args in orders:
        trial, covered = dict(bound), list(nodes)
        why = _fit(pattern.args, args, trial, covered) or _fit(
            tuple(pattern.kwargs.items()), tuple(value.kwargs.items()), trial, covered
        )
        if why is None:
            bound.update(trial)
            nodes[:] = covered
            return None
        misses.append((len(covered), why, covered))
    _, why, nodes[:] = max(misses, key=lambda miss: miss[0])  # the order that got furthest, the first of equals
    return why


def apply(gm: fx.GraphModule, rules: Sequence[Rule], log: RuleLog | None = None) -> int:
    """One sweep from outputs to inputs, rules in order (the bigger first); returns the number of rewrites."""
    log = log if log is not None else RuleLog()
    by_root: dict[Any, list[Rule]] = {}
    for each in rules:
        by_root.setdefault(each.root.target, []).append(each)
    edits = 0
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or node._erased:
            continue
        for each in by_root.get(node.target, ()):
            found = find(each, node)
            if isinstance(found, Miss):
                log.miss(found)
                continue
            log.hit(each.name, found)
            _replace(gm, each, found)
            edits += 1
            break
    return edits


def _replace(gm: fx.GraphModule, rule: Rule, match: Match) -> None:
    tracer = fx.proxy.GraphAppendingTracer(gm.graph)
    before = match.root.prev
    wrapped = {k: fx.Proxy(v, tracer) if isinstance(v, fx.Node) else v for k, v in match.bound.items()}
    with gm.graph.inserting_before(match.root):
        result = rule.replacement(**wrapped).node
    node = before.next
    while node is not match.root:
        _annotate(gm, node, rule, match, result)
        node = node.next
    match.root.replace_all_uses_with(result)
    for dead in match.nodes:
        if not dead.users:
            gm.graph.erase_node(dead)


def _annotate(gm: fx.GraphModule, node: fx.Node, rule: Rule, match: Match, result: fx.Node) -> None:
    """A new node is canonical, has a value, and carries where it comes from and which rule made it."""
    node.args, node.kwargs = full_arity(node.target, node.args, node.kwargs)
    for source in sorted(reversed(match.nodes), key=lambda n: "decision" in n.meta):  # a site's own name goes last
        node.meta.update({key: source.meta[key] for key in KEPT if key in source.meta})
    node.meta |= {"rule": rule.name, "from": tuple(n.name for n in match.nodes)}
    if node is result:
        node.meta["val"] = match.root.meta["val"]
    else:
        set_value(gm, node)

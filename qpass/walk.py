"""One calibration batch on its way through a captured graph, site by site: what true-sequential calibration runs.

    stored          values that are still to be read, at a place where they are few (between blocks: the residual stream)
    look(n, keep)   runs on from there to node n and gives n's first input; what it computed is dropped, or is `stored`

So a batch costs the memory of its narrow places, and one batch at a time that of what lies between two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.plan import Decision
from qpass.simulate import quantized_linear

WIDE = 1.5  # times the bytes at the median of the places, beyond which values are computed again rather than stored


class Walk(fx.Interpreter):
    """Runs a graph in parts; a linear whose site is in `decided` computes what it does once it is quantized.

    args: one for each placeholder. names: site of a node.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        args: Sequence[Any],
        names: Mapping[fx.Node, str],
        decided: Mapping[str, Decision],
    ) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.names, self.decided = names, decided
        self.order = list(graph.graph.nodes)
        self.again = not mutates(graph)  # whether a part may be run a second time
        given = [node for node in self.order if node.op == "placeholder"]
        self.stored = dict(zip(given, args if self.again else map(_own, args), strict=True))
        self.at = len(given)

    def look(self, node: fx.Node, keep: bool) -> Tensor:
        """The first input of a node, all nodes in front of it having run. keep: the next look goes on from here."""
        self.env, at = dict(self.stored), self.at
        with torch.no_grad():
            while self.order[at] is not node:
                self.env[self.order[at]] = self.run_node(self.order[at])
                for last in self.user_to_last_uses.get(self.order[at], ()):
                    self.env.pop(last, None)
                at += 1
        found = self.env[node.args[0]]
        if keep or not self.again:
            self.stored, self.at = self.env, at
        self.env = {}
        return found

    def run_node(self, n: fx.Node) -> Any:
        """One node; a site that is decided, in integers' stead."""
        decision = self.decided.get(self.names.get(n, ""))
        if decision is None or not decision.quantized:
            return super().run_node(n)
        x, _, bias = self.fetch_args_kwargs_from_env(n)[0][:3]
        return quantized_linear(decision, x, bias).to(x.dtype)


def mutates(graph: fx.GraphModule) -> bool:
    """Whether an operation of a graph writes to a tensor it is given."""
    schemas = (getattr(node.target, "_schema", None) for node in graph.graph.nodes if node.op == "call_function")
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _own(value: Any) -> Any:
    """A copy of what a graph may write to; parameters are not."""
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


def narrow(graph: fx.GraphModule, stops: Sequence[fx.Node]) -> set[fx.Node]:
    """The stops in front of which few values are alive: at most WIDE times the bytes at the median of them."""
    order = list(graph.graph.nodes)
    index = {node: i for i, node in enumerate(order)}
    wanted, found, total = set(stops), {}, 0
    ends: dict[int, int] = {}  # position -> bytes that are read there for the last time
    for i, node in enumerate(order):
        if node in wanted:
            found[node] = total
        last = max((index[user] for user in node.users), default=-1)
        if "fqn" not in node.meta and last >= 0:
            size = _bytes(node.meta.get("val"))
            ends[last] = ends.get(last, 0) + size
            total += size
        total -= ends.get(i, 0)
    middle = sorted(found.values())[(len(found) - 1) // 2] if found else 0
    return {node for node, size in found.items() if size <= WIDE * middle}


def _bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(_bytes, value))
    if not isinstance(value, Tensor):
        return 0
    count = value.element_size()
    for size in value.shape:
        count *= int(size.node.hint or 1) if isinstance(size, torch.SymInt) else int(size)
    return count

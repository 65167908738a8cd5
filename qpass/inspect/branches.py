r"""The outputs of a graph with a few sites other than in a base run: each computed from the first of these sites on only.

    base run, float       x --- a --- [site] --- b --- y_float
    alone                                 \--- quantized product --- b --- y       the values in front are float's
    base run, quantized   x --- a' -- [site] --- b' -- y_all
    without                               \--- float product ------- b' -- y       the values in front are the quantized ones'

The base run goes through the graph node by node and holds what is still to be read; a branch takes these values, goes on to
the end by itself, and is dropped. So N branches cost about N / 2 runs, and memory is that of two.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qpass.convolutions import is_convolution
from qpass.interrupts import stop_if_asked
from qpass.passes.other_sites import LOOKUP
from qpass.plan import Decision, Plan
from qpass.simulate import quantized_convolution, quantized_input, quantized_linear, quantized_lookup, real_weight

INPUT = ("input_scale", "input_zero", "input_shift", "input_extra")


class Products:
    """The quantized products of a plan. What its integers stand for is written out once a site, in float32."""

    def __init__(self, plan: Plan) -> None:
        self.decisions: Mapping[str, Decision] = {d.site: d for d in plan.quantized}
        self.weights: dict[str, Tensor] = {}
        self.forget()
        self.shared = {d.site: d.group for d in plan.quantized if _as_its_group(d, self.decisions.get(d.group))}

    def __call__(self, d: Decision, node: fx.Node, args: Sequence[Any]) -> Tensor:
        """What a site's node gives of its arguments once it is quantized, in the dtype of its weight."""
        table = d.operation == LOOKUP
        x, held = args[int(table)], args[int(not table)]
        if d.site not in self.weights:
            self.weights[d.site] = real_weight(d).to(x.device)
        weight = self.weights[d.site]
        if table:
            return quantized_lookup(d, x, weight).to(held.dtype)
        if is_convolution(node):
            return quantized_convolution(d, x, args[2], args[3:], weight).to(x.dtype)
        return quantized_linear(d, x, args[2], weight, self._input(d, x)).to(x.dtype)

    def _input(self, d: Decision, x: Tensor) -> Tensor:
        """The input of a linear through its type; that of sites that read one value with one step, once."""
        group = self.shared.get(d.site, "")
        value, known, real = self.last
        if not group or value is not x or known != (group, x._version) or real is None:
            real = quantized_input(d, x)
            self.last = (x, (group, x._version), real)
        return real

    def forget(self) -> None:
        """Drops the value that was quantized last, with its state and readers, and what became of it."""
        self.last: tuple[Any, Any, Tensor | None] = (None, None, None)


def _as_its_group(d: Decision, first: Decision | None) -> bool:
    """Whether a linear quantizes its input exactly as the first of its group does."""
    if first is None or d.operation != "linear" or first.operation != "linear" or d.input_type != first.input_type:
        return False
    pairs = [(d.packed.in_mul, first.packed.in_mul)]
    pairs += [(getattr(d, name), getattr(first, name)) for name in INPUT]
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def sites_of(nodes: Mapping[str, fx.Node], products: Products) -> dict[fx.Node, Decision]:
    """The nodes of a graph whose sites are quantized."""
    named = {node: name for name, node in nodes.items() if node.meta.get("site") == name}
    return {node: products.decisions[name] for node, name in named.items() if name in products.decisions}


Assigned = Mapping[str, "Products | None"]  # site -> whose product stands for its own; None, and sites not named: float


class Chosen(fx.Interpreter):
    """Runs a graph with some sites quantized."""

    def __init__(self, graph: fx.GraphModule, nodes: Mapping[str, fx.Node], chosen: Assigned) -> None:
        super().__init__(graph)
        self.extra_traceback = False
        self.chosen = chosen
        self.named = {node: name for name, node in nodes.items() if node.meta.get("site") == name}

    def run_node(self, n: fx.Node) -> Any:
        """One node, in integers' stead where its site is chosen."""
        site = self.named.get(n, "")
        products = self.chosen.get(site)
        d = None if products is None else products.decisions.get(site)
        if products is None or d is None:
            return super().run_node(n)
        return products(d, n, self.fetch_args_kwargs_from_env(n)[0])


class Branches(Chosen):
    """The runs of one call of a graph. The graph must not write to what it is given.

    args: one for each placeholder. base: the sites that are quantized in the base run. variants: key -> what it changes.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        nodes: Mapping[str, fx.Node],
        args: Sequence[Any],
        base: Assigned,
        variants: Mapping[Hashable, Assigned],
    ) -> None:
        super().__init__(graph, nodes, base)
        self.base, self.variants = base, variants
        self.order = list(graph.graph.nodes)
        given = [node for node in self.order if node.op == "placeholder"]
        self.given = dict(zip(given, args, strict=True))

    def outputs(self) -> Iterator[tuple[Any, Any]]:
        """(key, the graph's outputs) of every variant, in the order of the graph."""
        env, starts = dict(self.given), self._starts()
        for at, node in enumerate(self.order[:-1]):
            if node.op == "placeholder":
                continue
            stop_if_asked()
            for key in starts.get(node, ()):
                yield key, self._on(at, dict(env), {**self.base, **self.variants[key]})
            env[node] = self._run(node, env, self.base)
            self._forget(node, env)

    def _starts(self) -> dict[fx.Node, list[Hashable]]:
        """Node -> the variants whose first site it is; a variant none of whose sites is in the graph begins with it."""
        begin = next(node for node in self.order if node.op != "placeholder")
        found: dict[fx.Node, list[Hashable]] = {}
        for key, changes in self.variants.items():
            first = next((node for node in self.order if self.named.get(node) in changes), begin)
            found.setdefault(first, []).append(key)
        return found

    def _on(self, at: int, env: dict[fx.Node, Any], chosen: Assigned) -> Any:
        """The outputs, the values in front of node `at` being known."""
        with torch.no_grad():
            for node in self.order[at:-1]:
                if node.op != "placeholder":
                    env[node] = self._run(node, env, chosen)
                    self._forget(node, env)
        return fx.node.map_arg(self.order[-1].args[0], env.__getitem__)

    def _run(self, node: fx.Node, env: dict[fx.Node, Any], chosen: Assigned) -> Any:
        self.env, self.chosen = env, chosen
        return self.run_node(node)

    def _forget(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        for last in self.user_to_last_uses.get(node, ()):
            env.pop(last, None)

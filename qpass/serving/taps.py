"""A captured graph as its static inputs see it: run in plain torch up to the last of them, each value looked at on the way.

    canonical graph > simplify > annotate > migrate > insert-qdq        then node by node, on the inputs of a call

At this level everything that is quantized stands in the graph as quantize and dequantize: a tap sees the value with its
factors and shifts, that the compiled graph quantizes. Behind a tap the value goes on as it is, neither rounded nor clipped:
as it did in calibration, and as it will once every input has limits that suit it. (An input whose channels are split goes on
clipped: its copies count on that.) So one input that is clipped does not make those behind it look as if they had drifted,
and new limits of all can be chosen at once.

What a graph writes to is copied first, so the call itself finds everything as it was. Padding is left out (padding.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.convolutions import is_convolution
from qpass.padding import unpadded
from qpass.passes import ORDER
from qpass.pipeline import Context, Settings, run_pipeline
from qpass.plan import Decision, Plan
from qpass.seen import grid
from qpass.served import Kept, twin
from qpass.serving.collect import Bins, Stats, range_of, spread
from qpass.sites import SiteNames
from qpass.walk import mutates

Q = torch.ops.qpass
LAST = "insert-qdq"


@dataclass(frozen=True, eq=False)
class Tap:
    """One static input. site: the first that reads it; sites: all. axis: of its channels. mul, shift: what the plan moves
    onto it, [C] or None.
    """

    site: str
    sites: tuple[str, ...]
    decision: Decision
    axis: int
    mul: Tensor | None
    shift: Tensor | None

    @property
    def limits(self) -> tuple[float, float]:
        """Beyond which a value is clipped."""
        d = self.decision
        assert d.input_scale is not None
        assert d.input_type is not None
        return grid(d.input_scale, d.input_zero, d.input_type)


def tap_of(names: Sequence[str], plan: Plan, axis: int) -> Tap:
    """The tap of a quantize that carries out the decisions of these sites."""
    d = plan.decisions[names[0]]
    mul = d.input_mul if d.packed is None else d.packed.in_mul
    return Tap(d.site, tuple(names), d, axis, mul, d.input_shift)


class Watcher(fx.Interpreter):
    """Runs one captured graph for its static inputs alone."""

    def __init__(self, kept: Kept, plan: Plan, names: SiteNames) -> None:
        graph = twin(kept.graph)
        end = next(i for i, each in enumerate(ORDER) if each.name == LAST)
        context = Context(settings=Settings("off"), plan=plan, names=SiteNames(dict(names.taken)))
        run_pipeline(graph, ORDER[: end + 1], context)
        super().__init__(graph)
        self.extra_traceback = False
        self.own, self.writes, self.draws = kept.own, mutates(graph), _draws(graph)
        self.taps = {
            node: tap_of(sites, plan, _axis(node))
            for node in graph.graph.nodes
            if node.target is Q.quantize.default and (sites := _static(node, plan))
        }
        self.order = [n for n in graph.graph.nodes if n.op != "output"]
        self.bare = {node for node, tap in self.taps.items() if tap.decision.input_extra is None}
        last = max((i for i, n in enumerate(self.order) if n in self.taps), default=-1)
        self.order = self.order[: last + 1]

    def look(self, given: Sequence[Any], mask: Tensor | None, at: float) -> dict[str, Stats]:
        """What the static inputs of one call are. given: what the graph gets; at: 0 .. 1, says which values are counted."""
        found: dict[str, Stats] = {}
        args = (*given, *self.own)
        self.args_iter = iter(map(_copy, args) if self.writes else args)
        self.env = {}
        try:
            with torch.no_grad(), torch.random.fork_rng() if self.draws else contextlib.nullcontext():
                for node in self.order:
                    tap = self.taps.get(node)
                    if tap is not None:
                        x = self.env[node.args[0]]
                        found[tap.site] = found.get(tap.site, Stats()).merge(_stats(tap, x, mask, at))
                    self.env[node] = self._passed(node)
                    for last in self.user_to_last_uses.get(node, ()):
                        self.env.pop(last, None)
        finally:
            self.env = {}
        return found

    def _passed(self, node: fx.Node) -> Any:
        """What a node gives; codes of a tap, and what they stand for, are the value itself."""
        if node in self.bare:
            return self.env[node.args[0]]
        if node.target is Q.dequantize.default and node.args[0] in self.bare:
            return self.env[node.args[0]].to(node.args[4])
        return self.run_node(node)


def _draws(graph: fx.GraphModule) -> bool:
    """Whether a graph takes random numbers."""
    tags = (getattr(node.target, "tags", ()) for node in graph.graph.nodes)
    return any(torch.Tag.nondeterministic_seeded in each for each in tags)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) else value


def _static(node: fx.Node, plan: Plan) -> list[str]:
    """The decisions that a quantize carries out, where its scale is chosen before it runs."""
    names = node.meta.get("quantizes", [])
    return [name for name in names if plan.decisions[name].static]


def _axis(node: fx.Node) -> int:
    """The axis of channels of what is quantized: the last where linears read it, else the second."""
    readers = [user for codes in node.users for user in codes.users]
    linear = any(user.target is torch.ops.aten.linear.default for user in readers)
    return -1 if linear and not any(map(is_convolution, readers)) else 1


def _stats(tap: Tap, x: Tensor, mask: Tensor | None, at: float) -> Stats:
    """One look at one input."""
    d, samples = tap.decision, x.shape[0] if x.dim() > 1 else 1
    x = unpadded(x.detach(), mask)
    if not x.numel():
        return Stats()
    if d.input_extra is not None:
        x = x[..., : d.input_extra.numel()]
    some = spread(x, tap.axis if x.dim() > 1 else -1, at)
    lo, hi = tap.limits
    reach: Any = hi
    if d.input_extra is not None and d.input_type is not None:
        reach = hi + d.input_extra.to(some) * float(d.input_scale) * (d.input_type.qmax - int(d.input_zero))
    counted = range_of(x, some)
    source, raw = some, None
    if tap.mul is not None and tap.mul.numel() == some.shape[-1]:
        source = some / tap.mul.to(some) + (0.0 if tap.shift is None else tap.shift.to(some))
        raw = range_of(source, source)
    return Stats(
        1,
        samples,
        some.numel(),
        int((some < lo).sum()),
        int((some > reach).sum()),
        counted,
        raw,
        None if d.input_extra is None else x.flatten(0, -2).amax(0).float().cpu(),
        None if d.seen is None else Bins.of(source, d.seen.edges),
    )

"""A float model run again and again on one batch, with sites of its graphs quantized as each run asks.

A call that is one graph is run from the first site on that differs from a base run (branches.py); where a call is several
graphs, or writes to its inputs, every run is a whole call.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from qpass.calibrate import Batch, Caught, Session
from qpass.errors import QpassError
from qpass.inspect.branches import Assigned, Branches, Chosen
from qpass.walk import mutates


class Replay(Session):
    """A session whose graphs run in one of several ways: which sites are quantized, or with outputs known before."""

    def __init__(self, model: nn.Module) -> None:
        self.chosen: Assigned | None = None  # None: the run that `plain` makes
        self.answer: list[Any] = []  # a graph's outputs, in place of a run
        super().__init__(model)

    def interpreter(self, graph: fx.GraphModule, nodes: dict[str, fx.Node]) -> Any:
        """What runs a graph: now, as the session is set."""
        if self.answer:
            return _Known(self.answer[0])
        return self.plain(graph, nodes) if self.chosen is None else Chosen(graph, nodes, self.chosen)

    def plain(self, graph: fx.GraphModule, nodes: dict[str, fx.Node]) -> fx.Interpreter:
        """What runs a graph in float."""
        return Chosen(graph, nodes, {})

    def first(self, batch: Batch, what: str) -> Any:
        """The float model's output; variants of this batch may follow."""
        self.entered.clear()
        return self.run(batch, what)

    def quantized(self, chosen: Assigned, batch: Batch, what: str) -> Any:
        """The model's output with some sites quantized."""
        before, self.chosen = self.chosen, chosen
        try:
            return self.run(batch, what)
        finally:
            self.chosen = before

    def variants(
        self, batch: Batch, what: str, base: Assigned, variants: Mapping[Hashable, Assigned]
    ) -> Iterator[tuple[Any, Any]]:
        """(key, the model's output) of each variant of a base run. To be called behind `first` of the same batch."""
        entered = self.entered[:]
        if len(entered) != 1 or mutates(self.graphs[entered[0]][0]):
            yield from ((key, self.quantized({**base, **v}, batch, what)) for key, v in variants.items())
            return
        index, args = self._caught(batch, what)
        graph, nodes, lifted = self.graphs[index]
        for key, outputs in Branches(graph, nodes, (*args, *lifted), base, variants).outputs():
            with self._answering(outputs):
                found = self.run(batch, what)
            yield key, found

    def _caught(self, batch: Batch, what: str) -> tuple[int, tuple[Any, ...]]:
        self.catching = True
        try:
            self.run(batch, what)
        except Caught as found:
            return found.index, found.given
        finally:
            self.catching = False
        raise QpassError(
            f"{what}: the model did not come to its graph a second time; its forward changes what it does."
        )

    @contextmanager
    def _answering(self, outputs: Any):
        self.answer.append(outputs)
        try:
            yield
        finally:
            self.answer.clear()


class _Known:
    """Stands for an interpreter: the outputs are there."""

    def __init__(self, outputs: Any) -> None:
        self.outputs = outputs

    def run(self, *args: Any) -> Any:
        """The outputs."""
        return self.outputs

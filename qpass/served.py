r"""What the front end holds in place of each graph, and what the graph can be lowered from again.

    front end -> call(*inputs) -> Served.function          exchanged as a whole, between two calls
                              \-> Served.look(inputs)      where somebody watches (qpass/serving)

The canonical graph is kept as it was captured. Its weights are the model's own tensors, so it takes the memory of its nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from qpass.rewrite import Miss
from qpass.source_lines import SourceLine

Function = Callable[..., Any]


@dataclass
class Record:
    """One captured graph of a compiled model: what each pass left, as text, the sites in it, and their lines of source."""

    name: str
    steps: list[Any]
    sites: list[str]
    seconds: float = 0.0
    hits: list[tuple[str, str]] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    widened: list[str] = field(default_factory=list)
    sources: dict[str, SourceLine] = field(default_factory=dict)


@dataclass(eq=False)
class Served:
    """function: what runs. look: what is shown the inputs first, or None."""

    function: Function
    look: Callable[[tuple[Any, ...]], None] | None = None

    def call(self) -> Function:
        """What the front end gets; it never forgets it, so it holds the function of now and no graph."""

        def run(*given: Any) -> Any:
            if self.look is not None:
                self.look(given)
            return self.function(*given)

        return run


@dataclass(frozen=True, eq=False)
class Kept:
    """One captured graph. graph: canonical, before any pass. own: tensors it holds itself, its last inputs. fixed: which
    inputs stay where they are, for CUDA graphs. served: where what is lowered from it runs.
    """

    graph: fx.GraphModule
    own: tuple[Tensor, ...]
    fixed: tuple[int, ...]
    served: Served


def twin(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph to edit; the tensors it holds, and the values of its nodes, are the same."""
    graph = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, nodes)
    last = next(node for node in reversed(gm.graph.nodes) if node.op == "output")
    graph.output(result).meta = dict(last.meta)
    return fx.GraphModule(gm, graph)


@dataclass(frozen=True)
class Made:
    """What a graph was lowered to. frozen: its inputs that became constants; folded: the tensors in them."""

    function: Function
    record: Record
    frozen: tuple[int, ...]
    folded: tuple[Tensor, ...]

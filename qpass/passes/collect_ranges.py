"""Collect what calibration needs to know of every site's input. An analysis: it writes a table, never the graph.

    for each site:  range of its input (limits, histogram, per channel), second moment E[x x^T] where a solver asks

Sites that read the same value form a group and share one entry; views do not change what is read, so
`linear(view(x))` and `linear(x)` are of one group (a networkx component over "must agree" edges).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qpass.errors import QpassError
from qpass.observations import Observations, Observed
from qpass.ranges import Range

aten = torch.ops.aten

# Operations whose result has the values of their input: a scale chosen for one is the scale of the other.
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
)
# Operations that put values side by side or add them in integers: their inputs and their result share one scale.
JOINS = (aten.cat.default, aten.stack.default, aten.max_pool2d.default)


def sharing_groups(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Value node -> representative of the values that must have its scale."""
    import networkx  # a tenth of a second to import

    together = networkx.Graph()
    for node in gm.graph.nodes:
        together.add_node(node)
        if node.op == "call_function" and node.target in (*VIEWS, *JOINS):
            together.add_edges_from((node, source) for source in node.all_input_nodes if _is_float(source))
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    groups = {}
    for component in networkx.connected_components(together):
        first = min(component, key=order.__getitem__)
        groups |= dict.fromkeys(component, first)
    return groups


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


class CollectRanges(fx.Interpreter):
    """Runs a graph on real inputs and adds what flows into each site to the observations."""

    def __init__(
        self, gm: fx.GraphModule, sites: dict[str, fx.Node], into: Observations, batch: int, watching: bool = True
    ) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # errors name the site; fx would append its own lines to them
        self.into, self.batch, self.watching = into, batch, watching
        self.reads = {node: (name, node.args[0]) for name, node in sites.items() if ":linear." in name}
        self.names = self._group_names(gm)
        for name, group in self.names.items():
            into.groups.setdefault(name, group)

    def _group_names(self, gm: fx.GraphModule) -> dict[str, str]:
        groups = sharing_groups(gm)
        first: dict[Any, str] = {}
        names = {}
        for node in gm.graph.nodes:
            if node in self.reads:
                name, source = self.reads[node]
                key = (groups[source], str(source.meta["val"].shape[-1]))
                names[name] = self.into.groups.get(name) or first.setdefault(key, name)
        return names

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph; each group is observed once a run."""
        self.done: set[tuple[str, int]] = set()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node; where it is a site, looks at its input first."""
        if n in self.reads:
            name, source = self.reads[n]
            self._observe(name, self.env[source])
        return super().run_node(n)

    def _observe(self, name: str, x: Tensor) -> None:
        group = self.names[name]
        self.into.rows.setdefault(name, x.numel() // max(x.shape[-1], 1))
        key = (group, x.data_ptr())
        if key in self.done or x.numel() == 0 or not self.watching or x.is_complex():
            return
        self.done.add(key)
        if group not in self.into.observed:
            width = x.shape[-1]
            moment = torch.zeros(width, width, dtype=torch.float64) if self.into.moments else None
            self.into.observed[group] = Observed(Range.empty(channels=width), moment=moment)
        try:
            self.into.observed[group].add(x)
        except QpassError as error:
            raise QpassError(
                f"{name}.input, calibration batch {self.batch}: {error}; leave such batches out, or mend what makes them."
            ) from error

"""Collect what calibration needs to know of every site's input. An analysis: it writes a table, never the graph.

    for each site:  range of its input (limits, histogram, per channel), second moment E[x x^T] where a solver asks

Sites that read the same value form a group and share one entry; views do not change what is read, so
`linear(view(x))` and `linear(x)` are of one group (a networkx component over "must agree" edges). Rows that the batch's
attention_mask calls padding are not looked at (padding.py). Convolutions have their channels on axis 1, share scales through
concatenates and pools too, and each has an entry for its patches (patches.py).
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from qpass.convolutions import geometry, is_convolution
from qpass.errors import QpassError
from qpass.geometry import Geometry
from qpass.observations import Observations, Observed, halves, values_of
from qpass.padding import unpadded
from qpass.passes.conv_values import OUTPUT
from qpass.passes.scalable import sources
from qpass.patches import patches
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
# Operations that put values side by side: their inputs and their result share one scale.
JOINS = (aten.cat.default, aten.stack.default, aten.max_pool2d.default)
# More of both, for convolutions: a quantize moves through each of them (passes/hoist.py).
IMAGE_MOVES = (
    *VIEWS,
    *JOINS,
    aten.max_pool1d.default,
    aten.max_pool3d.default,
    aten.permute.default,
    aten.transpose.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
    aten.pixel_shuffle.default,
    aten.pixel_unshuffle.default,
    aten.channel_shuffle.default,
    aten.upsample_nearest2d.vec,
    aten.pad.default,
    aten.constant_pad_nd.default,
)


def sharing_groups(gm: fx.GraphModule, through: tuple[Any, ...] = (*VIEWS, *JOINS)) -> dict[fx.Node, fx.Node]:
    """Value node -> representative of the values that must have its scale; `through`: operations that keep values."""
    import networkx  # a tenth of a second to import

    together = networkx.Graph()
    for node in gm.graph.nodes:
        together.add_node(node)
        if node.op == "call_function" and node.target in through:
            together.add_edges_from((node, source) for source in node.all_input_nodes if _is_float(source))
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    groups = {}
    for component in networkx.connected_components(together):
        first = min(component, key=order.__getitem__)
        groups |= dict.fromkeys(component, first)
    return groups


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    value = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(value, Tensor) and value.is_floating_point()


WIDEST = 2304  # columns of patches whose second moments are kept: 42 MB a site


def patches_of(site: str) -> str:
    """The name under which the patches of a convolution are observed."""
    return f"{site}.patches"


def channels_of(group: str, half: int) -> str:
    """The name under which the channels of a value that can be scaled are observed, in two halves of the images."""
    return f"{group}.channels.{half}"


class CollectRanges(fx.Interpreter):
    """Runs a graph on real inputs and adds what flows into each site to the observations."""

    def __init__(
        self,
        gm: fx.GraphModule,
        sites: dict[str, fx.Node],
        into: Observations,
        batch: int,
        watching: bool = True,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # errors name the site; fx would append its own lines to them
        self.into, self.batch, self.watching, self.mask = into, batch, watching, mask
        self.reads = {node: (name, node.args[0]) for name, node in sites.items() if ":linear." in name}
        self.outputs = {node: name for name, node in sites.items() if name.endswith(OUTPUT)}
        own = {name: node for name, node in sites.items() if is_convolution(node) and not name.endswith(OUTPUT)}
        self.convolutions = {node: (name, geometry(node)) for name, node in own.items()}
        self.scalable = sources(gm, {name: node for node, name in self.outputs.items()})
        self.names = self._group_names(gm)
        for name, group in self.names.items():
            into.groups.setdefault(name, group)
        images = Counter(self.names[name] for name in (*own, *self.outputs.values()))
        self.several = {name for name, group in self.names.items() if images[group] > 1}

    def _group_names(self, gm: fx.GraphModule) -> dict[str, str]:
        groups, image_groups = sharing_groups(gm), sharing_groups(gm, IMAGE_MOVES)
        first: dict[Any, str] = {}
        names: dict[str, str] = {}

        def put(name: str, key: Any) -> None:
            names[name] = self.into.groups.get(name) or first.setdefault(key, name)

        for node in gm.graph.nodes:
            if node in self.reads:
                name, source = self.reads[node]
                put(name, (groups[source], str(source.meta["val"].shape[-1])))
            if node in self.convolutions:
                put(self.convolutions[node][0], (image_groups[node.args[0]], "image"))
            if node in self.outputs:
                put(self.outputs[node], (image_groups[node], "image"))
        return names

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph; each group is observed once a run."""
        self.done: set[tuple[str, int]] = set()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Runs one node; where it is a site, looks at its input first, and at the output of a value that has a name."""
        if n in self.reads:
            name, source = self.reads[n]
            self.observe(name, self.env[source])
        if n in self.convolutions:
            self._observe_image(self.convolutions[n][0], self.env[n.args[0]])
        result = super().run_node(n)
        if n in self.convolutions:
            name, walk = self.convolutions[n]
            counted = self.env[n.args[0]] if walk.transposed else result
            self.into.rows.setdefault(name, counted.numel() // max(counted.shape[1], 1))
            self._observe_patches(name, walk, self.env[n.args[0]])
        if n in self.outputs:
            self._observe_image(self.outputs[n], result)
        return result

    def _seen(self, group: str, x: Tensor) -> bool:
        """Whether there is nothing to look at, or it was looked at for another site of the group."""
        key = (group, x.data_ptr())
        if key in self.done or x.numel() == 0 or not self.watching or x.is_complex():
            return True
        self.done.add(key)
        return False

    def observe(self, name: str, x: Tensor) -> None:
        """Looks at the input of a linear."""
        group = self.names[name]
        self.into.rows.setdefault(name, x.numel() // max(x.shape[-1], 1))
        if self._seen(group, x):
            return
        x = unpadded(x, self.mask).cpu()
        if group not in self.into.observed:
            width = x.shape[-1]
            moment = torch.zeros(width, width, dtype=torch.float64) if self.into.moments else None
            self.into.observed[group] = Observed(Range.empty(channels=width), moment=moment)
        self._add(name, lambda: self.into.observed[group].add(x))

    def _observe_image(self, name: str, x: Tensor) -> None:
        """The range of all values; of channels, where every value of the group has as many."""
        group = self.names[name]
        if name in self.several and self.watching and x.numel() and not x.is_complex():  # a pool's values are larger
            own = self.into.observed.setdefault(values_of(name), Observed(Range.empty()))
            self._add(name, lambda: own.add_range(x.cpu(), 1))
        if self._seen(group, x):
            return
        x = x.cpu()
        known = self.into.observed.setdefault(group, Observed(Range.empty()))
        self._add(name, lambda: known.add_range(x, 1))
        if name in self.scalable and self.into.moments:
            self._add(name, lambda: self._observe_channels(group, x))

    def _observe_channels(self, group: str, x: Tensor) -> None:
        for i, part in enumerate(halves(x)):
            if len(part):
                empty = Observed(Range.empty(x.shape[1], histogram=False))
                self.into.observed.setdefault(channels_of(group, i), empty).add_channels(part)

    def _observe_patches(self, name: str, walk: Geometry, x: Tensor) -> None:
        key = patches_of(name)
        if not self.watching or not self.into.moments or x.numel() == 0:
            return
        rows = patches(x.cpu(), walk)
        if key not in self.into.observed:
            width = rows.shape[1]
            own = width // walk.groups
            shape = (own, own) if walk.groups == 1 else (walk.groups, own, own)
            moment = torch.zeros(shape, dtype=torch.float64) if width * own <= WIDEST**2 else None
            self.into.observed[key] = Observed(Range.empty(channels=width, histogram=False), moment=moment)
        self._add(name, lambda: self.into.observed[key].add(rows))

    def _add(self, name: str, add: Any) -> None:
        try:
            add()
        except QpassError as error:
            raise QpassError(
                f"{name}.input, calibration batch {self.batch}: {error}; leave such batches out, or mend what makes them."
            ) from error

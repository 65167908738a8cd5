"""Cut a lowered graph into regions of pointwise work and reductions, to be generated as one kernel each.

    level(n) = max over inputs i of level(i) + (1 where n and i are of different kind)

kinds being "fusable" and "extern" (matmuls, oneDNN, anything unknown). A region is a connected set of fusable nodes of
one level. Levels never fall along an edge and rise wherever it leaves or enters a region, so no path leaves a region
and comes back: calling each region whole is a legal order. Views join the region that reads them; a view whose
readers are not all fusable costs nothing by itself and stays outside.

Regions with the same text are one kernel, called with other tensors: a transformer has a handful, however deep it is.
"""

from __future__ import annotations

import heapq
import operator
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qpass.graph_text import text
from qpass.graphs import add_call

aten = torch.ops.aten
Q = torch.ops.qpass

FUSABLE = (
    aten.layer_norm.default,
    aten.native_layer_norm.default,
    aten.rms_norm.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.amax.default,
    aten.amin.default,
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.to.dtype,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.embedding.default,
    aten.index.Tensor,
    aten.arange.default,
    aten.arange.start,
    aten.full.default,
    aten.new_ones.default,
    aten.ones.default,
    aten.zeros.default,
    aten.triu.default,
    aten.tril.default,
    aten.cat.default,
    aten.masked_fill.Scalar,
    aten.where.self,
    Q.quantize.default,
    Q.dequantize.default,
    Q.choose_qparams.default,
)
VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.flatten.using_ints,
    aten.t.default,
)


SYMBOL = re.compile(r"\b[su]\d+\b(?!/(?:t|token|sample|[cg]\d+)\b)")  # s3, u0; not the number of a type, u8/t
SITES = re.compile(r"  [\w.+]*:[\w.:+]*|  <- \w+")  # which site a line comes from does not change the kernel


@dataclass
class Region:
    """Nodes of one region in order of execution, what they read from outside and what is read of them."""

    nodes: list[fx.Node]
    inputs: list[fx.Node] = field(default_factory=list)
    outputs: list[fx.Node] = field(default_factory=list)


def fusable_nodes(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that may be part of a region."""
    chosen: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op != "call_function" or _has_side_effect(node):
            continue
        if node.target in VIEWS:
            if node.users and all(user in chosen for user in node.users):
                chosen.add(node)
        elif _is_fusable(node) or (node.target is operator.getitem and _is_fusable(node.args[0])):
            chosen.add(node)
    return chosen


def _is_fusable(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not _all_tensors_strided(node):
        return False
    return target in FUSABLE or torch.Tag.pointwise in target.tags


def _all_tensors_strided(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return all(isinstance(v, Tensor) for v in (value if isinstance(value, tuple | list) else (value,)))


def _has_side_effect(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def find_regions(gm: fx.GraphModule) -> list[Region]:
    """The regions of a graph, in an order in which they can run."""
    import networkx  # a tenth of a second to import

    fusable = fusable_nodes(gm)
    level: dict[fx.Node, int] = {}
    together = networkx.Graph()
    for node in gm.graph.nodes:
        mine = node in fusable
        level[node] = max((level[i] + ((i in fusable) != mine) for i in node.all_input_nodes), default=0)
        if mine:
            together.add_node(node)
            together.add_edges_from((node, i) for i in node.all_input_nodes if i in fusable and level[i] == level[node])
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    components = [sorted(c, key=order.__getitem__) for c in networkx.connected_components(together)]
    symbols = symbol_sources(gm)
    regions = [_bounded(nodes, symbols) for nodes in components]
    return sorted(regions, key=lambda r: (level[r.nodes[0]], order[r.nodes[0]]))


def symbol_sources(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Symbol of a size -> the node that holds it: an input of the graph, or the size of an input tensor."""
    found: dict[str, fx.Node] = {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node in placeholders:
        value = node.meta["val"]
        if isinstance(value, torch.SymInt) and value.node.expr.is_symbol:
            found.setdefault(str(value.node.expr), node)
    first = next((n for n in gm.graph.nodes if n.op != "placeholder"), None)
    for node in placeholders:
        value = node.meta["val"]
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol and str(size.node.expr) not in found:
                found[str(size.node.expr)] = add_call(gm, aten.sym_size.int, (node, axis), first)
    return found


def _bounded(nodes: list[fx.Node], symbols: dict[str, fx.Node]) -> Region:
    inside = set(nodes)
    inputs: dict[fx.Node, None] = {}
    for node in nodes:
        inputs |= dict.fromkeys(i for i in node.all_input_nodes if i not in inside)
    needed = {name for node in (*nodes, *inputs) for name in _free_symbols(node)}
    inputs |= dict.fromkeys(symbols[name] for name in sorted(needed) if name in symbols)
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    return Region(nodes, list(inputs), outputs)


def _free_symbols(node: fx.Node) -> set[str]:
    """Names of the symbols in the sizes and strides of a node's value."""
    values = node.meta.get("val")
    names: set[str] = set()
    for value in values if isinstance(values, tuple | list) else (values,):
        sizes = (*value.shape, *value.stride()) if isinstance(value, Tensor) else (value,)
        for size in sizes:
            if isinstance(size, torch.SymInt):
                names |= {str(symbol) for symbol in size.node.expr.free_symbols}
    return names


def extract(gm: fx.GraphModule, region: Region) -> fx.GraphModule:
    """A region as a graph of its own: inputs are placeholders, outputs a tuple."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(region.inputs):
        mapping[node] = graph.placeholder(f"x{i}")
        mapping[node].meta = {"val": node.meta["val"]}
    for node in region.nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
        mapping[node].meta = {"val": node.meta["val"]}
    graph.output(tuple(mapping[node] for node in region.outputs))
    return fx.GraphModule(torch.nn.Module(), graph)


def kernel(*args: object) -> tuple[object, ...]:
    """Stands for a region's kernel in a graph; the emitter calls the kernel itself."""
    raise RuntimeError("a region was called without its kernel")


def replace_regions(gm: fx.GraphModule, regions: list[Region]) -> list[fx.Node]:
    """Puts one call in the place of each region; returns the calls. Results of a call are getitems of it."""
    rank = {node: i for i, node in enumerate(gm.graph.nodes)}
    calls = []
    moved: dict[fx.Node, fx.Node] = {}
    for region in regions:
        with gm.graph.inserting_before(region.nodes[-1]):
            call = gm.graph.call_function(kernel, tuple(moved.get(node, node) for node in region.inputs))
            items = [gm.graph.call_function(operator.getitem, (call, i)) for i in range(len(region.outputs))]
        call.meta = {"val": tuple(node.meta["val"] for node in region.outputs)}
        rank |= dict.fromkeys((call, *items), rank[region.nodes[-1]])
        for node, item in zip(region.outputs, items, strict=True):
            item.meta = dict(node.meta)
            node.replace_all_uses_with(item)
            moved[node] = item
        calls.append(call)
        for node in reversed(region.nodes):
            gm.graph.erase_node(node)
    _sort(gm, rank)
    return calls


def _sort(gm: fx.GraphModule, rank: dict[fx.Node, int]) -> None:
    """Brings the nodes into an order in which each follows its inputs, as near to `rank` as that allows."""
    waiting = {node: len(set(node.all_input_nodes)) for node in gm.graph.nodes}
    ready = [(rank[node], i, node) for i, node in enumerate(gm.graph.nodes) if not waiting[node]]
    heapq.heapify(ready)
    count = len(ready)
    last = None
    while ready:
        _, _, node = heapq.heappop(ready)
        if last is not None:
            last.append(node)
        last = node
        for user in node.users:
            waiting[user] -= 1
            if not waiting[user]:
                count += 1
                heapq.heappush(ready, (rank[user], count, user))


def signature(part: fx.GraphModule) -> str:
    """Equal for regions that one kernel can serve: same operations on inputs of the same types, sizes and strides.

    Symbols are named in order of appearance, so that another capture of the model finds the kernels of the first.
    """
    inputs = [n.meta["val"] for n in part.graph.nodes if n.op == "placeholder"]
    kinds = [f"{v.dtype}{tuple(v.shape)}{v.stride()}" if isinstance(v, Tensor) else str(v) for v in inputs]
    names: dict[str, str] = {}
    whole = "\n".join((*kinds, SITES.sub("", text(part))))
    return SYMBOL.sub(lambda m: names.setdefault(m.group(), f"n{len(names)}"), whole)

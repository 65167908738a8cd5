"""Name every site of a graph and write the plan's decision beside it. Leaves level `annotated`.

A site is an operation with a weight: `linear(x, w, b)` where w is a parameter, its transpose, or its packed form, or a
convolution. What a convolution leaves for others than sites to read has a name too (conv_values.py). The other
operations that multiply get a name too, and a sentence that says why no scheme quantizes them (other_sites.py).

    %5 = aten.linear(%4, @up.weight, @up.bias)      meta["site"] = "up:linear.0", meta["decision"] = Decision(...)
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch
from torch import fx

from qpass.convolutions import geometry, is_convolution
from qpass.graphs import constant
from qpass.passes.conv_values import is_operand, outputs_to_quantize
from qpass.passes.fold_norm import norm_affine
from qpass.passes.other_sites import LOOKUP, other_operation
from qpass.passes.scalable import norm_behind, sources
from qpass.products import is_parameter
from qpass.site_info import SiteInfo
from qpass.sites import SiteNames, module_path
from qpass.slices import rows_of, slice_name

aten = torch.ops.aten
qpass = torch.ops.qpass


@dataclass(frozen=True)
class WeightSource:
    """Where a linear's weight comes from: the parameter's path, with its rows where it is a slice, its node, and what stands
    between.

    packed: the dequantize node where the parameter is packed. transposed: the parameter is [K, N].
    """

    fqn: str
    node: fx.Node
    packed: fx.Node | None
    in_mul: fx.Node | None
    transposed: bool

    @property
    def type(self) -> str:
        """The type of the packed weight, as text."""
        return "" if self.packed is None else next(arg for arg in self.packed.args if isinstance(arg, str))


PACKED = re.compile(r"(.*)\bparametrizations\.(.+)\.original\d+")


def weight_source(node: object) -> WeightSource | None:
    """Follows a linear's weight argument back to the parameter, or None where it is not one parameter."""
    transposed, in_mul, packed, rows = False, None, None, None
    while isinstance(node, fx.Node) and node.op == "call_function":
        rows = node.meta.get("rows", rows)
        if rows is None and (rows := rows_of(node)) is not None:
            node = node.args[0]
            break
        if node.target in (aten.t.default, aten.transpose.int, aten.permute.default):
            transposed, node = not transposed, node.args[0]
        elif node.target is aten.mul.Tensor and is_parameter(node.args[1]):
            in_mul, node = node.args[1], node.args[0]
        elif node.target in (qpass.dequantize.default, qpass.nested.default):
            packed, node = node, node.args[0]
        elif node.target is qpass.whole.default:
            node = node.args[0]
        else:
            return None
    if not isinstance(node, fx.Node) or "fqn" not in node.meta or constant(node) is None:
        return None
    path = slice_name(parameter_path(node.meta["fqn"]), node.meta.get("rows", rows))
    return WeightSource(path, node, packed, in_mul, transposed)


def parameter_path(name: str) -> str:
    """`a.b.parametrizations.weight.original0` -> `a.b.weight`; other paths as they are."""
    found = PACKED.fullmatch(name)
    return name if found is None else found[1] + found[2]


def name_sites(gm: fx.GraphModule, names: SiteNames) -> dict[str, fx.Node]:
    """Writes `meta["site"]` on every site of a graph, in order of execution; returns name -> node."""
    used: set[str] = set()
    found: dict[str, fx.Node] = {}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if operation := site_operation(node):
            source = weight_source(node.args[1])
            name = names.name(module_path(node), operation, source.fqn if source else None, used)
        elif operation := other_operation(node):
            name = names.name(module_path(node), operation, None, used)
        else:
            continue
        node.meta["site"] = name
        found[name] = node
    return found


def site_operation(node: fx.Node) -> str | None:
    """`linear`, `conv2d`, ...: the name of an operation that schemes quantize; None for others."""
    if node.target is aten.linear.default:
        return "linear"
    return geometry(node).operation if is_convolution(node) else None


EPILOGUES = (aten.relu.default, aten.gelu.default)


def describe_sites(gm: fx.GraphModule, names: SiteNames) -> tuple[dict[str, fx.Node], list[SiteInfo]]:
    """The sites of a graph by name, and what the graph tells of each."""
    nodes = name_sites(gm, names)
    infos = [_describe(name, node) for name, node in nodes.items()]
    outputs = outputs_to_quantize(gm)
    kinds = {name: "operand" if is_operand(node) else "output" for name, node in outputs.items()}
    infos += [SiteInfo(name, kind, None) for name, kind in kinds.items()]
    made_by = sources(gm, outputs)
    return nodes | outputs, [dataclasses.replace(info, source=made_by.get(info.name)) for info in infos]


def _describe(name: str, node: fx.Node) -> SiteInfo:
    operation = name.rpartition(":")[2].partition(".")[0]
    if operation == LOOKUP:
        table = weight_source(node.args[0])
        return SiteInfo(name, operation, table.fqn if table and not table.transposed else None)
    if not site_operation(node):
        return SiteInfo(name, operation, None)
    source = weight_source(node.args[1])
    if is_convolution(node):
        norm = norm_behind(node)
        affine = None if norm is None else norm_affine(norm)
        path = source.fqn if source else None
        return SiteInfo(name, operation, path, walk=geometry(node), norm=None if affine is None else affine[0])
    x = node.args[0]
    epilogue = x.target in EPILOGUES and x.args[0].target is aten.linear.default and len(x.users) == 1
    if source is None:
        return SiteInfo(name, operation, None, from_epilogue=epilogue)
    bias = node.args[2] if len(node.args) > 2 else None
    own = bias.meta.get("fqn", "") if isinstance(bias, fx.Node) and bias.op != "call_function" else ""
    return SiteInfo(name, operation, source.fqn, source.transposed, epilogue, bias=own)


def annotate(gm: fx.GraphModule, context) -> int:
    """Names the sites and attaches the plan's decisions; a site the plan does not know stays float."""
    context.sites = name_sites(gm, context.names)
    decisions = context.plan.decisions
    for name, node in context.sites.items():
        if name in decisions:
            node.meta["decision"] = decisions[name]
    for name, node in outputs_to_quantize(gm).items():
        if name in decisions:
            node.meta["output_decision"] = decisions[name]
    return 0

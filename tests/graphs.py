"""Graphs for the tests of single passes, made by the road that models take."""

import operator

import torch
from torch import fx

from qpass.backends import backend_named
from qpass.capture import capture, front_end, tensor_names
from qpass.graphs import add_constant
from qpass.passes import ORDER
from qpass.pipeline import Context, run_pipeline
from qpass.sites import SiteNames

aten = torch.ops.aten
Q = torch.ops.qpass


def captured(model, *inputs):
    """(canonical graph of a model, the values of its placeholders)."""
    names, found = tensor_names(model), []

    def backend(gm, values):
        found.append((capture(gm, values, names), [real(v) for v in values]))
        return gm.forward

    front_end(model, backend)(*inputs)
    (result,) = found
    return result


def frozen(gm, values):
    """The same graph with the model's own tensors as constants, as a compiled model has them, and the values left."""
    left = []
    for node, value in zip(named_ops(gm, "placeholder"), values, strict=True):
        if "value" not in node.meta:
            left.append(value)
            continue
        node.replace_all_uses_with(add_constant(gm, node.meta["fqn"], node.meta["value"], node))
        gm.graph.erase_node(node)
    gm.recompile()
    return gm, left


def lowered(model, plan, *inputs, backend="cpu", until="layout"):
    """(graph of a float model as a plan and a backend leave it after a pass, the values of its placeholders)."""
    gm, values = captured(model, *inputs)
    context = Context(plan=plan, backend=backend_named(backend, torch.device("cpu")), names=SiteNames())
    last = [each.name for each in ORDER].index(until)
    return run_pipeline(gm, ORDER[: last + 1], context), values


def real(value):
    """A symbolic size as the number it has in the example; other values as they are."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


class Strides(fx.Interpreter):
    """Runs a graph and holds every value to what its meta tells."""

    def run_node(self, n):
        result = super().run_node(n)
        told = n.meta.get("val")
        if n.op == "call_function" and n.target is not operator.getitem and isinstance(told, torch.Tensor):
            assert told.dtype == result.dtype, n.format_node()
            if result.layout is torch.strided and told.device.type != "meta":
                assert [real(s) for s in told.shape] == list(result.shape), n.format_node()
                pairs = zip(result.shape, told.stride(), result.stride(), strict=True)
                assert all(real(a) == b for size, a, b in pairs if size > 1), n.format_node()
        return result


def run(gm, values):
    with torch.no_grad():
        out = gm(*values)
    return out[0] if isinstance(out, tuple | list) and len(out) == 1 else out


def targets(gm):
    """What a graph calls, in order."""
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def named_ops(gm, op):
    return [node for node in gm.graph.nodes if node.op == op]


def named(gm, target):
    """The nodes that call `target`."""
    return [node for node in gm.graph.nodes if node.target is target]

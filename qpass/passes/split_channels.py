"""Widen a linear, its activation and the linear behind it by copies of the channels that reach too far.

    linear(act(linear(x, w1, b1)), w2, b2)   ->   linear(act(linear(x, w1', b1')), w2', b2)
    w1' = [w1; w1[j]],  b1' = [b1; b1[j] - k T],  w2' = [w2, w2[:, j]]      for each added (j, k)

Part of insert-qdq: only with the saturation of the 8-bit quantize in between do the copies add up (solvers/split). The
integers are those of the plan, so the packed model itself stays as wide as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qpass.errors import QpassError
from qpass.graphs import add_call, add_constant, constant
from qpass.plan import Decision
from qpass.solvers.split import layout

aten = torch.ops.aten
qpass = torch.ops.qpass


def split_channels(gm: fx.GraphModule, node: fx.Node, decision: Decision) -> None:
    """Rewrites the linear `node`, whose input the plan splits, in place."""
    act = node.args[0]
    maker = act.args[0] if isinstance(act, fx.Node) and act.op == "call_function" and act.args else None
    if not isinstance(maker, fx.Node) or maker.target is not aten.linear.default:
        raise QpassError(
            f"{decision.site}: the plan splits channels of its input, which in this graph is not the activation of a "
            "linear; analyze the model again."
        )
    channel, k = layout(decision.input_extra)
    top = float(decision.input_scale) * (decision.input_type.qmax - int(decision.input_zero))
    rows = _weight(gm, maker, torch.cat([torch.arange(_width(maker)), channel]), 0)
    bias = constant(maker.args[2])
    bias = torch.zeros(_width(maker)) if bias is None else bias.detach().float()
    wide_bias = torch.cat([bias, bias[channel] - k * top]).to(maker.meta["val"].dtype)
    held = add_constant(gm, f"{decision.site}_split_bias", wide_bias, maker)
    wide = add_call(gm, aten.linear.default, (maker.args[0], rows, held), maker)
    wide.meta |= {key: maker.meta[key] for key in ("decision",) if key in maker.meta}
    activated = add_call(gm, act.target, (wide, *act.args[1:]), act, **act.kwargs)
    columns = _weight(gm, node, torch.cat([torch.arange(_width(maker)), channel]), 1)
    node.update_arg(0, activated)
    node.update_arg(1, columns)


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _weight(gm: fx.GraphModule, node: fx.Node, index: Tensor, axis: int) -> fx.Node:
    """The weight of a linear with rows (axis 0) or columns (axis 1) picked by index."""
    weight = node.args[1]
    name = f"{node.meta.get('site', 'linear')}_split"
    if weight.target is not qpass.dequantize.default:
        return add_constant(gm, name, constant(weight).detach().index_select(axis, index), node)
    data, scale, zero, qtype, dtype = weight.args
    held = add_constant(gm, f"{name}_q", _value(data).index_select(axis, index), node)
    if axis == 0:
        scale = add_constant(gm, f"{name}_scale", constant(scale)[index], node)
        zero = None if zero is None else add_constant(gm, f"{name}_zero", constant(zero)[index], node)
    return add_call(gm, qpass.dequantize.default, (held, scale, zero, qtype, dtype), node)


def _value(node: fx.Node) -> Tensor:
    """Integers of a packed weight; one held as [K, N] is turned."""
    return constant(node.args[0]).t() if node.target is aten.t.default else constant(node)

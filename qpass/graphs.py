"""Small steps every pass takes on a graph: add a constant, add a call with its fake value, read a constant.

Constants are get_attr nodes on the graph's module. A call's `meta["val"]` is computed by running the op on the fake
values of its arguments, so shapes, strides and dtypes are always there for the next pass.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import detect_fake_mode

from qpass.arity import full_arity

aten = torch.ops.aten
PADS = (aten.pad.default, aten.constant_pad_nd.default)


def fake_mode(gm: fx.GraphModule) -> Any:
    """The fake mode of a graph's values."""
    values = [node.meta.get("val") for node in gm.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    return detect_fake_mode(values) or torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)


def add_constant(gm: fx.GraphModule, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    """A get_attr node in front of `before` that holds a tensor, on the device of the graph; its name is made unique."""
    if not tensor.is_mkldnn and (device := device_of(gm)) is not None:
        tensor = tensor.to(device)
    target = name = "".join(c if c.isalnum() else "_" for c in name).strip("_") or "constant"
    count = 0
    while hasattr(gm, target):
        count += 1
        target = f"{name}_{count}"
    gm.register_buffer(target, tensor, persistent=False)
    with gm.graph.inserting_before(before):
        node = gm.graph.get_attr(target)
    node.meta = {"val": _fake(gm, tensor)}
    return node


def device_of(gm: fx.GraphModule) -> torch.device | None:
    """The accelerator that a graph's values are on, by the first of them that is floating point; None on CPU."""
    values = (node.meta.get("val") for node in gm.graph.nodes)
    device = next((v.device for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)
    return None if device is None or device.type in ("cpu", "meta") else device


def _fake(gm: fx.GraphModule, tensor: Tensor) -> Tensor:
    if tensor.is_mkldnn:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return fake_mode(gm).from_tensor(tensor, static_shapes=True)


def constant(node: object) -> Tensor | None:
    """The tensor behind a parameter, a buffer, a get_attr constant, or rows or codes of such; None for other nodes."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "placeholder":
        return node.meta.get("value")
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    if node.target is torch.ops.qpass.whole.default:
        held = constant(node.args[0])
        return None if held is None else torch.ops.qpass.whole.default(held, node.args[1])
    if node.target is aten.slice.Tensor:
        held = constant(node.args[0])
        fixed = all(isinstance(arg, int) for arg in node.args[1:])
        return None if held is None or not fixed else aten.slice.Tensor(held, *node.args[1:])
    return None


def add_call(gm: fx.GraphModule, target: Any, args: tuple[Any, ...], before: fx.Node, **kwargs: Any) -> fx.Node:
    """A call in front of `before`, canonical, with its fake value and the module stack of `before`."""
    args, kwargs = full_arity(target, args, kwargs)
    with gm.graph.inserting_before(before):
        node = gm.graph.call_function(target, args, kwargs)
    node.meta = {key: before.meta[key] for key in ("nn_module_stack", "site", "stack_trace") if key in before.meta}
    set_value(gm, node)
    return node


def set_value(gm: fx.GraphModule, node: fx.Node) -> None:
    """Computes `meta["val"]` of a call from the values of its arguments."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with fake_mode(gm), torch.no_grad():
        node.meta["val"] = node.target(*args, **kwargs)


def single_user(node: fx.Node) -> fx.Node | None:
    """The only user of a node, or None where it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def pads_zeros(node: fx.Node) -> bool:
    """Whether a node puts zeros around its input."""
    if node.op != "call_function" or node.target not in PADS:
        return False
    return (node.target is aten.constant_pad_nd.default or node.args[2] == "constant") and not node.args[-1]


def is_view(node: fx.Node) -> bool:
    """Whether a node's result shares memory with its input, or may."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(r.alias_info is not None for r in schema.returns)

"""From a module to graphs: torch.compile's front end, then one re-trace into canonical form.

    nn.Module --front end--> torch.fx graph of Python calls --retrace--> pre-dispatch ATen (aten.linear, ...)

What the front end cannot put into a graph (a branch on data, a call into C) it runs as Python between graphs, so a
model that torch.compile can run is a model that can be captured. Parameters and buffers are placeholders that carry
`meta["fqn"]`, their path in the model, and `meta["value"]`, the tensor itself. Where the front end leaves them on the
graph's module (inductor's `freezing` setting makes it), they are lifted: the graph's last inputs, in `held` order.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.canonical import canonicalize
from qpass.errors import QpassError

GraphBackend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Identity of each parameter and buffer of a model -> its path; a tied one is named by its first path."""
    names: dict[int, str] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names.setdefault(id(tensor), name)
    return names


def front_end(model: nn.Module, backend: GraphBackend) -> Callable[..., Any]:
    """The model's call, captured: each graph goes to `backend(graph, inputs)`, whose result runs in its place.

    Batch and length are symbolic from the first capture on. The outer function lives here, since the front end skips
    frames of torch.nn (a bare Sequential); it is a new code object for each model, since captures are counted by it.
    """

    def call(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return root._call_impl(*args, **kwargs)

    own = types.FunctionType(call.__code__.replace(co_name="forward"), call.__globals__, "forward")
    compiled = torch.compile(own, backend=backend, dynamic=True)
    # a float that arrives as a tensor cannot be retraced; a recurrent layer is one operation of the graph, not a break
    settings = torch._dynamo.config.patch(specialize_float=True, allow_rnn=True)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            with settings, torch.no_grad():
                return compiled(model, *args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, QpassError):  # our own sentence, without the front end's around it
                raise error.inner_exception from None
            raise

    return run


def held(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Tensors that a graph of the front end holds itself, by name; a tied one once. Usually none."""
    return dict(gm.named_parameters()) | dict(gm.named_buffers())


def capture(gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str]) -> fx.GraphModule:
    """A graph as the front end hands it over -> the same graph in canonical form.

    `inputs` are what the front end gives its backend: tensors and symbolic sizes, in the order of the placeholders. The
    result takes these, then what `held(gm)` gives.
    """
    graph = retrace(gm, inputs)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, (*inputs, *held(gm).values()), strict=True):
        if isinstance(value, Tensor) and id(value) in names:
            node.meta["fqn"], node.meta["value"] = names[id(value)], value
    return canonicalize(graph)


class _Interpreted(nn.Module):
    """Runs a graph node by node, so that each operation recorded on the way carries the node's meta."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *args: Any) -> Any:
        return fx.Interpreter(self.graph).run(*args)


def retrace(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Runs a graph on fake tensors and records the ATen operators it reaches before dispatch; sizes stay symbolic."""
    from torch.fx.experimental.proxy_tensor import make_fx

    context = torch._guards.TracingContext.try_get()
    mode = context.fake_mode if context else None
    if mode is None:
        mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    symbolic = context.tensor_to_context if context else {}
    lifted = held(gm)
    module = _Interpreted(gm)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = symbolic.get(value)
        source = known.tensor_source if known is not None else None  # with it, sizes and strides keep their symbols
        return mode.from_tensor(value, symbolic_context=known, static_shapes=known is None, source=source)

    def run(*args: Any) -> Any:
        own = {f"graph.{name}": value for name, value in zip(lifted, args[len(inputs) :], strict=True)}
        return torch.func.functional_call(module, own, args[: len(inputs)])

    fakes = [*map(fake, inputs), *(mode.from_tensor(value, static_shapes=True) for value in lifted.values())]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(torch.fx.traceback.preserve_node_meta())
        stack.enter_context(torch.no_grad())
        return make_fx(run, pre_dispatch=True)(*fakes)

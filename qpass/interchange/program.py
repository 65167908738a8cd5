"""A compiled model as one exported program at level qdq: what the writers of `.pt2` and ONNX files start from.

    the packed model --torch.export--> ATen before dispatch --ORDER up to qdq--> the graph --torch.export--> a program

The passes are those of a call of the model, so sites have their names and their decisions. What a backend would make of the
graph is left out: the file runs on any machine, and the backend of that machine can lower it there.

1. The whole call is one graph. A model that torch.export cannot capture is refused with its reason.
2. Outputs are tensors in tuples, lists and dictionaries; transformers' own output classes come back as dictionaries, so that
   a reader needs no transformers.
"""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qpass.calibrate import Batch, call_arguments
from qpass.canonical import canonicalize
from qpass.checks import check_inputs
from qpass.errors import QpassError
from qpass.passes import ORDER
from qpass.passes.annotate import site_operation, weight_source
from qpass.pipeline import Context, Pass, Settings, run_pipeline
from qpass.plan import Plan
from qpass.runtime import Runtime, runtime_of
from qpass.self_watched import CHANGED
from qpass.sites import SiteNames

QDQ = tuple(each for each in ORDER if each.leaves in ("float", "annotated", "qdq"))
ASSERTED = torch.ops.aten._assert_tensor_metadata.default
FORGOTTEN = ("stack_trace", "source_fn_stack", "torch_fn", "nn_module_stack", "from_node", "custom")
UNKNOWN = re.compile(r"Found <class '(?:\w+\.)*(\w+)'> in output")
RETURNS = (
    "the model returns a {}, which a reader of the file could not rebuild; ask for tensors, such as with use_cache=False "
    "among the example_inputs."
)


def compiled_by_qpass(model: nn.Module) -> Runtime:
    """The runtime of a model that qpass compiled and nobody changed since; another one is refused."""
    if not isinstance(model, nn.Module):
        raise QpassError(f"model is a {type(model).__name__}; expected a model that qpass.compile gave back.")
    runtime = runtime_of(model)
    if runtime is None:
        raise QpassError(f"this {type(model).__name__} was not compiled by qpass; compile it first.")
    watch = runtime.watch() if runtime.watch else None
    if watch is not None and watch.changed():
        raise QpassError(f"{CHANGED}.")
    return runtime


def qdq_program(
    model: nn.Module,
    example: Batch,
    dynamic_shapes: Any,
    plan: Plan,
    passes: Sequence[Pass] = QDQ,
    then: Callable[[fx.GraphModule], None] = lambda graph: None,
) -> torch.export.ExportedProgram:
    """The call of a compiled model on inputs like the example, at level qdq. dynamic_shapes: as torch.export takes it.

    then: what a format does to the graph behind the passes, in place; nodes know their module and site there.
    """
    check_inputs(model, example, "example_inputs")
    args, kwargs = call_arguments(example, "example_inputs")
    with uncompiled(model), torch.no_grad():
        program = _export(model, args, kwargs, dynamic_shapes, type(model).__name__)
        graph = _quantized(_constants(program), Context(plan=plan), passes, type(model).__name__)
        then(graph)
        found = _export(_Captured(model, graph, program.call_spec), args, kwargs, dynamic_shapes, type(model).__name__)
    for node in list(found.graph.nodes):  # what the trace asserts, and where the model's source lies on this machine
        node.meta = {key: value for key, value in node.meta.items() if key not in FORGOTTEN}
        if node.target is ASSERTED:
            found.graph.erase_node(node)
    return found


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """The model runs as plain Python inside."""
    call, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = call


def _export(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], dynamic_shapes: Any, kind: str):
    try:
        return torch.export.export(model, args, dict(kwargs), dynamic_shapes=dynamic_shapes, strict=False)
    except QpassError:
        raise
    except Exception as error:  # whatever the model's own code, or torch.export, has to say
        reason = str(error).strip().split("\n\n")[0]
        if foreign := UNKNOWN.search(reason):
            raise QpassError(RETURNS.format(foreign[1])) from error
        raise QpassError(
            f"torch.export cannot capture {kind} with these example_inputs and dynamic_shapes: "
            f"{type(error).__name__}: {reason}"
        ) from error


class _Captured(nn.Module):
    """The graph of an exported program at level qdq, called as the model is. specs: of its inputs and outputs."""

    def __init__(self, model: nn.Module, graph: fx.GraphModule, specs: Any) -> None:
        super().__init__()
        for node in list(graph.graph.nodes):
            if node.op == "placeholder" and (value := node.meta.get("value")) is not None:
                _hold(graph, node, value.detach())
        for name, value in graph._buffers.items():  # a file keeps them all, and of each no more than it shows
            graph._buffers[name] = value if value.untyped_storage().nbytes() == value.nbytes else value.clone()
        graph._non_persistent_buffers_set.clear()
        graph.graph.lint()
        graph.recompile()
        self.body = graph
        self._specs = specs
        forward = self._forward

        def call(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        call.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]  # dynamic_shapes names arguments
        self.forward = call

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._specs.in_spec:
            flat = _reordered(args, kwargs, self._specs.in_spec)
        found = pytree.tree_unflatten(list(self.body(*flat)), self._specs.out_spec)
        return plain(found)


def _reordered(args: tuple, kwargs: Mapping[str, Any], spec: Any) -> list[Any]:
    """The leaves of a call whose keywords come in another order."""
    names = spec.child(1).context if hasattr(spec, "child") else spec.children_specs[1].context
    return pytree.tree_flatten((args, {name: kwargs[name] for name in names}))[0]


def plain(value: Any) -> Any:
    """The same with dictionaries in the place of other mappings (transformers' output classes)."""
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items() if each is not None}
    if type(value) in (tuple, list):
        return type(value)(plain(each) for each in value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return tuple(plain(each) for each in value)
    if value is None or isinstance(value, Tensor | int | float | bool | str | torch.SymInt):
        return value
    raise QpassError(RETURNS.format(type(value).__name__))


def _constants(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """The program's graph in canonical form; its parameters and buffers are placeholders that say their path and value."""
    graph = program.graph_module
    held = {**program.state_dict, **program.constants}
    targets = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs if spec.target is not None}
    for node in list(graph.graph.nodes):
        if node.op == "placeholder" and (target := targets.get(node.name)) is not None:
            node.meta["fqn"], node.meta["value"] = target, held[target]
        if node.target is ASSERTED:
            graph.graph.erase_node(node)
    return canonicalize(graph)


def _quantized(graph: fx.GraphModule, context: Context, passes: Sequence[Pass], kind: str) -> fx.GraphModule:
    """The graph at level qdq. Each packed weight is read under a name that the plan knows."""
    context.graph_name, context.settings, context.names = "export", Settings.from_env(), SiteNames()
    graph = run_pipeline(graph, passes, context)
    for name, node in context.sites.items():
        if node._erased or not site_operation(node) or name in context.plan.decisions:
            continue
        source = weight_source(node.args[1])
        if source is not None and source.packed is not None:
            raise QpassError(
                f"{name}: this call of {kind} reads a packed weight at a place that calibration did not see; give "
                "qpass.compile example_inputs like those of the export."
            )
    return graph


def _hold(graph: fx.GraphModule, node: fx.Node, value: Tensor) -> None:
    """A placeholder becomes a buffer of the graph's module."""
    if node.users:
        name = node.meta["fqn"].replace(".", "_")
        while hasattr(graph, name):
            name += "_"
        graph.register_buffer(name, value)
        with graph.graph.inserting_before(node):
            held = graph.graph.get_attr(name)
        held.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(held)
    graph.graph.erase_node(node)

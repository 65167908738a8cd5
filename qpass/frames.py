"""Graphs of parts of a model: what the front end comes to by itself, behind a place where a call breaks off.

A call that breaks off inside of a module goes on in Python, and what that calls is captured anew, with itself as the root:

    model                   encoder (breaks off), in it layers.0, in it up: Linear
    the front end's path    L['self'].up                                  with the identity of that Linear
    from_model              L['self'].encoder.layers.0.up

To the front end layers.1 is the same code with other weights, so that one graph would do for both. Here a graph knows sites,
and holds weights: `bound` has it run for the modules that it was captured from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from qpass.sites import ROOT, path_of

STACK = "nn_module_stack"
IN_A_MODULE = ("_modules", "_parameters", "_buffers")


def bound(gm: fx.GraphModule) -> None:
    """Has the front end guard the identity of the modules whose tensors a graph reads; to be called while it captures."""
    from torch._dynamo.guards import GuardBuilder

    context = torch._guards.TracingContext.try_get()
    if context is None:
        return
    for source in _sources(gm):
        if (owner := _owner(source)) is not None:
            context.guards_context.dynamo_guards.add(torch._guards.Guard(owner, GuardBuilder.ID_MATCH))


def _sources(gm: fx.GraphModule) -> Iterator[Any]:
    """Where the front end found each tensor that it gives a graph, or leaves on its module."""
    yield from (getattr(gm, "_param_name_to_source", None) or {}).values()
    for node in gm.graph.nodes:
        if node.op == "placeholder" and (found := node.meta.get("grapharg")) is not None:
            yield found.source


def _owner(source: Any) -> Any:
    """The outermost module on the way to a tensor; None for one that hangs in no module."""
    owner = None
    while source is not None:
        inner = getattr(source, "base", None)
        if getattr(source, "member", None) in IN_A_MODULE:
            owner = inner
        source = inner
    return owner


def module_ids(model: nn.Module) -> dict[str, int]:
    """Path -> identity, of every module of a model under each of its names."""
    return {path: id(module) for path, module in model.named_modules(remove_duplicate=False)}


def from_model(gm: fx.GraphModule, modules: Mapping[str, int]) -> None:
    """Makes the paths in the module stacks of a graph begin at the model, in place. modules: `module_ids` of the model."""
    starts: dict[str, str] = {}  # what the front end calls the root -> its path in the model
    for node in gm.graph.nodes:
        for key, (raw, *_) in node.meta.get(STACK, {}).items():
            root = _root(raw)
            if root not in starts and (start := _start(key, path_of(raw), modules)) is not None:
                starts[root] = start
    if not any(starts.values()):
        return
    own = set(starts.values())
    for node in gm.graph.nodes:
        stack = node.meta.get(STACK)
        if stack:
            node.meta[STACK] = {key: (_moved(raw, starts), *rest) for key, (raw, *rest) in stack.items()}
        elif node.op == "call_function" and len(own) == 1:  # in the forward of the root itself
            node.meta[STACK] = {"": (f"L['self'].{next(iter(own))}", nn.Module)}


def _root(raw: str) -> str:
    found = ROOT.match(raw)
    return found.group(0) if found else ""


def _start(key: Any, path: str, modules: Mapping[str, int]) -> str | None:
    """Where the root is that a module with this path and identity was found from; None where nothing tells."""
    number = str(key).partition("@")[0]  # a module's second call has @1 behind its identity
    if not number.isdigit():
        return None
    if modules.get(path) == int(number):
        return ""
    end = f".{path}" if path else ""
    names = (name for name, identity in modules.items() if identity == int(number) and name.endswith(end))
    name = next(names, None)
    return None if name is None else name.removesuffix(end)


def _moved(raw: str, starts: Mapping[str, str]) -> str:
    root = _root(raw)
    start = starts.get(root)
    return f"L['self'].{start}{raw[len(root) :]}" if start else raw

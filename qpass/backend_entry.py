"""The torch.compile spelling: `model.compile(backend="qpass", options={"scheme": "w8a8-dynamic"})`.

There is no copy of the model to pack here, so the float weights stay in it; the integers are constants of each graph.
A program that qpass exported is quantized already: without a scheme it is lowered as it is.
Schemes whose inputs need calibration take a plan: `options={"plan": qpass.analyze(...)}`. torch.compile by itself leaves
a model with an LSTM or GRU alone, and no backend is asked: set torch._dynamo.config.allow_rnn = True first, or call
qpass.compile, which captures it. mode="reduce-overhead" replays CUDA graphs; torch.compile takes
either options or a mode, so the mode can be one of the options.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends import Backend, backend_named
from qpass.backends.cuda_graphs import check_mode
from qpass.capture import capture, held
from qpass.checks import check_calibration, check_one_width, check_plan_alone, check_plan_fits
from qpass.decide import decide
from qpass.errors import QpassError, nearest
from qpass.observations import Observations
from qpass.passes.annotate import describe_sites
from qpass.passes.logits import makes_logits
from qpass.plan import Plan
from qpass.runtime import Runtime
from qpass.schemes import Recipe, Scheme
from qpass.sites import SiteNames, path_of

KEPT_NOWHERE = "this spelling has no model to keep its weights in, so nobody could choose their bits; use qpass.compile"
OPTIONS = ("scheme", "recipe", "plan", "backend", "mode")


def qpass_backend(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """A torch.compile backend: quantizes the graph it is given and runs it."""
    given = dict(options or {})
    for key in given:
        if key not in OPTIONS:
            raise QpassError(
                f"option {key!r} of backend 'qpass' is not one of {', '.join(OPTIONS)}.{nearest(key, OPTIONS)}"
            )
    device = next((v.device for v in inputs if isinstance(v, Tensor)), torch.device("cpu"))
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    names = {id(v): _path(n) for n, v in zip(placeholders, inputs, strict=True) if _is_weight(n, v)}
    names |= {id(value): _held_path(gm, name) for name, value in held(gm).items()}
    weights = {names[id(v)]: v for v in (*inputs, *held(gm).values()) if id(v) in names}
    chosen = backend_named(given.get("backend", "auto"), device)
    plan = given.get("plan")
    if plan is None:
        plan = _plan(gm, inputs, names, weights, given, chosen)
    else:
        check_plan_alone(plan, given.get("scheme"), given.get("recipe"))
        check_plan_fits(plan, weights, None)
    check_one_width(plan, KEPT_NOWHERE)
    runtime = Runtime(plan, chosen, tensors=names, mode=check_mode(given.get("mode", mode)))
    return runtime(gm, inputs)


def _is_weight(node: fx.Node, value: Any) -> bool:
    return isinstance(value, torch.nn.Parameter) or (isinstance(value, Tensor) and "_buffers_" in str(node.target))


def _path(node: fx.Node) -> str:
    """Path of a parameter from the name the front end gave it."""
    source = node.meta.get("grapharg")
    return path_of(source.source.name if source is not None else str(node.target))


def _held_path(gm: fx.GraphModule, name: str) -> str:
    """Path of a parameter that the front end left on the graph's module under `name`."""
    source = getattr(gm, "_param_name_to_source", {}).get(name)
    return path_of(source.name) if source is not None else name


def _plan(
    gm, inputs, names: Mapping[int, str], weights: Mapping[str, Tensor], given: Mapping[str, Any], backend: Backend
) -> Plan:
    if "scheme" not in given and "recipe" not in given and _is_quantized(gm):
        return Plan(Scheme.parse(backend.scheme(static=False)))
    scheme = Scheme.parse(given.get("scheme", backend.scheme(static=False)))
    recipe = Recipe.parse(given.get("recipe"), scheme)
    schemes = [scheme, *(s for _, s in recipe.rules if s is not None)]
    check_calibration(schemes, None)
    nested = next((s for s in schemes if s.nested), None)
    if nested is not None:
        raise QpassError(f"scheme {nested}: {KEPT_NOWHERE}.")
    nodes, infos = describe_sites(capture(gm, inputs, names), SiteNames())
    heads = makes_logits(nodes)
    sites = {i.name: dataclasses.replace(i, head=i.name in heads) for i in infos}
    return decide(weights, sites, recipe, Observations())


def _is_quantized(gm: fx.GraphModule) -> bool:
    """Whether a graph holds packed weights or codes already, as a program that qpass exported does."""
    ours = (torch.ops.qpass.dequantize.default, torch.ops.qpass.quantize.default)
    return any(node.target in ours for node in gm.graph.nodes)

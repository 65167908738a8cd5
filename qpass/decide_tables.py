"""Tables and output layers: they stay float unless a recipe names them; one that is both is stored once.

    a table        embedding(w, i): rows are looked up, and nothing is multiplied
    a head         linear(x, w) that makes the logits: what `get_output_embeddings()` of the model returns, or a linear
                   whose weight is looked up elsewhere (tied), or what the graph shows (passes/logits.py)

An error in a row of a table goes into every later layer, one in the head straight into the logits, and both have more
parameters a multiply-add than any other layer. `lm_head`, `*embed_tokens` and `model.embed*` name one; `*` and `model.*` do
not. Who asks for one of the readers of a tied weight asks for all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from qpass.decide_linear import suited
from qpass.decide_site import BY_RECIPE, describe, why_type, why_weight
from qpass.observations import Observations
from qpass.passes.other_sites import LOOKUP, why_not
from qpass.plan import Decision
from qpass.schemes import Recipe, Scheme
from qpass.site_info import SiteInfo

HEAD = "an output layer: its rounding goes straight into the logits, so it stays float unless a recipe names it"
SHARED = "{} reads the same weight, and the recipe leaves that in float"
UNEVEN = "its rows of {} are no multiple of the group of {}: each row has one scale"
NO_INPUT = "a table multiplies nothing that solver={} could look at: its weight is rounded to nearest"
Round = Callable[[list[Decision], Scheme], list[Decision]]


def one_name(sites: Mapping[str, SiteInfo], weights: Mapping[str, Tensor]) -> dict[str, SiteInfo]:
    """The sites with every tied weight under the first of its names."""
    first: dict[int, str] = {}
    for name, weight in weights.items():
        first.setdefault(id(weight), name)
    named = {info.name: first.get(id(weights[info.weight])) for info in sites.values() if info.weight in weights}
    return {name: dataclasses.replace(info, weight=named.get(info.name, info.weight)) for name, info in sites.items()}


def heads(model: object, sites: Mapping[str, SiteInfo], weights: Mapping[str, Tensor]) -> set[str]:
    """Names of the sites that are output layers."""
    tables = {info.weight for info in sites.values() if info.operation == LOOKUP and info.weight}
    head = _output_embeddings(model)
    return {
        name
        for name, info in sites.items()
        if info.operation == "linear"
        and info.weight in weights
        and (info.head or info.weight in tables or weights[info.weight] is head)
    }


def _output_embeddings(model: object) -> Tensor | None:
    """The weight of the layer that a model of the transformers library calls its output layer."""
    getter = getattr(model, "get_output_embeddings", None)
    layer = getter() if callable(getter) else None
    return getattr(layer, "weight", None) if isinstance(layer, nn.Module) else None


def schemes_of(
    sites: Mapping[str, SiteInfo], recipe: Recipe, heads: set[str]
) -> tuple[dict[str, Scheme | None], dict[str, str]]:
    """Site -> its scheme, and for tables and heads without one the sentence that says why."""
    schemes = {name: recipe.scheme_for(name) for name in sites}
    special = [name for name, info in sites.items() if name in heads or (info.operation == LOOKUP and info.weight)]
    readers: dict[str | None, list[str]] = {}
    for name in special:
        readers.setdefault(sites[name].weight, []).append(name)
    why: dict[str, str] = {}
    for tied in readers.values():
        named = [name for name in tied if recipe.names(name)]
        kept = next((name for name in named if schemes[name] is None), None)
        for name in tied:
            if kept is not None:
                why[name] = BY_RECIPE if name == kept else SHARED.format(kept)
            elif not named:
                why[name] = HEAD if name in heads else why_not(LOOKUP)
            schemes[name] = None if name in why else schemes[name if name in named else named[0]]
    return schemes, why


def decide_tables(
    weights: Mapping[str, Tensor],
    sites: Mapping[str, SiteInfo],
    schemes: Mapping[str, Scheme | None],
    why: Mapping[str, str],
    solved: Mapping[str, Decision],
    rounded: Round,
) -> dict[str, Decision]:
    """The decisions on tables. rounded: gives decisions their integers; a weight that a linear reads has them already."""
    linears = {d.weight: d for d in solved.values() if d.quantized and d.operation == "linear"}
    found: dict[str, Decision] = {}
    done: dict[str, Decision] = dict(linears)
    for name, info in sites.items():
        if info.operation != LOOKUP or not info.weight:
            continue
        scheme, decision = schemes[name], describe(weights, info, Observations())
        reason = why.get(name, "") if scheme is None or scheme.weight is None else why_type(scheme, LOOKUP)
        reason = reason or why_weight(weights, decision)
        if reason or scheme is None:
            found[name] = decision.as_float(reason or BY_RECIPE)
            continue
        if info.weight not in done:
            (done[info.weight],) = rounded([decision], dataclasses.replace(scheme, activation=None, dynamic=False))
        d = done[info.weight]
        note = _note(scheme, decision, info.weight in linears)
        found[name] = dataclasses.replace(
            decision, weight_type=d.weight_type, packed=d.packed, made_from=d.made_from, note=note
        )
    return found


def _note(scheme: Scheme, decision: Decision, is_linear: bool) -> str:
    """What to know of a table: its rows cannot be cut into the groups that were asked for; its solver had nothing to see."""
    uneven = bool(suited(scheme, [decision])[1])
    notes = [UNEVEN.format(decision.shape[1], scheme.weight.group)] if uneven else []
    if scheme.solver_needs_data and not is_linear:
        notes.append(NO_INPUT.format(scheme.solver))
    return "; ".join(notes)

"""Decide: recipe x observations -> a Plan. Every site gets a type, or the sentence that says why it stays float."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qpass.observations import Observations, Observed
from qpass.packing import Packed
from qpass.passes.annotate import OTHER_SITES
from qpass.plan import Decision, Plan, SiteInfo
from qpass.schemes import Recipe, Scheme
from qpass.solvers.solve import Solution, solve
from qpass.storage import fingerprint

NO_PARAMETER = "its weight is computed, not a parameter of the model"
A_BUFFER = "its weight is a buffer of the model, not a parameter"
NOT_REAL = "its weight is {}, schemes quantize real floating-point weights"
BY_RECIPE = "the recipe leaves it in float"
NOT_REACHED = "no calibration batch reached it, so its input has no range"
EXTREME = "its input spans too many orders of magnitude for second moments; its weight is rounded to nearest"
LOW_BIT = "the scheme's weight type {} is not executed yet; types that run: i8/c0"


def decide(
    model: nn.Module | Mapping[str, Tensor],
    sites: Mapping[str, SiteInfo],
    recipe: Recipe,
    observations: Observations,
) -> Plan:
    """The plan for the sites of a model, in the order given."""
    recipe.check([name for name in sites if ":linear." in name] or list(sites))
    weights = dict(model.named_parameters(remove_duplicate=False)) if isinstance(model, nn.Module) else model
    plan = Plan(recipe.default, parameters=sum({id(p): p.numel() for p in weights.values()}.values()))
    solved: dict[str, dict[str, Decision]] = {}
    for group, members in _groups(sites, observations).items():
        solved[group] = _decide_group(weights, group, members, recipe, observations)
    for name, info in sites.items():
        group = observations.groups.get(name, name)
        plan.decisions[name] = solved.get(group, {}).get(name) or _other(info)
    if any(d.input_type is not None for d in plan) and fast_bfloat16():
        plan.attention = torch.bfloat16
    return plan


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _groups(sites: Mapping[str, SiteInfo], observations: Observations) -> dict[str, list[SiteInfo]]:
    groups: dict[str, list[SiteInfo]] = {}
    for name, info in sites.items():
        if info.operation == "linear":
            groups.setdefault(observations.groups.get(name, name), []).append(info)
    return groups


def _other(info: SiteInfo) -> Decision:
    why = next((why for _, operation, why in OTHER_SITES if operation == info.operation), "")
    return Decision(info.name, info.operation, info.weight or "", why=why)


def _decide_group(weights, group, members, recipe: Recipe, observations: Observations) -> dict[str, Decision]:
    """Sites that read one input: they share its scale and its per-channel factor where they have one scheme."""
    found: dict[str, Decision] = {}
    by_scheme: dict[Scheme, list[Decision]] = {}
    observed = observations.observed.get(group)
    for info in members:
        decision = _describe(weights, info, group, observations)
        scheme = recipe.scheme_for(info.name)
        why = _why_weight(weights, info.weight) or why_float(decision, scheme, observed)
        if why:
            found[info.name] = decision.as_float(why)
        else:
            assert scheme is not None
            by_scheme.setdefault(scheme, []).append(decision)
    epilogue = any(info.from_epilogue for info in members)
    for scheme, decisions in by_scheme.items():
        found |= {d.site: d for d in quantize_group(weights, decisions, scheme, observed, epilogue)}
    return found


def _describe(weights: Mapping[str, Tensor], info: SiteInfo, group: str, observations: Observations) -> Decision:
    shape: tuple[int, ...] = ()
    if info.weight in weights:
        shape = tuple(weights[info.weight].shape)
        shape = shape[::-1] if info.transposed else shape
    observed = observations.observed.get(group)
    lo, hi = (observed.range.lo, observed.range.hi) if observed and observed.rows else (None, None)
    rows = observations.rows.get(info.name, 0)
    return Decision(
        info.name, info.operation, info.weight or "", shape, info.transposed, rows, group=group, lo=lo, hi=hi
    )


def why_float(decision: Decision, scheme: Scheme | None, observed: Observed | None) -> str | None:
    """None where the scheme can quantize the site, or the sentence that says why not."""
    if scheme is None or scheme.weight is None:
        return BY_RECIPE
    if str(scheme.weight) != "i8/c0" or (scheme.activation is not None and scheme.activation.number != "u8"):
        return LOW_BIT.format(f"{scheme.weight} with input {scheme.activation or 'float'}")
    if scheme.needs_calibration and (observed is None or not observed.rows):
        return NOT_REACHED
    return None


def _why_weight(weights: Mapping[str, Tensor], path: str | None) -> str | None:
    if not path:
        return NO_PARAMETER
    if path not in weights:
        return A_BUFFER
    weight = weights[path]
    name = str(weight.dtype).removeprefix("torch.")
    return None if weight.is_floating_point() and weight.dtype.itemsize > 1 else NOT_REAL.format(name)


def quantize_group(
    named: Mapping[str, Tensor], decisions: list[Decision], scheme: Scheme, observed: Observed | None, epilogue: bool
) -> list[Decision]:
    """Chooses the shared input parameters and rounds each weight."""
    weights = [_weight(named, d) for d in decisions]
    solution, note = _solve(weights, scheme, observed, epilogue)
    done = []
    for decision, packed, bias in zip(decisions, solution.packed, solution.bias, strict=True):
        packed = _turned(packed) if decision.transposed else packed
        done.append(
            dataclasses.replace(
                decision,
                weight_type=packed.type,
                input_type=scheme.activation,
                input_scale=solution.scale,
                input_zero=solution.zero,
                input_shift=solution.shift,
                input_extra=solution.extra,
                bias=bias,
                packed=packed,
                made_from=fingerprint(named[decision.weight]),
                note=note,
            )
        )
    return done


def _solve(weights: list[Tensor], scheme: Scheme, observed: Observed | None, epilogue: bool) -> tuple[Solution, str]:
    """The solution, and a note where its input's second moments are of no use: then weights are rounded to nearest."""
    free = scheme.dynamic or not epilogue
    try:
        solution = solve(weights, scheme, observed, free=free, splits=epilogue)
    except torch.linalg.LinAlgError:
        solution = None
    if solution is not None and solution.finite:
        return solution, ""
    assert observed is not None  # without statistics nothing is inverted, and nothing overflows
    bare = dataclasses.replace(observed, moment=None)
    return solve(weights, scheme, bare, free=free, splits=epilogue), EXTREME


def _weight(named: Mapping[str, Tensor], decision: Decision) -> Tensor:
    weight = named[decision.weight].detach()
    return weight.t() if decision.transposed else weight


def _turned(packed: Packed) -> Packed:
    turned = dataclasses.replace(packed.type, axis=1)
    return Packed(packed.data.t().contiguous(), packed.scale, turned, packed.in_mul)

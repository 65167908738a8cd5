"""Decide on convolutions: sites and outputs that share a value share its scale; each weight is rounded once.

static        input u8/t, scale and zero point from the range of the group     weight i8/c0 (c1 where transposed)
dynamic       input u8/sample, at run time                                     the same
weight-only   float                                                            the same
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from qpass import affine
from qpass.decide_site import BY_RECIPE, describe, why_float, why_type, why_weight
from qpass.observations import Observations, Observed
from qpass.passes.collect_ranges import patches_of
from qpass.plan import Decision
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.range_choice import choose_range
from qpass.ranges import Range
from qpass.schemes import Recipe, Scheme
from qpass.seen import Seen, clipped_of, grid, seen_of
from qpass.site_info import SiteInfo
from qpass.solvers.convolution import solve_convolution
from qpass.solvers.equalize import Factor, choose_factors, scaled
from qpass.solvers.smooth import WHOLE
from qpass.storage import fingerprint

OPERAND = "bfloat16: one add reads it, whose result has a rounding of its own"


def input_type(scheme: Scheme) -> QType | None:
    """The type of a convolution's input: per tensor, or per sample where it is chosen at run time."""
    if scheme.activation is None:
        return None
    return dataclasses.replace(scheme.activation, granularity="sample" if scheme.dynamic else "tensor")


def static_input(scheme: Scheme, observed: Observed | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Scale and zero point of a static input; nothing for other schemes."""
    if not scheme.needs_calibration or observed is None:
        return None, None
    qtype = input_type(scheme)
    assert qtype is not None
    params = affine.choose_qparams(*choose_range(observed.range, qtype, scheme.range_for("convolution")), qtype)
    assert params.zero is not None
    return params.scale, params.zero


def image_groups(sites: Mapping[str, SiteInfo], observations: Observations) -> list[list[SiteInfo]]:
    """Convolutions and outputs that are decided together: they read one value, or one weight."""
    import networkx  # a tenth of a second to import

    together = networkx.Graph()
    for name, info in sites.items():
        if info.walk is not None or info.operation == "output":
            together.add_edge(("site", name), ("input", observations.groups.get(name, name)))
            if info.weight:
                together.add_edge(("site", name), ("weight", info.weight))
    order = {name: i for i, name in enumerate(sites)}
    groups = []
    for component in networkx.connected_components(together):
        names = sorted((name for kind, name in component if kind == "site"), key=order.__getitem__)
        groups.append([sites[name] for name in names])
    return groups


def decide_images(
    weights: Mapping[str, Tensor],
    sites: Mapping[str, SiteInfo],
    recipe: Recipe,
    observations: Observations,
    each: Callable[..., Iterable[dict[str, Decision]]] = map,
) -> dict[str, Decision]:
    """The decisions of all convolutions and outputs. weights: parameters by path; each: does the work in map's stead."""
    together = image_groups(sites, observations)
    schemes = schemes_of(weights, together, recipe, observations)
    factors = choose_factors(weights, sites, schemes, observations, together)

    def of_group(members: list[SiteInfo]) -> dict[str, Decision]:
        source = members[0].source
        return _decide_group(weights, members, recipe, observations, factors.get(source.site) if source else None)

    found: dict[str, Decision] = {}
    for decisions in each(of_group, together):
        found |= decisions
    return found


def schemes_of(
    weights, together: list[list[SiteInfo]], recipe: Recipe, observations: Observations
) -> dict[str, Scheme]:
    """The schemes of the convolutions that will be quantized."""
    found = {}
    for members in together:
        observed = observations.together(info.name for info in members)
        for info in members:
            scheme, decision = recipe.scheme_for(info.name), describe(weights, info, observations)
            if scheme and not (why_weight(weights, decision) or why_float(decision, scheme, observed)):
                found[info.name] = scheme
    return found


def _decide_group(
    weights: Mapping[str, Tensor],
    members: list[SiteInfo],
    recipe: Recipe,
    observations: Observations,
    factor: Factor | None,
) -> dict[str, Decision]:
    """Convolutions that read one value, times a factor [C], and outputs that share its scale."""
    found: dict[str, Decision] = {}
    by_scheme: dict[Scheme, list[Decision]] = {}
    observed = observations.together(info.name for info in members)
    if factor is not None and observed is not None:
        observed = scaled(observations, [info.name for info in members], factor)
    mul = None if factor is None else factor.m
    for info in members:
        scheme = recipe.scheme_for(info.name.removesuffix(".output"))
        if info.operation == "output":
            group = observations.groups.get(info.name, info.name)
            decision = output_decision(info, scheme, observed, group, mul, observations.values(info.name))
            found |= {} if decision is None else {info.name: decision}
            continue
        decision = describe(weights, info, observations)
        why = why_weight(weights, decision) or why_float(decision, scheme, observed)
        if why or scheme is None:
            found[info.name] = decision.as_float(why or BY_RECIPE)
        else:
            by_scheme.setdefault(scheme, []).append(decision)
    infos = {info.name: info for info in members}
    for scheme, decisions in by_scheme.items():
        done = quantize_convolutions(weights, infos, decisions, scheme, observations, observed, mul)
        found |= {d.site: d for d in done}
    return found


def quantize_convolutions(
    weights: Mapping[str, Tensor],
    infos: Mapping[str, SiteInfo],
    decisions: list[Decision],
    scheme: Scheme,
    observations: Observations,
    observed: Observed | None,
    factor: Tensor | None = None,
) -> list[Decision]:
    """The decisions of sites that read one value, under one scheme; observed: of the value times its factor [C]."""
    scale, zero = static_input(scheme, observed)
    params = _usual(scheme, observed) if scale is None else QParams(scale, zero, input_type(scheme))
    found: dict[str, tuple] = {}
    done = []
    for decision in decisions:
        walk = infos[decision.site].walk
        assert walk is not None
        if decision.weight not in found:
            seen = observations.observed.get(patches_of(decision.site))
            found[decision.weight] = solve_convolution(
                weights[decision.weight].detach().cpu(), walk, scheme, seen, params, factor
            )
        packed, bias = found[decision.weight]
        done.append(
            dataclasses.replace(
                decision,
                weight_type=packed.type,
                input_type=input_type(scheme),
                input_scale=scale,
                input_zero=zero,
                bias=bias,
                packed=packed,
                seen=_seen(observations.values(decision.site), observed, scale, zero, input_type(scheme)),
                made_from=fingerprint(weights[decision.weight]),
            )
        )
    return done


def _seen(
    values: Range | None, observed: Observed | None, scale: Tensor | None, zero: Tensor | None, qtype: QType | None
) -> Seen | None:
    """What calibration saw of a static input. values: of this site; observed: of all that share its scale, times a factor."""
    if values is None or observed is None or scale is None or qtype is None:
        return None
    return seen_of(values, clipped_of(observed.range, *grid(scale, zero, qtype)))


def _usual(scheme: Scheme, observed: Observed | None) -> QParams | None:
    """Scale and zero point of a dynamic input, were its range that of all samples."""
    if scheme.activation is None or observed is None or not observed.rows:
        return None
    lo, hi = torch.tensor(observed.range.lo), torch.tensor(observed.range.hi)
    return affine.choose_qparams(lo, hi, dataclasses.replace(scheme.activation, granularity="tensor"))


def operand_decision(info: SiteInfo, scheme: Scheme | None) -> dict[str, Decision]:
    """The decision for a value that is read once, to be added to a later convolution; nothing where it stays as it is."""
    if scheme is None or not scheme.needs_calibration or why_type(scheme, "convolution"):
        return {}
    return {info.name: Decision(info.name, "operand", note=OPERAND)}


def output_decision(
    info: SiteInfo,
    scheme: Scheme | None,
    observed: Observed | None,
    group: str,
    factor: Tensor | None = None,
    values: Range | None = None,
) -> Decision | None:
    """The decision for what others than sites read of a value, in 8 bits; None where it stays float, without a sentence.

    Fewer bits are asked for where values are multiplied; an add, a mean or a pool gains nothing by them, and in a chain of
    adds errors pile up. factor: [C], what the value is multiplied by before. values: of this value alone.
    """
    if (
        scheme is None
        or not scheme.needs_calibration
        or why_type(scheme, "convolution")
        or observed is None
        or not observed.rows
    ):
        return None
    scheme = dataclasses.replace(scheme, activation=dataclasses.replace(scheme.activation, bits=WHOLE))
    scale, zero = static_input(scheme, observed)
    lo, hi = observed.range.lo, observed.range.hi
    return Decision(
        info.name,
        "output",
        group=group,
        lo=lo,
        hi=hi,
        input_type=input_type(scheme),
        input_scale=scale,
        input_zero=zero,
        input_mul=factor,
        seen=_seen(values, observed, scale, zero, input_type(scheme)),
    )

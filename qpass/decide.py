"""Decide: recipe x observations -> a Plan. Every site gets a type, or the sentence that says why it stays float."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from qpass.decide_conv import decide_images, operand_decision
from qpass.decide_linear import suited
from qpass.decide_nested import nest_group
from qpass.decide_site import describe, turned, weight_of, why_float, why_nested, why_weight
from qpass.decide_tables import decide_tables, heads, one_name, schemes_of
from qpass.in_place import pack_now
from qpass.interrupts import stop_if_asked
from qpass.observations import Observations, Observed
from qpass.passes.other_sites import LOOKUP, why_not
from qpass.plan import Decision, Plan
from qpass.schemes import Recipe, Scheme
from qpass.seen import Seen, clipped_of, grid, seen_of
from qpass.site_info import SiteInfo
from qpass.slices import overlapping, slice_of, with_slices
from qpass.solvers.solve import Solution, solve
from qpass.storage import fingerprint

BOTH_WAYS = "{} reads the same weight the other way round, and one set of integers has scales along one axis"
EXTREME = "its input spans too many orders of magnitude for second moments; its weight is rounded to nearest"


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a recipe asks of a model: its weights by path, its sites, and for each its scheme, or why it has none.

    first: weight -> the first site that is to be quantized and reads it.
    """

    weights: dict[str, Tensor]
    sites: Mapping[str, SiteInfo]
    schemes: Mapping[str, Scheme | None]
    why: Mapping[str, str]
    first: Mapping[str, SiteInfo]


def own_biases(sites: Mapping[str, SiteInfo], named: Mapping[str, Tensor]) -> dict[str, SiteInfo]:
    """The sites, each with a bias only where nothing else in the model reads it, so that it may be corrected in place."""
    readers: dict[str, set[str | None]] = {}
    for info in sites.values():
        readers.setdefault(info.bias, set()).add(info.weight)
    names = Counter(id(t) for t in named.values())

    def alone(info: SiteInfo) -> bool:
        held = [named.get(info.weight or ""), named.get(info.bias)]
        return len(readers[info.bias]) == 1 and all(t is not None and names[id(t)] == 1 for t in held)

    return {name: info if alone(info) else dataclasses.replace(info, bias="") for name, info in sites.items()}


def asked(model: nn.Module | Mapping[str, Tensor], sites: Mapping[str, SiteInfo], recipe: Recipe) -> Asked:
    """What the recipe asks of a model, or of the weights of a graph."""
    named = model.named_parameters(remove_duplicate=False) if isinstance(model, nn.Module) else model.items()
    shared_rows = overlapping({name: info.weight for name, info in sites.items() if info.weight})
    weights = with_slices(dict(named), (info.weight for name, info in sites.items() if name not in shared_rows))
    sites = own_biases(one_name(sites, weights), weights)
    schemes, why = schemes_of(sites, recipe, heads(model, sites, weights))
    return Asked(weights, sites, schemes, why | shared_rows, _first_readers(sites, schemes))


def decide(
    model: nn.Module | Mapping[str, Tensor],
    sites: Mapping[str, SiteInfo],
    recipe: Recipe,
    observations: Observations,
    decided: Mapping[str, Decision] | None = None,
    each: Callable[..., Iterable[dict[str, Decision]]] = map,
    in_place: bool = False,
) -> Plan:
    """The plan for the sites of a model, in the order given. decided: what is known of some sites already.

    each: does the work of groups in `map`'s stead, such as several processes, which then all must come here. in_place: the
    model's weights are packed as soon as they are decided on.
    """
    recipe.check([n for n, i in sites.items() if i.operation in ("linear", LOOKUP) or i.walk] or list(sites))
    ask = asked(model, sites, recipe)
    weights, sites, schemes = ask.weights, ask.sites, ask.schemes
    sizes = {id(p): p.numel() for name, p in weights.items() if slice_of(name)[1] is None}
    plan = Plan(recipe.default, parameters=sum(sizes.values()))
    solved: dict[str, Decision] = dict(decided or {})
    missing = [g for g in groups(sites, observations) if any(info.name not in solved for info in g)]
    for decisions in each(lambda members: decide_group(ask, members, observations), missing):
        solved |= decisions
        if in_place and isinstance(model, nn.Module):
            pack_now(model, weights, decisions.values(), sites.values())
    solved |= decide_tables(
        weights, sites, schemes, ask.why, solved, lambda d, s: quantize_group(weights, d, s, None, [False])
    )
    if not fast_bfloat16():
        kinds = {name: "output" if info.operation == "operand" else info.operation for name, info in sites.items()}
        sites = {name: dataclasses.replace(info, operation=kinds[name]) for name, info in sites.items()}
    solved |= decide_images(weights, sites, recipe, observations, each)
    for name, info in sites.items():
        if info.operation == "operand":
            solved |= operand_decision(info, recipe.scheme_for(name.removesuffix(".output")))
        if name in solved or info.operation not in ("output", "operand"):
            plan.decisions[name] = solved.get(name) or _other(info)
    if any(d.input_type is not None for d in plan) and fast_bfloat16():
        plan.attention = torch.bfloat16
    return plan


def fast_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 natively."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def groups(sites: Mapping[str, SiteInfo], observations: Observations) -> list[list[SiteInfo]]:
    """Sites that are decided together: they read one input, or one weight (a layer called twice, tied layers)."""
    import networkx  # a tenth of a second to import

    together = networkx.Graph()
    for name, info in sites.items():
        if info.operation == "linear":
            together.add_edge(("site", name), ("input", observations.groups.get(name, name)))
            if info.weight:
                together.add_edge(("site", name), ("weight", (info.weight, info.transposed)))
    order = {name: i for i, name in enumerate(sites)}
    groups = []
    for component in networkx.connected_components(together):
        names = sorted((name for kind, name in component if kind == "site"), key=order.__getitem__)
        groups.append([sites[name] for name in names])
    return groups


def _other(info: SiteInfo) -> Decision:
    return Decision(info.name, info.operation, info.weight or "", why=why_not(info.operation))


def _first_readers(sites: Mapping[str, SiteInfo], schemes: Mapping[str, Scheme | None]) -> dict[str, SiteInfo]:
    """Weight -> the first site that is to be quantized and reads it: the others follow its scheme and its axis."""
    first: dict[str, SiteInfo] = {}
    for name, info in sites.items():
        if info.operation == "linear" and info.weight and schemes[name] is not None:
            first.setdefault(info.weight, info)
    return first


def decide_group(ask: Asked, members: list[SiteInfo], observations: Observations) -> dict[str, Decision]:
    """They share the scale of the input and its per-channel factor where they have one scheme; a weight has one."""
    stop_if_asked()
    found: dict[str, Decision] = {}
    by_scheme: dict[Scheme, list[Decision]] = {}
    observed = observations.together(info.name for info in members)
    for info in members:
        decision = describe(ask.weights, info, observations)
        scheme = ask.schemes[info.name]
        leader = ask.first.get(decision.weight, info)
        why = ask.why.get(info.name) or why_weight(ask.weights, decision) or why_float(decision, scheme, observed)
        why = why or why_nested(decision, scheme)
        if not why and leader.transposed != info.transposed:
            why = BOTH_WAYS.format(leader.name)
        if why:
            found[info.name] = decision.as_float(why)
        else:
            by_scheme.setdefault(ask.schemes[leader.name], []).append(decision)
    epilogue = [info.from_epilogue for info in members]
    for scheme, decisions in by_scheme.items():
        if scheme.weight.widths:
            done = nest_group(ask.weights, decisions, scheme, observed, observations.parts)
        else:
            done = quantize_group(ask.weights, decisions, scheme, observed, epilogue)
        found |= {d.site: d for d in done}
    return found


def quantize_group(
    named: Mapping[str, Tensor],
    decisions: list[Decision],
    scheme: Scheme,
    observed: Observed | None,
    epilogue: list[bool],
) -> list[Decision]:
    """Chooses the shared input parameters and rounds each weight once."""
    weights = {d.weight: weight_of(named, d) for d in decisions}
    scheme, groups = suited(scheme, decisions)
    biased = all(d.bias_name for d in decisions)
    solution, note = _solve(list(weights.values()), scheme, observed, epilogue, biased)
    note = "; ".join(filter(None, (groups, note)))
    seen = _seen(solution, scheme, observed)
    rounded = dict(zip(weights, zip(solution.packed, solution.bias, strict=True), strict=True))
    done = []
    for decision in decisions:
        packed, bias = rounded[decision.weight]
        packed = turned(packed) if decision.transposed else packed
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
                seen=seen,
            )
        )
    return done


def _seen(solution: Solution, scheme: Scheme, observed: Observed | None) -> Seen | None:
    """What calibration saw of a static input; how much of it the scale clips is known by sampled rows behind a factor."""
    if solution.scale is None or observed is None or solution.scale.numel() > 1:
        return None
    lo, hi = grid(solution.scale, solution.zero, scheme.activation)
    factor = solution.packed[0].in_mul
    if factor is not None and observed.sample is not None:
        rows = (observed.sample - (0.0 if solution.shift is None else solution.shift)) * factor
        return seen_of(observed.range, float(((rows < lo) | (rows > hi)).double().mean()))
    return seen_of(observed.range, 0.0 if solution.extra is not None else clipped_of(observed.range, lo, hi))


def _solve(
    weights: list[Tensor], scheme: Scheme, observed: Observed | None, epilogue: list[bool], biased: bool = False
) -> tuple[Solution, str]:
    """The solution, and a note where its input's second moments are of no use: then weights are rounded to nearest."""
    free = scheme.dynamic or not any(epilogue)
    try:
        solution = solve(weights, scheme, observed, free=free, splits=all(epilogue), biased=biased)
    except torch.linalg.LinAlgError:
        solution = None
    if solution is not None and solution.finite:
        return solution, solution.note
    assert observed is not None  # without statistics nothing is inverted, and nothing overflows
    bare = dataclasses.replace(observed, moment=None)
    plain = dataclasses.replace(scheme, solver="rtn")
    return solve(weights, plain, bare, free=free, splits=all(epilogue)), EXTREME

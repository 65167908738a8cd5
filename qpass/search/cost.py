"""What a group of sites costs under each candidate: bytes as they are stored, bits of its weights, or milliseconds.

bytes   what the packed weight keeps, scales, zero points and factors too; in float its own dtype. Codes of up to 4 bits are
        stored two a byte, so 2 and 3 bits take as many bytes as 4
bits    bits of each code, and the same scales, zero points and factors: what a denser format would take
ms      each linear at the shape of example_inputs by the cpu backend, timed once on this machine and remembered
        (qpass/profit.py); what is not a linear takes what it takes whatever is chosen (`rest`)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpass import profit
from qpass.backends import backend_named
from qpass.calibrate import Batch, buffers_kept, call_arguments, shown
from qpass.errors import QpassError
from qpass.install import copy_for_packing, install
from qpass.plan import Decision, Plan
from qpass.runtime import attach
from qpass.search.candidates import Prepared
from qpass.search.groups import Group
from qpass.slices import slice_of

Costs = Mapping[tuple[str, str], float]  # (group, candidate)
ONLY_LINEARS = (
    "a budget in milliseconds counts linears of integers on the cpu backend; {} ({}) is none: leave it out by recipe=, or "
    "give a budget in bytes or bits."
)


@dataclass(frozen=True)
class Table:
    """rest: what all else costs; of: (group, candidate) -> cost; unit: what the sum is divided by."""

    rest: float
    of: Costs
    unit: float = 1.0

    def total(self, chosen: Mapping[str, str]) -> float:
        """The cost of a choice by group."""
        return (self.rest + math.fsum(self.of[pair] for pair in chosen.items())) / self.unit


def stored(d: Decision, weight: Tensor) -> float:
    """Bytes of a site's weight."""
    return float(weight.nbytes if d.packed is None else d.packed.nbytes)


def bits(d: Decision, weight: Tensor) -> float:
    """Bits of a site's weight, of its codes and all that stands beside them."""
    if d.packed is None or d.weight_type is None:
        return 8.0 * weight.nbytes
    beside = d.packed.nbytes - d.packed.stored.nbytes
    return d.weight_type.bits * math.prod(d.packed.shape) + 8.0 * beside


def sizes(prepared: Prepared, groups: Sequence[Group], measure: Callable[[Decision, Tensor], float]) -> dict:
    """(group, candidate) -> bytes or bits, each weight once."""
    found = {}
    for group in groups:
        for name in group.takes:
            decided = prepared.decisions(name)
            weights = {decided[site].weight: decided[site] for site in group.sites}
            found[group.name, name] = sum(measure(d, prepared.weights[path]) for path, d in weights.items())
    return found


def bytes_table(prepared: Prepared, groups: Sequence[Group]) -> Table:
    """Bytes of all parameters, those that are not chosen for as the caller's recipe has them."""
    own = {id(t): t.nbytes for t in prepared.weights.values()}
    for name, rows in prepared.weights.items():
        path, alone = slice_of(name)
        if alone is not None:
            own[id(prepared.weights[path])] -= rows.nbytes
    decided = next(iter(prepared.plans.values())).decisions
    chosen = {id(prepared.weights[decided[site].weight]) for group in groups for site in group.sites}
    for d in decided.values():
        if d.site in prepared.fixed and d.packed is not None:
            own[id(prepared.weights[d.weight])] = d.packed.nbytes
    rest = sum(size for key, size in own.items() if key not in chosen)
    return Table(float(rest), sizes(prepared, groups, stored))


def bits_table(prepared: Prepared, groups: Sequence[Group]) -> Table:
    """Bits a weight, of the weights that are chosen for."""
    decided = next(iter(prepared.plans.values())).decisions
    paths = {decided[site].weight for group in groups for site in group.sites}
    return Table(0.0, sizes(prepared, groups, bits), float(sum(prepared.weights[path].numel() for path in paths)))


def time_table(model: nn.Module, prepared: Prepared, groups: Sequence[Group], example: Batch) -> Table:
    """Milliseconds of a call. rest: of a model compiled with the quickest candidates, without what is chosen for."""
    if any(p.device.type != "cpu" for p in model.parameters()):
        raise QpassError("a budget in milliseconds is measured on a CPU alone; move the model there, or give bytes.")
    backend = backend_named("cpu", torch.device("cpu"))
    found: dict[tuple[str, str], float] = {}
    for group in shown(groups, "timing", lambda g: g.name):
        for name in group.takes:
            decided = prepared.decisions(name)
            found[group.name, name] = sum(_milliseconds(decided[site], prepared, backend) for site in group.sites)
    quickest = {g.name: min(g.takes, key=lambda name, g=g: found[g.name, name]) for g in groups}
    plan = mixed(prepared, groups, quickest)
    whole = milliseconds(model, plan, example)
    rest = whole - sum(found[pair] for pair in quickest.items())
    return Table(max(rest, 0.0), found)


def _milliseconds(d: Decision, prepared: Prepared, backend: object) -> float:
    types = [t for name in prepared.plans for t in _types(prepared.plans[name].decisions[d.site])]
    if d.operation != "linear" or not d.rows or any(t.is_float for t in types):
        raise QpassError(ONLY_LINEARS.format(d.site, d.operation))
    if not d.quantized:
        other = next((t for p in prepared.plans.values() if (t := p.decisions[d.site]).quantized), None)
        return 0.0 if other is None else profit.timing(other, backend).float_us / 1e3
    return profit.timing(d, backend).integer_us / 1e3


def _types(d: Decision) -> list:
    return [t for t in (d.weight_type, d.input_type) if t is not None]


def mixed(prepared: Prepared, groups: Sequence[Group], chosen: Mapping[str, str]) -> Plan:
    """A plan of decisions that are each their own candidate's."""
    first = next(iter(prepared.plans.values()))
    plan = Plan(first.scheme, dict(first.decisions), first.parameters, first.attention)
    for group in groups:
        for site in group.sites:
            plan.decisions[site] = prepared.decisions(chosen[group.name])[site]
    return plan


def milliseconds(model: nn.Module, plan: Plan, example: Batch) -> float:
    """Of a call of the model, compiled by a plan on the cpu backend."""
    backend = backend_named("cpu", torch.device("cpu"))
    target = copy_for_packing(model, plan.packed)
    args, kwargs = call_arguments(example, "example_inputs")
    with buffers_kept(model), torch.no_grad():
        install(target, plan.packed, plan.biases)
        attach(target, plan, backend, "default")
        return profit.whole_model_us(lambda: target(*args, **kwargs)) / 1e3

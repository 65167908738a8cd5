"""What a search has to spend: the tables of its costs, and the budget in their units."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qpass.errors import QpassError
from qpass.schemes import Scheme
from qpass.search import cost as costs
from qpass.search.budget import Budget
from qpass.search.candidates import FLOAT, prepare
from qpass.search.explored import Search
from qpass.search.kept import Kept
from qpass.search.program import cheapest


def tables_of(known: Search, budget: Budget) -> tuple[dict[str, costs.Table], Budget]:
    """The tables of bytes, bits and, where it is asked for, milliseconds; and the budget, a scheme in it made bits."""
    found = {
        "bytes": costs.bytes_table(known.prepared, known.groups),
        "bits": costs.bits_table(known.prepared, known.groups),
    }
    if budget.kind == "ms":
        assert known.example is not None
        found["ms"] = costs.time_table(known.model, known.prepared, known.groups, known.example)
    if budget.like is not None:
        budget = dataclasses.replace(budget, limit=_bits_of(known, budget.like, found["bits"]))
    return found, budget


def _bits_of(known: Search, scheme: Scheme, table: costs.Table) -> float:
    """Bits a weight of a scheme everywhere; rounding to nearest takes as many as any other."""
    name = str(scheme)
    if name in known.prepared.plans and all(name in g.takes for g in known.groups):
        return table.total({g.name: name for g in known.groups})
    plain = dataclasses.replace(
        scheme, solver="auto" if scheme.weight is not None and scheme.weight.is_float else "rtn"
    )
    free = prepare(
        known.model, {str(plain): plain}, known.example, known.calibration if plain.needs_calibration else None,
        known.rules, bool(known.prepared.special & {s for g in known.groups for s in g.sites}), Kept(None, "", ""),
    )  # fmt: skip
    decided = {**known.prepared.decisions(FLOAT), **free.plans[str(plain)].decisions}
    paths = {decided[site].weight: decided[site] for g in known.groups for site in g.sites}
    return sum(costs.bits(d, known.prepared.weights[path]) for path, d in paths.items()) / table.unit


def check_feasible(known: Search, tables: Mapping[str, costs.Table], budget: Budget) -> None:
    """Raises QpassError, with the least that there is, for a budget that cannot be met."""
    table = tables[budget.kind]
    low = cheapest(known.groups, known.loss, table.of)
    least = table.total(low)
    if least > budget.limit * (1 + 1e-9):
        inside = f", {table.rest / table.unit:.4g} of it for what is not chosen for" if table.rest else ""
        raise QpassError(
            f"budget: {budget.text(budget.limit)} cannot be met; with candidates {', '.join(known.prepared.schemes)} the "
            f"least is {budget.text(least)}{inside}. Give more, or add candidates of fewer bits"
            + ("" if budget.kind == "ms" else ", or tables=True")
            + "."
        )

"""What qpass.search does, step by step.

candidates.py   what each site becomes under each candidate           groups.py   which sites must agree
measured.py, estimate.py   what each group loses under each           cost.py     and what it costs
program.py      the least loss within the budget                      front.py    and within others
then the plan of that recipe, calibrated as it asks for, and its loss
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from qpass.calibrate import Batch
from qpass.errors import QpassError
from qpass.interrupts import heard
from qpass.planning import RecipeLike
from qpass.search import cost as costs
from qpass.search.budget import Budget, parse
from qpass.search.explored import Search, Values, explored
from qpass.search.front import front
from qpass.search.kept import digest_of
from qpass.search.limits import check_feasible, tables_of
from qpass.search.program import greedy, solve, total
from qpass.search.result import Found, compared, spearman


@heard()
def find(
    model: nn.Module, budget: str | int, metric: Any, candidates: Any, example_inputs: Batch | None,
    calibration: Iterable[Batch] | None, validation: Iterable[Batch] | None, recipe: RecipeLike, tables: bool,
    estimate: str, rounds: int, checkpoint: str | os.PathLike[str] | None, seed: int,
) -> Found:  # fmt: skip
    """The Found; arguments are those of qpass.search."""
    limit = parse(budget)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise QpassError(f"rounds={rounds!r}; expected a whole number, 1 or more.")
    known = explored(
        model, metric, candidates, example_inputs, calibration, validation, recipe, tables, estimate, checkpoint, seed
    )
    table, limit = tables_of(known, limit)
    check_feasible(known, table, limit)
    return _chosen(known, table, limit, rounds)


def _chosen(known: Search, tables: dict[str, costs.Table], budget: Budget, rounds: int) -> Found:
    table, parts = tables[budget.kind], known.groups
    limit = budget.limit * table.unit - table.rest
    chosen = solve(parts, known.loss, table.of, limit)
    assert chosen is not None
    chosen, notes = refined(known, chosen, table, limit, rounds)
    predicted = {name: known.base + total(values, chosen) for name, values in known.losses.items()}
    other = greedy(parts, known.loss, table.of, limit)
    recipe, plan = known.plan(chosen, _resumed(known, chosen))
    loss = known.true_loss(plan)
    fronts = {kind: front(parts, known.loss, each, known.base) for kind, each in tables.items()}
    found = Found(
        recipe, plan, chosen, loss, known.measurement.chosen, predicted, rank_of(known.losses), budget, table.total(chosen),
        {kind: each.total(chosen) for kind, each in tables.items()}, fronts, known.losses, tables, parts,
        None if other is None else known.base + total(known.loss, other),
        costs.milliseconds(known.model, plan, known.example) if budget.kind == "ms" else None, [*known.notes, *notes],
    )  # fmt: skip
    plan.front = found.data()
    return found


def _resumed(known: Search, chosen: Mapping[str, str]) -> Path | None:
    """Where the calibration of a recipe keeps what it has finished, if it is in order and the search keeps anything."""
    picked = [known.prepared.schemes[name] for name in chosen.values()]
    folder = known.measurement.kept.folder
    if folder is None or known.calibration is None or not any(s is not None and s.in_order for s in picked):
        return None
    return folder / f"recipe-{digest_of(chosen)}"


def refined(
    known: Search, chosen: dict[str, str], table: costs.Table, limit: float, rounds: int
) -> tuple[dict[str, str], list[str]]:
    """The choice after measuring around it: each round solves with what moves from there on add to its loss.

    A round that does not lower the loss of the whole is the last, and is left out.
    """
    notes: list[str] = []
    for number in range(2, rounds + 1):
        around, own = known.measurement.losses(chosen)
        moved = solve(known.groups, around, table.of, limit)
        if moved is None or moved == chosen:
            notes.append(f"round {number}: nothing moved")
            break
        changes, loss = sum(moved[g] != chosen[g] for g in moved), known.measurement.of_choice(moved)
        if loss >= own:
            notes.append(f"round {number}: {changes} groups would move, which is no better")
            break
        notes.append(f"round {number}: {changes} of {len(moved)} groups moved, {own:.4g} became {loss:.4g}")
        chosen = moved
    return chosen, notes


def rank_of(losses: Mapping[str, Values]) -> float | None:
    if len(losses) < 2:
        return None
    keys = compared(*losses.values())
    first, second = ([values[key] for key in keys] for values in losses.values())
    return spearman(first, second)

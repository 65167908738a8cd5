"""What qpass.search does, step by step.

candidates.py   what each site becomes under each candidate           groups.py   which sites must agree
measured.py, estimate.py   what each group loses under each           cost.py     and what it costs
program.py      the least loss within the budget                      front.py    and within others
then the plan of that recipe, calibrated as it asks for, and its loss
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qpass import checks
from qpass.calibrate import Batch
from qpass.errors import QpassError, nearest
from qpass.inspect.branches import Products
from qpass.interrupts import heard
from qpass.plan import Plan
from qpass.planning import RecipeLike, analyze
from qpass.schemes import Recipe, Scheme
from qpass.search import cost as costs
from qpass.search.budget import Budget, parse
from qpass.search.candidates import FLOAT, Prepared, parsed, prepare
from qpass.search.estimate import KINDS, second_order
from qpass.search.front import front
from qpass.search.groups import Group, groups
from qpass.search.kept import Kept, digest_of, made_of
from qpass.search.measured import Measurement
from qpass.search.metric import checked
from qpass.search.program import cheapest, check_scipy, greedy, solve, total
from qpass.search.result import Found, compared, recipe_of, spearman

MEASURED, SECOND_ORDER = "measured", "second order"
ESTIMATES = (MEASURED, SECOND_ORDER)
Values = Mapping[tuple[str, str], float]


@dataclass
class Search:
    """All that is known of a model before something is chosen."""

    model: nn.Module
    prepared: Prepared
    groups: list[Group]
    losses: dict[str, Values]
    measurement: Measurement
    base: float
    example: Batch | None
    calibration: Sequence[Batch] | None
    rules: Recipe
    notes: list[str]

    @property
    def loss(self) -> Values:
        """The losses that are chosen by."""
        return next(iter(self.losses.values()))

    def plan(self, chosen: Mapping[str, str], checkpoint: Any = None) -> tuple[Recipe, Plan]:
        """The recipe of a choice, and its plan, calibrated as the recipe asks for."""
        recipe = recipe_of(self.prepared, self.groups, chosen, self.rules)
        return recipe, analyze(self.model, None, self.example, self.calibration, recipe, checkpoint)

    def true_loss(self, plan: Plan) -> float:
        """The loss of a plan, simulated."""
        products = Products(plan)
        return self.measurement.loss(dict.fromkeys(products.decisions, products))


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
    table, limit = _costs(known, limit)
    _check_feasible(known, table, limit)
    return _chosen(known, table, limit, rounds)


def explored(
    model: nn.Module, metric: Any, candidates: Any, example_inputs: Batch | None, calibration: Iterable[Batch] | None,
    validation: Iterable[Batch] | None, recipe: RecipeLike, tables: bool, estimate: str,
    checkpoint: str | os.PathLike[str] | None, seed: int,
) -> Search:  # fmt: skip
    """Everything up to the choice: plans, groups, losses."""
    check_scipy()
    if estimate not in ESTIMATES:
        near = nearest(estimate, ESTIMATES) if isinstance(estimate, str) else ""
        raise QpassError(f"estimate={estimate!r} is none of {', '.join(ESTIMATES)}.{near}")
    checks.check_model(model)
    schemes = parsed(candidates)
    checks.check_calibration([s for s in schemes.values() if s is not None], calibration)
    data = _listed(calibration, "calibration")
    batches = _listed(validation, "validation") or data or ([example_inputs] if example_inputs is not None else [])
    if not batches:
        raise QpassError(
            "search measures losses on batches; pass calibration=[batch, ...], validation= or example_inputs=."
        )
    example = example_inputs if example_inputs is not None else batches[0]
    metric, value = checked(metric, model, batches[0])
    kept = Kept(None, "", "")
    if checkpoint is not None:
        plans = made_of(model, [example, data], str(Recipe.parse(recipe)), tables)
        kept = Kept(checkpoint, plans, made_of(None, batches, list(schemes), _name(metric)))
    prepared = prepare(model, schemes, example, data, recipe, tables, kept)
    parts = groups(prepared)
    measurement = Measurement(model, prepared, parts, batches, metric, value, kept)
    losses: dict[str, Values] = {}
    base = 0.0
    if estimate == MEASURED:
        losses[MEASURED], base = measurement.losses()
    notes: list[str] = []
    try:
        if estimate == SECOND_ORDER or metric in KINDS:
            losses[SECOND_ORDER] = second_order(model, prepared, parts, batches, metric, seed)
    except QpassError as error:
        if estimate == SECOND_ORDER:
            raise
        notes.append(f"there is no second order to compare with: {error}")
    return Search(model, prepared, parts, losses, measurement, base, example, data, Recipe.parse(recipe), notes)


def _listed(batches: Any, what: str) -> list[Batch] | None:
    if batches is None:
        return None
    if isinstance(batches, Tensor | Mapping | str | tuple) or not isinstance(batches, Iterable):
        raise QpassError(
            f"{what} is a {type(batches).__name__}; expected an iterable of batches, such as [batch, ...]."
        )
    found = list(batches)
    if not found:
        raise QpassError(f"{what} gave no batches (empty, or an iterator used up); pass a list or a fresh iterator.")
    return found


def _name(metric: Any) -> str:
    return metric if isinstance(metric, str) else f"{metric.__module__}.{getattr(metric, '__qualname__', '')}"


def _costs(known: Search, budget: Budget) -> tuple[dict[str, costs.Table], Budget]:
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


def _check_feasible(known: Search, tables: Mapping[str, costs.Table], budget: Budget) -> None:
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
        recipe, plan, chosen, loss, known.measurement.chosen, predicted, _rank(known.losses), budget, table.total(chosen),
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


def _rank(losses: Mapping[str, Values]) -> float | None:
    if len(losses) < 2:
        return None
    keys = compared(*losses.values())
    first, second = ([values[key] for key in keys] for values in losses.values())
    return spearman(first, second)

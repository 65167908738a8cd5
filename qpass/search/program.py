"""The choice itself: one candidate a group, the least loss within a budget, as an integer program.

    minimise    sum_g,c  loss[g, c] x[g, c]
    such that   sum_c x[g, c] = 1  for each group g,     sum_g,c cost[g, c] x[g, c] <= budget,     x in {0, 1}

(HAWQ-V3, 2011.10680, section 3.4.) Solved by scipy's milp (HiGHS) until the best is proven. `greedy` is there to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import numpy

from qpass.errors import QpassError
from qpass.search.groups import Group

Values = Mapping[tuple[str, str], float]  # (group, candidate) -> loss, or cost
SLACK = 1e-9  # of the budget: sums of floats
MISSING = "the search solves an integer program with scipy, which is not installed; pip install 'qpass-torch[search]'."


def check_scipy() -> None:
    """Said before anything is measured."""
    if find_spec("scipy") is None:
        raise QpassError(MISSING)


def cheapest(groups: Sequence[Group], loss: Values, cost: Values) -> dict[str, str]:
    """The least that groups can cost; of equals the one of less loss."""
    return {g.name: min(g.takes, key=lambda c, g=g: (cost[g.name, c], loss[g.name, c])) for g in groups}


def best(groups: Sequence[Group], loss: Values, cost: Values) -> dict[str, str]:
    """The least loss that groups can have; of equals the one of less cost."""
    return {g.name: min(g.takes, key=lambda c, g=g: (loss[g.name, c], cost[g.name, c])) for g in groups}


def solve(groups: Sequence[Group], loss: Values, cost: Values, limit: float) -> dict[str, str] | None:
    """Group -> candidate of least total loss whose total cost is within the limit; None where there is none."""
    low = cheapest(groups, loss, cost)
    if total(cost, low) > limit * (1 + SLACK):
        return None
    free = best(groups, loss, cost)
    if total(cost, free) <= limit:
        return free
    held = limit
    for _ in range(20):  # the solver keeps a constraint to 1e-7 of the scale it works at
        found = _program(groups, loss, cost, held)
        if found is None:
            break
        if total(cost, found) <= limit * (1 + SLACK):
            return found
        held -= total(cost, found) - limit
    return low


def _program(groups: Sequence[Group], loss: Values, cost: Values, limit: float) -> dict[str, str] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    pairs = [(g.name, c) for g in groups for c in g.takes]
    rows = numpy.repeat(numpy.arange(len(groups)), [len(g.takes) for g in groups])
    one = csr_array((numpy.ones(len(pairs)), (rows, numpy.arange(len(pairs)))), shape=(len(groups), len(pairs)))
    losses = numpy.array([loss[pair] for pair in pairs])
    costs = numpy.array([cost[pair] for pair in pairs])
    least = numpy.array([min(loss[g.name, c] for c in g.takes) for g in groups])[rows]
    gains = losses - least  # what a choice loses beyond the best of its group
    scale = numpy.median(gains[gains > 0]) if (gains > 0).any() else 1.0
    found = milp(
        gains / scale,
        integrality=numpy.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one, 1, 1), LinearConstraint(costs[None] / limit, -numpy.inf, 1)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        return None
    values = dict(zip(pairs, found.x, strict=True))
    return {g.name: max(g.takes, key=lambda c, g=g: values[g.name, c]) for g in groups}


def greedy(groups: Sequence[Group], loss: Values, cost: Values, limit: float) -> dict[str, str] | None:
    """From the best on, always the step that loses least for what it saves, until the budget holds; None where none does."""
    chosen = best(groups, loss, cost)
    while total(cost, chosen) > limit * (1 + SLACK):
        steps = [
            ((loss[g.name, c] - loss[g.name, chosen[g.name]]) / saved, g.name, c)
            for g in groups
            for c in g.takes
            if (saved := cost[g.name, chosen[g.name]] - cost[g.name, c]) > 0
        ]
        if not steps:
            return None
        _, name, candidate = min(steps)
        chosen[name] = candidate
    return chosen


def total(values: Values, chosen: Mapping[str, str]) -> float:
    """The sum over groups."""
    return float(sum(values[pair] for pair in chosen.items()))

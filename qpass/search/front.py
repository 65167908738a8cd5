"""The front: the least loss at each of a row of budgets, and its picture.

A point that another one beats in both, cost and predicted loss, is not on it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qpass.search.cost import Table
from qpass.search.groups import Group
from qpass.search.program import Values, best, cheapest, solve

POINTS = 16


@dataclass(frozen=True)
class Point:
    """cost: in the unit of its front; loss: as predicted; chosen: candidate of each group."""

    cost: float
    loss: float
    chosen: dict[str, str]


def front(groups: Sequence[Group], loss: Values, table: Table, base: float, points: int = POINTS) -> list[Point]:
    """The points between the least cost and the least loss, cheapest first. base: the loss that is there anyway."""
    low, high = cheapest(groups, loss, table.of), best(groups, loss, table.of)
    ends = [table.total(low), table.total(high)]
    found = [low]
    for i in range(1, points - 1):
        limit = ends[0] + (ends[1] - ends[0]) * i / (points - 1)
        chosen = solve(groups, loss, table.of, limit * table.unit - table.rest)
        found += [chosen] if chosen is not None else []
    every = [point(chosen, loss, table, base) for chosen in [*found, high]]
    return undominated(every)


def point(chosen: dict[str, str], loss: Values, table: Table, base: float) -> Point:
    """What a choice costs, and what it is predicted to lose."""
    return Point(table.total(chosen), base + math.fsum(loss[pair] for pair in chosen.items()), chosen)


def undominated(points: Sequence[Point]) -> list[Point]:
    """The points that no other is at least as good as in both, cheapest first."""
    kept: list[Point] = []
    for each in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not kept or each.loss < kept[-1].loss:
            kept.append(each)
    return kept


def as_data(points: Sequence[Point], kind: str, metric: str, here: dict[str, float | None]) -> dict[str, Any]:
    """A front as plain values, as a plan keeps it for its report. here: what was chosen: cost, predicted and loss."""
    rows = [{"cost": p.cost, "loss": p.loss} for p in points]
    return {"unit": kind, "metric": metric, "points": rows, "chosen": here}


WIDTH, HEIGHT, LEFT, BOTTOM = 480, 300, 70, 40


def svg(data: dict[str, Any]) -> str:
    """The picture of a front: cost to the right, the logarithm of the loss upwards; a ring where it was chosen."""
    from html import escape

    points, here = data["points"], data["chosen"]
    xs = [p["cost"] for p in points] + [here["cost"]]
    ys = [p["loss"] for p in points] + [v for v in (here["predicted"], here["loss"]) if v is not None]
    positive = [y for y in ys if y > 0]
    floor = min(positive, default=1.0)

    def log(value: float) -> float:
        return math.log10(max(value, floor))

    x = _scale(min(xs), max(xs), LEFT, WIDTH - 20)
    y = _scale(min(map(log, ys)), max(map(log, ys)), HEIGHT - BOTTOM, 20)
    line = " ".join(f"{x(p['cost']):.1f},{y(log(p['loss'])):.1f}" for p in points)
    dots = "".join(f'<circle cx="{x(p["cost"]):.1f}" cy="{y(log(p["loss"])):.1f}" r="3"/>' for p in points)
    ring = here["loss"] if here["loss"] is not None else here["predicted"]
    chosen = f'<circle cx="{x(here["cost"]):.1f}" cy="{y(log(ring)):.1f}" r="7" fill="none" stroke="#c33"/>'
    ends = "".join(
        f'<text x="{x(v):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="{a}">{v:.4g}</text>'
        for v, a in ((min(xs), "start"), (max(xs), "end"))
    )
    ends += "".join(
        f'<text x="{LEFT - 6}" y="{y(log(v)) + 4:.1f}" text-anchor="end">{v:.2g}</text>'
        for v in {floor, max(ys)}
        if v > 0
    )
    title = f"{data['metric']} over {data['unit']}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">'
        f"<title>{escape(title)}</title>"
        f'<path d="M{LEFT} 20V{HEIGHT - BOTTOM}H{WIDTH - 20}" fill="none" stroke="#888"/>'
        f'<polyline points="{line}" fill="none" stroke="#36c"/><g fill="#36c">{dots}</g>{chosen}{ends}'
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 4}" text-anchor="middle">{escape(title)}, log of the loss</text>'
        "</svg>\n"
    )


def _scale(low: float, high: float, start: float, end: float):
    width = high - low or 1.0
    return lambda value: start + (end - start) * (value - low) / width

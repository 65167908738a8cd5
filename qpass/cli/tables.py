"""What the commands print as tables."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qpass.cli.show import table
from qpass.passes import ORDER
from qpass.passes.fuse import EPILOGUE, LINEAR
from qpass.plan import Plan, rows
from qpass.runtime import Record

RULES = (*LINEAR, *EPILOGUE)


def passes(record: Record | None = None) -> None:
    """The passes in order; with a record also what each did to that graph."""
    done = {step.name: step for step in record.steps} if record else {}
    heads = ("pass", "needs", "leaves", *(("edits", "ms") if done else ()), "what it does")
    lines = []
    for each in ORDER:
        step = done.get(each.name)
        figures = (str(step.edits), f"{step.seconds * 1e3:.0f}") if step else ()
        lines.append((each.name, each.needs, each.leaves, *figures, _first_line(sys.modules[each.run.__module__])))
    table(heads, lines, right=(3, 4) if done else ())


def rules(records: Iterable[Record] = ()) -> None:
    """The rewrite rules; with records also how often each applied and its nearest miss."""
    records = tuple(records)
    hits = Counter(name for record in records for name, _ in record.hits)
    nearest = {miss.rule: str(miss) for record in records for miss in sorted(record.misses, key=lambda m: m.depth)}
    heads = ("rule", *(("hits",) if records else ()), "what it does", *(("nearest miss",) if records else ()))
    lines = []
    for rule in RULES:
        figures = (str(hits[rule.name]),) if records else ()
        miss = (nearest.get(rule.name, ""),) if records else ()
        lines.append((rule.name, *figures, _first_line(rule), *miss))
    table(heads, lines, right=(1,) if records else ())


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def plan(plan: Plan) -> None:
    """Every site of a plan, then its summary."""
    heads, *lines = rows(plan)
    table(heads, lines)
    print(plan.summary())


def times(milliseconds: Mapping[str, float], results: Mapping[str, Any]) -> None:
    """Median times, their ratio to the first, and how far each result is from the first's."""
    first = next(iter(milliseconds))
    base, wanted = milliseconds[first], floats(results[first])
    lines = [
        (name, f"{ms:.3f}", f"{ms / base:.2f}", f"{_distance(floats(results[name]), wanted):.1e}")
        for name, ms in milliseconds.items()
    ]
    table(("variant", "ms (median)", f"of {first}", "relative error"), lines, right=(1, 2, 3))


def floats(value: Any) -> list[Tensor]:
    """The float tensors of a model's result."""
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def _distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(found, wanted, strict=True))
    power = sum(float(b.double().square().sum()) for b in wanted)
    return (noise / max(power, 1e-300)) ** 0.5

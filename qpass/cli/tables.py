"""What the commands print as tables."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qpass.cli.show import console, table
from qpass.inspect import tables as of_sites
from qpass.inspect.document import sites as sites_of
from qpass.inspect.report import Report
from qpass.passes import ORDER
from qpass.passes.fuse import EPILOGUE, LINEAR
from qpass.plan import Plan, rows
from qpass.served import Record

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


def worst(report: Report, count: int) -> None:
    """The sites with the largest error."""
    table(of_sites.HEADS, of_sites.rows(report, count), right=tuple(range(3, len(of_sites.HEADS))))


def tree(report: Report) -> None:
    """The modules that hold sites, each with the bytes of its weights and the worst SQNR within."""
    from rich.text import Text
    from rich.tree import Tree

    sites = [site for site in sites_of(report, weights=False) if site["operation"] not in ("output", "operand")]
    root = Tree(Text(f"{report.model or 'model'}  {_figures(sites)}"))
    branches = {"": root}

    def branch(path: str) -> Tree:
        if path not in branches:
            inside = [s for s in sites if s["module"] == path or s["module"].startswith(path + ".")]
            above, _, name = path.rpartition(".")
            branches[path] = branch(above).add(Text(f"{name}  {_figures(inside)}"))
        return branches[path]

    for site in sites:
        kind = f"{site['weight_type']} x {site['input_type'] or 'float'}" if site["quantized"] else "float"
        branch(site["module"]).add(Text(f"{site['site'].rpartition(':')[2]}  {kind}"))
    console(root)


def _figures(sites: list[dict[str, Any]]) -> str:
    before, after = (sum(s[key] or 0 for s in sites) for key in ("bytes_float", "bytes"))
    found = [s["sqnr"] for s in sites if s["sqnr"] is not None]
    losses = [s["loss_alone"] for s in sites if s["loss_alone"] is not None]
    parts = [f"{before:,} > {after:,} bytes"] if before else []
    parts += [f"SQNR {min(found):.1f} dB"] if found else []
    parts += [f"loss alone {max(losses):.3g}"] if losses else []
    return ", ".join(parts)


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

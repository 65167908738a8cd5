"""Report: what qpass knows of a compiled model, as text and as data."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qpass.errors import QpassError, nearest
from qpass.graph_text import diff
from qpass.inspect.errors import Measured
from qpass.inspect.explain import explain
from qpass.inspect.figures import SiteError
from qpass.plan import Plan, matches
from qpass.runtime import Record


@dataclass(frozen=True)
class Report:
    """plan: what was decided. records: the graphs captured so far, each with the text that every pass left.
    measured: against the float model, where there was one.
    """

    plan: Plan
    records: tuple[Record, ...]
    backend: str
    measured: Measured = field(default_factory=Measured)

    @property
    def errors(self) -> Mapping[str, SiteError]:
        """The error of each site by its name, where they were measured."""
        return self.measured.errors

    def __str__(self) -> str:
        """Coverage, reasons, and one line a graph."""
        lines = [self.plan.summary()]
        for d in self.plan:
            if d.quantized and d.note:
                lines.append(f"  note: {d.site}: {d.note}")
        for record in self.records:
            edits = ", ".join(f"{step.name} {step.edits}" for step in record.steps[1:])
            lines.append(
                f"  {record.name} on {self.backend}: {len(record.sites)} sites, {record.seconds:.1f} s ({edits})"
            )
            lines += [f"    kept as reference: {site}: {why}" for site, why in record.kept]
            lines += [f"    codes of fewer bits read as bytes: {site}" for site in record.widened]
        return "\n".join(lines)

    def passes(self) -> tuple[str, ...]:
        """Names of the steps whose graph can be shown."""
        return tuple(step.name for step in self.record(0).steps)

    def graph(self, after: str = "lower", index: int = 0) -> str:
        """Text of graph number `index` after a pass, or at the end of a level (float, annotated, qdq, fused, lowered)."""
        steps = self.record(index).steps
        found = [step for step in steps if after in (step.name, step.level)]
        if not found:
            known = [*(step.name for step in steps), *dict.fromkeys(step.level for step in steps)]
            raise QpassError(
                f"{after!r} is no pass or level; expected one of {', '.join(known)}.{nearest(after, known)}"
            )
        return found[-1].text

    def diff(self, before: str, after: str, index: int = 0) -> str:
        """What changed between two passes or levels."""
        return diff(self.graph(before, index), self.graph(after, index))

    def explain(self, site: str) -> str:
        """A site, or each that a glob or module path names, in full (see qpass/inspect/explain.py)."""
        chosen = [self.plan[site]] if site in self.plan.decisions else [d for d in self.plan if matches(d.site, site)]
        if not chosen:
            chosen = [self.plan[site]]  # raises, with the nearest name
        return "\n\n".join(explain(d, self.records, self.errors.get(d.site)) for d in chosen)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as JSON; also written to `path` where one is given."""
        text = json.dumps(self._data(), indent=1)
        if path is not None:
            Path(path).write_text(text)
        return text

    def _data(self) -> dict[str, Any]:
        parameters, macs = self.plan.coverage()
        sites = [
            {
                "site": d.site,
                "shape": list(d.shape),
                "weight": str(d.weight_type) if d.quantized else "float",
                "input": str(d.input_type) if d.input_type else "float",
                "range": [d.lo, d.hi],
                "why_float": d.why,
                "note": d.note,
                "sqnr": _finite(self.errors[d.site].sqnr) if d.site in self.errors else None,
            }
            for d in self.plan
        ]
        graphs = [
            {
                "name": r.name,
                "seconds": r.seconds,
                "passes": [{"name": s.name, "level": s.level, "edits": s.edits} for s in r.steps],
            }
            for r in self.records
        ]
        coverage = {"parameters": parameters, "multiply_adds": macs}
        return {
            "scheme": str(self.plan.scheme),
            "backend": self.backend,
            "coverage": coverage,
            "sites": sites,
            "graphs": graphs,
        }

    def record(self, index: int = 0) -> Record:
        """Graph number `index`: its steps, sites, hits and misses."""
        if not self.records:
            raise QpassError("no graph was captured yet; call the model once, or compile it with example_inputs.")
        if not -len(self.records) <= index < len(self.records):
            raise QpassError(f"there is no graph {index}; {len(self.records)} were captured.")
        return self.records[index]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""Report: what qpass knows of a compiled model, as text and as data."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpass.errors import QpassError, nearest
from qpass.graph_text import diff
from qpass.plan import Plan
from qpass.runtime import Record


@dataclass(frozen=True)
class Report:
    """plan: what was decided. records: the graphs captured so far, each with the text that every pass left."""

    plan: Plan
    records: tuple[Record, ...]
    backend: str

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
        return "\n".join(lines)

    def passes(self) -> tuple[str, ...]:
        """Names of the steps whose graph can be shown."""
        return tuple(step.name for step in self._record(0).steps)

    def graph(self, after: str = "lower", index: int = 0) -> str:
        """Text of graph number `index` after a pass, or at the end of a level (float, annotated, qdq, fused, lowered)."""
        steps = self._record(index).steps
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
        """One site: its decision, its types and scales, its lines in the lowered graph, and why rules missed there."""
        d = self.plan[site]
        lines = [f"{d.site}: {d.operation} {'x'.join(map(str, d.shape))}".rstrip()]
        if not d.quantized:
            return "\n".join([*lines, f"  stays float: {d.why}"])
        lines.append(
            f"  weight {d.weight} as {d.weight_type}: {d.packed.nbytes} bytes, {4 * d.packed.data.numel()} in float32"
        )
        lines.append(f"  input as {d.input_type or 'float'}, seen {_span(d.lo, d.hi)}, shared with group {d.group}")
        if d.input_scale is not None:
            lines.append(f"  input scale {float(d.input_scale):.6g}, zero point {int(d.input_zero)}")
        if d.packed.in_mul is not None:
            lines.append(
                f"  input channels scaled by {float(d.packed.in_mul.min()):.3g} .. {float(d.packed.in_mul.max()):.3g}"
            )
        if d.input_extra is not None:
            lines.append(f"  {int(d.input_extra.sum())} copies of far channels added to its input")
        lines += [f"  note: {d.note}"] if d.note else []
        for record in self.records:
            lines += [f"  {record.name}: {line.strip()}" for line in record.steps[-1].text.splitlines() if site in line]
            lines += [f"  {record.name}: {line}" for line in record.misses if site.replace(":", "_") in line]
        return "\n".join(lines)

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

    def _record(self, index: int) -> Record:
        if not self.records:
            raise QpassError("no graph was captured yet; call the model once, or compile it with example_inputs.")
        if not -len(self.records) <= index < len(self.records):
            raise QpassError(f"there is no graph {index}; {len(self.records)} were captured.")
        return self.records[index]


def _span(lo: float | None, hi: float | None) -> str:
    return "never" if lo is None or hi is None else f"{lo:.4g} .. {hi:.4g}"

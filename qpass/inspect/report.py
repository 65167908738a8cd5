"""Report: what qpass knows of a compiled model, as text and as data."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import Any

from qpass.errors import QpassError, nearest
from qpass.graph_text import diff
from qpass.inspect import drawn, tables
from qpass.inspect.document import document, sites
from qpass.inspect.explain import explain
from qpass.inspect.known import Known
from qpass.inspect.written import written
from qpass.plan import matches
from qpass.served import Record

WORST = 5
Path = str | os.PathLike[str]


class Report(Known):
    """What a user asks: text, graphs, differences, single sites, files."""

    def __str__(self) -> str:
        """Coverage, reasons, and one line a graph."""
        lines = [self.plan.summary(), *_widths(self)]
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
        lines += [f"  note: {note}" for note in (*self.measured.notes, *self.times.notes)]
        if self.times.whole is not None:
            lines.append("  {float:.3g} ms in float, {quantized:.3g} ms quantized".format(**self.times.whole))
        if self.measured.loss is not None:
            batches = f"{self.measured.batches} batch{'es' * (self.measured.batches != 1)}"
            lines.append(f"  {self.measured.metric} of the output, all sites: {self.measured.loss:.4g} on {batches}")
        if self.errors:
            lines += ["  the worst sites:", *(f"    {line}" for line in tables.text(self, WORST))]
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
        return "\n\n".join(
            explain(d, self.records, self.errors.get(d.site), self.times.sites.get(d.site)) for d in chosen
        )

    def document(self) -> dict[str, Any]:
        """The report as plain JSON values; the schema is qpass/inspect/schema.json."""
        return document(self)

    def to_json(self, path: Path | None = None) -> str:
        """The document as JSON; also written to `path` where one is given."""
        text = json.dumps(self.document(), indent=1, allow_nan=False)
        if path is not None:
            written(path, text)
        return text

    def to_csv(self, path: Path | None = None) -> str:
        """The sites as CSV, one a row; also written to `path` where one is given."""
        text = tables.comma_separated(sites(self, weights=False))
        if path is not None:
            written(path, text)
        return text

    def to_html(self, path: Path, depth: int | None = None) -> None:
        """Writes one page that opens offline. depth: modules so many names deep are one node each."""
        from qpass.inspect.page import write

        write(document(self, limited=False), path, depth)

    def to_dot(self, level: str = "lowered", depth: int | None = None, index: int = 0) -> str:
        """The graph at a level for Graphviz. depth: modules so many names deep are one node each."""
        return drawn.dot(drawn.at_level(self.record(index), level, depth))

    def to_graphml(self, path: Path, level: str = "lowered", depth: int | None = None, index: int = 0) -> None:
        """Writes the graph at a level as GraphML, with what is known of each node."""
        written(path, drawn.graphml(drawn.at_level(self.record(index), level, depth)))

    def _repr_html_(self) -> str:
        """What a notebook shows: a table, the worst sites first."""
        return tables.notebook(self)

    def record(self, index: int = 0) -> Record:
        """Graph number `index`: its steps, sites, hits and misses."""
        if not self.records:
            raise QpassError("no graph was captured yet; call the model once, or compile it with example_inputs.")
        if not -len(self.records) <= index < len(self.records):
            raise QpassError(f"there is no graph {index}; {len(self.records)} were captured.")
        return self.records[index]


def _widths(report: Known) -> list[str]:
    """What is read of nested weights now, a line where there are any."""
    counts = sorted(Counter(report.bits.values()).items(), reverse=True)
    of = sorted({d.weight_type.widths for d in report.plan.nested if d.weight_type is not None}, reverse=True)
    read = ", ".join(f"{count} weights at {bits} bits" for bits, count in counts)
    held = " or ".join(", ".join(map(str, widths)) for widths in of)
    return [f"  read now: {read} (of {held})"] if counts else []

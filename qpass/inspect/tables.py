"""The sites of a report as rows: CSV for spreadsheets, a small table for notebooks, and the worst ones as text."""

from __future__ import annotations

import io
from typing import Any

from qpass.inspect.figures import SiteError
from qpass.inspect.known import Known

COLUMNS = (
    "site", "operation", "quantized", "weight_type", "input_type", "shape", "parameters", "multiply_adds", "bytes_float",
    "bytes", "range_lo", "range_hi", "scale", "zero_point", "group", "clipped", "sqnr", "cosine", "worst", "loss_alone",
    "loss_without", "milliseconds", "roofline", "source", "why_float", "note", "rules", "missed", "kept",
)  # fmt: skip
SHOWN = 20
HEADS = ("site", "weight", "input", "SQNR dB", "cosine", "clipped", "loss alone", "loss without")


def worst(errors: Any, count: int | None = None) -> list[SiteError]:
    """Errors of sites, the worst first: by the loss that each causes alone, where that is known, else by SQNR."""
    ordered = sorted(errors, key=lambda e: (-(e.loss_alone if e.loss_alone is not None else 0.0), e.sqnr))
    return ordered if count is None else ordered[:count]


def rows(report: Known, count: int | None = None) -> list[tuple[str, ...]]:
    """Rows under HEADS, the worst sites first; empty where nothing was measured."""
    found = []
    for e in worst(report.errors.values(), count):
        d = report.plan[e.site]
        clipped = "" if e.clipped is None else f"{e.clipped:.2%}"
        losses = ("" if loss is None else f"{loss:.3g}" for loss in (e.loss_alone, e.loss_without))
        types = (str(d.weight_type), str(d.input_type or "float"))
        found.append((e.site, *types, f"{e.sqnr:.1f}", f"{e.cosine:.5f}", clipped, *losses))
    return found


def text(report: Known, count: int) -> list[str]:
    """The worst sites as lines."""
    lines = [HEADS, *rows(report, count)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def comma_separated(sites: list[dict[str, Any]]) -> str:
    """CSV of a document's sites: one a row, numbers in full, lists joined by "; "."""
    import csv

    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for site in sites:
        lo, hi = site["range"] or (None, None)
        source = site["source"]
        flat = {
            "shape": "x".join(map(str, site["shape"])),
            "range_lo": lo,
            "range_hi": hi,
            "source": f"{source['file']}:{source['line']}" if source else None,
            "rules": "; ".join(site["rules"]),
            "missed": "; ".join(f"{miss['rule']}: {miss['why']}" for miss in site["missed"]),
            "kept": "; ".join(site["kept"]),
        }
        writer.writerow({name: _cell(flat[name] if name in flat else site[name]) for name in COLUMNS})
    return out.getvalue()


def _cell(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula gets a quote in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


def notebook(report: Known) -> str:
    """HTML: the summary's first line, and the worst sites, or all where nothing was measured."""
    from html import escape as e

    heads, lines = HEADS, rows(report, SHOWN)
    if not lines:
        heads = ("site", "weight", "input", "")
        lines = [
            (d.site, str(d.weight_type or "float"), str(d.input_type or "float"), d.why or d.note) for d in report.plan
        ][:SHOWN]
    more = max(len(report.errors or report.plan) - SHOWN, 0)
    return "".join(
        (
            f"<p>{e(report.model)} {e(report.plan.summary().splitlines()[0])}</p><table><thead><tr>",
            *(f"<th>{e(head)}</th>" for head in heads),
            "</tr></thead><tbody>",
            *("<tr>" + "".join(f"<td>{e(cell)}</td>" for cell in line) + "</tr>" for line in lines),
            "</tbody></table>",
            f"<p>and {more} more sites</p>" if more else "",
        )
    )

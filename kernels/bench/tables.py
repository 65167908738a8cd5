"""Rows of a run as files: CSV, Markdown and, where matplotlib is installed, plots; and what the run was made on."""

from __future__ import annotations

import csv
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path

import torch
import triton

from bench.peers import PACKAGES
from qpass_kernels.timing import Times

DRY = "dry run, not a measurement"


@dataclass
class Row:
    """One case by one kernel. us: microseconds a call, low and high its 10th and 90th of 100; share: of the bound, 0 to 1;
    ratio: times as fast as bfloat16 in the same run; verdict: met, missed, wrong, failed: reason, or nothing was asked.
    """

    case: str
    m: int
    scheme: str
    by: str
    us: float | None = None
    low: float | None = None
    high: float | None = None
    share: float | None = None
    bound: str = ""
    ratio: float | None = None
    goal: str = ""
    verdict: str = ""
    error: float | None = None
    allowed: float | None = None
    note: str = ""


def filled(row: Row, found: Times, plain: float | None, goal: float | None) -> None:
    """Fills in times, the ratio to `plain` microseconds, and the verdict: errors stand in the row already."""
    row.us, row.low, row.high = found.median, found.low, found.high
    row.ratio = plain / found.median if plain else None
    row.verdict = verdict(row, goal)


def verdict(row: Row, goal: float | None) -> str:
    """What became of a row: wrong, or where a ratio is asked of it met, missed or failed; what it says already stays."""
    if row.verdict:
        return row.verdict
    if row.error is not None and not row.error <= row.allowed:
        return "wrong"
    if goal is None:
        return ""
    if row.ratio is None or row.error is None:
        return "failed: nothing to compare with"
    return "met" if row.ratio >= goal else "missed"


def end(rows: Sequence[Row], why: str) -> None:
    """Says of rows that were not reached why."""
    for row in rows:
        if row.us is None and not row.verdict:
            row.verdict = why


def machine(device: torch.device) -> dict[str, str]:
    """Card, driver and versions."""
    found = {"card": "none", "driver": "none"}
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device)
        found["card"] = f"{held.name}, {held.multi_processor_count} processors, {held.total_memory >> 30} GiB"
        found["driver"] = _driver()
    found |= {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": triton.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"python": platform.python_version()}


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    asked = [tool, "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit", "--format=csv,noheader"]
    try:
        return "; ".join(subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout.split("\n")).strip(
            "; "
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def write(folder: Path, name: str, rows: Sequence[Row], about: dict[str, str], dry: bool) -> list[Path]:
    """Writes name.csv, name.md and name.png; returns those written."""
    folder.mkdir(parents=True, exist_ok=True)
    table, text = folder / f"{name}.csv", folder / f"{name}.md"
    with table.open("w", newline="", encoding="utf-8") as file:
        columns = [f.name for f in fields(Row)]
        writer = csv.DictWriter(file, [*columns, "measured"])
        writer.writeheader()
        for row in rows:
            writer.writerow(asdict(row) | {"measured": DRY if dry else "yes"})
    text.write_text(markdown(name, rows, about, dry), encoding="utf-8")
    picture = folder / f"{name}.png"
    return [table, text, *([picture] if plot(picture, rows, dry) else [])]


def markdown(name: str, rows: Sequence[Row], about: dict[str, str], dry: bool) -> str:
    """The table of a run, with what was asked."""
    lines = [f"# {name}" + (f" ({DRY})" if dry else ""), "", *(f"- {key}: {value}" for key, value in about.items()), ""]
    asked = [row for row in rows if row.goal]
    met = sum(row.verdict == "met" for row in asked)
    lines += ["Nothing was timed: the times are made up." if dry else f"{met} of {len(asked)} goals met.", ""]
    lines += [
        "| case | M | scheme | by | µs | 10 to 90 % | of the bound | times bf16 | goal | verdict | error | note |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in rows:
        spread = "" if row.low is None else f"{row.low:.2f} to {row.high:.2f}"
        share = "" if row.share is None else f"{100 * row.share:.0f} % of {row.bound}"
        numbers = [_number(row.us, ".2f"), spread, share, _number(row.ratio, ".2f")]
        error = "" if row.error is None else f"{row.error:.1e} ({row.allowed:.1e})"
        cells = [row.case, str(row.m), row.scheme, row.by, *numbers, row.goal, row.verdict, error, row.note]
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def plot(path: Path, rows: Sequence[Row], dry: bool) -> bool:
    """A bar for each kernel and case, in times bfloat16; False, and what to install, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: they need matplotlib (pip install matplotlib)")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row.ratio is not None]
    cases = list(dict.fromkeys((row.case, row.m) for row in shown))
    if not cases:
        return False
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(9, 3.2 * len(cases)), squeeze=False)
    for axis, case in zip(axes[:, 0], cases, strict=True):
        bars = [row for row in shown if (row.case, row.m) == case]
        axis.barh([f"{row.scheme}: {row.by}" for row in bars], [row.ratio for row in bars])
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(f"{case[0]}, {case[1]} rows: times bfloat16" + (f" ({DRY})" if dry else ""))
        axis.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True

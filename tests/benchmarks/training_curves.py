"""Curves of a training as a plot, where matplotlib is installed: loss, step sizes, share of oscillating weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SHOWN = ("loss", "weight step", "input step", "oscillating")


def plot(curves: dict[str, dict[str, list[dict[str, float]]]], path: Path) -> bool:
    """One row of plots a task, one line a run; False, and what to install, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: they need matplotlib (pip install matplotlib)")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(curves), len(SHOWN), figsize=(4 * len(SHOWN), 3 * len(curves)), squeeze=False)
    for row, (task, runs) in zip(axes, curves.items(), strict=True):
        for axis, what in zip(row, SHOWN, strict=True):
            for number, (name, curve) in enumerate(runs.items()):
                _line(axis, name, curve, what, f"C{number}")
            axis.set_title(f"{task}: {what}", fontsize=8)
            axis.set_xlabel("step", fontsize=7)
        row[0].legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _line(axis: Any, name: str, curve: list[dict[str, float]], what: str, color: str) -> None:
    points = [(at["step"], at[what]) for at in curve if what in at]
    if points:
        axis.plot(*zip(*points, strict=True), label=name, linewidth=0.8, color=color)

"""Rows of whole models: each call a CUDA graph, compared with a plain model that was measured first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.tables import Row, filled
from qpass_kernels import timing
from qpass_kernels.timing import Times


def measured(
    make: Callable[[], Any],
    rows: Sequence[Row],
    run: Callable[[Any, Row], tuple[Times, float | None]],
    plain: dict[tuple[str, int], float],
    is_plain: bool,
    goals: Callable[[Row], float | None],
    device: torch.device,
) -> None:
    """Fills in and prints the rows of one model. What fails says why; a lost CUDA context raises timing.Lost.

    run(model, row): the times of a call, and its error against row.allowed, None where there is nothing to compare with.
    plain: microseconds of the plain model by case and size, which this model adds to where it is the plain one.
    """
    model, broken = None, ""
    try:
        with torch.no_grad():
            model = make()
    except Exception as error:
        broken = timing.reason(error)
        timing.alive(device)
    for row in rows:
        try:
            if broken:
                row.verdict = f"failed: {broken}"
                continue
            with torch.no_grad():
                found, row.error = run(model, row)
            if is_plain:
                plain[row.case, row.m] = found.median
            filled(row, found, plain.get((row.case, row.m)), goals(row))
        except Exception as error:
            row.verdict = f"failed: {timing.reason(error)}"
            timing.alive(device)
        finally:
            print(
                f"{row.scheme:22} {row.case:14} {row.m:5} {row.us or 0:10.1f} us {row.ratio or 0:6.2f} x  {row.verdict}",
                flush=True,
            )


def relative(found: Tensor, wanted: Tensor) -> float:
    """The error of logits as a part of their size."""
    return float((found.float() - wanted).norm() / wanted.norm())

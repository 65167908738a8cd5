"""Search: the recipe that meets a budget at the least loss, found by what each site costs and loses under each scheme."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from qpass.calibrate import Batch
    from qpass.planning import RecipeLike
    from qpass.schemes import Scheme
    from qpass.search.metric import Function
    from qpass.search.result import Found

CANDIDATES = ("w4a16", "w8a8", None)


def search(
    model: nn.Module,
    budget: str | int,
    metric: str | Function | None = None,
    candidates: Sequence[str | Scheme | None] = CANDIDATES,
    example_inputs: Batch | None = None,
    calibration: Iterable[Batch] | None = None,
    *,
    validation: Iterable[Batch] | None = None,
    recipe: RecipeLike = None,
    tables: bool = False,
    estimate: str = "measured",
    rounds: int = 1,
    checkpoint: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Found:
    """The recipe of least loss within a budget: pass `recipe=found.recipe` or `plan=found.plan` to `qpass.compile`.

    budget: `"3.5 MB"` or a number of bytes, of all the model's parameters as they are stored; `"4.5 bits"` a weight that may
    be quantized, scales counted; `"12 ms"` a call with example_inputs on this machine's CPU; or a scheme, `"w4a16"`: no more
    bits than that scheme takes everywhere. candidates: schemes, and None for float. metric: as in `qpass.inspect`, `auto`,
    `kl`, `squared error` or a function of (output, float output); or a function of the model alone: the loss is then how
    much more it is than of the float model. Less is better. calibration: what static inputs and solvers need; validation:
    the batches that losses are measured on (default: those of the calibration, else example_inputs). recipe: globs to
    schemes or None for sites that are not searched. tables: whether embedding tables and output layers are searched too.

    estimate: `measured` (the loss of each group of sites alone, under each candidate) or `second order` (from gradients,
    qpass/search/estimate.py: quicker, for `kl` and `squared error`). rounds: 2 and more measure once more around the recipe
    found, which takes in how sites act together. checkpoint: a directory that takes what is measured, from which the same
    call goes on. seed: of the labels that `second order` draws.

    Raises QpassError for a budget that cannot be met, which says the smallest that can; for a metric that fails, is not
    finite, or says two things of one model; for candidates that no site can take. The model is not changed.
    """
    from qpass.search.find import find  # this package is loaded with qpass, what it needs is not

    return find(
        model, budget, metric, candidates, example_inputs, calibration, validation, recipe, tables, estimate, rounds,
        checkpoint, seed,
    )  # fmt: skip

"""Batch norms of a model in training: frozen on schedule, and their statistics estimated anew at the end.

A batch norm's running statistics are what the compiled model is folded with. Weights that move between codes spoil them
(Nagel et al. 2022, 2203.11086, section 3.3), so they are estimated again with the weights as they are at the end (section
4.1 there), or the norms are frozen for the last part of the training (Krishnamoorthi 2018, 1806.08342, section 3.2.2). The
weight that is fake-quantized is the convolution's own, one step a channel; the norm's factor goes into those steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qpass.calibrate import Batch, call_arguments, evaluating
from qpass.errors import QpassError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def freeze_norms(model: nn.Module) -> int:
    """Puts every batch norm into eval mode and holds its affine parameters; returns their number.

    `model.train()` would undo the first: call it before, once an epoch.
    """
    norms = _norms(model)
    for norm in norms:
        norm.eval()
        for parameter in norm.parameters():
            parameter.requires_grad_(False)
    return len(norms)


def reestimate_norms(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Sets running statistics to the mean over the batches, each a call as in calibration; returns the number of batches.

    Weights, steps and every module's mode stay; dropout is off meanwhile.
    """
    norms = [norm for norm in _norms(model) if norm.running_mean is not None]
    if not norms:
        raise QpassError(
            f"{type(model).__name__} has no batch norm with running statistics; there is nothing to estimate."
        )
    before: list[tuple[nn.Module, Any]] = [(norm, norm.momentum) for norm in norms]
    kept = [(n.running_mean.clone(), n.running_var.clone(), n.num_batches_tracked.clone()) for n in norms]
    try:
        with evaluating(model), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # the mean of all batches
                norm.train()
            count = 0
            for count, batch in enumerate(batches, 1):
                args, kwargs = call_arguments(batch, f"batch {count - 1}")
                model(*args, **kwargs)
        if not count:
            raise QpassError("reestimate_norms got no batches (empty, or an iterator used up); pass a list.")
    except BaseException:
        for norm, (mean, var, tracked) in zip(norms, kept, strict=True):
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(var)
            norm.num_batches_tracked.copy_(tracked)
        raise
    finally:
        for norm, momentum in before:
            norm.momentum = momentum
    return count


def _norms(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, NORMS)]

"""Sizes of channels that factors are chosen from: none is zero."""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST = 1e-4  # smallest to largest channel: below, a channel counts as this large


def usual(sizes: Tensor) -> Tensor:
    """Sizes [C] without zeros: a dead channel gets the geometric mean of the others, a tiny one WIDEST of the largest."""
    sizes = sizes.double()
    alive = sizes > 0
    if not alive.any():
        return torch.ones_like(sizes)
    held = sizes.clamp(min=float(sizes.max()) * WIDEST)
    return torch.where(alive, held, held[alive].log().mean().exp())

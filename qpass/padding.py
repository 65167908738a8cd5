"""Which rows of a batch are padding: what a call's `attention_mask` says. Nothing is learned from them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

NAME = "attention_mask"


def mask_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Bool [B, L], True where a token is no padding, of a call; None where it has no such mask, or nothing is padded.

    An encoder's mask says nothing of the rows of its decoder, so a model that has both has none.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    mask = kwargs.get(NAME)
    if mask is None and args:
        try:
            mask = inspect.signature(model.forward).bind_partial(*args).arguments.get(NAME)
        except TypeError:
            return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.is_floating_point() or mask.is_complex():
        return None
    kept = mask.detach().cpu().to(torch.bool)
    return kept if bool(kept.any()) and not bool(kept.all()) else None


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of x [B, L, K] that are no padding, [rows, K]; another x as it is."""
    if mask is None or x.dim() != 3 or x.shape[:2] != mask.shape:
        return x
    return x[mask.to(x.device)]

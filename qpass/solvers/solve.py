"""From the weights that read one input and what was seen of it, to integers and scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass import affine
from qpass.packing import Packed
from qpass.observations import Observed
from qpass.range_choice import choose_range
from qpass.schemes import Scheme
from qpass.solvers.rtn import round_to_nearest
from qpass.solvers.smooth import choose_factor, factor


@dataclass(frozen=True)
class Solution:
    """packed: one per weight; scale, zero: of the shared static input, None where there is none."""

    packed: tuple[Packed, ...]
    scale: Tensor | None = None
    zero: Tensor | None = None


def solve(weights: list[Tensor], scheme: Scheme, observed: Observed | None, scale_inputs: bool) -> Solution:
    """weights: float [N_i, K], all reading the input that `observed` describes."""
    v = _factor(weights, scheme, observed) if scale_inputs else None
    packed = tuple(round_to_nearest(w, scheme.weight, v) for w in weights)
    if not scheme.needs_calibration:
        return Solution(packed)
    lo, hi = _limits(scheme, observed, v)
    params = affine.choose_qparams(lo, hi, scheme.activation)
    return Solution(packed, params.scale, params.zero)


def _factor(weights: list[Tensor], scheme: Scheme, observed: Observed | None) -> Tensor | None:
    if scheme.smooth is None or scheme.activation is None or observed is None or not observed.rows:
        return None
    channels = observed.range.channels
    stacked = torch.cat([w.float() for w in weights])
    if scheme.smooth == "auto":
        second = (observed.moment.diagonal() / observed.rows).float()
        v = choose_factor(
            channels.lo, channels.hi, second, stacked, scheme.activation.levels, scheme.weight.levels
        )
    else:
        v = factor(channels.lo, channels.hi, stacked, scheme.smooth)
    return v


def _limits(scheme: Scheme, observed: Observed, v: Tensor | None) -> tuple[Tensor, Tensor]:
    if v is None:
        return choose_range(observed.range, scheme.activation, scheme.range_method)
    channels = observed.range.channels
    return (channels.lo * v).min(), (channels.hi * v).max()

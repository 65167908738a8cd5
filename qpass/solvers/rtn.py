"""Round to nearest: each weight to the closest code, with the steps of its channel or group (steps.py, gain.py).

q = clamp(round(w / s) + z, qmin, qmax)      (Jacob et al. 2018, 1712.05877)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from qpass import affine
from qpass.packing import Packed, pack
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.solvers.gain import with_gain
from qpass.solvers.steps import best_qparams

AT_ONCE = 1 << 20  # weights that are rounded together
Method = Callable[[Tensor, Tensor | None, QType], tuple[Tensor, QParams]]


def round_to_nearest(weight: Tensor, qtype: QType, in_mul: Tensor | None = None) -> Packed:
    """weight: [N, K] (axis 0 or groups) or [K, N] (axis 1) float; in_mul: float [K] divides the weight's input channels."""
    return round_with(nearest, weight, qtype, in_mul)


def round_with(method: Method, weight: Tensor, qtype: QType, in_mul: Tensor | None = None) -> Packed:
    """A weight [N, K] or [K, N] rounded by a solver that looks at weights alone, its gain kept.

    Outputs do not look at each other, so some are rounded at a time: what is in float32 is a few megabytes.
    """
    alone = qtype.granularity in ("channel", "group")
    axis = qtype.axis or 0
    outputs = max(1, AT_ONCE // max(1, weight.numel() // max(1, weight.shape[axis]))) if alone else weight.shape[axis]
    found = [_rounded(method, part, qtype, in_mul) for part in weight.detach().split(max(1, outputs), axis)]
    data = torch.cat([data for data, _ in found], axis)
    scale = torch.cat([params.scale for _, params in found]) if alone else found[0][1].scale
    zeros = [params.zero for _, params in found if params.zero is not None]
    zero = (torch.cat(zeros) if alone else zeros[0]) if zeros else None
    return pack(data, scale, qtype, in_mul, zero)


def _rounded(method: Method, weight: Tensor, qtype: QType, in_mul: Tensor | None) -> tuple[Tensor, QParams]:
    real = weight.float()
    if in_mul is not None:
        real = real / (in_mul if qtype.axis != 1 else in_mul[:, None])
    data, params = method(real, None, qtype)
    return data, with_gain(real, data, params)


def nearest(weight: Tensor, moments: Tensor | None, qtype: QType) -> tuple[Tensor, QParams]:
    """(codes, parameters) of a weight; moments: not looked at."""
    del moments
    params = best_qparams(weight, qtype)
    return affine.quantize(weight, params.scale, params.zero, qtype), params


def with_axis(qtype: QType, axis: int) -> QType:
    """The type with its channels on another axis."""
    return dataclasses.replace(qtype, axis=axis) if qtype.granularity == "channel" else qtype

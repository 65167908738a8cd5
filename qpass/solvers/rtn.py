"""Round to nearest: each weight to the closest code, with the steps of its channel or group (steps.py, gain.py).

q = clamp(round(w / s) + z, qmin, qmax)      (Jacob et al. 2018, 1712.05877)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import Tensor

from qpass import affine
from qpass.packing import Packed, pack
from qpass.qtype import QParams, QType
from qpass.solvers.gain import with_gain
from qpass.solvers.steps import best_qparams

Method = Callable[[Tensor, Tensor | None, QType], tuple[Tensor, QParams]]


def round_to_nearest(weight: Tensor, qtype: QType, in_mul: Tensor | None = None) -> Packed:
    """weight: [N, K] (axis 0 or groups) or [K, N] (axis 1) float; in_mul: float [K] divides the weight's input channels."""
    real = weight.detach().float()
    if in_mul is not None:
        real = real / (in_mul if qtype.axis != 1 else in_mul[:, None])
    return round_with(nearest, real, qtype, in_mul)


def round_with(method: Method, weight: Tensor, qtype: QType, in_mul: Tensor | None = None) -> Packed:
    """A weight [N, K] or [K, N] rounded by a solver that looks at weights alone, its gain kept."""
    real = weight.detach().float()
    data, params = method(real, None, qtype)
    params = with_gain(real, data, params)
    return pack(data, params.scale, qtype, in_mul, params.zero)


def nearest(weight: Tensor, moments: Tensor | None, qtype: QType) -> tuple[Tensor, QParams]:
    """(codes, parameters) of a weight; moments: not looked at."""
    del moments
    params = best_qparams(weight, qtype)
    return affine.quantize(weight, params.scale, params.zero, qtype), params


def with_axis(qtype: QType, axis: int) -> QType:
    """The type with its channels on another axis."""
    return dataclasses.replace(qtype, axis=axis) if qtype.granularity == "channel" else qtype

"""Round to nearest: each weight to the closest code, with the steps of its channel or group (steps.py, gain.py)."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qpass import affine
from qpass.packing import Packed
from qpass.qtype import QType
from qpass.solvers.gain import with_gain
from qpass.solvers.steps import best_qparams


def round_to_nearest(weight: Tensor, qtype: QType, in_mul: Tensor | None = None) -> Packed:
    """weight: [N, K] (axis 0 or groups) or [K, N] (axis 1) float; in_mul: float [K] divides the weight's input channels."""
    real = weight.detach().float()
    if in_mul is not None:
        real = real / (in_mul if qtype.axis != 1 else in_mul[:, None])
    params = best_qparams(real, qtype)
    data = affine.quantize(real, params.scale, params.zero, qtype)
    params = with_gain(real, data, params)
    return Packed(data, params.scale, qtype, in_mul, params.zero)


def with_axis(qtype: QType, axis: int) -> QType:
    """The type with its channels on another axis."""
    return dataclasses.replace(qtype, axis=axis) if qtype.granularity == "channel" else qtype

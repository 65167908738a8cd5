"""Round to nearest: each weight to the closest code, the scale from the largest of its channel or group."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from qpass import affine
from qpass.packing import Packed
from qpass.qtype import QType


def round_to_nearest(weight: Tensor, qtype: QType, in_mul: Tensor | None = None) -> Packed:
    """weight: [N, K] (axis 0) or [K, N] (axis 1) float; in_mul: float [K] divides the weight's input channels."""
    real = weight.detach().float()
    if in_mul is not None:
        real = real / (in_mul if qtype.axis != 1 else in_mul[:, None])
    params = affine.choose_qparams(*affine.limits(real, qtype), qtype)
    data = affine.quantize(real, params.scale, params.zero, qtype)
    return Packed(data, params.scale, qtype, in_mul)


def with_axis(qtype: QType, axis: int) -> QType:
    """The type with its channels on another axis."""
    return dataclasses.replace(qtype, axis=axis) if qtype.granularity == "channel" else qtype

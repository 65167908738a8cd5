"""What rounding an input does to the columns of a convolution's patches: e = Q(x) - x.

8 bits          noise of variance s^2 / 12 that goes with nothing, of mean 0
fewer           mean(e), var(x + e) - var(x) and cov(e, x + e), measured on sampled rows, one figure for each input channel

The noise of the first line is a bad model of 4 bits: the zeros of a ReLU have no error at all, clipped values have one
against x, and a code in the middle of the values that it stands for has an error that goes with x but not with Q(x). Weights
that suit the wrong noise are too small, in every layer, and the layers' losses multiply.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass import affine
from qpass.observations import Observed
from qpass.qparams import QParams
from qpass.solvers.smooth import WHOLE


@dataclass(frozen=True)
class InputError:
    """Of each column, float64 [K]. shift: mean(e); added: var(x + e) - var(x), 0 or more; pulled: cov(e, x + e)."""

    shift: Tensor
    added: Tensor
    pulled: Tensor


def input_error(observed: Observed, params: QParams, factor: Tensor | None, taps: int) -> InputError:
    """The error of the input [rows, K] that `observed` describes, times its factor [K], when `params` round it.

    taps: columns of one channel, which lie together.
    """
    assert observed.sample is not None
    width = observed.sample.shape[1]
    if params.type.bits >= WHOLE:
        noise = torch.full((width,), float(params.scale.double().square().mean() / 12), dtype=torch.float64)
        return InputError(torch.zeros(width, dtype=torch.float64), noise, noise)
    x = (observed.sample if factor is None else observed.sample * factor).double()
    q = affine.fake_quantize(x, params)
    e, real, rounded = ((v - v.mean(0)) for v in (q - x, x, q))
    found = ((q - x).mean(0), rounded.square().mean(0) - real.square().mean(0), (e * rounded).mean(0))
    shift, added, pulled = (v.reshape(-1, taps).mean(1).repeat_interleave(taps) for v in found)
    return InputError(shift, added.clamp(min=0), pulled)

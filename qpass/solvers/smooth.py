"""Shift and factor per input channel, moved from an input to the weights that read it.

    x'_j = (x_j - c_j) * v_j      W'_nj = W_nj / v_j      b' = b + W c      v_j = max_n|W_nj|^(1-a) / max|x_j - c_j|^a

SmoothQuant (2211.10438, eq. 4) with a shift (as in Outlier Suppression+, 2304.09145). `a` is not a constant of the
method: it is chosen per group as the one whose output error, measured on sampled rows with both roundings, is least.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpass import affine
from qpass.observations import Observed
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.schemes import Scheme
from qpass.solvers.channel_sizes import usual
from qpass.solvers.steps import least_error

STATIC_STRENGTHS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DYNAMIC_STRENGTHS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
WHOLE = 8  # bits whose steps are small enough to make room for all that was seen
INPUT_PARTS = torch.linspace(1.0, 0.1, 31)  # of the limits of an input of fewer bits: candidates for what is kept
SMALLEST = 1e-5  # of the largest channel: below it a channel is dead


ROOM = 0.2  # of its reach that a channel with a heavy tail gets more
REACH, ENOUGH = (
    4.0,
    1024,
)  # standard deviations that few rows are taken to reach; rows from which on limits are believed


def channel_limits(observed: Observed) -> tuple[Tensor, Tensor]:
    """(lo, hi), float32 [K]: what each channel has to make room for. Calibration has seen only so much of it.

    1. A normal value is clipped at 4 standard deviations where the errors of rounding to 8 bits and of clipping are least in
       sum. Few rows do not get that far (45 rows: 2.2), so limits are widened to it, by ENOUGH / rows where rows are more.
    2. Of n normal values the largest is near sqrt(2 ln n) standard deviations. A channel that went further has a heavy tail,
       which another text may stretch, also to the other side: by two deviations and more, that side gets the reach of the
       longer one, and both get ROOM.

    Only the channel's own step pays for its room, since its factor is its own.
    """
    channels, mean = observed.range.channels, observed.mean
    up, down = channels.hi.double() - mean, mean - channels.lo.double()
    rows = max(observed.rows, 4)
    moves = channels.hi > channels.lo  # of one that does not, the variance is rounding
    spread = torch.where(moves, observed.covariance.diagonal().clamp(min=0).sqrt(), 0)
    beyond = torch.maximum(up, down) - math.sqrt(2 * math.log(rows)) * spread
    tail = (beyond / (2 * spread).clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
    missing, room = min(1.0, ENOUGH / rows), 1 + ROOM * tail
    sides = [a + missing * (REACH * spread - a).clamp(min=0) for a in (up, down)]
    hi, lo = mean + torch.maximum(sides[0], tail * down) * room, mean - torch.maximum(sides[1], tail * up) * room
    return lo.float(), hi.float()


def shift(observed: Observed, dynamic: bool) -> Tensor:
    """C [K]: the middle of each channel where scales are static, its mean where a row gets its own."""
    if dynamic:
        return observed.mean.float()
    lo, hi = channel_limits(observed)
    return (lo + hi) / 2


def factor(reach: Tensor, weight: Tensor, strength: float) -> Tensor:
    """V [K] for channels that reach `reach` [K] and the weights [N, K] that read them; its mean log is 0.

    Of a channel that never moved nothing is known: it is taken to reach as far as others do (their geometric mean), since a
    factor that makes it large would clip whatever comes to it later.
    """
    size = weight.abs().amax(0).double()
    size = size.clamp(min=max(float(size.max()) * SMALLEST, torch.finfo(torch.float32).tiny))
    moves = reach.double() > float(reach.max()) * SMALLEST
    log = (1 - strength) * size.log() - strength * usual(torch.where(moves, reach.double(), 0)).log()
    return (log - log.mean()).exp().float()


def choose_factor(observed: Observed, weight: Tensor, scheme: Scheme, c: Tensor) -> Tensor:
    """The factor with the least output error on the sampled rows; `smooth=0.5` in a scheme fixes the strength."""
    channels = observed.range.channels
    lo, hi = (channels.lo, channels.hi) if scheme.dynamic else channel_limits(observed)
    reach = torch.maximum(hi - c, c - lo)
    if isinstance(scheme.smooth, float):
        return factor(reach, weight, scheme.smooth)
    strengths = DYNAMIC_STRENGTHS if scheme.dynamic else STATIC_STRENGTHS
    candidates = [factor(reach, weight, strength) for strength in strengths]
    rows = observed.sample
    target = rows @ weight.t()

    def error(v: Tensor) -> float:
        wanted = ((rows - c) * v, weight / v)
        x = fake_input(wanted[0], scheme, None if scheme.dynamic else static_params(observed, c, v, scheme.activation))
        y = x @ affine.fake_quantize(wanted[1], row_steps(wanted[1], scheme.weight)).t()
        return float((y - target).var(0, correction=0).sum())

    return min(candidates, key=error)


def static_limits(observed: Observed, c: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest (x - c) * v to make room for."""
    lo, hi = channel_limits(observed)
    return ((lo - c) * v).min(), ((hi - c) * v).max()


def static_params(observed: Observed, c: Tensor, v: Tensor, qtype: QType) -> QParams:
    """Scale and zero point of (x - c) * v; of fewer than 8 bits, those with the least squared error on the sampled rows."""
    lo, hi = static_limits(observed, c, v)
    if qtype.bits >= WHOLE:
        return affine.choose_qparams(lo, hi, qtype)
    return least_error((observed.sample - c) * v, lo, hi, qtype, INPUT_PARTS)


def fake_input(x: Tensor, scheme: Scheme, params: QParams | None) -> Tensor:
    """X as the scheme's input type holds it: scales from its own rows where params is None."""
    if params is None:
        scale, zero = affine.choose_dynamic(x, scheme.activation)
        params = QParams(scale, zero, scheme.activation)
    return affine.fake_quantize(x, params)


def row_steps(weight: Tensor, qtype: QType) -> QParams:
    """Scales and zero points of a weight from its largest values."""
    return affine.choose_qparams(*affine.limits(weight, qtype), qtype)

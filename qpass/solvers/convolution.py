"""From a convolution's weight and what was seen of its patches, to integers, scales and a corrected bias.

As solve.py does for a linear, on the patches [rows, C * taps] that the weight multiplies (patches.py):

1. the factor of each input channel is divided out of the weight (equalize.py);
2. weights that suit a rounded input (Wiener filter):  W* = W (1 - P (C + A)^-1),  A what rounding adds to the variances of
   the patches, P the covariance of its error and what is read (input_error.py);
3. rounding by GPTQ, with few bits also by descent on codes and steps (descent.py), group by group, on C + A. C: the
   covariance; second moments where no bias takes up the mean. Where neither was kept, or the solver is rtn, each output
   channel gets the step of least squared error, and rounding is to nearest;
4. the bias that leaves the mean of every output where it was:  b* = b + W mean(x) - W_q mean(Q(x)).
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from qpass import affine
from qpass.geometry import Geometry
from qpass.observations import Observed
from qpass.packing import Packed, pack, spread
from qpass.patches import as_matrix
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.schemes import Scheme
from qpass.solvers.descent import best_codes
from qpass.solvers.input_error import InputError, input_error
from qpass.solvers.methods import with_noise
from qpass.solvers.solve import denoised
from qpass.solvers.steps import FEW, PARTS, least_error

TO_NEAREST = ("rtn", "hqq", "smoothquant")  # every other solver is GPTQ with descent here


def channel_type(qtype: QType, axis: int) -> QType:
    """The weight type of a convolution: a scale for each output channel, whatever the groups a linear would have."""
    return QType(qtype.bits, True, granularity="channel", axis=axis)


def solve_convolution(
    weight: Tensor,
    g: Geometry,
    scheme: Scheme,
    observed: Observed | None,
    params: QParams | None,
    factor: Tensor | None,
) -> tuple[Packed, Tensor | None]:
    """weight: [N, C / groups, *kernel], or transposed. params: what rounds the input; factor: [C] of the input, in_mul.

    Returns the packed weight, shaped like the weight, and what to add to the bias [N] (None where no statistics are).
    """
    qtype = channel_type(scheme.weight, 1 if g.transposed else 0)
    real = weight.detach().float()
    if factor is not None:
        real = real / spread(factor, real, g.transposed)
    taps = 1 if g.transposed else math.prod(g.kernel)
    by_column = None if factor is None else factor.repeat_interleave(taps)
    seen = None if observed is None or not observed.rows else observed
    off = None
    if seen is not None and seen.sample is not None and params is not None:
        off = input_error(seen, params, by_column, taps)
    matrix = rows_of(real, g)
    scale = best_steps(matrix, qtype)
    codes = (matrix / scale[:, None]).round().clamp(qtype.qmin, qtype.qmax).to(torch.int8)
    if seen is not None and seen.moment is not None and not g.transposed and scheme.solver not in TO_NEAREST:
        moments = seen.covariance if corrected(scheme) else seen.square
        with contextlib.suppress(torch.linalg.LinAlgError):  # moments of too many orders of magnitude: to nearest
            codes, scale = _with_moments(matrix, moments, scale, channel_type(qtype, 0), off, by_column)
    packed = pack(rows_back(codes, weight.shape, g), scale, qtype, factor)
    if seen is None or not corrected(scheme):
        return packed, None
    return packed, _bias(weight.detach(), packed, g, seen.mean, None if off is None else off.shift)


def corrected(scheme: Scheme) -> bool:
    """Whether biases take up what rounding adds to the mean, so that only the rest of the error counts."""
    return scheme.bias == "mean" and scheme.activation is not None


def _with_moments(
    matrix: Tensor, moments: Tensor, scale: Tensor, qtype: QType, off: InputError | None, factor: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(codes [N, K], scale [N]) of a weight [N, K] that reads columns of `moments`, times their factor."""
    if factor is not None:
        v = factor.reshape(*moments.shape[:-1], 1).double()
        moments = moments * (v @ v.mT)
    moments = moments.reshape(-1, *moments.shape[-2:])
    groups = len(moments)
    best = matrix.reshape(groups, -1, matrix.shape[1])
    if off is not None:
        added, pulled = (v.reshape(groups, -1) for v in (off.added, off.pulled))
        best = denoised(best, moments, added, pulled)
        moments = with_noise(moments, added)
    codes, scale = best_codes(best, moments, scale.reshape(groups, -1), qtype)
    return codes.reshape(matrix.shape), scale.reshape(-1)


def rows_of(weight: Tensor, g: Geometry) -> Tensor:
    """The weight with one row for each scale: [N, C / groups * taps], or [N / groups, C * taps] where transposed."""
    return weight.transpose(0, 1).flatten(1) if g.transposed else weight.flatten(1)


def rows_back(rows: Tensor, shape: tuple[int, ...], g: Geometry) -> Tensor:
    """What rows_of made of a weight of `shape`, in that shape again."""
    if not g.transposed:
        return rows.reshape(shape).contiguous()
    return rows.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1).contiguous()


def by_channel(weight: Tensor, g: Geometry) -> Tensor:
    """The weight of a convolution with a row for each channel of its input: [C, M]."""
    if g.transposed:
        return weight.flatten(1)
    return weight.reshape(g.groups, -1, weight.shape[1], weight[0, 0].numel()).transpose(1, 2).flatten(0, 1).flatten(1)


def by_output(weight: Tensor, g: Geometry) -> Tensor:
    """The weight of a convolution with a row for each channel of its output: [N, M]."""
    if not g.transposed:
        return weight.flatten(1)
    return weight.reshape(g.groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1).flatten(1)


def best_steps(rows: Tensor, qtype: QType) -> Tensor:
    """The step of each row [N] with the least squared error of rounding to nearest, clipping included."""
    by_row = channel_type(qtype, 0)
    parts = PARTS if qtype.bits <= FEW else PARTS[:6]
    return least_error(rows, *affine.limits(rows, by_row), by_row, parts).scale


def _bias(weight: Tensor, packed: Packed, g: Geometry, mean: Tensor, shift: Tensor | None) -> Tensor:
    """W mean - W_q (mean + shift), [N]. mean: float64 of patch columns; shift: what rounding adds to that of x * factor."""
    shape = [-1 if i == packed.type.axis else 1 for i in range(weight.dim())]
    rounded = packed.data.double() * packed.scale.double().reshape(shape)
    own = rounded if packed.in_mul is None else rounded * spread(packed.in_mul, weight, g.transposed).double()
    found = _product(weight.double() - own, mean, g)
    return (found if shift is None else found - _product(rounded, shift, g)).float()


def _product(weight: Tensor, x: Tensor, g: Geometry) -> Tensor:
    """What a convolution makes of constant columns x, [N]. A transposed output sees taps / strides of the products."""
    if g.transposed:
        total = weight.flatten(2).sum(2)  # [C, N / groups]
        by_group = total.reshape(g.groups, -1, total.shape[1])
        return torch.einsum("gcn,gc->gn", by_group, x.reshape(g.groups, -1)).flatten() / math.prod(g.stride)
    rows = as_matrix(weight, g).reshape(g.groups, -1, weight.flatten(1).shape[1])  # [groups, N / groups, columns]
    return torch.einsum("gnk,gk->gn", rows, x.reshape(g.groups, -1)).flatten()

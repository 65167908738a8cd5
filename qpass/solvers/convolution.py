"""From a convolution's weight and what was seen of its patches, to integers, scales and a corrected bias.

As solve.py does for a linear, on the patches [rows, C * taps] that the weight multiplies (patches.py):

1. the factor of each input channel is divided out of the weight (equalize.py);
2. weights that suit a rounded input (Wiener filter), rounding by GPTQ: where second moments were kept, that is for one group;
3. else each output channel gets the step of least squared error, and rounding is to nearest;
4. the bias that leaves the mean of every output where it was:  b* = b + (W - W_q) mean(x).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qpass import affine
from qpass.geometry import Geometry
from qpass.observations import Observed
from qpass.packing import Packed, spread
from qpass.patches import as_matrix
from qpass.qtype import QParams, QType
from qpass.schemes import Scheme
from qpass.solvers.solve import denoised, rounded
from qpass.solvers.steps import FEW, PARTS, least_error


def channel_type(qtype: QType, axis: int) -> QType:
    """The weight type of a convolution: a scale for each output channel, whatever the groups a linear would have."""
    return QType(qtype.bits, True, granularity="channel", axis=axis)


def solve_convolution(
    weight: Tensor, g: Geometry, scheme: Scheme, observed: Observed | None, step: Tensor | None, factor: Tensor | None
) -> tuple[Packed, Tensor | None]:
    """weight: [N, C / groups, *kernel], or transposed. step: of the input's rounding; factor: [C] of the input, in_mul.

    Returns the packed weight, shaped like the weight, and what to add to the bias [N] (None where no statistics are).
    """
    qtype = channel_type(scheme.weight, 1 if g.transposed else 0)
    real = weight.detach().float()
    if factor is not None:
        real = real / spread(factor, real, g.transposed)
    noise = 0.0 if step is None else float(step.double().square().mean() / 12)
    matrix = rows_of(real, g)
    scale = best_steps(matrix, qtype)
    moments = observed is not None and observed.moment is not None and observed.rows > 0
    if moments and g.groups == 1 and not g.transposed and scheme.solver == "gptq":
        codes = _with_moments(matrix, g, QParams(scale, None, channel_type(qtype, 0)), observed, noise, factor)
    else:
        codes = (matrix / scale[:, None]).round().clamp(qtype.qmin, qtype.qmax).to(torch.int8)
    packed = Packed(rows_back(codes, weight.shape, g), scale, qtype, factor)
    if observed is None or not observed.rows or scheme.bias == "none" or scheme.activation is None:
        return packed, None
    return packed, _bias(weight.detach(), packed, g, observed.mean)


def _with_moments(matrix, g: Geometry, params: QParams, observed: Observed, noise: float, factor) -> Tensor:
    taps = math.prod(g.kernel)
    v = torch.ones(matrix.shape[1]) if factor is None else factor.repeat_interleave(taps)
    covariance = observed.covariance * torch.outer(v, v).double()
    best = denoised(matrix, covariance, noise) if noise else matrix
    return rounded(best, covariance, noise, params, "gptq")


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


def _bias(weight: Tensor, packed: Packed, g: Geometry, mean: Tensor) -> Tensor:
    """(W - W_q) mean, [N]: mean float64 of patch columns. A transposed output sees taps / strides of the products."""
    shape = [-1 if i == packed.type.axis else 1 for i in range(weight.dim())]
    real = packed.data.double() * packed.scale.double().reshape(shape)
    if packed.in_mul is not None:
        real = real * spread(packed.in_mul, weight, g.transposed).double()
    lost = weight.double() - real
    if g.transposed:
        total = lost.flatten(2).sum(2)  # [C, N / groups]
        by_group = total.reshape(g.groups, -1, total.shape[1])
        found = torch.einsum("gcn,gc->gn", by_group, mean.reshape(g.groups, -1)).flatten()
        return (found / math.prod(g.stride)).float()
    rows = as_matrix(lost, g).reshape(g.groups, -1, lost.flatten(1).shape[1])  # [groups, N / groups, C / groups * taps]
    return torch.einsum("gnk,gk->gn", rows, mean.reshape(g.groups, -1)).flatten().float()

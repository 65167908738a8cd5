"""GPTQ (Frantar et al. 2022, 2210.17323): round column by column, spread each error over the columns still to come.

    q_j = round(w_j),   w_k -= (w_j - q_j) / U_jj * U_jk  for k > j,   U = upper Cholesky factor of C^-1

with C the covariance of the quantized input (the bias absorbs the mean), columns in order of falling variance, blocks
of 128 with one lazy update each, and steps fixed beforehand, of a channel or of each group of its columns. Where C plus its
dampening still is not positive definite, the dampening grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.qparams import QParams

DAMPING = 0.05  # of the mean variance, added to every variance
GROWTH, TRIES = 10.0, 4  # what the dampening is multiplied by where it is too little, and how often it is tried
BLOCK = 128
SINGULAR = "second moments that no dampening up to {:g} of their mean makes positive definite"


def damped(covariance: Tensor, damping: float = DAMPING) -> Tensor:
    """C + damping, float64 [..., K, K]; where nothing varies variances are 1, so that it can be inverted."""
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype)
    return covariance + eye * torch.where(mean > 0, damping * mean, 1.0)


def factored(covariance: Tensor) -> Tensor:
    """Lower Cholesky factor [..., K, K] of C + damping, of as much as it takes; LinAlgError where nothing is enough."""
    damping = DAMPING
    for _ in range(TRIES):
        factor, info = torch.linalg.cholesky_ex(damped(covariance, damping))
        if not bool(info.any()) and bool(torch.isfinite(factor).all()):
            return factor
        damping *= GROWTH
    raise torch.linalg.LinAlgError(SINGULAR.format(damping / GROWTH))


def gptq(weight: Tensor, covariance: Tensor, params: QParams) -> Tensor:
    """weight: float [N, K]; covariance: [K, K]; params: of channels [N] or groups [N, K / G]. Returns the codes [N, K]."""
    qtype = params.type
    order = covariance.diagonal().argsort(descending=True)
    group = (order // (qtype.group or len(order))).tolist()
    steps = params.scale.reshape(len(weight), -1).t().contiguous()
    zeros = torch.zeros(1, 1) if params.zero is None else params.zero.reshape(len(weight), -1).t().float().contiguous()
    lowest, highest = qtype.qmin - zeros, qtype.qmax - zeros
    work = weight.float()[:, order].clone()
    inverse = torch.cholesky_inverse(factored(covariance[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    codes = torch.empty_like(work)
    for start in range(0, work.shape[1], BLOCK):
        end = min(start + BLOCK, work.shape[1])
        columns = work[:, start:end].t().contiguous()
        errors = torch.empty_like(columns)
        for i in range(end - start):
            row, g = upper[start + i], group[start + i]
            own = g if params.zero is not None else 0
            level = (columns[i] / steps[g]).round_().clamp_(lowest[own], highest[own])
            codes[:, start + i] = level + zeros[own]
            errors[i] = (columns[i] - level * steps[g]) / row[start + i]
            columns[i + 1 :] -= row[start + i + 1 : end, None] * errors[i]
        work[:, end:] -= errors.t() @ upper[start:end, end:]
    return codes[:, order.argsort()].to(qtype.storage)

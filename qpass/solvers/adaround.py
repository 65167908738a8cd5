"""AdaRound (Nagel et al. 2020, 2004.10568): which weights to round up is learned, on the error of the layer's output.

    r = s (clamp(floor(w / s) + z + h(V)) - z),     h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
    min over V of  (w - r) C (w - r)^T  +  lambda sum (1 - |2 h(V) - 1|^beta),     beta from 20 to 2, after a warm start

C holds all that the layer's output error needs of the data: its gradient is -2 (w - r) C s h'(V), so there is no backward
pass, and all rows go at once. V starts where h(V) is what floor leaves off, so that r = w but for what is clipped; Adam.
Steps are those of least squared error (steps.py). The error is in units of the squared step, C of unit mean variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass import affine
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.solvers.gptq import damped
from qpass.solvers.steps import best_qparams

ROUNDS, WARM = 400, 0.1  # steps of Adam, and the share of them without the regulariser
RATE, WEIGHT = 0.1, 3.0  # Adam's rate; lambda: large, so that what is nearly decided is, and the others make up for it
BETA = (20.0, 2.0)
STRETCH, SHIFT = 1.2, -0.1  # of the sigmoid, so that h reaches 0 and 1
MEMORY, EPSILON = (0.9, 0.999), 1e-8  # Adam's
DAMPING = 0.01  # of the mean of C's diagonal


def adaround(weight: Tensor, moments: Tensor, qtype: QType) -> tuple[Tensor, QParams]:
    """(codes [N, K], parameters) of a float weight [N, K] that reads an input of second moments [K, K]."""
    w = weight.float()
    params = best_qparams(w, qtype)
    s = affine.expand(params.scale, qtype, 2)
    z = torch.zeros_like(s) if params.zero is None else affine.expand(params.zero, qtype, 2).float()
    c = damped(moments, DAMPING)
    c = (c / c.diagonal().mean()).float()
    level = w / s  # of the weight, in steps
    floor = level.floor().clamp(qtype.qmin - z, qtype.qmax - z)
    up = _learned(level, floor, s / s.mean(1, keepdim=True), c, (qtype.qmin - z, qtype.qmax - z))
    codes = (floor + up + z).clamp(qtype.qmin, qtype.qmax)
    return codes.to(qtype.storage), params


def _learned(level: Tensor, floor: Tensor, s: Tensor, c: Tensor, limits: tuple[Tensor, Tensor]) -> Tensor:
    """Whether to round up, 0 or 1 [N, K]. level: weights in steps; s: steps, of mean 1 in each row; limits: of levels."""
    v = torch.logit((((level - floor).clamp(0.01, 0.99)) - SHIFT) / STRETCH)
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    warm = int(ROUNDS * WARM)
    for i in range(ROUNDS):
        sigmoid = v.sigmoid()
        h = (STRETCH * sigmoid + SHIFT).clamp(0, 1)
        inside = (floor + h > limits[0]) & (floor + h < limits[1])
        gradient = -2 * (((level - (floor + h).clamp(*limits)) * s) @ c) * s * inside
        if i >= warm:
            beta = BETA[1] + (BETA[0] - BETA[1]) * (1 - (i - warm) / (ROUNDS - warm))
            far = 2 * h - 1
            gradient = gradient - WEIGHT * 2 * beta * far.sign() * far.abs().pow(beta - 1)
        gradient = gradient * STRETCH * sigmoid * (1 - sigmoid) * ((h > 0) & (h < 1))
        first = MEMORY[0] * first + (1 - MEMORY[0]) * gradient
        second = MEMORY[1] * second + (1 - MEMORY[1]) * gradient.square()
        mean, spread = first / (1 - MEMORY[0] ** (i + 1)), second / (1 - MEMORY[1] ** (i + 1))
        v = v - RATE * mean / (spread.sqrt() + EPSILON)
    return (v > 0).float()

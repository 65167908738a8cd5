"""The solvers of linears by name: each takes a weight [N, K], second moments [K, K] of what it reads and a type, to codes and
parameters.

    rtn, smoothquant    to nearest (steps.py)              gptq        gptq.py        descent     linear_descent.py
    awq                 to nearest, clip by C (awq.py)     adaround    adaround.py    hqq         hqq.py

`auto` is descent up to NARROW bits, else gptq. What awq and smoothquant do to the input is done before, in solve.py. Behind
each the gain of what it rounded is kept (gain.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.scheme_words import NARROW
from qpass.solvers.adaround import adaround
from qpass.solvers.awq import awq
from qpass.solvers.gain import with_gain
from qpass.solvers.gptq import gptq
from qpass.solvers.hqq import hqq
from qpass.solvers.linear_descent import descent
from qpass.solvers.rows import in_chunks
from qpass.solvers.rtn import nearest
from qpass.solvers.steps import best_qparams

Method = Callable[[Tensor, Tensor, QType], tuple[Tensor, QParams]]


def columns(weight: Tensor, moments: Tensor, qtype: QType) -> tuple[Tensor, QParams]:
    """GPTQ on the steps of least squared error."""
    params = best_qparams(weight, qtype)
    return gptq(weight, moments, params), params


METHODS: dict[str, Method] = {
    "rtn": nearest,
    "smoothquant": nearest,
    "gptq": columns,
    "descent": descent,
    "awq": awq,
    "adaround": adaround,
    "hqq": hqq,
}


def rounded(
    weight: Tensor, covariance: Tensor, noise: float | Tensor, qtype: QType, solver: str
) -> tuple[Tensor, QParams]:
    """The codes of a weight [N, K] that reads an input of `covariance` and rounding noise, and their parameters."""
    if solver == "auto":
        solver = "descent" if qtype.bits <= NARROW else "gptq"
    moments = with_noise(covariance, noise)

    def work(rows: Tensor) -> tuple[Tensor, QParams]:
        codes, params = METHODS[solver](rows, moments, qtype)
        return codes, with_gain(rows, codes, params, moments)

    return work(weight) if qtype.granularity == "tensor" else in_chunks(work, weight)


def with_noise(covariance: Tensor, noise: float | Tensor) -> Tensor:
    """C + noise I; noise: a variance, or one for each channel [..., K]."""
    variances = torch.as_tensor(noise, dtype=torch.float64).expand(covariance.shape[:-1])
    return covariance + torch.diag_embed(variances)

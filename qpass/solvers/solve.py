"""From the weights that read one input and what was seen of it, to integers, scales and corrected biases.

1. shift and factor of the input channels, where the product is free (smooth); else split of far channels (split);
2. scale and zero point of the static input;
3. the weights that suit a rounded input: the input's rounding error is noise of variance s^2/12 per channel, so the best
   linear answer is the Wiener filter  W* = W C (C + s^2/12 I)^-1,  C the covariance of the input;
4. rounding (GPTQ on that covariance, or to nearest);
5. the bias that leaves the mean of every output where it was:  b* = b + W mean(x) - W_q mean(x').

Statistics are those of the float model, from one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass import affine
from qpass.observations import Observed
from qpass.packing import Packed
from qpass.range_choice import choose_range
from qpass.schemes import Scheme
from qpass.solvers.gptq import damped, gptq
from qpass.solvers.rtn import round_to_nearest
from qpass.solvers.smooth import choose_factor, row_steps, shift, static_limits
from qpass.solvers.split import copies, pays


@dataclass(frozen=True)
class Solution:
    """packed, bias: one per weight (bias: what to add to the module's own). scale, zero: of a shared static input.

    shift: c [K], subtracted before the factor. extra: copies of each input channel [K], see split.
    """

    packed: tuple[Packed, ...]
    bias: tuple[Tensor | None, ...]
    scale: Tensor | None = None
    zero: Tensor | None = None
    shift: Tensor | None = None
    extra: Tensor | None = None

    @property
    def finite(self) -> bool:
        """Whether every number of it is."""
        held = [self.scale, self.shift, *self.bias, *(t for p in self.packed for t in (p.scale, p.in_mul))]
        return all(bool(torch.isfinite(t).all()) for t in held if t is not None)


def solve(weights: list[Tensor], scheme: Scheme, observed: Observed | None, free: bool, splits: bool) -> Solution:
    """weights: float [N_i, K], all reading the input `observed` describes. free: a product in front of it costs nothing.

    splits: the input is the activation of another linear, so its channels may be split.
    """
    if observed is None or observed.moment is None or not observed.rows or scheme.activation is None:
        return _plain(weights, scheme, observed)
    stacked = torch.cat([w.float() for w in weights])
    c, v = torch.zeros(stacked.shape[1]), torch.ones(stacked.shape[1])
    if free and scheme.smooth is not None:
        c = shift(observed, scheme.dynamic)
        v = choose_factor(observed, stacked, scheme, c)
    extra, scale, zero = _static_input(scheme, observed, stacked, c, v, splits)
    noise = _noise(scheme, observed, c, v, scale)
    covariance = observed.covariance * torch.outer(v, v).double()
    best = _denoised(stacked / v, covariance, noise)
    params = row_steps(best, scheme.weight)
    if scheme.solver == "gptq":
        noisy = covariance + noise * torch.eye(len(v), dtype=torch.float64)
        codes = gptq(best, noisy, params.scale, scheme.weight.qmin, scheme.weight.qmax)
    else:
        codes = affine.quantize(best, params.scale, None, scheme.weight)
    real = affine.dequantize(codes, params.scale, None, scheme.weight, torch.float64)
    mean = observed.mean
    shifted = stacked.double() @ mean - real @ ((mean - c.double()) * v.double())
    factor = v if free and scheme.smooth is not None else None
    counts = [w.shape[0] for w in weights]
    parts = zip(codes.split(counts), params.scale.split(counts), strict=True)
    return Solution(
        tuple(Packed(code.contiguous(), step.contiguous(), scheme.weight, factor) for code, step in parts),
        shifted.float().split(counts),
        scale,
        zero,
        c if factor is not None else None,
        extra,
    )


def _plain(weights: list[Tensor], scheme: Scheme, observed: Observed | None) -> Solution:
    """Rounding to nearest, and limits as they were seen."""
    packed = tuple(round_to_nearest(w, scheme.weight) for w in weights)
    nothing = (None,) * len(weights)
    if not scheme.needs_calibration:
        return Solution(packed, nothing)
    params = affine.choose_qparams(
        *choose_range(observed.range, scheme.activation, scheme.range_method), scheme.activation
    )
    return Solution(packed, nothing, params.scale, params.zero)


def _static_input(scheme: Scheme, observed: Observed, weight: Tensor, c: Tensor, v: Tensor, splits: bool):
    """(extra copies, scale, zero) of a static input; nothing for one that gets its scales at run time."""
    if scheme.dynamic:
        return None, None, None
    extra = None
    if splits and scheme.smooth is not None:
        low, levels = observed.range.lo, scheme.activation.levels - 1
        extra, top = copies(observed.range.channels.hi)
        if not pays(observed.sample, weight.square().sum(0), (low, observed.range.hi), extra, top, levels):
            extra, top = None, observed.range.hi
        lo, hi = torch.tensor(low), torch.tensor(top)
    elif scheme.smooth is not None:
        lo, hi = static_limits(observed, c, v)
    else:
        lo, hi = choose_range(observed.range, scheme.activation, scheme.range_method)
    params = affine.choose_qparams(lo, hi, scheme.activation)
    return (extra if extra is not None and int(extra.sum()) else None), params.scale, params.zero


def _noise(scheme: Scheme, observed: Observed, c: Tensor, v: Tensor, scale: Tensor | None) -> float:
    """Variance of the input's rounding error: s^2 / 12, the mean over rows where each has its own step."""
    if scale is None:
        scale, _ = affine.choose_dynamic((observed.sample - c) * v, scheme.activation)
    return float(scale.double().square().mean() / 12)


def _denoised(weight: Tensor, covariance: Tensor, noise: float) -> Tensor:
    """W + W (C - C')(C' + damping)^-1 with C' = C + noise I: step 3."""
    noisy = damped(covariance + noise * torch.eye(len(covariance), dtype=torch.float64))
    correction = torch.cholesky_solve((-noise * weight.double()).t(), torch.linalg.cholesky(noisy)).t()
    return (weight.double() + correction).float()

"""From the weights that read one input and what was seen of it, to integers, scales and corrected biases.

1. shift and factor of the input channels, where the product is free (smooth); else split of far channels (split);
2. scale and zero point of the static input;
3. the weights that suit a rounded input: the input's rounding error is noise of variance s^2/12 per channel, so the best
   linear answer is the Wiener filter  W* = W C (C + s^2/12 I)^-1,  C the covariance of the input;
4. rounding with steps of channels or groups, on that covariance, by the solver of the scheme (methods.py);
5. the bias that leaves the mean of every output where it was:  b* = b + W mean(x) - W_q mean(x').

Where linears are rounded in order of execution (sequential.py), the input is already off by what those before it make: W is
to give of it what it gives of the float model's. With D = E[(x_float - x) x^T] that adds W D (C + s^2/12 I)^-1 to W* (with
D alone it is GPTAQ's asymmetric calibration, 2504.02692), and W mean(x_float - x) to the bias.

Where the input stays float, 4 and 5 alone, behind awq's factor where that is the solver; where no bias is there to take up
the mean, 4 is on the second moments E[x x^T]. Float types are rounded to nearest: their steps grow with the values, so that
rounding is no noise of one variance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass import affine
from qpass.observations import Observed
from qpass.packing import Packed, pack
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.range_choice import choose_range
from qpass.schemes import Scheme
from qpass.solvers.awq import NOT_FREE, choose_awq
from qpass.solvers.gptq import factored
from qpass.solvers.hqq import hqq
from qpass.solvers.methods import rounded, with_noise
from qpass.solvers.rtn import nearest, round_with
from qpass.solvers.smooth import WHOLE, choose_factor, shift, static_params
from qpass.solvers.smoothquant import UNMOVED, with_strength
from qpass.solvers.split import copies, pays

UNABLE = {"awq": NOT_FREE, "smoothquant": UNMOVED}  # where a product in front of the input has a price
UNSEEN = "solver={} has seen nothing of an input here: its weight is rounded to nearest"


@dataclass(frozen=True)
class Solution:
    """packed, bias: one per weight (bias: what to add to the module's own). scale, zero: of a shared static input.

    shift: c [K], subtracted before the factor. extra: copies of each input channel [K], see split. note: what the solver
    that was asked for could not do.
    """

    packed: tuple[Packed, ...]
    bias: tuple[Tensor | None, ...]
    scale: Tensor | None = None
    zero: Tensor | None = None
    shift: Tensor | None = None
    extra: Tensor | None = None
    note: str = ""

    @property
    def finite(self) -> bool:
        """Whether every number of it is."""
        held = [self.scale, self.shift, *self.bias, *(t for p in self.packed for t in (p.scale, p.in_mul))]
        return all(bool(torch.isfinite(t).all()) for t in held if t is not None)


def solve(
    weights: list[Tensor], scheme: Scheme, observed: Observed | None, free: bool, splits: bool, biased: bool = False
) -> Solution:
    """weights: float [N_i, K], all reading the input `observed` describes. free: a product in front of it costs nothing.

    splits: the input is the activation of another linear, so its channels may be split. biased: beside an input that stays
    float, each has a bias that may take up what rounding adds to the mean.
    """
    if observed is None or observed.moment is None or not observed.rows or scheme.weight.is_float:
        return _plain(weights, scheme, observed)
    stacked = torch.cat([w.float() for w in weights])
    counts = [w.shape[0] for w in weights]
    note = "" if free else UNABLE.get(scheme.solver, "")
    if scheme.activation is None:
        return _float_input(stacked, counts, scheme, observed, free, biased and scheme.bias == "mean", note)
    scheme = with_strength(scheme)
    kept = observed.covariance if scheme.bias == "mean" else observed.square  # the mean is part of the error, or is not
    c, v = torch.zeros(stacked.shape[1]), torch.ones(stacked.shape[1])
    if free and scheme.smooth is not None:
        c = shift(observed, scheme.dynamic)
        v = _factor(observed, stacked, scheme, c, kept)
    splits = splits and scheme.split != "none" and scheme.weight.group is None
    extra, scale, zero = _static_input(scheme, observed, stacked, c, v, free, splits)
    noise = _noise(scheme, observed, c, v, scale)
    covariance = kept * torch.outer(v, v).double()
    drift, moved = _drift(observed, scheme, v)
    best = denoised(stacked / v, covariance, noise, drift=drift)
    codes, params = rounded(best, covariance, noise, scheme.weight, scheme.solver)
    real = affine.dequantize(codes, params.scale, params.zero, scheme.weight, torch.float64)
    mean = observed.mean if scheme.bias == "mean" else torch.zeros(len(v), dtype=torch.float64)
    shifted = stacked.double() @ (mean + moved) - real @ ((mean - c.double()) * v.double())
    factor = v if free and scheme.smooth is not None else None
    return Solution(
        _split(codes, params, counts, factor),
        shifted.float().split(counts),
        scale,
        zero,
        c if factor is not None else None,
        extra,
        note,
    )


def _float_input(
    weight: Tensor, counts: list[int], scheme: Scheme, observed: Observed, free: bool, centred: bool, note: str
) -> Solution:
    """Steps 4 and 5, behind awq's factor where that is the solver and a product is free; 5 where there is a bias."""
    moments, target, v = observed.covariance if centred else observed.square, weight, torch.ones(weight.shape[1])
    if observed.drift is not None:
        target = corrected(weight, observed, moments, centred)
    if scheme.solver == "awq" and free:
        v = choose_awq(target, moments, observed.range.channels.abs_mean, scheme.weight)
    factor = None if bool((v == 1).all()) else v
    codes, params = rounded(target / v, moments * torch.outer(v, v).double(), 0.0, scheme.weight, scheme.solver)
    packed = _split(codes, params, counts, factor)
    if not centred:
        return Solution(packed, (None,) * len(counts), note=note)
    real = affine.dequantize(codes, params.scale, params.zero, scheme.weight, torch.float64)
    moved = 0.0 if observed.drift is None else observed.drift.total / max(observed.rows, 1)
    added = weight.double() @ (observed.mean + moved) - real @ (observed.mean * v.double())
    return Solution(packed, added.float().split(counts), note=note)


def _factor(observed: Observed, weight: Tensor, scheme: Scheme, c: Tensor, moments: Tensor) -> Tensor:
    """The factor [K] of an input that is rounded."""
    if scheme.solver != "awq":
        return choose_factor(observed, weight, scheme, c)

    def noise(v: Tensor) -> float:
        return _noise(scheme, observed, c, v, _static_input(scheme, observed, weight, c, v, True, False)[1])

    return choose_awq(weight, moments, observed.range.channels.abs_mean, scheme.weight, noise)


def _drift(observed: Observed, scheme: Scheme, v: Tensor) -> tuple[Tensor | None, Tensor]:
    """(E[(x_float - x) x^T] of scaled channels, centered where the bias takes up the mean; the mean of x_float - x)."""
    if observed.drift is None:
        return None, torch.zeros(len(v), dtype=torch.float64)
    rows = max(observed.rows, 1)
    moment, total = observed.drift.moment / rows, observed.drift.total / rows
    if scheme.bias == "mean":
        moment = moment - torch.outer(total, observed.mean)
    return moment * torch.outer(v, v).double(), total if scheme.bias == "mean" else torch.zeros_like(total)


def corrected(weight: Tensor, observed: Observed, moments: Tensor, centred: bool) -> Tensor:
    """W + W D (C + damping)^-1: the weights [N, K] that make of the values they read what W makes of the float model's.

    moments: C; centred: of both, C and D, the means are left to the bias.
    """
    assert observed.drift is not None
    rows = max(observed.rows, 1)
    drift = observed.drift.moment / rows
    if centred:
        drift = drift - torch.outer(observed.drift.total / rows, observed.mean)
    return (weight.double() + torch.cholesky_solve((weight.double() @ drift).mT, factored(moments)).mT).float()


def _split(codes: Tensor, params: QParams, counts: list[int], factor: Tensor | None) -> tuple[Packed, ...]:
    """The rows of several weights, each as a weight of its own."""
    zeros = (None,) * len(counts) if params.zero is None else params.zero.split(counts)
    parts = zip(codes.split(counts), params.scale.split(counts), zeros, strict=True)
    return tuple(pack(code.contiguous(), step.contiguous(), params.type, factor, zero) for code, step, zero in parts)


def _plain(weights: list[Tensor], scheme: Scheme, observed: Observed | None) -> Solution:
    """Rounding to nearest, or another solver that looks at weights alone, and limits as they were seen."""
    method = hqq if scheme.solver == "hqq" else nearest
    packed = tuple(round_with(method, w, scheme.weight) for w in weights)
    nothing = (None,) * len(weights)
    note = UNSEEN.format(scheme.solver) if scheme.solver_needs_data else ""
    if not scheme.needs_calibration:
        return Solution(packed, nothing, note=note)
    params = affine.choose_qparams(
        *choose_range(observed.range, scheme.activation, scheme.range_for("linear")), scheme.activation
    )
    return Solution(packed, nothing, params.scale, params.zero, note=note)


def _static_input(scheme: Scheme, observed: Observed, weight: Tensor, c: Tensor, v: Tensor, free: bool, splits: bool):
    """(extra copies, scale, zero) of a static input; nothing for one that gets its scales at run time."""
    if scheme.dynamic:
        return None, None, None
    qtype, extra = scheme.activation, None
    if scheme.smooth is None or (qtype.bits < WHOLE and not free):
        params = affine.choose_qparams(*choose_range(observed.range, qtype, scheme.range_for("linear")), qtype)
    elif splits and qtype.bits >= WHOLE:
        extra, params = _split_input(observed, weight, qtype)
    else:
        params = static_params(observed, c, v, qtype)
    return extra, params.scale, params.zero


def _split_input(observed: Observed, weight: Tensor, qtype: QType) -> tuple[Tensor | None, QParams]:
    """Copies of the channels that reach far, where they pay, and the parameters of what is left (split.py)."""
    low, high = observed.range.lo, observed.range.hi
    extra, top = copies(observed.range.channels.hi)
    if not pays(observed.sample, weight.square().sum(0), (low, high), extra, top, qtype.levels - 1):
        extra, top = None, high
    params = affine.choose_qparams(torch.tensor(low), torch.tensor(top), qtype)
    return (extra if extra is not None and int(extra.sum()) else None), params


def _noise(scheme: Scheme, observed: Observed, c: Tensor, v: Tensor, scale: Tensor | None) -> float:
    """Variance of the input's rounding error: s^2 / 12, the mean over rows where each has its own step."""
    if scale is None:
        scale, _ = affine.choose_dynamic((observed.sample - c) * v, scheme.activation)
    return float(scale.double().square().mean() / 12)


def denoised(
    weight: Tensor,
    covariance: Tensor,
    noise: float | Tensor,
    pulled: Tensor | None = None,
    drift: Tensor | None = None,
) -> Tensor:
    """W - W (P - D) (C' + damping)^-1 with C' = C + noise I: step 3. pulled: P, where it is not the noise; drift: D."""
    factor = factored(with_noise(covariance, noise))
    off = -(noise if pulled is None else pulled.unsqueeze(-2)) * weight.double()
    if drift is not None:
        off = off + weight.double() @ drift
    correction = torch.cholesky_solve(off.mT, factor).mT
    return (weight.double() + correction).float()

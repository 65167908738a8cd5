"""How far what is seen is from what calibration saw: formulas, each with what it is good for.

    PSI  = sum_b (p_b - q_b) ln(p_b / q_b)      population stability index: symmetric; rules of thumb of credit scoring call
                                                less than 0.1 stable and more than 0.25 shifted (Siddiqi, Credit Risk
                                                Scorecards, 2006)
    KL   = sum_b p_b ln(p_b / q_b)              nats lost by coding what is seen for what was (Kullback and Leibler, 1951)

p: shares seen, q: shares of calibration, in bins that hold about a sixteenth each. A share is taken to be at least FLOOR.

A sample of the same distribution has a PSI too, of about sum_b Var(p_b) / q_b (to second order it is a chi-square of the
shares: Yurdakul and Naranjo, Statistical properties of the population stability index, 2020). Values of one call are alike
(the tokens of a text), so the variance is that of a ratio over calls, not of as many values (Cochran, Sampling Techniques,
6.3):

    Var(p_b) = k / (k - 1) sum_i (c_ib - p_b n_i)^2 / n^2       call i has n_i values, c_ib of them in bin b; n: all

`score` is the PSI beyond that noise. A judgement waits until the noise is less than half the threshold.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.seen import Seen
from qpass.serving.collect import Bins, Stats

FLOOR = 1e-4
LOOKS = 8  # before which nothing is judged
OK, DRIFT, FEW, UNKNOWN = "ok", "drift", "too few", "unknown"


@dataclass(frozen=True)
class Limits:
    """psi: a score above it is drift. clipped: so is a share beyond the grid that exceeds calibration's by more."""

    psi: float = 0.1
    clipped: float = 0.005


@dataclass(frozen=True)
class Verdict:
    """status: OK, DRIFT, FEW (looks) or UNKNOWN (no histogram of calibration). excess: clipped beyond calibration's share."""

    status: str
    psi: float | None
    kl: float | None
    noise: float | None
    excess: float

    @property
    def score(self) -> float:
        """The PSI beyond its noise; 0 where there is none."""
        return 0.0 if self.psi is None or self.noise is None else max(self.psi - self.noise, 0.0)

    def times(self, limits: Limits) -> float:
        """The larger of PSI and clipping, in thresholds: drift above 1."""
        return max(self.score / limits.psi, self.excess / limits.clipped)


def psi(p: Tensor, q: Tensor) -> float:
    """The population stability index of two vectors of shares.

    >>> psi(torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5]))
    0.0
    """
    p, q = p.double().clamp(min=FLOOR), q.double().clamp(min=FLOOR)
    return float(((p - q) * (p / q).log()).sum())


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p || q) of two vectors of shares, in nats."""
    p, q = p.double(), q.double().clamp(min=FLOOR)
    return float(torch.where(p > 0, p * (p / q).clamp(min=1e-300).log(), 0.0).sum())


def noise(bins: Bins, looks: int, q: Tensor) -> float:
    """The PSI that chance alone makes of so many looks."""
    if looks < 2 or not bins.total:
        return math.inf
    p = bins.counts / bins.total
    spread = bins.squares - 2 * p * bins.crossed + p.square() * bins.total_square
    variance = spread.clamp(min=0) / bins.total**2 * looks / (looks - 1)
    return float((variance / q.double().clamp(min=FLOOR)).sum())


def judge(stats: Stats, seen: Seen | None, limits: Limits, drifting: bool = False) -> Verdict:
    """What is to be said of an input. drifting: it was before; then half of a limit keeps it there."""
    expected = seen.clipped if seen is not None else 0.0
    excess = max(stats.clipped - expected, 0.0)
    found = (None, None, None)
    if seen is not None and stats.bins is not None and stats.bins.total:
        p = stats.bins.counts / stats.bins.total
        found = psi(p, seen.shares), kl(p, seen.shares), noise(stats.bins, stats.looks, seen.shares)
    verdict = Verdict(UNKNOWN, *found, excess)
    unsure = found[2] is not None and found[2] > limits.psi / 2 and verdict.score < limits.psi
    if stats.looks < LOOKS or (unsure and excess <= limits.clipped):
        return Verdict(FEW, *found, excess)
    if verdict.times(limits) > (0.5 if drifting else 1.0):
        return Verdict(DRIFT, *found, excess)
    return verdict if seen is None else Verdict(OK, *found, excess)

"""Weights that jump between two codes, step after step (Nagel et al. 2022, 2203.11086): measured, damped, frozen.

    o_t  = the code moved, and against the way of its last move                     (section 3.2)
    f_t  = m o_t + (1 - m) f_{t-1}                                                  (equation 4)
    damping   L = sum (w^ - clip(w, low, high))^2,  w^ the fake-quantized weight    (equation 5)
              where its input's channels have factors, of w divided by them (channels.py)
    freezing  where f_t > threshold: the code is kept at round(average of codes)    (section 4.3, algorithm 1)

oscillation = qpass.qat.Oscillation(t, threshold=0.02)
loss = task + 1e-4 * qpass.qat.damping(t)
...; optimizer.step(); oscillation.step()
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qpass import affine
from qpass.errors import QpassError
from qpass.qat.quantizer import Quantizer
from qpass.qat.sites import trained_modules, weight_of
from qpass.qparams import QParams

MOMENTUM = 0.01
OFTEN = 0.005  # the frequency above which a weight counts as oscillating, as in the paper's table 1


def damping(model: nn.Module) -> Tensor:
    """The damping loss of all weights, a scalar; its gradient goes to the weights alone."""
    terms = []
    for weight, quantizer in _weights(model):
        params = quantizer.params(weight)
        low, high = (_real(torch.full_like(weight, code), params) for code in (params.type.qmin, params.type.qmax))
        rounded, seen = affine.fake_quantize(quantizer.seen(weight.detach()), params), quantizer.seen(weight)
        terms.append((rounded - torch.minimum(torch.maximum(seen, low), high)).square().sum())
    return torch.stack(terms).sum() if terms else torch.zeros(())


@dataclass
class _State:
    code: Tensor  # of the last step
    way: Tensor  # int8, -1, 0, 1: of the last move
    frequency: Tensor
    average: Tensor  # of the codes
    frozen: Tensor  # where a code is kept


class Oscillation:
    """Follows the codes of every weight. threshold: of the frequency above which a weight is frozen; None: none is."""

    def __init__(self, model: nn.Module, threshold: float | None = None, momentum: float = MOMENTUM) -> None:
        if threshold is not None and not 0 < threshold <= 1:
            raise QpassError(
                f"threshold is {threshold}; expected a frequency above 0 and up to 1, such as 0.02, or None."
            )
        if not 0 < momentum <= 1:
            raise QpassError(f"momentum is {momentum}; expected a number above 0 and up to 1, such as {MOMENTUM}.")
        self.model, self.threshold, self.momentum = model, threshold, momentum
        self.states: dict[str, _State] = {}

    @torch.no_grad()
    def step(self) -> float:
        """To be called after the optimizer's step: the share of weights that oscillate now."""
        often = total = 0
        for weight, quantizer in _weights(self.model):
            params = quantizer.params(weight)
            code = affine.quantize(quantizer.seen(weight), params.scale, params.zero, params.type).to(torch.int16)
            state = self.states.get(quantizer.site)
            if state is None:
                zeros = torch.zeros_like(code, dtype=torch.float32)
                state = _State(code, torch.zeros_like(code, dtype=torch.int8), zeros, code.float(), zeros.bool())
                self.states[quantizer.site] = state
            else:
                self._follow(state, code)
            if self.threshold is not None:
                self._freeze(state, weight, quantizer, params)
            often += int((state.frequency > OFTEN).sum())
            total += weight.numel()
        return often / max(total, 1)

    def _follow(self, state: _State, code: Tensor) -> None:
        way = (code - state.code).sign().to(torch.int8)
        back = (way != 0) & (way == -state.way)
        state.frequency.lerp_(back.float(), self.momentum)
        state.average.lerp_(torch.where(state.frozen, state.average, code.float()), self.momentum)
        state.way = torch.where(way != 0, way, state.way)
        state.code = code

    def _freeze(self, state: _State, weight: Tensor, quantizer: Quantizer, params: QParams) -> None:
        state.frozen |= state.frequency > self.threshold
        if bool(state.frozen.any()):
            kept = quantizer.undone(_real(state.average.round(), params))
            weight.copy_(torch.where(state.frozen, kept.to(weight.dtype), weight))


def _weights(model: nn.Module) -> list[tuple[Tensor, Quantizer]]:
    """Each fake-quantized weight once, with its quantizer."""
    found = {id(m.used[0]): (weight_of(m), m.used[0]) for m in trained_modules(model).values()}
    return list(found.values())


def _real(codes: Tensor, params: QParams) -> Tensor:
    """What codes, whole numbers of any dtype, stand for."""
    return affine.dequantize(codes, params.scale, params.zero, params.type)

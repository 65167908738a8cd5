"""The error each site makes by itself: its float input through its quantized product, against its float output.

linear:        y = Q(x) W_q^T + b + b*             Q: the input's type, static, per row or per sample
convolution:   y = Q(x) * W_q + b + b*             b*: what the plan adds to the bias
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass import affine
from qpass.calibrate import Batch, Session
from qpass.convolutions import is_convolution
from qpass.passes.other_sites import LOOKUP
from qpass.plan import Decision, Plan
from qpass.qtype import QParams
from qpass.solvers.split import layout


@dataclass(frozen=True)
class SiteError:
    """sqnr: 10 log10(power of the float output / power of the error), dB; inf where there is none."""

    site: str
    sqnr: float
    worst: float


def site_errors(model: nn.Module, plan: Plan, batch: Batch) -> list[SiteError]:
    """The error of each quantized site of the float `model` on a batch, largest first."""
    found: dict[str, SiteError] = {}
    session = _Watch(model, plan, found)
    session.run(batch, "the batch to measure errors on")
    return sorted(found.values(), key=lambda e: e.sqnr)


class _Watch(Session):
    """A session whose graphs measure each site as they run."""

    def __init__(self, model: nn.Module, plan: Plan, found: dict[str, SiteError]) -> None:
        self.plan, self.found = plan, found
        super().__init__(model)

    def interpreter(self, graph: fx.GraphModule, nodes: dict[str, fx.Node]) -> fx.Interpreter:
        """Runs a graph in float, and each site in integers beside."""
        return _Measure(graph, nodes, self.plan, self.found)


class _Measure(fx.Interpreter):
    """Runs a graph in float and compares each quantized site with its float result."""

    def __init__(self, gm: fx.GraphModule, sites: dict[str, fx.Node], plan: Plan, found: dict[str, SiteError]) -> None:
        super().__init__(gm)
        self.sites = {node: name for name, node in sites.items() if node.meta.get("site") == name}
        self.plan, self.found = plan, found

    def run_node(self, n: fx.Node) -> Any:
        """One node; a quantized site is also computed in integers' stead."""
        result = super().run_node(n)
        decision = self.plan.decisions.get(self.sites.get(n, ""))
        if decision is not None and decision.quantized and decision.operation != LOOKUP:  # it multiplies nothing
            x, bias = self.env[n.args[0]], None if n.args[2] is None else self.env[n.args[2]]
            walk = n.args[3:] if is_convolution(n) else None
            y = quantized_convolution(decision, x, bias, walk) if walk else quantized_linear(decision, x, bias)
            self.found[decision.site] = _compare(decision, result, y)
        return result


def quantized_linear(d: Decision, x: Tensor, bias: Tensor | None) -> Tensor:
    """What a site computes of a float input once it is quantized."""
    packed = d.packed
    weight = affine.dequantize(packed.data, packed.scale, packed.zero, packed.type)
    weight = weight.t() if d.transposed else weight
    real = x.float() if packed.in_mul is None else x.float() * packed.in_mul
    if d.input_shift is not None:
        real = real - d.input_shift * packed.in_mul
    if d.input_type is not None:
        real = _through_input_type(d, real)
    y = torch.nn.functional.linear(real, weight, None if bias is None else bias.float())
    return y if d.bias is None or d.input_type is None else y + d.bias


def quantized_convolution(d: Decision, x: Tensor, bias: Tensor | None, walk: tuple[Any, ...]) -> Tensor:
    """What a convolution computes of a float input [B, C, ...] once it is quantized; walk: stride and what follows it."""
    packed = d.packed
    weight = affine.dequantize(packed.data, packed.scale, None, packed.type)
    real = x.float()
    if packed.in_mul is not None:
        real = real * packed.in_mul.reshape(-1, *[1] * (x.dim() - 2))
    if d.input_type is not None:
        real = _through_input_type(d, real)
        bias = d.bias if bias is None else bias if d.bias is None else bias.float() + d.bias
    return torch.ops.aten.convolution(real, weight, None if bias is None else bias.float(), *walk)


def _through_input_type(d: Decision, x: Tensor) -> Tensor:
    if d.input_scale is None:
        scale, zero = affine.choose_dynamic(x, d.input_type)
        return affine.fake_quantize(x, QParams(scale, zero, d.input_type))
    params = QParams(d.input_scale, d.input_zero, d.input_type)
    out = affine.fake_quantize(x, params)
    if d.input_extra is not None:
        top = float(d.input_scale) * (d.input_type.qmax - int(d.input_zero))
        for channel, k in zip(*layout(d.input_extra), strict=True):
            out[..., channel] += affine.fake_quantize((x[..., channel] - k * top).clamp(min=0), params)
    return out


def _compare(d: Decision, wanted: Tensor, found: Tensor) -> SiteError:
    error = found.double() - wanted.double()
    power, noise = float(wanted.double().square().sum()), float(error.square().sum())
    sqnr = math.inf if noise == 0 else 10 * math.log10(max(power, 1e-300) / noise)
    return SiteError(d.site, sqnr, float(error.abs().max()) if error.numel() else 0.0)

"""The weights of a site as a report shows them: a histogram, and lo, hi and scale of each channel.

Of the float weight as it is rounded, that is divided by the factors its input has; without a float model, of what the
integers stand for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.inspect.figures import Histogram
from qpass.nested import real_weight
from qpass.nested_words import HALF
from qpass.packing import Packed, spread
from qpass.plan import Decision
from qpass.ranges import Range

CHANNELS = 512
SAMPLE = 1 << 22  # values that are counted


@dataclass(frozen=True)
class WeightFigures:
    """channels: lo, hi and scale of at most CHANNELS of them, evenly picked; of: how many there are."""

    histogram: Histogram | None
    channels: dict[str, Any]


def weight_figures(d: Decision, float_weight: Tensor | None) -> WeightFigures | None:
    """The figures of a quantized site; None of another."""
    packed = d.packed
    if packed is None or not packed.stored.numel():
        return None
    weight = real_weight(packed) if float_weight is None else _divided(float_weight.detach().float().cpu(), d, packed)
    axis = (1 if d.transposed else 0) if packed.type.axis is None else packed.type.axis
    rows = weight.movedim(axis, 0).flatten(1)
    at = torch.linspace(0, len(rows) - 1, min(CHANNELS, len(rows)), dtype=torch.float64).long()
    scale = _scale_of_channels(packed, len(rows))
    lists = {"lo": rows.amin(1), "hi": rows.amax(1), "scale": scale}
    channels: dict[str, Any] = {name: values[at].tolist() for name, values in lists.items()}
    flat = weight.flatten()
    counted = Range.empty().update(flat[:: -(-len(flat) // SAMPLE)])
    return WeightFigures(Histogram.of(counted), channels | {"of": len(rows)})


def _divided(weight: Tensor, d: Decision, packed: Packed) -> Tensor:
    factor = packed.in_mul
    if factor is None or d.operation == "embedding":
        return weight
    if weight.dim() > 2:
        return weight / spread(factor.cpu(), weight, "transpose" in d.operation)
    return weight / (factor.cpu()[:, None] if d.transposed else factor.cpu())


def _scale_of_channels(packed: Packed, channels: int) -> Tensor:
    """Float32 [channels]; the largest of a channel's groups."""
    scale = packed.scale.float().cpu()
    if packed.type.widths:
        scale = scale[packed.type.widths.index(HALF)]
    if packed.type.granularity == "group":
        return scale.flatten(1).amax(1)
    return scale.flatten().expand(channels)

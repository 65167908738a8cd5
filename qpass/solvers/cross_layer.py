"""Cross-layer equalization (Nagel et al. 2019, 1906.04721, section 4.1): factors for channels from the weights alone.

    m_i = sqrt(r2_i / r1_i)      eq. 11 with m = 1 / s; r1, r2: the largest weights that make and that read channel i

so that W1_i m_i and W2_i / m_i are as large as each other. Weights stand as they will: with batch norm, and with the factors
of the values around, so all values take turns until nothing moves.

A channel without weights counts as the usual one, so that it neither gets nor takes room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qpass.geometry import Geometry
from qpass.packing import spread
from qpass.site_info import SiteInfo, Source
from qpass.solvers.channel_sizes import usual
from qpass.solvers.convolution import by_channel, by_output

SWEEPS = 20
STILL = 1e-3  # the largest change of a logarithm that is none


def from_weights(
    weights: Mapping[str, Tensor], sites: Mapping[str, SiteInfo], chosen: Sequence[Source]
) -> dict[str, Tensor]:
    """Site of the producer of each value chosen -> m [C], float32. weights: parameters by path."""
    chosen = [source for source in chosen if sites[source.site].weight in weights]
    before = {name: source.site for source in chosen for name in source.readers}
    found: dict[str, Tensor] = {}

    def standing(name: str) -> tuple[Tensor, Geometry]:
        info = sites[name]
        assert info.walk is not None
        weight = weights[info.weight or ""].detach().cpu().float()
        if before.get(name) in found:
            weight = weight / spread(found[before[name]], weight, info.walk.transposed)
        for mul in (info.norm, found.get(name)):
            weight = weight if mul is None else weight * along_outputs(mul.abs().float(), weight, info.walk)
        return weight, info.walk

    for _ in range(SWEEPS):
        moved = 0.0
        for source in chosen:
            made = usual(by_output(*standing(source.site)).abs().amax(1))
            read = torch.stack([by_channel(*standing(name)).abs().amax(1) for name in source.readers]).amax(0)
            step = (usual(read) / made).sqrt().float()
            found[source.site] = found.get(source.site, torch.ones_like(step)) * step
            moved = max(moved, float(step.log().abs().max()))
        if moved < STILL:
            break
    return found


def along_outputs(factor: Tensor, weight: Tensor, g: Geometry) -> Tensor:
    """A factor [N] of output channels, shaped to multiply the weight of a convolution that makes them."""
    ones = [1] * (weight.dim() - 2)
    if not g.transposed:
        return factor.reshape(-1, 1, *ones)
    return (
        factor.reshape(g.groups, -1)
        .repeat_interleave(weight.shape[0] // g.groups, 0)
        .reshape(weight.shape[0], -1, *ones)
    )

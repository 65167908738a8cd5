"""Factors for the channels of values between convolutions: equalize=auto and equalize=weights.

    x'_i = x_i * m_i      W'_i = W_i / m_i      of every convolution that reads x; what makes x makes x * m (migrate_conv.py)

weights   cross-layer equalization, from the weights alone (cross_layer.py)
auto      m_i = r2_i^(1-a) / max|x_i|^a or max|x_i|^-a, with the a of the least estimated error of what the readers compute:

          E = sum_i E[(x_i - Q(x_i m_i) / m_i)^2] sum_n w_ni^2  +  sum_ni var(x_i) m_i^2 step_n(m)^2 / 12

          over a sample of pixels: rounding and clipping of the input, and rounding of the weights. None where none is better.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qpass import affine, histogram
from qpass.geometry import Geometry
from qpass.observations import Observations, Observed
from qpass.packing import spread
from qpass.passes.collect_ranges import channels_of
from qpass.plan import SiteInfo, Source
from qpass.ranges import Range
from qpass.schemes import Scheme
from qpass.solvers.convolution import by_channel, channel_type, rows_of
from qpass.solvers.cross_layer import from_weights, usual
from qpass.solvers.steps import least_error

STRENGTHS = (0.5, 0.75, 1.0)
PARTS = torch.linspace(1.0, 0.2, 9)  # of the limits of an input: candidates for what is kept
PIXELS = 256  # of the sample that errors are estimated on
CLEAR = 0.95  # of the error without factors: what is not below is chance


@dataclass(frozen=True)
class Reader:
    """A convolution that reads a value. weight: float32; columns: [C, M], the same by channel of its input."""

    weight: Tensor
    walk: Geometry
    columns: Tensor

    @staticmethod
    def of(weight: Tensor, info: SiteInfo) -> Reader:
        """From its parameter."""
        assert info.walk is not None
        real = weight.detach().float()
        return Reader(real, info.walk, by_channel(real, info.walk))


def choose_factors(
    weights: Mapping[str, Tensor],
    sites: Mapping[str, SiteInfo],
    schemes: Mapping[str, Scheme],
    observations: Observations,
    together: Sequence[Sequence[SiteInfo]],
) -> dict[str, Tensor]:
    """Site of a producer -> m [C], float32, of what it makes.

    schemes: of the sites that will be quantized; together: the groups that sites and outputs are decided in.
    """
    wanted = {source: schemes[source.readers[0]] for source in free_values(sites, schemes, together)}
    chosen = [source for source, scheme in wanted.items() if scheme.equalize == "weights"]
    found = from_weights(weights, sites, chosen)
    for source, scheme in wanted.items():
        seen = observations.together(source.readers, channels_of)
        seen = None if seen is None or seen.sample is None or not seen.rows else seen
        if scheme.needs_calibration and seen is None:
            found.pop(source.site, None)
        if scheme.equalize != "auto" or scheme.activation is None or seen is None:
            continue
        readers = [Reader.of(weights[info.weight or ""], info) for info in map(sites.__getitem__, source.readers)]
        if (m := from_calibration(readers, scheme, seen)) is not None:
            found[source.site] = m
    return found


def free_values(
    sites: Mapping[str, SiteInfo], schemes: Mapping[str, Scheme], together: Sequence[Sequence[SiteInfo]]
) -> list[Source]:
    """Values whose readers are all quantized, under one scheme, and share their scale with nothing else."""
    strangers = {
        source for group in together if len({i.source for i in group}) > 1 for i in group if (source := i.source)
    }
    known = dict.fromkeys(info.source for info in sites.values() if info.source is not None)
    found = []
    for source in known:
        wanted = {schemes.get(name) for name in source.readers}
        if source not in strangers and len(wanted) == 1 and None not in wanted:
            found.append(source)
    return found


def from_calibration(readers: list[Reader], scheme: Scheme, seen: Observed) -> Tensor | None:
    """M [C], float32, of the least estimated error; None where it is no better than without."""
    channels = seen.range.channels
    assert channels is not None
    ones, reach = torch.ones_like(channels.lo), usual(channels.absmax)
    weights = usual(torch.stack([largest(reader) for reader in readers]).amax(0))
    candidates = [weights ** (1 - a) / reach**a for a in STRENGTHS] + [reach**-a for a in STRENGTHS[:-1]]
    least, best = CLEAR * error(readers, scheme, seen, ones), None
    for m in candidates:
        m = (m / m.log().mean().exp()).float()
        if (found := error(readers, scheme, seen, m)) < least:
            least, best = found, m
    return best


def largest(reader: Reader) -> Tensor:
    """The largest weight that reads each channel [C], relative to the largest of all."""
    sizes = reader.columns.abs().amax(1)
    return sizes / sizes.max().clamp(min=torch.finfo(torch.float32).tiny)


def error(readers: list[Reader], scheme: Scheme, seen: Observed, m: Tensor) -> float:
    """Estimated squared error of what the readers compute, each relative to the signal in it."""
    assert seen.sample is not None
    assert scheme.activation is not None
    qtype = replace(scheme.activation, granularity="tensor")
    x, mul = seen.sample[:PIXELS], m.double()
    wanted = x * m
    params = least_error(wanted, *limits(seen, m), qtype, PARTS[:1] if keeps_all(scheme) else PARTS)
    lost = (affine.fake_quantize(wanted, params) - wanted).double().square().mean(0) / mul**2
    spread = x.double().var(0, correction=0)
    total = 0.0
    for reader in readers:
        power = reader.columns.double().square().sum(1)
        rounding = lost @ power + (mul**2 * spread) @ step_squares(reader, m, scheme) / 12
        total += float(rounding) / max(float(spread @ power), 1e-30)
    return total


def step_squares(reader: Reader, m: Tensor, scheme: Scheme) -> Tensor:
    """Squared steps of the divided weight, summed over the weights that read each channel: float64 [C]."""
    assert scheme.weight is not None
    g, axes = reader.walk, [1] * (reader.weight.dim() - 2)
    divided = reader.weight / spread(m, reader.weight, g.transposed)
    qmax = channel_type(scheme.weight, 0).qmax
    step = rows_of(divided, g).abs().amax(1).double() / qmax
    wide = step.reshape([1, -1, *axes] if g.transposed else [-1, 1, *axes]).expand(reader.weight.shape)
    return by_channel(wide.square(), g).sum(1)


def keeps_all(scheme: Scheme) -> bool:
    """Whether a range clips nothing."""
    return scheme.dynamic or scheme.range_for("convolution") == "minmax"


def limits(seen: Observed, m: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest x * m."""
    channels = seen.range.channels
    assert channels is not None
    return (channels.lo * m).min(), (channels.hi * m).max()


def scaled(observations: Observations, sites: Iterable[str], m: Tensor) -> Observed | None:
    """What would have been seen of x * m, x what sites read: limits are exact, the histogram is that of the sample."""
    seen = observations.together(sites, channels_of)
    if seen is None or seen.sample is None:
        return None
    sample = Range.empty().update(seen.sample * m)
    lo, hi = (float(limit) for limit in limits(seen, m))
    counts = histogram.widen(sample.histogram, (sample.lo, sample.hi), (lo, hi))  # pyright: ignore[reportArgumentType]
    return Observed(Range(sample.count, lo, hi, counts, None), rows=seen.rows)

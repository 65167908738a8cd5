"""Factors for the channels of values between convolutions: equalize=auto and equalize=weights.

    x'_i = x_i * m_i      W'_i = W_i / m_i      of every convolution that reads x; what makes x makes x * m (migrate_conv.py)

weights   cross-layer equalization, from the weights alone (cross_layer.py)
auto      m_i = r_i^(1-a) / max|x_i|^a or max|x_i|^-a, r_i the largest weight that reads channel i, with the a of the least
          estimated error of what the readers compute, or no factor where none is clearly better:

          E = sum_i E[(x_i - Q(x_i m_i) / m_i)^2] sum_n w_ni^2  +  sum_ni var(x_i) m_i^2 step_n(m)^2 / 12

With factors every channel fills the range, so all of them meet values that calibration has not seen. Images are therefore
kept in two halves: the range and the error of a factor are those of one half's pixels times the factor that fits the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from qpass import affine, histogram
from qpass.geometry import Geometry
from qpass.observations import Observations, Observed
from qpass.packing import spread
from qpass.passes.collect_ranges import channels_of
from qpass.qparams import QParams
from qpass.ranges import Channels, Range
from qpass.schemes import Scheme
from qpass.site_info import SiteInfo, Source
from qpass.sizes import PLACES, places
from qpass.solvers.channel_sizes import usual
from qpass.solvers.convolution import by_channel, channel_type, rows_of
from qpass.solvers.cross_layer import from_weights

STRENGTHS = ((0.5, 0.5), (0.75, 0.25), (0.75, 0.0), (1.0, 0.0))  # exponents of reach and of weights
PARTS = torch.linspace(1.0, 0.2, 9)  # of the limits of an input: candidates for what is kept
CLEAR = 0.9  # of the error without factors: what is not below is chance


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


@dataclass(frozen=True)
class Factor:
    """M [C], float32; crossed: the factors that pixels of the first and of the second half meet as unseen ones."""

    m: Tensor
    crossed: tuple[Tensor, Tensor]


Halves = tuple[Observed, Observed]


def choose_factors(
    weights: Mapping[str, Tensor],
    sites: Mapping[str, SiteInfo],
    schemes: Mapping[str, Scheme],
    observations: Observations,
    together: Sequence[Sequence[SiteInfo]],
) -> dict[str, Factor]:
    """Site of a producer -> the factor of what it makes.

    schemes: of the sites that will be quantized; together: the groups that sites and outputs are decided in.
    """
    wanted = {source: schemes[source.readers[0]] for source in free_values(sites, schemes, together)}
    chosen = [source for source, scheme in wanted.items() if scheme.equalize == "weights"]
    found = {site: Factor(m, (m, m)) for site, m in from_weights(weights, sites, chosen).items()}
    for source, scheme in wanted.items():
        halves = halves_of(observations, source.readers)
        if scheme.needs_calibration and halves is None:
            found.pop(source.site, None)
        if scheme.equalize == "auto" and scheme.activation is not None and halves is not None:
            readers = [
                Reader.of(weights[info.weight or ""].detach().cpu(), info)
                for info in map(sites.__getitem__, source.readers)
            ]
            factor = from_calibration(readers, scheme, halves)
            found |= {} if factor is None else {source.site: factor}
    return found


def halves_of(observations: Observations, sites: Iterable[str]) -> Halves | None:
    """What was seen of the channels of the value that sites read, in two halves; None where there is not enough."""
    sites = tuple(sites)
    first, second = (observations.together(sites, partial(channels_of, half=half)) for half in (0, 1))
    if first is None or second is None or not first.rows or not second.rows:
        return None
    return first, second


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


def from_calibration(readers: list[Reader], scheme: Scheme, halves: Halves) -> Factor | None:
    """The factor of the least estimated error; None where it is no better than without."""
    read = usual(torch.stack([largest(reader) for reader in readers]).amax(0))
    reaches = [channels(half).absmax for half in halves]
    whole = torch.maximum(*reaches)

    def of_strength(a: float, weight: float) -> Factor:
        m, first, second = (balanced(read**weight / usual(reach) ** a) for reach in (whole, *reaches))
        return Factor(m, (m, m) if scheme.dynamic else (second, first))

    ones = torch.ones_like(whole)
    least, best = CLEAR * error(readers, scheme, halves, Factor(ones, (ones, ones))), None
    for a, weight in STRENGTHS:
        factor = of_strength(a, weight)
        if (found := error(readers, scheme, halves, factor)) < least:
            least, best = found, factor
    return best


def balanced(m: Tensor) -> Tensor:
    """M with a mean logarithm of 0, float32."""
    return (m / m.log().mean().exp()).float()


def channels(seen: Observed) -> Channels:
    """What was seen of each channel."""
    assert seen.range.channels is not None
    return seen.range.channels


def largest(reader: Reader) -> Tensor:
    """The largest weight that reads each channel [C], relative to the largest of all."""
    sizes = reader.columns.abs().amax(1)
    return sizes / sizes.max().clamp(min=torch.finfo(torch.float32).tiny)


def error(readers: list[Reader], scheme: Scheme, halves: Halves, factor: Factor) -> float:
    """Estimated squared error of what the readers compute, each relative to the signal in it."""
    assert scheme.activation is not None
    qtype, m = replace(scheme.activation, granularity="tensor"), factor.m.double()
    x, lost = values_of(halves, factor), []
    for part in PARTS[:1] if keeps_all(scheme) else PARTS:
        lo, hi = (part * limit for limit in limits(halves, factor))
        lost.append(rounding_error(x.value * x.mul, affine.choose_qparams(lo, hi, qtype)))
    best = min(lost, key=lambda each: float(each @ x.share))
    noise = torch.zeros_like(m).index_add_(0, x.channel, best * x.share / x.mul.square())
    mean = torch.zeros_like(m).index_add_(0, x.channel, x.value * x.share)
    spread = torch.zeros_like(m).index_add_(0, x.channel, x.value.square() * x.share) - mean.square()
    total = 0.0
    for reader in readers:
        power = reader.columns.double().square().sum(1)
        rounding = noise @ power + (m.square() * spread) @ step_squares(reader, factor.m, scheme) / 12
        total += float(rounding) / max(float(spread @ power), 1e-30)
    return total


def rounding_error(x: Tensor, params: QParams) -> Tensor:
    """Expected squared error of values, float64: of clipping, and of rounding but for an exact 0."""
    zero = 0.0 if params.zero is None else params.zero.double()
    step = params.scale.double()
    lo, hi = (params.type.qmin - zero) * step, (params.type.qmax - zero) * step
    return (x - x.clamp(lo, hi)).square() + step.square() / 12 * (x != 0)


@dataclass(frozen=True)
class Values:
    """Values of channels, and the share of their channel's that each stands for.

    channel: int64 [n]; value, share, and mul, the factor that the value meets: float64 [n].
    """

    channel: Tensor
    value: Tensor
    share: Tensor
    mul: Tensor


def values_of(halves: Halves, factor: Factor) -> Values:
    """Those that stand for the bins of both halves; none reaches further than its channel does."""
    rows, found = sum(half.rows for half in halves), []
    for half, mul in zip(halves, factor.crossed, strict=True):
        assert half.sizes is not None
        c, (channel, size) = channels(half), half.sizes.nonzero(as_tuple=True)
        value = places()[size].clamp(c.lo[channel, None], c.hi[channel, None])
        channel, share = (
            t[:, None].expand(value.shape) for t in (channel, half.sizes[channel, size] / (rows * PLACES))
        )
        found.append((channel, value.double(), share.double(), mul.double()[channel]))
    return Values(*(torch.cat(parts).flatten() for parts in zip(*found, strict=True)))


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


def limits(halves: Halves, factor: Factor) -> tuple[Tensor, Tensor]:
    """Smallest and largest x * m, also of a half's pixels times the factor of the other half."""
    ends = [
        (channels(half), mul)
        for half, crossed in zip(halves, factor.crossed, strict=True)
        for mul in (factor.m, crossed)
    ]
    return torch.stack([c.lo * mul for c, mul in ends]).min(), torch.stack([c.hi * mul for c, mul in ends]).max()


def scaled(observations: Observations, sites: Iterable[str], factor: Factor) -> Observed | None:
    """What would be seen of x * m, x what sites read: limits are exact, the histogram is made of counts by size."""
    halves = halves_of(observations, sites)
    if halves is None:
        return None
    lo, hi = (float(limit) for limit in limits(halves, factor))
    rows, x = sum(half.rows for half in halves), values_of(halves, factor)
    values = (x.value * x.mul).float().clamp(lo, hi)
    counts = histogram.count(values, lo, hi, x.share * rows * PLACES)
    return Observed(Range(int(counts.sum()), lo, hi, counts, None), rows=rows)

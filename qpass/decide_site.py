"""What is known of one site before it is decided on, and the sentences for those that stay float."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from qpass.observations import Observations, Observed
from qpass.packing import Packed, pack
from qpass.passes.other_sites import LOOKUP
from qpass.plan import Decision
from qpass.schemes import Scheme
from qpass.site_info import SiteInfo
from qpass.slices import slice_of

NO_PARAMETER = "its weight is computed, not a parameter of the model"
NOT_REAL = "its weight is {}, schemes quantize real floating-point weights"
NOT_A_PARAMETER = "its weight is a buffer of the model, not a parameter"
NOT_A_MATRIX = "its weight has {} dimensions, not two"
BY_RECIPE = "the recipe leaves it in float"
NOT_REACHED = "no calibration batch reached it, so its input has no range"
FLOAT_TABLE = "tables become integers of 2 to 8 bits; {} has other types"
NESTED = "linears alone have weights of several widths, as {} asks for; give it another scheme by a recipe"
ODD = "its {} inputs are no multiple of 4: a byte of a nested weight holds codes of four"
ROWS = "it reads rows of a parameter, and whole parameters alone are kept in several widths"
FLOAT_TYPE = "weights and inputs of convolutions become integers of 2 to 8 bits; {} has other types"


def why_type(scheme: Scheme, operation: str) -> str | None:
    """None where an operation can have a scheme's types, or why not."""
    weight, activation = scheme.weight, scheme.activation
    if weight is not None and weight.widths:
        return None if operation == "linear" else NESTED.format(scheme)
    integers = weight is not None and not weight.is_float and (activation is None or not activation.is_float)
    if integers or operation == "linear":
        return None
    return (FLOAT_TABLE if operation == LOOKUP else FLOAT_TYPE).format(scheme)


def why_nested(decision: Decision, scheme: Scheme) -> str | None:
    """None where a weight's codes can be kept in the widths of a scheme, or why not."""
    if scheme.weight is None or not scheme.weight.widths:
        return None
    if slice_of(decision.weight)[1] is not None:
        return ROWS
    return ODD.format(decision.shape[1]) if decision.shape[1] % 4 else None


def describe(weights: Mapping[str, Tensor], info: SiteInfo, observations: Observations) -> Decision:
    """The decision of a site as far as its weight and what was seen of its input say it: float, without a reason."""
    shape: tuple[int, ...] = ()
    if info.weight in weights:
        shape = tuple(weights[info.weight].shape)
        shape = shape[::-1] if info.transposed else shape
    group = observations.groups.get(info.name, info.name)
    observed = observations.observed.get(group)
    lo, hi = (observed.range.lo, observed.range.hi) if observed and observed.rows else (None, None)
    rows = observations.rows.get(info.name, 0)
    return Decision(
        info.name, info.operation, info.weight or "", shape, info.transposed, rows, group=group, lo=lo, hi=hi,
        bias_name=info.bias,
    )  # fmt: skip


def why_float(decision: Decision, scheme: Scheme | None, observed: Observed | None) -> str | None:
    """None where the scheme can quantize the site, or the sentence that says why not."""
    if scheme is None or scheme.weight is None:
        return BY_RECIPE
    unseen = observed is None or not observed.rows
    return why_type(scheme, decision.operation) or (NOT_REACHED if scheme.needs_calibration and unseen else None)


def why_weight(weights: Mapping[str, Tensor], decision: Decision) -> str | None:
    """None where the weight is a matrix of real numbers that can be packed, or why not."""
    if not decision.weight:
        return NO_PARAMETER
    if decision.weight not in weights:
        return NOT_A_PARAMETER
    weight = weights[decision.weight]
    if not (weight.is_floating_point() and weight.dtype.itemsize > 1):
        return NOT_REAL.format(str(weight.dtype).removeprefix("torch."))
    matrix = decision.operation in ("linear", LOOKUP)
    return NOT_A_MATRIX.format(weight.dim()) if matrix and weight.dim() != 2 else None


def weight_of(named: Mapping[str, Tensor], decision: Decision) -> Tensor:
    """The float weight of a linear as [N, K], on the CPU."""
    weight = named[decision.weight].detach().cpu()
    return weight.t() if decision.transposed else weight


def turned(packed: Packed) -> Packed:
    """A weight with scales by output, [N, K], as one that is held as [K, N]."""
    qtype = dataclasses.replace(packed.type, axis=1)
    if packed.type.widths:
        return dataclasses.replace(packed, type=qtype)
    return pack(packed.data.t().contiguous(), packed.scale, qtype, packed.in_mul, packed.zero)

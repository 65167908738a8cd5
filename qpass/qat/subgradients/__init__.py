"""The methods of training by name: a rule of subgradients for weights and one for inputs, each in a file of its own."""

from __future__ import annotations

from dataclasses import dataclass

from qpass.errors import QpassError, nearest
from qpass.qat.subgradients.ewgs import EWGS
from qpass.qat.subgradients.lsq import LSQ
from qpass.qat.subgradients.lsq_plus import LSQ_PLUS
from qpass.qat.subgradients.pact import PACT
from qpass.qat.subgradients.straight_through import STRAIGHT_THROUGH
from qpass.qat.subgradients.subgradient import Subgradient


@dataclass(frozen=True)
class Method:
    """weights, inputs: their rules; negative_inputs: the rule of inputs that are negative somewhere."""

    name: str
    weights: Subgradient
    inputs: Subgradient
    negative_inputs: Subgradient


METHODS = (
    Method("lsq+", LSQ_PLUS, LSQ_PLUS, LSQ_PLUS),
    Method("lsq", LSQ, LSQ, LSQ),
    Method("ewgs", EWGS, EWGS, EWGS),
    Method("pact", STRAIGHT_THROUGH, PACT, LSQ_PLUS),
    Method("ste", STRAIGHT_THROUGH, STRAIGHT_THROUGH, STRAIGHT_THROUGH),
)


def method_named(name: str) -> Method:
    """A method of METHODS."""
    names = [method.name for method in METHODS]
    if name not in names:
        raise QpassError(f"method {name!r} is not one of {', '.join(names)}.{nearest(str(name), names)}")
    return METHODS[names.index(name)]

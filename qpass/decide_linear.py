"""Decide on the weight type of linears: what a scheme asks for, or a scale for each output where groups do not fit.

    w8a8, w6a8, w4a16-c     iN/c0
    w4a8                    i4/g128  ->  i4/c0     where 128 does not divide K, or the weight is held as [K, N]
    w4a16                   u4/g128  ->  i4/c0     the same

Weights that are rounded together, since they read one input, have one type.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from qpass.plan import Decision
from qpass.qtype import QType
from qpass.schemes import Scheme

UNEVEN = "its {} inputs are no multiple of the group of {}: its weight has a scale for each output"
TURNED = "its weight is held as [K, N], where groups would run over outputs: it has a scale for each output"


def why_no_groups(decision: Decision, group: int) -> str | None:
    """None where a weight's rows can be cut into groups, or why not."""
    if decision.transposed:
        return TURNED
    return UNEVEN.format(decision.shape[1], group) if decision.shape[1] % group else None


def suited(scheme: Scheme, decisions: Sequence[Decision]) -> tuple[Scheme, str]:
    """The scheme that weights which are rounded together can have, and a note where it is not the one asked for."""
    weight = scheme.weight
    if weight is None or weight.group is None:
        return scheme, ""
    group = weight.group
    why = next((why for d in decisions if (why := why_no_groups(d, group))), None)
    if why is None:
        return scheme, ""
    if weight.widths:
        by_output = dataclasses.replace(weight, granularity="channel", axis=0, group=None)
        return dataclasses.replace(scheme, weight=by_output), why
    signed = weight.bits > 2  # of 2 bits, symmetric ones have 3 values (schemes.py, 2)
    by_output = QType(weight.bits, signed, granularity="channel", axis=0)
    return dataclasses.replace(scheme, weight=by_output), why

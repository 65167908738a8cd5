"""A linear and the nested weight that it reads, as one op: what reads the weight decides on its bits.

linear(x, nested(w), b)      ->  qpass.nested_linear(x, w, b)
embedding(nested(w), i)      ->  stays: the table is made at the width of now, then looked up
"""

from __future__ import annotations

import torch

from qpass.rewrite import rule

aten = torch.ops.aten
Q = torch.ops.qpass


@rule
def nested_linear(x, planes, scale, zero, bits, wt, wd, b):
    """linear(x, nested(w), b)  ->  qpass.nested_linear(x, w, b)

    1. it has its scales by output: held as [N, K].
    """
    return aten.linear.default(x, Q.nested.default(planes, scale, zero, bits, wt, wd), b)


@nested_linear.check
def _(wt, **_):
    return f"a weight of {wt} is held the other way round" if wt.endswith("/c1") else None


@nested_linear.to
def _(x, planes, scale, zero, bits, wt, wd, b):
    return Q.nested_linear.default(x, planes, scale, zero, bits, wt, b, wd)


NESTED = (nested_linear,)

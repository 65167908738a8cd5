"""A nested weight of what 4 and 2 bits have rounded: for 8 bits, what 4 bits leave of it is rounded to 4 bits more.

    r = w - w4,     l = argmin  (r - s8 (l - z8)) C (r - s8 (l - z8))^T      of each output

by descent on codes and steps (linear_descent.py), from the nearest codes; C: second moments of what the weight reads, I where
nothing is known of it. Matryoshka quantization (Nair et al. 2025, 2502.06786) trains one integer for all widths; here widths
of 4 and 2 bits are those that are rounded alone, to the last bit (docs/decisions/0010-nested-weights.md).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qpass import affine
from qpass.nested import joined, real_weight, type_at
from qpass.nested_words import HALF
from qpass.packing import Packed, pack
from qpass.qparams import QParams
from qpass.qtype import QType
from qpass.solvers import linear_descent
from qpass.solvers.rows import in_chunks
from qpass.solvers.steps import best_qparams


def nested(weight: Tensor, moments: Tensor | None, qtype: QType, parts: Mapping[int, Packed]) -> Packed:
    """The nested weight of a float one [N, K]. parts: what 4 and 2 bits are alone; moments: [K, K]."""
    found = dict(parts)
    if qtype.bits > HALF:
        rest, half = weight.float() - real_weight(parts[HALF]), type_at(qtype, qtype.bits)
        codes, params = in_chunks(lambda rows: rounded(rows, moments, half), rest)
        found[qtype.bits] = pack(codes, params.scale, half, None, params.zero)
    return joined(found, qtype)


def rounded(rest: Tensor, moments: Tensor | None, qtype: QType) -> tuple[Tensor, QParams]:
    """(codes [N, K], parameters) of what 4 bits leave of a weight."""
    params = best_qparams(rest, qtype)
    codes = affine.quantize(rest, params.scale, params.zero, qtype)
    return (codes, params) if moments is None else linear_descent.refined(rest, moments, codes, params)

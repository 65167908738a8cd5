"""Decide on nested weights: each width is decided on as if it were the only one, and the results become one weight.

    w{8,4,2}a16   =   w4a16 and w2a16, each with a calibration of its own, in order of execution    ->  parts
                      and, in one more pass over the float model, what 4 bits leave                 ->  solvers/nested.py

Means are not corrected in the biases: a module has one bias, and each width would want its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from torch import Tensor

from qpass.decide_linear import suited
from qpass.decide_site import turned, weight_of
from qpass.nested_words import HALF, spelled
from qpass.observations import Observed, Parts
from qpass.packing import Packed, pack
from qpass.plan import Decision, Plan
from qpass.schemes import Recipe, Scheme
from qpass.solvers.nested import nested
from qpass.storage import fingerprint


def parts_of(recipe: Recipe, solve: Callable[[Recipe, int], Plan]) -> Parts:
    """What the weights of a recipe's nested schemes are at 4 and at 2 bits. solve: the plan of a recipe without them."""
    schemes = (*(scheme for _, scheme in recipe.rules), recipe.default)
    nested = [scheme.weight.widths for scheme in schemes if scheme is not None and scheme.weight is not None]
    widths = sorted({width for each in nested for width in each if width <= HALF}, reverse=True)
    return {bits: solve(recipe_at(recipe, bits), bits).packed for bits in widths}


def recipe_at(recipe: Recipe, bits: int) -> Recipe:
    """The recipe with every nested scheme as it is at a width."""
    rules = tuple((glob, None if scheme is None else scheme_at(scheme, bits)) for glob, scheme in recipe.rules)
    return Recipe(rules, None if recipe.default is None else scheme_at(recipe.default, bits))


def scheme_at(scheme: Scheme, bits: int) -> Scheme:
    """What a nested scheme is at a width: of those it has the largest of at most `bits`, else the smallest; others stay.

    >>> str(scheme_at(Scheme.parse("w{8,4,2}a16-g32,solver=gptq"), 4))
    'w4a16-g32,solver=gptq,bias=none'
    """
    if not scheme.nested:
        return scheme
    widths = scheme.weight.widths
    width = next((width for width in widths if width <= bits), widths[-1])
    return dataclasses.replace(Scheme.parse(str(scheme).replace(spelled(widths), str(width))), bias="none")


def nest_group(
    named: Mapping[str, Tensor],
    decisions: list[Decision],
    scheme: Scheme,
    observed: Observed | None,
    parts: Parts,
) -> list[Decision]:
    """The decisions of sites that read one input, each with its nested weight."""
    scheme, note = suited(scheme, decisions)
    moments = None if observed is None or observed.moment is None or not observed.rows else observed.square
    moments = None if scheme.solver == "rtn" else moments
    made: dict[str, Packed] = {}
    for d in decisions:
        if d.weight not in made:
            alone = {bits: _by_rows(parts[bits][d.weight]) for bits in scheme.weight.widths if bits <= HALF}
            packed = nested(weight_of(named, d), moments, scheme.weight, alone)
            made[d.weight] = turned(packed) if d.transposed else packed
    return [
        dataclasses.replace(
            d, weight_type=made[d.weight].type, packed=made[d.weight], made_from=fingerprint(named[d.weight]), note=note
        )
        for d in decisions
    ]


def _by_rows(packed: Packed) -> Packed:
    """A weight as [N, K]."""
    if packed.type.axis != 1:
        return packed
    return pack(packed.data.t(), packed.scale, dataclasses.replace(packed.type, axis=0), None, packed.zero)

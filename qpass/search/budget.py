"""A budget as it is written: bytes, bits a weight, milliseconds, or the size of a scheme everywhere."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from qpass.errors import QpassError
from qpass.schemes import Scheme, is_scheme

BYTES = {"b": 1, "byte": 1, "bytes": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
EXPECTED = "bytes as a whole number or '3.5 MB', '4.5 bits' a weight, '12 ms' a call, or a scheme such as 'w4a16'"


@dataclass(frozen=True)
class Budget:
    """kind: `bytes`, `bits` (a weight) or `ms`; limit in these units. like: the scheme whose bits are the limit, or None."""

    kind: str
    limit: float
    like: Scheme | None = None

    def text(self, value: float) -> str:
        """A cost in the budget's own units."""
        return {"bytes": f"{value:,.0f} bytes", "bits": f"{value:.4g} bits a weight", "ms": f"{value:.4g} ms"}[
            self.kind
        ]


def parse(budget: object) -> Budget:
    """The budget that a text or a whole number of bytes is.

    >>> parse("1.5 MB"), parse("4 bits").kind, parse(1000).limit, parse("w4a16").kind
    (Budget(kind='bytes', limit=1500000.0, like=None), 'bits', 1000.0, 'bits')
    """
    if isinstance(budget, int) and not isinstance(budget, bool):
        return _positive(Budget("bytes", float(budget)), budget)
    if isinstance(budget, str):
        if is_scheme(budget):
            return Budget("bits", math.inf, Scheme.parse(budget))
        match = re.fullmatch(r"\s*([\d_,]*\.?\d+(?:e-?\d+)?)\s*([a-zA-Z]+)\s*", budget)
        if match:
            number, unit = float(match[1].replace(",", "").replace("_", "")), match[2].lower()
            if unit in ("bit", "bits"):
                return _positive(Budget("bits", number), budget)
            for kind, units in (("bytes", BYTES), ("ms", MILLISECONDS)):
                if unit in units:
                    return _positive(Budget(kind, number * units[unit]), budget)
    raise QpassError(f"budget={budget!r} is none; expected {EXPECTED}.")


def _positive(found: Budget, budget: object) -> Budget:
    if not found.limit > 0:
        raise QpassError(f"budget={budget!r} leaves nothing; expected {EXPECTED}, more than 0.")
    return found

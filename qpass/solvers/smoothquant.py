"""SmoothQuant (Xiao et al. 2022, 2211.10438): half of each input channel's reach moves to the weights, then to nearest.

    x'_j = x_j v_j    W'_nj = W_nj / v_j    v_j = max_n|W_nj|^(1-a) / max|x_j|^a,   a = 0.5 or the scheme's `smooth`

As `smooth=0.5,solver=rtn` (smooth.py), where `smooth=auto` would try several strengths.
"""

from __future__ import annotations

import dataclasses

from qpass.schemes import Scheme

STRENGTH = 0.5
UNMOVED = "its input is the activation of another linear, where a product has its price: its reach is not moved"


def with_strength(scheme: Scheme) -> Scheme:
    """The scheme with the method's own strength, if the solver is this one and none is given."""
    if scheme.solver != "smoothquant" or scheme.smooth != "auto":
        return scheme
    return dataclasses.replace(scheme, smooth=STRENGTH)

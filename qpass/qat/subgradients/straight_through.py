"""The straight-through estimator, clipped: rounding passes the gradient on, what is clipped gets none.

    dL/dx = dL/dy   where low < x / s + z < high,   else 0

(Bengio et al. 2013, 1308.3432, section 4; with ranges that follow the values, Jacob et al. 2018, 1712.05877, section 3.)
Nothing is learned but the weights: a weight's step is that of its largest values at every call, an input's that of an
exponential moving average of its range.
"""

from __future__ import annotations

from qpass.qat.subgradients.subgradient import Subgradient, clipped

STRAIGHT_THROUGH = Subgradient("ste", clipped)

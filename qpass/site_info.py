"""What a capture tells of a site, before anything is decided."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from qpass.geometry import Geometry


@dataclass(frozen=True)
class Source:
    """What makes a value whose channels can be scaled there (passes/scalable.py): the site of a convolution, and the sites
    of all that read the value.
    """

    site: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class SiteInfo:
    """What a capture tells of a site, or of an `output` or `operand` of convolutions (passes/conv_values.py).

    weight: parameter path; transposed: it is [K, N]; bias: path of the parameter added to its product, or ""; head: the graph
    shows that it makes the logits; from_epilogue: its input is the activation of another linear, so a product in front of
    it would cost a pass over memory; walk: of a convolution; norm: float64 [N], what a batch norm behind it multiplies by;
    source: of its input, or of an output itself, where channels can be scaled.
    """

    name: str
    operation: str
    weight: str | None
    transposed: bool = False
    from_epilogue: bool = False
    walk: Geometry | None = None
    norm: Tensor | None = None
    source: Source | None = None
    head: bool = False
    bias: str = ""

"""How a convolution walks over its input: what is known of it beside its weight.

    Conv2d(C, N, (3, 5), stride=2, groups=g)   ->   kernel (3, 5), stride (2, 2), padding (0, 0), dilation (1, 1), groups g

Plain data: a plan holds it, and any layer may read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks over its input; every tuple has one number for each spatial axis.

    weight: [N, C / groups, *kernel], or [C, N / groups, *kernel] where transposed.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    @property
    def axes(self) -> int:
        """Number of spatial axes."""
        return len(self.kernel)

    @property
    def operation(self) -> str:
        """`conv2d`, `conv_transpose1d`, ..."""
        return f"conv_transpose{self.axes}d" if self.transposed else f"conv{self.axes}d"

"""Convolutions of known networks as data, and random int8 samples of them, for the tuner, the benchmark and its checks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qpass_kernels import conv, conv_depthwise
from qpass_kernels.configs import Config, conv_kind
from qpass_kernels.conv_finish import Finish
from qpass_kernels.conv_weights import Window, correction, depth, exact_sums, pack, pack_depthwise


@dataclass(frozen=True)
class Layer:
    """A convolution of images of size x size, from c channels to n, padded by half of its kernel."""

    c: int
    n: int
    kernel: int
    stride: int
    size: int
    groups: int = 1

    @property
    def window(self) -> Window:
        """What slides over an image."""
        return Window(*((value, value) for value in (self.kernel, self.stride, self.kernel // 2, 1)))

    @property
    def out(self) -> int:
        """Rows, and columns, of the result."""
        return self.window.sizes(self.size, self.size)[0]

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel has a kernel of its own."""
        return self.groups == self.c == self.n

    @property
    def is_matmul(self) -> bool:
        """Whether it is a matmul of pixels, unless a residual of codes is added (conv.is_matmul)."""
        return self.kernel == self.stride == self.groups == 1 and self.c == depth(self.c)

    def __str__(self) -> str:
        name = (
            "depthwise" if self.is_depthwise else f"{self.c}>{self.n}" + ("" if self.groups == 1 else f"/{self.groups}")
        )
        return f"{name} {self.kernel}x{self.kernel}" + f"/{self.stride}" * (self.stride > 1) + f" at {self.size}"


RESNET50 = (
    Layer(3, 64, 7, 2, 224),
    *(Layer(64, 64, 1, 1, 56), Layer(64, 64, 3, 1, 56), Layer(64, 256, 1, 1, 56), Layer(256, 64, 1, 1, 56)),
    *(Layer(256, 128, 1, 1, 56), Layer(128, 128, 3, 2, 56), Layer(128, 512, 1, 1, 28), Layer(256, 512, 1, 2, 56)),
    *(Layer(512, 128, 1, 1, 28), Layer(128, 128, 3, 1, 28), Layer(512, 256, 1, 1, 28), Layer(256, 256, 3, 2, 28)),
    *(Layer(256, 1024, 1, 1, 14), Layer(512, 1024, 1, 2, 28), Layer(1024, 256, 1, 1, 14), Layer(256, 256, 3, 1, 14)),
    *(Layer(1024, 512, 1, 1, 14), Layer(512, 512, 3, 2, 14), Layer(512, 2048, 1, 1, 7), Layer(1024, 2048, 1, 2, 14)),
    *(Layer(2048, 512, 1, 1, 7), Layer(512, 512, 3, 1, 7)),
)
DEPTHWISE = tuple(  # those of MobileNetV2: channels, stride, size
    Layer(c, c, 3, stride, size, c)
    for c, stride, size in (
        *((32, 1, 112), (96, 2, 112), (144, 1, 56), (144, 2, 56), (192, 1, 28), (192, 2, 28)),
        *((384, 1, 14), (576, 1, 14), (576, 2, 14), (960, 1, 7)),
    )
)
POINTWISE = tuple(  # those of MobileNetV2: channels, outputs, size
    Layer(c, n, 1, 1, size)
    for c, n, size in (
        *((32, 16, 112), (16, 96, 112), (96, 24, 56), (24, 144, 56), (144, 24, 56), (144, 32, 28), (32, 192, 28)),
        *((192, 32, 28), (192, 64, 14), (64, 384, 14), (384, 64, 14), (384, 96, 14), (96, 576, 14), (576, 96, 14)),
        *((576, 160, 7), (160, 960, 7), (960, 160, 7), (960, 320, 7), (320, 1280, 7)),
    )
)
MOBILENET = (Layer(3, 32, 3, 2, 224), *DEPTHWISE, *POINTWISE)
NETWORKS = {"resnet50": RESNET50, "mobilenet-v2": MOBILENET}
ZERO = -20  # of the codes of a sample's images, and of a residual


@dataclass(frozen=True, eq=False)
class Images:
    """A layer's input [B, C, H, W], packed weight, correction or None, and what happens to the sums: relu, codes."""

    layer: Layer
    x: Tensor
    weights: tuple[Tensor | None, ...]
    after: Finish

    def copies(self, count: int) -> list[Images]:
        """The sample and others alike, whose weights and images lie elsewhere in memory."""
        clones = (
            (self.x.clone(), tuple(None if w is None else w.clone() for w in self.weights)) for _ in range(count - 1)
        )
        return [self, *(replace(self, x=x, weights=weights) for x, weights in clones)]

    def run(self, config: Config | None = None) -> Tensor:
        """The convolution by its kernel: int8 [B, N, OH, OW]."""
        window, groups = self.layer.window, self.layer.groups
        if self.layer.is_depthwise:
            return conv_depthwise.convolve(self.x, self.weights[0], ZERO, window, self.after, groups, config)
        return conv.convolve(self.x, *self.weights, window, self.after, groups, config)

    def exact(self, some: list[int]) -> Tensor:
        """The result of some of the images, from sums in float64."""
        x, window, groups = self.x[some], self.layer.window, self.layer.groups
        after = self.after if self.after.other is None else replace(self.after, other=self.after.other[some])
        if self.layer.is_depthwise:
            return after.reference(conv_depthwise.sums(x, self.weights[0], ZERO, window))
        return after.reference(exact_sums(x, *self.weights, window, groups))

    def steps_off(self, y: Tensor, some: list[int]) -> float:
        """How many codes y is off at most, on some of the images; rounding may put a right one off by one."""
        return apart(y[some], self.exact(some))


def images(layer: Layer, batch: int, device: torch.device | str, residual: bool = False) -> Images:
    """Random codes for a layer; the result spreads over the codes that it is written in. residual: codes are added."""
    deep, device = layer.c // layer.groups, torch.device(device)
    drawn = lambda *shape: torch.randint(-128, 128, shape, dtype=torch.int8, device=device)  # noqa: E731
    x = drawn(batch, layer.c, layer.size, layer.size).contiguous(memory_format=torch.channels_last)
    weight = drawn(layer.n, deep, layer.kernel, layer.kernel)
    spread = 74.0 * 74.0 * (deep * layer.kernel**2) ** 0.5
    alpha = (torch.rand(layer.n, device=device) + 0.5) / spread
    beta = torch.randn(layer.n, device=device)
    other = drawn(batch, layer.out, layer.out, layer.n).permute(0, 3, 1, 2) if residual else None
    more = {"other": other, "other_scale": 0.01, "other_zero": ZERO} if residual else {}
    after = Finish(alpha, beta, act="relu", out_scale=0.02, out_zero=-128, out_dtype=torch.int8, **more)
    if layer.is_depthwise:
        return Images(layer, x, (pack_depthwise(weight),), after)
    return Images(layer, x, (pack(weight), correction(weight, ZERO)), after)


def product(layer: Layer, batch: int) -> tuple[int, int, int, int]:
    """(pixels of the result, outputs of a group, channels of a group as kernels read them, a row of the packed weight)."""
    deep = depth(layer.c // layer.groups)
    return batch * layer.out**2, layer.n // layer.groups, deep, layer.kernel**2 * deep


def key(layer: Layer, batch: int) -> tuple[str, int, int, int]:
    """What a measured configuration of the layer is looked up by (measured.known), where it is not a matmul of pixels."""
    m, n, c, k = product(layer, batch)
    return conv_kind(layer.window.kernel, layer.window.stride, c, layer.groups), m, n, k


def apart(y: Tensor, base: Tensor) -> float:
    """How many codes two results differ by at most."""
    return float((y.int() - base.int()).abs().max())

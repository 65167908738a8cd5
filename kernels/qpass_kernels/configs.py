"""Which kernel, and which tiles: measured where it was tuned, else a rule.

The number of tokens M is taken in buckets, so that a few measurements serve all. A measured entry wins (tuning.py keeps
them on disk, by GPU); the rules below are arithmetic: weights on the left while the bytes of the weights bound the time, K
split until every processor has two programs; tensor descriptors and large tiles from 256 tokens on.
"""

from __future__ import annotations

import bisect
import functools
from dataclasses import asdict, dataclass
from typing import Any

from qpass_kernels.launch import Chip

PIXELS = tuple(4**i for i in range(3, 13))  # buckets of pixels of a convolution's result
BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
HOW = ("streamed", "persistent", "dequantized", "library")


@dataclass(frozen=True)
class Config:
    """how: the kernel, one of HOW. bm tokens by bn outputs by bk inputs are a tile; split slices of K; band: rows of tiles
    that are walked together; warps and stages as Triton counts them.
    """

    how: str = "streamed"
    bm: int = 16
    bn: int = 128
    bk: int = 128
    split: int = 1
    band: int = 8
    warps: int = 4
    stages: int = 4

    def to_json(self) -> dict[str, Any]:
        """The fields, by name."""
        return asdict(self)

    @staticmethod
    def from_json(fields: Any) -> Config:
        """A configuration from its fields; ValueError where they are not those of one."""
        known = asdict(Config())
        if not isinstance(fields, dict) or not fields.keys() <= known.keys():
            raise ValueError(f"a configuration has the fields {', '.join(known)}")
        made = Config(**fields)
        numbers = [value for name, value in asdict(made).items() if name != "how"]
        if made.how not in HOW or not all(isinstance(v, int) and 0 < v <= 1024 for v in numbers):
            raise ValueError(f"not a configuration: {fields}")
        return made


def bucket(m: int, kind: str = "") -> int:
    """What stands for M, tokens or a convolution's pixels: the next of BUCKETS or PIXELS, the last for all beyond."""
    sizes = PIXELS if kind.startswith("conv") else BUCKETS
    return sizes[min(bisect.bisect_left(sizes, m), len(sizes) - 1)]


@functools.lru_cache(4096)
def conv_kind(kernel: tuple[int, ...], stride: tuple[int, ...], channels: int, groups: int) -> str:
    """What measured configurations of a convolution are filed under: conv3x3c64g1, conv3x3s2x2c64g1. channels: of a group.

    They are measured on int8, and serve fp8 too, whose tiles take the same bytes.
    """
    steps = "" if stride == (1, 1) else f"s{stride[0]}x{stride[1]}"
    return f"conv{kernel[0]}x{kernel[1]}{steps}c{channels}g{groups}"


def why_no_convolution(config: Config, chip: Chip) -> str | None:
    """None where the kernel of convolutions can run a configuration on a chip, or why not."""
    if config.how != "streamed" or min(config.bm, config.bn) < 16 or config.bk < 32:
        return "tiles of a streamed kernel are 16 x 16 x 32 or more"
    if config.split > 8 or config.warps > 32:
        return "more than 8 slices, or more than 32 warps"
    if config.stages * config.bk * (config.bm + config.bn) > chip.shared:
        return f"its stages take more than {chip.shared} bytes"
    return None


@functools.lru_cache(4096)
def rule(kind: str, m: int, n: int, k: int, chip: Chip) -> Config:
    """The configuration of a product [M, K] x [N, K] where none was measured. kind: w8a8, fp8, w8a16, w4a16 or w4a8."""
    tokens = bucket(m)
    if tokens > 128:
        if kind in ("w8a16", "w4a16"):
            return Config("dequantized", bn=64)
        if kind != "w4a8" and k % 16 == 0 and chip.capability >= (9, 0):
            return Config("persistent", 128, 256, 128, warps=8, stages=4 if chip.capability < (10, 0) else 3)
    bm = min(tokens, 128)
    warps = 4 if bm <= (32 if chip.capability < (10, 0) else 16) else 8
    bytes_of_x = 2 if kind in ("w8a16", "w4a16") else 1
    bytes_of_w = 0.5 if kind in ("w4a16", "w4a8") else 1
    stages = 4 if bm <= 64 else 3
    while stages > 2 and stages * 128 * (128 * bytes_of_w + bm * bytes_of_x) > 0.9 * chip.shared:
        stages -= 1
    return Config("streamed", bm, 128, 128, split(m, n, k, bm, chip), warps=warps, stages=stages)


def split(m: int, n: int, k: int, bm: int, chip: Chip) -> int:
    """Slices of K: a power of two up to 8, until there are two programs a processor, none with less than 4 blocks."""
    tiles = -(-m // bm) * -(-n // 128)
    slices = 1
    while slices < 8 and tiles * slices < 2 * chip.processors and k // 128 >= 8 * slices:
        slices *= 2
    return slices

"""The configurations that the tuner tries for a product, as data; those that cannot run on a chip are left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, replace

from qpass_kernels import conv
from qpass_kernels.configs import Config, bucket, rule
from qpass_kernels.launch import Chip

# bucket of M -> tiles of tokens of the streamed kernels; beyond: those of 128
TOKENS = {16: (16,), 32: (32, 16), 64: (64, 32), 128: (128, 64)}
OUTPUTS = (128, 64)
BLOCKS = {"w8a8": (128, 256), "fp8": (128, 256)}  # the others have the block of their packed layout
SPLITS = (1, 2, 4, 8)
WARPS = (4, 8)
STAGES = (4, 3, 5, 6)
PERSISTENT = (  # bm, bn, bk, band, warps, stages
    (128, 256, 128, 8, 8, 4),
    (128, 256, 128, 8, 8, 3),
    (128, 256, 128, 16, 8, 4),
    (128, 256, 64, 8, 8, 4),
    (128, 128, 128, 8, 4, 4),
    (128, 128, 128, 8, 8, 4),
    (128, 128, 128, 8, 8, 5),
    (256, 128, 128, 8, 8, 4),
    (256, 128, 128, 8, 8, 3),
    (64, 256, 128, 8, 4, 4),
)
DEQUANTIZED = (64, 32, 128)  # bn
BYTES_OF_X = {"w8a16": 2, "w4a16": 2}
BYTES_OF_W = {"w4a16": 0.5, "w4a8": 0.5}


def candidates(kind: str, m: int, n: int, k: int, chip: Chip) -> list[Config]:
    """What to try for a product [M, K] x [N, K]: the rule's choice first, then what is most like it."""
    first = rule(kind, m, n, k, chip)
    tokens = bucket(m)
    found = []
    if tokens > 64 and kind in ("w8a8", "fp8"):
        if k % 16 == 0 and chip.capability >= (9, 0):
            found += [c for c in _persistent() if shared(kind, c) <= chip.shared]
        # where torch's own product does not take an epilogue, the tiles of a streamed kernel count
        found.append(replace(rule(kind, min(m, 128), n, k, chip), how="library", split=1))
    if tokens > 32 and kind in ("w8a16", "w4a16"):
        found += [Config("dequantized", bn=bn) for bn in DEQUANTIZED]
    found += _streamed(kind, m, n, k, chip)
    return [first, *sorted((c for c in dict.fromkeys(found) if c != first), key=lambda c: _unlike(c, first))]


def shared(kind: str, config: Config) -> float:
    """Bytes of shared memory that a configuration's stages take, estimated."""
    x = config.bm * config.bk * BYTES_OF_X.get(kind, 1)
    return config.stages * (x + config.bn * config.bk * BYTES_OF_W.get(kind, 1))


def _streamed(kind: str, m: int, n: int, k: int, chip: Chip) -> Iterator[Config]:
    sizes = TOKENS.get(bucket(m), (128,))
    blocks = BLOCKS.get(kind, (128,))
    for bm, bn, bk, split, warps, stages in itertools.product(sizes, OUTPUTS, blocks, SPLITS, WARPS, STAGES):
        config = Config("streamed", bm, bn, bk, split, warps=warps, stages=stages)
        tiles = -(-m // bm) * -(-n // bn)
        few = -(-k // bk)
        if shared(kind, config) > chip.shared or stages > max(few // split, 3):
            continue
        if split > 1 and (split * 2 > few or tiles * split > 8 * chip.processors):
            continue
        if (warps == 8 and bn * bm < 2048) or bn * bm > warps * 32 * 128:  # idle warps; too many sums for the registers
            continue
        yield config


def _persistent() -> Iterator[Config]:
    for bm, bn, bk, band, warps, stages in PERSISTENT:
        yield Config("persistent", bm, bn, bk, band=band, warps=warps, stages=stages)


def _unlike(config: Config, first: Config) -> int:
    """How many fields differ: a limited time goes to the neighbours of the rule's choice, and to each other kernel early."""
    if config.how != first.how:
        return 4 if config.how == "streamed" else 1
    mine, its = asdict(config), asdict(first)
    return sum(mine[name] != its[name] for name in its)


def for_convolution(m: int, n: int, c: int, k: int, groups: int, chip: Chip) -> list[Config]:
    """What to try for a convolution of M pixels, N outputs, C channels of a group, sums of K: the rule's choice first."""
    first = conv.rule(m, n, c, k, groups, chip)
    found = []
    blocks = sorted({first.bk, max(first.bk // 2, 32)}, reverse=True)
    for bm, bn, bk, split, warps, stages in itertools.product(
        (128, 64, 256), (256, 128, 64, 32, 16), blocks, SPLITS, WARPS, (4, 3)
    ):
        config = Config("streamed", bm, bn, bk, split, warps=warps, stages=stages)
        tiles = -(-m // bm) * -(-n // bn) * groups
        if not min(n, 32) <= bn <= max(2 * n, 16) or stages * bk * (bm + bn) > 0.9 * chip.shared:
            continue
        if not 2048 <= bm * bn // (warps // 4) <= 128 * 128 or (warps == 4 and bm > 128):
            continue
        if split > 1 and (2 * split * bk > k or tiles * split > 2 * chip.processors):
            continue
        found.append(config)
    return [first, *sorted((f for f in dict.fromkeys(found) if f != first), key=lambda f: _unlike(f, first))]

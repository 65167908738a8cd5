"""How packed weights lie in memory, so that a kernel turns them into operands with a few instructions and no permutation.

A row of K codes is cut into blocks (128 codes, or fewer; the last filled up with zeros), and the codes of a block go into
words so that equal bits of neighbouring words are neighbours in k:

    w4a16   16-bit words, Q = block / 4:   word j holds the codes of k = j, j + Q, j + 2 Q, j + 3 Q, 4 bits each, lowest first
    w8a16   16-bit words, Q = block / 2:   word j holds the codes of k = j, j + Q, 8 bits each
    w4a8    bytes,        Q = block / 2:   byte j holds the codes of k = j, j + Q, 4 bits each

So the lowest bits of Q neighbouring words are the operand of one dot of depth Q, the next bits that of the next.
`unpack(pack(q)) == q`. 4-bit codes of w4a16 are 0 .. 15; those of w4a8 and w8a16 are signed, in two's complement.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
# kind -> bits of a code, codes of a word, dtype of a word, signed
LAYOUTS = {
    "w4a16": (4, 4, torch.uint16, False),
    "w8a16": (8, 2, torch.uint16, True),
    "w4a8": (4, 2, torch.uint8, True),
}


def block_of(kind: str, group: int) -> int:
    """Codes of a block: 128, or twice a small group of w4a8, so that one dot has one scale. group 0: one scale a row."""
    return 2 * group if kind == "w4a8" and 0 < group < BLOCK // 2 else BLOCK


def why_no_group(kind: str, group: int, k: int) -> str | None:
    """None where the kernels of a kind take groups of a row of K codes, or why not. 0: one scale a row."""
    if group == 0 or (kind == "w8a16" and group == k):
        return None
    if kind == "w8a16":
        return f"8-bit weights have one scale a row, not groups of {group}"
    if k % group:
        return f"a group of {group} does not divide the {k} inputs of a row"
    if group not in (32, 64) and group % BLOCK:
        return f"groups are of 32, 64 or a multiple of {BLOCK}, not {group}"
    return None


def pack(codes: Tensor, kind: str, block: int = BLOCK) -> Tensor:
    """[N, K] integers -> [N, ceil(K / block) * block / codes of a word] words."""
    bits, count, dtype, signed = LAYOUTS[kind]
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if codes.dim() != 2:
        raise ValueError(f"{kind}: codes must be [N, K], not {tuple(codes.shape)}")
    if codes.numel() and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise ValueError(f"{kind}: codes must lie in {low} .. {high}, not {int(codes.min())} .. {int(codes.max())}")
    n, k = codes.shape
    filled = torch.nn.functional.pad(codes.to(torch.int32), (0, -k % block)) & (2**bits - 1)
    parts = filled.reshape(n, filled.shape[1] // block, count, block // count)
    words = sum(parts[:, :, i] << bits * i for i in range(count))
    return _narrow(words.reshape(n, filled.shape[1] // count), dtype)


def unpack(words: Tensor, kind: str, k: int, block: int = BLOCK) -> Tensor:
    """The codes [N, K] that `pack` packed: int8, uint8 where unsigned."""
    bits, count, _, signed = LAYOUTS[kind]
    held = words.view(torch.int16 if words.dtype == torch.uint16 else torch.uint8).to(torch.int32)
    n, q = words.shape[0], block // count
    held = held.reshape(n, words.shape[1] // q, 1, q)
    parts = [(held >> bits * i) & (2**bits - 1) for i in range(count)]
    codes = torch.cat(parts, 2).reshape(n, words.shape[1] * count)[:, :k]
    if not signed:
        return codes.to(torch.uint8)
    return (codes - ((codes >> (bits - 1)) << bits)).to(torch.int8)


def _narrow(words: Tensor, dtype: torch.dtype) -> Tensor:
    """int32 words of up to 16 bits in 8 or 16; torch has few operations on uint16, so by way of int16."""
    if dtype == torch.uint8:
        return words.to(torch.uint8)
    return (words - ((words >> 15) << 16)).to(torch.int16).view(torch.uint16)


def group_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [N, G] -> float16 [G, N], each row's largest at most 1, and float32 [N] to multiply by at the end.

    A product of the two is within 2^-11 of the scale, for scales down to a sixteen-thousandth of their row's largest. Raises
    ValueError where a scale is negative or not finite; one of 0 makes its weights 0.
    """
    if scale.numel() and not (bool(torch.isfinite(scale).all()) and float(scale.min()) >= 0):
        row, group = (~(torch.isfinite(scale) & (scale >= 0))).nonzero()[0].tolist()
        raise ValueError(
            f"scales must be finite and not negative; that of row {row}, group {group} is {scale[row, group]}"
        )
    top = scale.amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    return (scale / top[:, None]).to(torch.float16).t().contiguous(), top

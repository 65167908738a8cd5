"""Packed weights: what goes in comes out, and a kernel's two forms of unpacking are one."""

import re

import pytest
import torch

from qpass_kernels import layouts, unpack

RANGES = {"w4a16": (0, 16), "w8a16": (-128, 128), "w4a8": (-8, 8)}


@pytest.mark.parametrize("shape", [(1, 1), (3, 128), (5, 200), (2, 33), (0, 128)], ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("kind", RANGES)
def test_round_trip(kind, shape, block):
    codes = torch.randint(*RANGES[kind], shape)
    words = layouts.pack(codes, kind, block)
    bits, count, dtype, _ = layouts.LAYOUTS[kind]
    assert words.dtype == dtype
    assert words.shape == (shape[0], -(-shape[1] // block) * block // count)
    assert bits * count == 8 * dtype.itemsize
    assert torch.equal(layouts.unpack(words, kind, shape[1], block).long(), codes)


def test_where_codes_lie():
    """Word j of a w4a16 block holds the codes of k = j, j + 32, j + 64, j + 96."""
    word = layouts.pack(torch.arange(128).reshape(1, 128) // 8, "w4a16").view(torch.int16).int()[0, 5] & 0xFFFF
    assert [int(word >> 4 * i) & 15 for i in range(4)] == [(5 + 32 * i) // 8 for i in range(4)]


@pytest.mark.parametrize("kind", RANGES)
def test_codes_out_of_range(kind):
    low, high = RANGES[kind]
    for value in (low - 1, high):
        with pytest.raises(ValueError, match=f"codes must lie in {low} .. {high - 1}"):
            layouts.pack(torch.full((2, 128), value), kind)
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        layouts.pack(torch.zeros(4, dtype=torch.int8), kind)


@pytest.mark.parametrize(
    ("kind", "group", "k", "why"),
    [
        ("w4a16", 128, 256, None),
        ("w4a16", 0, 77, None),
        ("w4a8", 32, 96, None),
        ("w4a8", 100, 256, "does not divide"),
        ("w4a8", 16, 256, "32, 64 or a multiple of 128"),
        ("w8a16", 64, 256, "one scale a row"),
    ],
)
def test_groups(kind, group, k, why):
    found = layouts.why_no_group(kind, group, k)
    assert found is None if why is None else why in found


def test_group_scales():
    scale = torch.rand(7, 5) * torch.logspace(-30, 3, 7)[:, None]
    half, top = layouts.group_scales(scale)
    assert half.dtype == torch.float16
    torch.testing.assert_close((half.float() * top).t(), scale, rtol=2**-11, atol=0)
    assert torch.isfinite(layouts.group_scales(torch.zeros(2, 3))[0]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none(value):
    scale = torch.ones(3, 4)
    scale[2, 1] = value
    with pytest.raises(ValueError, match=f"that of row 2, group 1 is {value}"):
        layouts.group_scales(scale)


def lanes(value):
    return value & 0xFFFF, value >> 16 & 0xFFFF


def float_of(bits, kind):
    held = torch.tensor([bits], dtype=torch.int32).to(torch.int16)
    return float(held.view(torch.bfloat16 if kind == "bf16x2" else torch.float16)[0])


def bits_of(value, kind):
    held = torch.tensor([value], dtype=torch.bfloat16 if kind == "bf16x2" else torch.float16)
    return int(held.view(torch.int16)[0]) & 0xFFFF


def run(code, *inputs, outputs):
    """Runs a block of PTX on 32-bit registers: just the instructions that unpack.py uses."""
    held = {f"${outputs + i}": value for i, value in enumerate(inputs)}
    number = lambda word: held[word] if word in held else int(word, 0)
    for line in code.strip("{} \n").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, _, rest = line.partition(" ")
        to, *args = re.split(r",\s*", rest)
        values = [number(a) for a in args]
        if name == "mov.b32":
            held[to] = values[0]
        elif name == "shr.u32":
            held[to] = values[0] >> values[1]
        elif name == "shl.b32":
            held[to] = values[0] << values[1] & 0xFFFFFFFF
        elif name == "and.b32":
            held[to] = values[0] & values[1]
        elif name == "lop3.b32":
            a, b, c, table = values
            held[to] = sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))
        else:
            kind = re.fullmatch(r"fma\.rn\.(bf16x2|f16x2)", name)[1]
            parts = [[float_of(lane, kind) for lane in lanes(v)] for v in values]
            low, high = (bits_of(parts[0][i] * parts[1][i] + parts[2][i], kind) for i in range(2))
            held[to] = low | high << 16
    return [held[f"${i}"] for i in range(outputs)]


def words():
    """Pairs of 16-bit words in which every byte and every nibble stands in every place."""
    first = torch.arange(0, 65536, 257).tolist()
    return [(a, (a * 31 + 77) & 0xFFFF) for a in first]


@pytest.mark.parametrize("kind", ["bf16x2", "f16x2"])
def test_nibbles(kind):
    code = (unpack.NIBBLES_BF16 if kind == "bf16x2" else unpack.NIBBLES_FP16).value
    base = 0xC300 if kind == "bf16x2" else 0xE400
    for i, (a, b) in enumerate(words()):
        zero = i % 16
        found = run(code, a | b << 16, (base | zero) * 0x10001, outputs=4)
        for place, register in enumerate(found):
            expected = [(word >> 4 * place & 15) - zero for word in (a, b)]
            assert [float_of(lane, kind) for lane in lanes(register)] == expected


@pytest.mark.parametrize("kind", ["bf16x2", "f16x2"])
def test_bytes(kind):
    code = (unpack.BYTES_BF16 if kind == "bf16x2" else unpack.BYTES_FP16).value
    signed = lambda byte: byte - 256 * (byte >> 7)
    for a, b in words():
        for place, register in enumerate(run(code, a | b << 16, outputs=2)):
            expected = [signed(word >> 8 * place & 255) for word in (a, b)]
            assert [float_of(lane, kind) for lane in lanes(register)] == expected


def test_halves():
    for a, b in words():
        low, high = run(unpack.HALVES.value, a | b << 16, outputs=2)
        for place in range(4):
            byte = (a | b << 16) >> 8 * place & 255
            assert low >> 8 * place & 255 == (byte & 15) << 4
            assert high >> 8 * place & 255 == byte & 0xF0

"""Packed weights into operands inside a kernel: an inline-assembly form for CUDA, and a plain one for the interpreter.

A 16-bit float with a suitable exponent has integers in its mantissa: bfloat16 0x4300 | q is 128 + q for q < 128, float16
0x6400 | q is 1024 + q for q < 1024. So a code becomes a float by one LOP3, exact, and a subtraction takes off the exponent's
share together with the zero point (Kim et al. 2022, arXiv 2211.10017, section 3.3). Two codes a register, counted in
instructions a weight: w4a16 1.4, w8a16 1.75 (bfloat16) and 1.25 (float16), w4a8 0.4. The two forms are equal bit by bit.
"""

import triton
import triton.language as tl

# $0 .. $3: operands, two values each; $4: two words; $5: minus (128 or 1024 + zero point), twice
NIBBLES = """{{
    .reg .b32 t, mask, magic, one;
    mov.b32 mask, 0x000F000F;
    mov.b32 magic, {magic};
    mov.b32 one, {one};
    lop3.b32 $0, $4, mask, magic, 0xEA;
    shr.u32 t, $4, 4;
    lop3.b32 $1, t, mask, magic, 0xEA;
    shr.u32 t, $4, 8;
    lop3.b32 $2, t, mask, magic, 0xEA;
    shr.u32 t, $4, 12;
    lop3.b32 $3, t, mask, magic, 0xEA;
    fma.rn.{type} $0, $0, one, $5;
    fma.rn.{type} $1, $1, one, $5;
    fma.rn.{type} $2, $2, one, $5;
    fma.rn.{type} $3, $3, one, $5;
}}"""
NIBBLES_BF16 = tl.constexpr(NIBBLES.format(magic="0x43004300", one="0x3F803F80", type="bf16x2"))
NIBBLES_FP16 = tl.constexpr(NIBBLES.format(magic="0x64006400", one="0x3C003C00", type="f16x2"))

# $0, $1: operands; $2: two words. A byte b is (b & 127) - (b & 128): both with 128 added by the exponent.
BYTES_BF16 = tl.constexpr("""{
    .reg .b32 t, low, sign, magic, minus, s;
    mov.b32 low, 0x007F007F;
    mov.b32 sign, 0x00800080;
    mov.b32 magic, 0x43004300;
    mov.b32 minus, 0xBF80BF80;
    lop3.b32 $0, $2, low, magic, 0xEA;
    lop3.b32 s, $2, sign, magic, 0xEA;
    fma.rn.bf16x2 $0, s, minus, $0;
    shr.u32 t, $2, 8;
    lop3.b32 $1, t, low, magic, 0xEA;
    lop3.b32 s, t, sign, magic, 0xEA;
    fma.rn.bf16x2 $1, s, minus, $1;
}""")
# 0x6400 | (b ^ 128) is 1152 + b
BYTES_FP16 = tl.constexpr("""{
    .reg .b32 t, mask, magic, one, less;
    mov.b32 mask, 0x00FF00FF;
    mov.b32 magic, 0x64806480;
    mov.b32 one, 0x3C003C00;
    mov.b32 less, 0xE480E480;
    lop3.b32 $0, $2, mask, magic, 0x6A;
    fma.rn.f16x2 $0, $0, one, less;
    shr.u32 t, $2, 8;
    lop3.b32 $1, t, mask, magic, 0x6A;
    fma.rn.f16x2 $1, $1, one, less;
}""")
# $0, $1: four bytes each, 16 times the signed code; $2: four bytes of two codes
HALVES = tl.constexpr("""{
    .reg .b32 t;
    shl.b32 t, $2, 4;
    and.b32 $0, t, 0xF0F0F0F0;
    and.b32 $1, $2, 0xF0F0F0F0;
}""")


@triton.jit
def nibbles(q, zero, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """uint16 words -> four operands of DTYPE, code - zero each. zero: uint8, shaped to broadcast against q."""
    if PLAIN:
        q = q.to(tl.int32)
        zero = zero.to(tl.int32)
        a = ((q & 15) - zero).to(DTYPE)
        b = (((q >> 4) & 15) - zero).to(DTYPE)
        c = (((q >> 8) & 15) - zero).to(DTYPE)
        d = (((q >> 12) & 15) - zero).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        less = (zero.to(tl.uint16) | 0xC300).to(tl.bfloat16, bitcast=True)
        q, less = tl.broadcast(q, less)
        a, b, c, d = tl.inline_asm_elementwise(
            NIBBLES_BF16, "=r,=r,=r,=r,r,r", [q, less],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        less = (zero.to(tl.uint16) | 0xE400).to(tl.float16, bitcast=True)
        q, less = tl.broadcast(q, less)
        a, b, c, d = tl.inline_asm_elementwise(
            NIBBLES_FP16, "=r,=r,=r,=r,r,r", [q, less],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    return a, b, c, d


@triton.jit
def bytes_of(q, DTYPE: tl.constexpr, PLAIN: tl.constexpr):
    """uint16 words -> two operands of DTYPE, the signed 8-bit codes."""
    if PLAIN:
        a = (q & 255).to(tl.uint8).to(tl.int8, bitcast=True).to(DTYPE)
        b = (q >> 8).to(tl.uint8).to(tl.int8, bitcast=True).to(DTYPE)
    elif tl.bfloat16 == DTYPE:
        a, b = tl.inline_asm_elementwise(
            BYTES_BF16, "=r,=r,r", [q], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )  # fmt: skip
    else:
        a, b = tl.inline_asm_elementwise(
            BYTES_FP16, "=r,=r,r", [q], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )  # fmt: skip
    return a, b


@triton.jit
def halves(q, PLAIN: tl.constexpr):
    """uint8 -> two int8 operands, 16 times the signed 4-bit codes."""
    if PLAIN:
        a = ((q & 15) << 4).to(tl.int8, bitcast=True)
        b = (q & 0xF0).to(tl.int8, bitcast=True)
    else:
        a, b = tl.inline_asm_elementwise(HALVES, "=r,=r,r", [q], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    return a, b

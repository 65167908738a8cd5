"""QType: how the numbers of one tensor are stored, as a value that prints and parses.

    i8/t       int8, one scale for the tensor             scale ()
    i8/c0      int8, one scale per channel of axis 0      scale (shape[0],)
    u4/g128    uint4, groups of 128 along the last axis   scale (*shape[:-1], shape[-1] / 128)
    u8/token   uint8, one scale per row                   scale (*shape[:-1], 1)
    u8/sample  uint8, one scale per image of a batch      scale (shape[0], 1, ..., 1)
    u4/token*0.8   the same scale times 0.8: the ends of each row's range are clipped
    e4m3/token 8-bit float, one scale per row
    u{8,4,2}/g128  a weight that can be read at several widths, each with scales of its own (nested.py)

`i` is signed and symmetric with the narrow range -(2^(b-1)-1) .. 2^(b-1)-1 and no zero point, so that -q is a
code whenever q is. `u` is unsigned and asymmetric, 0 .. 2^b-1, with a zero point. Floats are symmetric.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import torch
from torch import Tensor

from qpass.errors import QpassError, nearest
from qpass.nested_words import SPELLED, parse_widths, spelled, why_no_widths

Granularity = Literal["tensor", "channel", "group", "token", "sample"]

# name, mantissa bits, storage, distinct finite values (the two zeros count once)
FLOATS = (
    ("e4m3", 3, torch.float8_e4m3fn, 253),
    ("e5m2", 2, torch.float8_e5m2, 247),
)
_NUMBERS = (*(f"{sign}{bits}" for sign in "iu" for bits in range(2, 9)), *(name for name, *_ in FLOATS))
_SPELLINGS = ("t", "c0", "c1", "g32", "g64", "g128", "token", "sample")
_EXPECTED = "i8/t, i8/c0, u4/g128, u8/token or e4m3/token"


@dataclass(frozen=True)
class QType:
    """Number format and granularity of one quantized tensor.

    >>> t = QType.parse("u4/g128")
    >>> t.bits, t.signed, t.granularity, t.group, t.qmin, t.qmax, t.storage
    (4, False, 'group', 128, 0, 15, torch.uint8)
    >>> str(t)
    'u4/g128'
    """

    bits: int
    signed: bool
    is_float: bool = False
    granularity: Granularity = "tensor"
    axis: int | None = None  # channel only
    group: int | None = None  # group only
    mantissa: int = 0  # float only: 3 for e4m3, 2 for e5m2
    widths: tuple[int, ...] = ()  # nested only: the bits that can be read of a code, `bits` first
    clip: float = 1.0  # token and sample only: a part of the range that its own values have

    def __post_init__(self) -> None:
        """Reject field combinations that have no text."""
        why = _why_not(self)
        if why:
            raise QpassError(f"QType: {why}. Expected a type that prints as {_EXPECTED}.")

    @staticmethod
    def parse(text: str | QType) -> QType:
        """The type that prints as `text`; a QType is returned as it is. Cached."""
        if isinstance(text, QType):
            return text
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise QpassError(f"quantized type must be text such as {_EXPECTED}, not {type(text).__name__}.")
        return _parse(text)

    def __str__(self) -> str:
        """The text that parses back to this type."""
        suffix = {"tensor": "t", "channel": f"c{self.axis}", "group": f"g{self.group}"}
        clip = "" if self.clip == 1 else f"*{self.clip!r}"
        return f"{self.number}/{suffix.get(self.granularity, self.granularity)}{clip}"

    @property
    def number(self) -> str:
        """The number format alone: `i8`, `u4`, `e4m3`, `u{8,4,2}`."""
        if self.is_float:
            return f"e{self.bits - 1 - self.mantissa}m{self.mantissa}"
        if self.widths:
            return f"u{spelled(self.widths)}"
        return f"{'i' if self.signed else 'u'}{self.bits}"

    @property
    def bare(self) -> QType:
        """The type of codes whose scales are known: without the clip that these were chosen with."""
        return self if self.clip == 1 else dataclasses.replace(self, clip=1.0)

    @property
    def symmetric(self) -> bool:
        """Whether zero is code 0, so that there is no zero point."""
        return self.signed or self.is_float

    @property
    def qmin(self) -> int:
        """Smallest code (integers) or smallest finite value (floats)."""
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code (integers) or largest finite value (floats)."""
        if self.is_float:
            return int(torch.finfo(self.storage).max)
        return 2 ** (self.bits - self.signed) - 1

    @property
    def levels(self) -> int:
        """How many distinct values a code can stand for."""
        if self.is_float:
            return next(levels for _, mantissa, _, levels in FLOATS if mantissa == self.mantissa)
        return self.qmax - self.qmin + 1

    @property
    def storage(self) -> torch.dtype:
        """The dtype codes are held in, one code an element (packing comes later)."""
        if self.is_float:
            return next(dtype for _, mantissa, dtype, _ in FLOATS if mantissa == self.mantissa)
        return torch.int8 if self.signed else torch.uint8


def _why_not(t: QType) -> str | None:
    """None for a legal type, else what is wrong with its fields."""
    if t.is_float and (t.bits != 8 or not t.signed or t.mantissa not in (2, 3)):
        return "a float type has 8 bits, is signed, and has 3 (e4m3) or 2 (e5m2) mantissa bits"
    if not t.is_float and not (2 <= t.bits <= 8 and t.mantissa == 0):
        return f"an integer type has 2 to 8 bits and no mantissa, not {t.bits} bits and mantissa {t.mantissa}"
    if t.widths and (t.signed or t.widths[0] != t.bits or why_no_widths(t.widths)):
        return why_no_widths(t.widths) or f"a nested type is unsigned, of {t.widths[0]} bits"
    if t.granularity not in get_args(Granularity):
        return f"granularity is tensor, channel, group, token or sample, not {t.granularity!r}"
    if t.clip != 1 and (t.granularity not in ("token", "sample") or not 0 < t.clip < float("inf")):
        return f"a clip above 0 goes with granularity token or sample, not {t.clip} with {t.granularity}"
    if (t.granularity == "channel") != (t.axis is not None) or (t.axis or 0) < 0:
        return f"an axis of 0 or more goes with granularity channel, not {t.axis} with {t.granularity}"
    if (t.granularity == "group") != (t.group is not None) or t.group == 0 or (t.group or 1) < 0:
        return f"a group of 1 or more goes with granularity group, not {t.group} with {t.granularity}"
    return None


@cache
def _parse(text: str) -> QType:
    number, slash, spelling = text.partition("/")
    if not slash:
        raise QpassError(f"quantized type {text!r} has no granularity; expected {_EXPECTED}.")
    if nested := re.fullmatch(f"u{SPELLED}", number):
        widths = parse_widths(nested[1])
        if isinstance(widths, str):
            raise QpassError(f"quantized type {text!r}: {widths}.")
        return QType(widths[0], False, False, *_parse_granularity(text, spelling), widths=widths)
    if number not in _NUMBERS:
        expected = f"expected i2..i8, u2..u8, e4m3 or e5m2.{nearest(number, _NUMBERS)}"
        raise QpassError(f"quantized type {text!r}: {number!r} is no number format; {expected}")
    spelling, clip = _parse_clip(text, spelling)
    mantissa = next((m for name, m, *_ in FLOATS if name == number), 0)
    bits, signed = (8, True) if mantissa else (int(number[1:]), number[0] == "i")
    granularity, axis, group = _parse_granularity(text, spelling)
    return QType(bits, signed, bool(mantissa), granularity, axis, group, mantissa, clip=clip)


def _parse_clip(text: str, spelling: str) -> tuple[str, float]:
    """(the granularity's spelling, the clip behind it)."""
    spelling, star, clip = spelling.partition("*")
    try:
        return spelling, float(clip) if star else 1.0
    except ValueError:
        raise QpassError(f"quantized type {text!r}: {clip!r} is no number to clip a range by.") from None


def _parse_granularity(text: str, spelling: str) -> tuple[Granularity, int | None, int | None]:
    if spelling == "t":
        return "tensor", None, None
    if spelling in ("token", "sample"):
        return spelling, None, None
    if match := re.fullmatch(r"c(0|[1-9][0-9]*)", spelling):
        return "channel", int(match[1]), None
    if match := re.fullmatch(r"g([1-9][0-9]*)", spelling):
        return "group", None, int(match[1])
    hint = nearest(spelling, _SPELLINGS)
    raise QpassError(
        f"quantized type {text!r}: {spelling!r} is no granularity; expected t (tensor), c0 (channels of "
        f"axis 0), g128 (groups of 128), token or sample.{hint}"
    )


def shortest(number: Tensor) -> float:
    """The decimal with the fewest digits that is this float32 number, for a type's text to say."""
    exact = number.item()
    return next(f for f in (float(f"{exact:.{n}g}") for n in range(1, 10)) if torch.tensor(f) == number.cpu())


def scale_shape(qtype: QType, shape: Sequence[int]) -> tuple[int, ...]:
    """Shape of the scale of a tensor of `shape`.

    tensor -> (); channel -> (shape[axis],); group -> (*shape[:-1], K/g); token -> (*shape[:-1], 1);
    sample -> (shape[0], 1, ..., 1).
    """
    if qtype.granularity == "tensor":
        return ()
    if len(shape) <= (qtype.axis or 0):
        axes = (qtype.axis or 0) + 1
        raise QpassError(f"type {qtype} needs a tensor of at least {axes} axes, got shape {tuple(shape)}.")
    if qtype.axis is not None:
        return (shape[qtype.axis],)
    if qtype.granularity == "sample":
        return (shape[0], *(1 for _ in shape[1:]))
    if qtype.group is None:
        return (*shape[:-1], 1)
    if shape[-1] % qtype.group:
        raise QpassError(
            f"type {qtype} needs a last axis that is a multiple of {qtype.group}, got {shape[-1]}; "
            "choose a group size that divides it, or one scale per channel (c0)."
        )
    return (*shape[:-1], shape[-1] // qtype.group)

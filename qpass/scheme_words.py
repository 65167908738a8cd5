"""The words of a scheme: names, options with what they take, and what is wrong with others."""

from __future__ import annotations

import re
from typing import Literal

from qpass.errors import QpassError, nearest
from qpass.nested_words import SPELLED, parse_widths
from qpass.qtype import QType

NAMES = ("w8a8", "w8a8-dynamic", "w8a16", "w4a16", "w4a16-g32", "w4a8", "w4a8-dynamic", "fp8", "fp8-static",
         "w{8,4,2}a16")  # fmt: skip
SOLVERS = ("auto", "rtn", "hqq", "gptq", "descent", "awq", "adaround", "smoothquant")
DATA_FREE = ("rtn", "hqq")  # solvers that need no calibration
MOVERS = ("awq", "smoothquant")  # solvers that choose the factor of the input channels, or its strength
OPTIONS = ("range", "smooth", "solver", "equalize", "bias", "sequential", "split")
CHOICES = {
    "solver": SOLVERS,
    "equalize": ("auto", "weights", "none"),
    "bias": ("mean", "none"),
    "sequential": ("auto", "yes", "no"),
    "split": ("auto", "none"),
}
NARROW = 4  # bits of a weight up to which codes and steps are worth a descent, and linears are rounded in order
DEFAULT_GROUP = 128
EXPECTED = (
    "w8a8, w8a8-dynamic, w8a16, w4a16, w4a16-g32, w4a8, fp8, fp8-static, w{8,4,2}a16, or wNaM with 2 <= N, M <= 8"
)


def check_widths(word: str, bits: int, act_bits: int) -> None:
    """Weights of 2 to 8 bits and inputs of 2 to 8 or 16."""
    if not 2 <= bits <= 8 or not (2 <= act_bits <= 8 or act_bits == 16):
        raise QpassError(
            f"scheme {word!r}: weights have 2 to 8 bits and inputs 2 to 8, or 16 to stay float."
            + nearest(word.lower(), NAMES)
        )


WORD = re.compile(r"(?:\{[^{}]*\}|[^,\s])+")  # commas between braces are part of a word
NAME = re.compile(rf"w(\d+|{SPELLED})a(\d+)((?:-(?:dynamic|c|g[1-9]\d*))*)")
NESTED_FLOAT = (
    "scheme {!r}: weights of several widths take inputs that stay float; write w{}a16, or w{}a{} for one width."
)
NO_NESTED = "scheme {!r}: solver={} moves a factor to the input, one for each width; nested weights take other solvers."


def bits_of(word: str, spelled: str, inside: str | None, act_bits: int) -> tuple[int, tuple[int, ...]]:
    """Bits of a weight, and the widths of a nested one: of `8` or `{8,4,2}`, whose `inside` is `8,4,2`."""
    if inside is None:
        check_widths(word, int(spelled), act_bits)
        return int(spelled), ()
    widths = parse_widths(inside)
    if isinstance(widths, str):
        raise QpassError(f"scheme {word!r}: {widths}.")
    if act_bits != 16:
        raise QpassError(NESTED_FLOAT.format(word, spelled, widths[0], act_bits))
    return widths[0], widths


def check_suffixes(word: str, act_bits: int, suffixes: list[str]) -> None:
    """No suffix twice, and none that means nothing here."""
    if act_bits == 16 and "dynamic" in suffixes:
        raise QpassError(
            f"scheme {word!r}: inputs of 16 bits stay float, so there is nothing dynamic; drop '-dynamic'."
        )
    if suffixes.count("dynamic") > 1 or len([s for s in suffixes if s != "dynamic"]) > 1:
        raise QpassError(f"scheme {word!r}: give '-dynamic' once, and one of '-c' or '-g128'.")


def check_solver(text: str, solver: str, smooth: object, weight: QType | None, float_input: bool) -> None:
    """A solver that the scheme's types and its other options leave something to do."""
    if weight is not None and weight.widths and solver in MOVERS:
        raise QpassError(NO_NESTED.format(text, solver))
    if weight is not None and weight.is_float and solver not in ("auto", "rtn"):
        raise QpassError(f"scheme {text!r}: float types are rounded to nearest; drop solver={solver}.")
    if solver == "smoothquant" and float_input:
        raise QpassError(
            f"scheme {text!r}: smoothquant makes inputs easier to round, and these stay float; use solver=awq, which "
            "moves factors for the weight's sake, or a scheme with 8-bit inputs."
        )
    if solver == "smoothquant" and smooth is None:
        raise QpassError(f"scheme {text!r}: smooth=none leaves solver=smoothquant nothing to do; use solver=rtn.")
    if solver == "awq" and smooth != "auto":
        raise QpassError(f"scheme {text!r}: solver=awq chooses the factor of the input channels itself; drop smooth=.")


def parse_smooth(value: str, text: str) -> float | Literal["auto"] | None:
    """The strength of an option `smooth=`: a number from 0 to 1, `auto`, or None for `none`."""
    if value == "auto":
        return "auto"
    if value == "none":
        return None
    try:
        strength = float(value)
    except ValueError:
        strength = -1.0
    if not 0.0 <= strength <= 1.0:
        raise QpassError(f"scheme {text!r}: smooth={value} must be a number from 0 to 1, auto or none.")
    return strength

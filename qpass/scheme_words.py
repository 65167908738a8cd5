"""The words of a scheme: names, options with what they take, and what is wrong with others."""

from __future__ import annotations

from qpass.errors import QpassError, nearest

NAMES = ("w8a8", "w8a8-dynamic", "w8a16", "w4a16", "w4a16-g32", "w4a8", "w4a8-dynamic", "fp8", "fp8-static")
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
EXPECTED = "w8a8, w8a8-dynamic, w8a16, w4a16, w4a16-g32, w4a8, fp8, fp8-static, or wNaM with 2 <= N, M <= 8"


def check_widths(word: str, bits: int, act_bits: int) -> None:
    """Weights of 2 to 8 bits and inputs of 2 to 8 or 16."""
    if not 2 <= bits <= 8 or not (2 <= act_bits <= 8 or act_bits == 16):
        raise QpassError(
            f"scheme {word!r}: weights have 2 to 8 bits and inputs 2 to 8, or 16 to stay float."
            + nearest(word.lower(), NAMES)
        )


def check_suffixes(word: str, act_bits: int, suffixes: list[str]) -> None:
    """No suffix twice, and none that means nothing here."""
    if act_bits == 16 and "dynamic" in suffixes:
        raise QpassError(
            f"scheme {word!r}: inputs of 16 bits stay float, so there is nothing dynamic; drop '-dynamic'."
        )
    if suffixes.count("dynamic") > 1 or len([s for s in suffixes if s != "dynamic"]) > 1:
        raise QpassError(f"scheme {word!r}: give '-dynamic' once, and one of '-c' or '-g128'.")


def check_solver(text: str, solver: str, smooth: object, float_weight: bool, float_input: bool) -> None:
    """A solver that the scheme's types and its other options leave something to do."""
    if float_weight and solver not in ("auto", "rtn"):
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

"""Scheme and Recipe: what to do with weights and inputs, and where; both are data that print as they parse.

    w8a8            weight i8/c0    input u8/t                     needs calibration
    w8a8-dynamic    weight i8/c0    input u8/token, at run time
    w8a16           weight i8/c0    input stays float
    w4a16[-g32]     weight u4/g128  input stays float
    w4a8[-dynamic]  weight i4/g128  input u8/t or u8/token
    fp8             weight e4m3/c0  input e4m3/token, at run time
    fp8-static      weight e4m3/c0  input e4m3/t                   needs calibration
    w{8,4,2}a16     weight u{8,4,2}/g128: one that can be read at 8, 4 or 2 bits, as set_bits says (nested.py)
    wNaM            2 <= N, M <= 8, by the same rules: for training and simulation

1. Weights of 5 bits and more have a scale per output channel, of 4 and fewer per group of 128; `-g32` sets
   the group, `-c` asks for channels.
2. Weights that meet integer inputs are symmetric, so that the integer product has no weight zero point to
   correct for; beside a float input, groups are asymmetric. 2-bit weights always are asymmetric: narrow
   signed has only 3 values.
3. Inputs are unsigned with a zero point: oneDNN's fast int8 kernels take u8.
4. Options follow after a comma or a space: `w8a8,range=mse,smooth=0.5,solver=gptq,equalize=none,bias=none`. range=auto:
   minmax for linears of 8-bit inputs, mse for convolutions and for fewer bits. solver=auto: descent for linears of up to
   4 bits, else gptq (others: solvers/methods.py). equalize: per-channel factors between convolutions (auto: from
   calibration, where inputs are rounded; weights: cross-layer equalization; none). bias: mean corrects what rounding adds
   to the mean of every output. sequential: whether linears are rounded on what the rounded ones before them make (auto:
   up to 4 bits). split: whether channels of an activation that reach far may become several (solvers/split.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal

from qpass.errors import QpassError, nearest
from qpass.nested_words import spelled
from qpass.qtype import QType
from qpass.range_choice import parse_method
from qpass.scheme_words import (
    CHOICES,
    DATA_FREE,
    DEFAULT_GROUP,
    EXPECTED,
    NAME,
    NAMES,
    NARROW,
    OPTIONS,
    WORD,
    bits_of,
    check_solver,
    check_suffixes,
    parse_smooth,
)


@dataclass(frozen=True)
class Scheme:
    """What happens to the weight and the input of a site.

    >>> s = Scheme.parse("w8a8 range=mse")
    >>> str(s.weight), str(s.activation), s.dynamic, s.range_method
    ('i8/c0', 'u8/t', False, 'mse')
    >>> str(s)
    'w8a8,range=mse'
    """

    name: str
    weight: QType | None
    activation: QType | None
    dynamic: bool = False
    range_method: str = "auto"
    smooth: float | Literal["auto"] | None = "auto"
    solver: str = "auto"
    equalize: str = "auto"
    bias: str = "mean"
    sequential: str = "auto"
    split: str = "auto"

    @staticmethod
    def parse(text: str | Scheme) -> Scheme:
        """The scheme that prints as `text`; a Scheme is returned as it is."""
        if isinstance(text, Scheme):
            return text
        if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise QpassError(f"scheme must be text such as {EXPECTED}, not {type(text).__name__}.")
        name, *options = WORD.findall(text) or [""]
        if not name:
            raise QpassError(f"scheme is empty; expected {EXPECTED}.")
        scheme = _parse_name(name)
        for word in options:
            scheme = _with_option(scheme, word, text)
        check_solver(text, scheme.solver, scheme.smooth, scheme.weight, scheme.activation is None)
        return scheme

    def __str__(self) -> str:
        """The text that parses back to this scheme: its name, then the options that are not the default."""
        smooth = "none" if self.smooth is None else self.smooth
        values = (self.range_method, smooth, self.solver, self.equalize, self.bias, self.sequential, self.split)
        given = (
            f"{key}={v}" for key, v in zip(OPTIONS, values, strict=True) if v != ("mean" if key == "bias" else "auto")
        )
        return ",".join((self.name, *given))

    def range_for(self, operation: str) -> str:
        """The range method for the inputs of an operation: `auto` is minmax for 8-bit inputs of linears, else mse."""
        if self.range_method != "auto":
            return self.range_method
        whole = self.activation is None or self.activation.bits == 8
        return "minmax" if operation == "linear" and whole else "mse"

    @property
    def in_order(self) -> bool:
        """Whether linears are to be rounded in order of execution, where there is calibration."""
        if self.sequential != "auto":
            return self.sequential == "yes"
        rounds = self.weight is not None and not self.weight.is_float and self.solver not in (*DATA_FREE, "smoothquant")
        return rounds and self.weight.bits <= NARROW and not self.weight.widths

    @property
    def nested(self) -> bool:
        """Whether weights are kept in several widths."""
        return self.weight is not None and bool(self.weight.widths)

    @property
    def solver_needs_data(self) -> bool:
        """Whether the solver that was asked for looks at what the weights read."""
        return self.solver not in ("auto", *DATA_FREE)

    @property
    def needs_calibration(self) -> bool:
        """Whether inputs have static scales, which are chosen from calibration batches."""
        return self.activation is not None and not self.dynamic


def is_scheme(text: str) -> bool:
    """Whether a text parses as a scheme."""
    try:
        Scheme.parse(text)
    except QpassError:
        return False
    return True


def _parse_name(word: str) -> Scheme:
    lower = word.lower()
    if lower in ("fp8", "fp8-static"):
        dynamic = lower == "fp8"
        act = QType.parse("e4m3/token" if dynamic else "e4m3/t")
        return Scheme(lower, QType.parse("e4m3/c0"), act, dynamic)
    match = NAME.fullmatch(lower)
    if not match:
        raise QpassError(f"scheme {word!r} is not known; expected {EXPECTED}.{nearest(lower, NAMES)}")
    act_bits, suffixes = int(match[3]), match[4].split("-")[1:]
    bits, widths = bits_of(word, match[1], match[2], act_bits)
    check_suffixes(word, act_bits, suffixes)
    return _integer_scheme(bits, widths, act_bits, suffixes)


def _integer_scheme(bits: int, widths: tuple[int, ...], act_bits: int, suffixes: list[str]) -> Scheme:
    default = "c" if bits > 4 and not widths else f"g{DEFAULT_GROUP}"
    layout = next((s for s in suffixes if s != "dynamic"), default)
    dynamic = "dynamic" in suffixes
    asymmetric = bits == 2 or (layout != "c" and act_bits == 16) or bool(widths)
    number = spelled(widths) if widths else str(bits)
    weight = QType.parse(f"{'u' if asymmetric else 'i'}{number}/{'c0' if layout == 'c' else layout}")
    act = None if act_bits == 16 else QType.parse(f"u{act_bits}/{'token' if dynamic else 't'}")
    suffix = ("" if layout == default else f"-{layout}") + ("-dynamic" if dynamic else "")
    return Scheme(f"w{number}a{act_bits}{suffix}", weight, act, dynamic)


def _with_option(scheme: Scheme, word: str, text: str) -> Scheme:
    key, equals, value = word.partition("=")
    if not equals or key not in OPTIONS:
        expected = ", ".join(f"{option}=..." for option in OPTIONS)
        hint = nearest(key, OPTIONS)
        raise QpassError(f"scheme {text!r}: {word!r} is no option; expected {expected}.{hint}")
    if key == "range":
        if value != "auto":
            parse_method(value)
        return replace(scheme, range_method=value)
    if key == "smooth":
        return replace(scheme, smooth=parse_smooth(value, text))
    if value not in CHOICES[key]:
        raise QpassError(
            f"scheme {text!r}: {key} {value!r} is not one of {', '.join(CHOICES[key])}.{nearest(value, CHOICES[key])}"
        )
    return replace(scheme, **{key: value})


@dataclass(frozen=True)
class Recipe:
    """Where to use which scheme: globs in order, the first that matches wins, `default` where none does.

    A glob is matched against the module path (`encoder.layer.*.attention.*`), or against the whole site name
    where it holds a colon (`encoder.*:matmul.*`). None keeps a site in float.
    """

    rules: tuple[tuple[str, Scheme | None], ...]
    default: Scheme | None

    @staticmethod
    def parse(rules: Mapping[str, str | Scheme | None] | Recipe | None, default: str | Scheme | None = None) -> Recipe:
        """A recipe from a mapping of globs to schemes; a Recipe is returned as it is."""
        if isinstance(rules, Recipe):
            return rules
        if rules is not None and not isinstance(rules, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise QpassError(f"recipe must map module-path globs to schemes, not be a {type(rules).__name__}.")
        pairs = tuple((glob, _parse_rule(glob, value)) for glob, value in (rules or {}).items())
        return Recipe(pairs, None if default is None else Scheme.parse(default))

    def scheme_for(self, site: str) -> Scheme | None:
        """The scheme of a site (`path:operation.ordinal`) or module path; None keeps it in float."""
        return next((scheme for glob, scheme in self.rules if _matches(glob, site)), self.default)

    def __str__(self) -> str:
        """`glob: scheme`, one a line in order; the last line is the default."""
        return "\n".join(f"{glob}: {scheme or 'float'}" for glob, scheme in (*self.rules, ("*", self.default)))

    def names(self, site: str) -> bool:
        """Whether the rule that a site follows names it, by the end of its path: `lm_head` and `*embed*`, not `model.*`."""
        glob = next((glob for glob, _ in self.rules if _matches(glob, site)), "")
        return bool(glob.partition(":")[0].rpartition(".")[2].strip("*"))

    def unmatched(self, sites: Iterable[str]) -> tuple[str, ...]:
        """The globs that match none of the sites."""
        known = tuple(sites)
        return tuple(glob for glob, _ in self.rules if not any(_matches(glob, site) for site in known))

    def check(self, sites: Iterable[str]) -> None:
        """Raise QpassError for the first glob that matches none of the sites."""
        known = tuple(sites)
        for glob in self.unmatched(known):
            choices = known if ":" in glob else tuple(site.partition(":")[0] for site in known)
            raise QpassError(
                f"recipe: {glob!r} matches no module or site of this model; use the path of a module "
                f"that has operations to quantize, or a glob such as 'encoder.*'.{nearest(glob, choices)}"
            )


def _matches(glob: str, site: str) -> bool:
    return fnmatchcase(site if ":" in glob else site.partition(":")[0], glob)


def _parse_rule(glob: str, value: str | Scheme | None) -> Scheme | None:
    if not isinstance(glob, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise QpassError(f"recipe: {glob!r} is a {type(glob).__name__}; a rule begins with a glob such as 'encoder.*'.")
    try:
        return None if value is None else Scheme.parse(value)
    except QpassError as error:
        raise QpassError(f"recipe: {glob!r}: {error}") from error

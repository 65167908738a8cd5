"""A plan: what is to be done with each site, or the sentence that says why it stays float.

The result of the analyses, made of data alone: print it, edit it (`plan["*.attention.*"] = None`), save it, compile
any number of models with it. Tensors (integers, scales) are saved beside the JSON as safetensors.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qpass.errors import QpassError, nearest
from qpass.packing import Packed
from qpass.qtype import QType
from qpass.schemes import Scheme, is_scheme
from qpass.seen import Seen

INPUT_FIELDS = ("input_type", "input_scale", "input_zero", "input_mul", "input_shift", "input_extra", "bias", "seen")


@dataclass(frozen=True)
class Decision:
    """What happens at one site.

    shape: (N, K) of the weight, held as [K, N] where transposed, or as the convolution holds it. rows: input rows in the
    example batch (output pixels of a convolution, input pixels of a transposed one), so rows * numel is its multiply-
    adds. group: name of the first site that reads the same input; sites of a group share one quantize. lo, hi: the
    input's range in calibration. input_scale, input_zero: of a static input. input_mul: [C], the factor of an output's
    channels that its scale counts on. input_shift: [K], subtracted from the input before its factor (packed.in_mul).
    input_extra: [K], copies of its channels (see solvers/split). bias: [N], added to the module's own: in the graph where the
    input is quantized, else in the model, to the parameter bias_name. made_from: fingerprint of the float weight that the
    integers stand for. seen: what calibration saw at a static input, in bins.
    """

    site: str
    operation: str
    weight: str = ""
    shape: tuple[int, ...] = ()
    transposed: bool = False
    rows: int = 0
    weight_type: QType | None = None
    input_type: QType | None = None
    why: str = ""
    group: str = ""
    lo: float | None = None
    hi: float | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    input_mul: Tensor | None = None
    input_shift: Tensor | None = None
    input_extra: Tensor | None = None
    bias: Tensor | None = None
    packed: Packed | None = None
    note: str = ""
    made_from: str = ""
    bias_name: str = ""
    seen: Seen | None = None

    @property
    def quantized(self) -> bool:
        """Whether the site's weight becomes integers."""
        return self.weight_type is not None

    @property
    def is_output(self) -> bool:
        """Whether this is not a site but a value that one leaves for others than sites to read."""
        return self.operation in ("output", "operand")

    @property
    def static(self) -> bool:
        """Whether its input has one scale, chosen before it runs."""
        return self.input_scale is not None and self.input_type is not None and self.input_scale.numel() == 1

    @property
    def macs(self) -> int:
        """Multiply-adds of the site in the example batch."""
        return self.rows * math.prod(self.shape) if self.shape else 0

    def as_float(self, why: str) -> Decision:
        """The same site left in float, with the reason."""
        return dataclasses.replace(self, weight_type=None, packed=None, why=why, **dict.fromkeys(INPUT_FIELDS))


@dataclass
class Plan:
    """Site name -> Decision, in the order of the model's execution. attention: its dtype, None for the model's own.

    front: of the search that chose the recipe, as plain values (search/front.py).
    """

    scheme: Scheme
    decisions: dict[str, Decision] = field(default_factory=dict)
    parameters: int = 0
    attention: torch.dtype | None = None
    notes: list[str] = field(default_factory=list)
    front: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions.values())

    def __len__(self) -> int:
        return len(self.decisions)

    def __getitem__(self, site: str) -> Decision:
        if site not in self.decisions:
            raise QpassError(f"the plan has no site {site!r}.{nearest(site, self.decisions)}")
        return self.decisions[site]

    def __setitem__(self, glob: str, value: str | None) -> None:
        """`plan[glob] = None` (or a reason) leaves the sites that match in float."""
        matched = [name for name in self.decisions if matches(name, glob)]
        if not matched:
            choices = self.decisions if ":" in glob else {name.partition(":")[0] for name in self.decisions}
            raise QpassError(f"no site of the plan matches {glob!r}.{nearest(glob, choices)}")
        if value is not None and (not isinstance(value, str) or is_scheme(value)):
            raise QpassError(
                f"plan[{glob!r}] takes None or a reason to stay float, not {value!r}; another scheme needs ranges of "
                "its own: pass recipe={...} to qpass.analyze"
            )
        for name in matched:
            self.decisions[name] = self.decisions[name].as_float(value or "left in float by an edit of the plan")

    @property
    def quantized(self) -> tuple[Decision, ...]:
        """The decisions that quantize."""
        return tuple(d for d in self if d.quantized)

    @property
    def biases(self) -> dict[str, Tensor]:
        """Path of each bias that is corrected in the model itself -> what is added to it."""
        held = {d.bias_name: d.bias for d in self if d.quantized and d.input_type is None and d.bias_name}
        return {name: bias for name, bias in held.items() if bias is not None}

    @property
    def packed(self) -> dict[str, Packed]:
        """Parameter path -> its integers, for every site that is quantized."""
        return {d.weight: d.packed for d in self.quantized if d.packed is not None}

    @property
    def nested(self) -> tuple[Decision, ...]:
        """The decisions whose weights can be read at several widths."""
        return tuple(d for d in self.quantized if d.weight_type is not None and d.weight_type.widths)

    def coverage(self) -> tuple[float, float]:
        """Share of the model's parameters, and of its multiply-adds with weights, that are quantized."""
        weights = {d.weight: math.prod(d.shape) for d in self.quantized}
        total = sum(d.macs for d in self)
        macs = sum(d.macs for d in self.quantized)
        return sum(weights.values()) / max(self.parameters, 1), macs / max(total, 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan: safetensors with JSON in the header."""
        from qpass.storage import save_plan

        save_plan(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads a plan that `save` wrote."""
        from qpass.storage import load_plan

        return load_plan(path)

    def summary(self) -> str:
        """One line of coverage, then each reason to stay float with the sites it holds for."""
        parameters, macs = self.coverage()
        reasons: dict[str, list[str]] = {}
        for d in self:
            if not d.quantized and not d.is_output:
                reasons.setdefault(d.why, []).append(d.site)
        lines = [
            f"{self.scheme}: {len(self.quantized)} of {sum(not d.is_output for d in self)} sites, "
            f"{parameters:.1%} of parameters, "
            f"{macs:.1%} of multiply-adds with weights quantized"
        ]
        for why, sites in reasons.items():
            more = f" and {len(sites) - 1} more" if len(sites) > 1 else ""
            lines.append(f"  float: {sites[0]}{more}: {why}")
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return table(self)


def matches(site: str, glob: str) -> bool:
    """Whether a glob names a site: by its module path, or by its whole name where the glob holds a colon."""
    return fnmatch.fnmatchcase(site if ":" in glob else site.partition(":")[0], glob)


def rows(plan: Plan) -> list[tuple[str, ...]]:
    """A head, then one row a site: name, shape, range, types, and why it stays float or what to know of it."""
    found = [("site", "shape", "range", "input", "weight", "")]
    for d in plan:
        span = f"{d.lo:.3g} .. {d.hi:.3g}" if d.lo is not None and d.hi is not None else ""
        types = (str(d.input_type or "float"), str(d.weight_type)) if d.quantized else ("float", "float")
        if d.is_output:
            types = (str(d.input_type or "bf16"), "")
        found.append((d.site, "x".join(map(str, d.shape)), span, *types, d.why or d.note))
    return found


def table(plan: Plan) -> str:
    """The plan as text: site, operation, shape, range, type, or why it stays float."""
    found = rows(plan)
    widths = [max(len(row[i]) for row in found) for i in range(5)]
    lines = ["  ".join([*(row[i].ljust(widths[i]) for i in range(5)), row[5]]).rstrip() for row in found]
    return "\n".join([*lines, plan.summary()])


def sizes(plan: Plan) -> str:
    """Bytes of the quantized weights before and after, tied ones once."""
    weights = {d.weight: d.packed for d in plan.quantized if d.packed is not None}
    before = sum(4 * math.prod(packed.shape) for packed in weights.values())
    after = sum(packed.nbytes for packed in weights.values())
    if not before:
        return "no weight is quantized"
    return f"quantized weights: {before / 1e6:.2f} MB in float32, {after / 1e6:.2f} MB packed ({after / before:.3f})"

"""Packed weights on a copy of the model: `weight = dequantize(packed, scale)` as a parametrization.

    Linear.weight  float32 [N, K]   ->   Linear.parametrizations.weight.original0   int8 [N, K]
                                         Linear.parametrizations.weight.original1   float32 scale [N]
                                                                                    ([N, K / G] of groups of G)
                                         Linear.parametrizations.weight.original2   float32 in_mul [K], where inputs
                                                                                    are scaled per channel; of a
                                                                                    convolution as packing.spread
                                                                                    shapes it
                                         Linear.parametrizations.weight.original2,3 uint8 zero, shaped like the scale,
                                                                                    where the type is unsigned
                                         Linear.parametrizations.weight.0.bits      int64 [], of a nested weight: the width
                                                                                    it is read at (bits.py)
    Attention.in_proj_weight, whose slices are packed each by itself: the tensors of the first slice, of the second, ...; one
    that no site reads as integers stays float, by itself

The copy is an ordinary module from here on: it runs in eager mode, its state_dict holds the integers, and a graph
captured from it shows `dequantize(packed, scale) -> linear`. A tied weight is packed once and stays tied.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qpass.errors import QpassError
from qpass.packing import Packed, spread
from qpass.slices import Rows, slice_name, slice_of


class PackedWeight(nn.Module):
    """The parametrization: forward computes the float weight from its integers."""

    def __init__(self, packed: Packed, dtype: torch.dtype) -> None:
        super().__init__()
        self.type = str(packed.type)
        self.dtype = dtype
        self.axis = packed.type.axis
        self.zeros = int(packed.stored_zero is not None)
        in_mul = packed.in_mul
        if in_mul is not None and packed.stored.dim() > 2:
            in_mul = spread(in_mul, packed.stored, self.axis == 1)
        self.halves, self.widths = packed.halves, packed.type.widths
        if self.widths:
            self.register_buffer("bits", torch.tensor(self.widths[0]))
        self._initial = tuple(t for t in (packed.stored, packed.scale, in_mul, packed.stored_zero) if t is not None)

    def forward(self, data: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        """data: int8 or uint8 shaped like the weight, or uint8 of two codes each; scale: float32 of the type's shape.

        rest: in_mul, float32 [K] or shaped like the weight, where inputs are scaled; then the zero point, uint8, where
        the type has one.
        """
        if self.widths:
            return torch.ops.qpass.nested.default(data, scale, rest[0], self.bits, self.type, self.dtype)
        if self.halves:
            data = torch.ops.qpass.whole.default(data, self.type)
        zero = rest[-1] if self.zeros else None
        weight = torch.ops.qpass.dequantize.default(data, scale, zero, self.type, self.dtype)
        if len(rest) == self.zeros:
            return weight
        in_mul = rest[0].to(self.dtype)
        return weight * (in_mul[:, None] if self.axis == 1 and in_mul.dim() == 1 else in_mul)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Follows the model to another dtype (`.half()`, `.to(torch.bfloat16)`)."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        bits = self._buffers.get("bits")
        super()._apply(fn, recurse)
        if bits is not None:  # it is read on the CPU when an op is launched
            self._buffers["bits"] = bits
        return self

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What to keep instead of the float weight: the integers this parametrization was made with."""
        return self._initial


class PackedSlices(nn.Module):
    """The parametrization of a parameter whose rows are packed a slice at a time; a slice may be float."""

    def __init__(self, slices: Mapping[Rows, Packed], weight: Tensor) -> None:
        super().__init__()
        ends = sorted({0, len(weight), *(row for rows in slices for row in rows)})
        self.rows = list(itertools.pairwise(ends))
        self.forms = nn.ModuleList(
            PackedWeight(slices[rows].to(weight.device), weight.dtype) if rows in slices else nn.Identity()
            for rows in self.rows
        )
        held = [
            form._initial if isinstance(form, PackedWeight) else (weight[first:last].clone(),)
            for form, (first, last) in zip(self.forms, self.rows, strict=True)
        ]
        self.counts = [len(tensors) for tensors in held]
        self._initial = tuple(itertools.chain.from_iterable(held))

    def forward(self, *tensors: Tensor) -> Tensor:
        """tensors: those of all slices, each as PackedWeight takes them, or float."""
        left = iter(tensors)
        parts = [form(*itertools.islice(left, count)) for form, count in zip(self.forms, self.counts, strict=True)]
        return torch.cat(parts)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The tensors of all slices."""
        return self._initial

    def slices(self) -> Iterator[tuple[Rows, nn.Module, int]]:
        """(rows, form, place of its first tensor among all) of each slice; a float one's form is nn.Identity."""
        yield from zip(self.rows, self.forms, itertools.accumulate(self.counts, initial=0), strict=False)


def copy_for_packing(model: nn.Module, weights: Iterable[str]) -> nn.Module:
    """A deep copy of a model that shares the tensors named, which are about to be replaced: no float is copied."""
    named = dict(model.named_parameters(remove_duplicate=False))
    paths = {slice_of(name)[0] for name in weights}
    memo = {id(named[path]): named[path] for path in paths if path in named}
    return copy.deepcopy(model, memo)


def install(model: nn.Module, packed: Mapping[str, Packed], biases: Mapping[str, Tensor] | None = None) -> None:
    """Replaces each named parameter, and every parameter tied to it, by its packed form, in place; adds to biases by path."""
    whole, slices = _by_parameter(packed)
    holders = {path: tuple(_holders(model, path)) for path in (*whole, *slices)}
    for path in holders:
        own = model.get_parameter(path).detach()
        data: tuple[Tensor, ...] | None = None
        bits: Tensor | None = None
        for module, attribute in holders[path]:
            sliced = path in slices
            form = PackedSlices(slices[path], own) if sliced else PackedWeight(whole[path].to(own.device), own.dtype)
            frozen = nn.Parameter(module._parameters[attribute].detach(), requires_grad=False)
            module._parameters[attribute] = frozen  # of the copy: the caller's parameter keeps its gradient flag
            parametrize.register_parametrization(module, attribute, form, unsafe=True)
            for each in form.modules():
                if isinstance(each, PackedWeight | PackedSlices):
                    each._initial = ()
            if isinstance(form, PackedWeight) and form.widths:
                bits = form._buffers["bits"] = form.bits if bits is None else bits
            originals = module.parametrizations[attribute]
            data = data or tuple(getattr(originals, f"original{i}") for i in range(originals.ntensors))
            for i, tensor in enumerate(data):
                originals._parameters.pop(f"original{i}", None)
                originals._buffers[f"original{i}"] = tensor

    for name, more in (biases or {}).items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        own = module._parameters[attribute].detach()
        moved = (own.float() + more.to(own.device)).to(own.dtype)
        module._parameters[attribute] = nn.Parameter(moved, requires_grad=False)


def _by_parameter(packed: Mapping[str, Packed]) -> tuple[dict[str, Packed], dict[str, dict[Rows, Packed]]]:
    """(path -> a whole parameter, path -> the slices of one) of packed weights by name."""
    whole: dict[str, Packed] = {}
    slices: dict[str, dict[Rows, Packed]] = {}
    for name, weight in packed.items():
        path, rows = slice_of(name)
        if rows is None:
            whole[path] = weight
        else:
            slices.setdefault(path, {})[rows] = weight
    return whole, slices


def _holders(model: nn.Module, name: str) -> Iterator[tuple[nn.Module, str]]:
    """Each (module, attribute) under which the named parameter hangs in the model."""
    try:
        target = model.get_parameter(name)
    except AttributeError as error:
        raise QpassError(
            f"the plan has a weight {name!r} that this {type(model).__name__} lacks; "
            "compile the model the plan was made from"
        ) from error
    for module in model.modules():
        for attribute, parameter in list(module._parameters.items()):
            if parameter is target:
                yield module, attribute


def uninstall(model: nn.Module, floats: Mapping[str, nn.Parameter]) -> None:
    """Puts float parameters, by path, back in the place of packed ones, tied as they were."""
    for name in dict.fromkeys(slice_of(name)[0] for name in packed_weights(model)):
        if name not in floats:  # it was packed before
            continue
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
        module._buffers.pop(attribute, None)  # what the removal left there: the dequantized weight
        module._parameters[attribute] = floats[name]


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    """Path of each packed parameter of a model (`module.attribute`), or name of its slice -> its parametrization."""
    found = {}
    for name, _, form in _parametrizations(model):
        if isinstance(form, PackedWeight):
            found[name] = form
        elif isinstance(form, PackedSlices):
            parts = ((slice_name(name, rows), part) for rows, part, _ in form.slices())
            found |= {part_name: part for part_name, part in parts if isinstance(part, PackedWeight)}
    return found


def float_slices(model: nn.Module) -> dict[str, Tensor]:
    """Name of each slice that stayed float, of parameters that are packed in part -> its values."""
    found = {}
    for name, held, form in _parametrizations(model):
        for rows, part, place in form.slices() if isinstance(form, PackedSlices) else ():
            if isinstance(part, nn.Identity):
                found[slice_name(name, rows)] = getattr(held, f"original{place}")
    return found


def _parametrizations(model: nn.Module) -> Iterator[tuple[str, Any, nn.Module]]:
    """(path of a parameter, the list that holds its tensors, a parametrization of it) of a whole model."""
    for path, module in model.named_modules():
        for attribute, held in getattr(module, "parametrizations", {}).items():
            for form in held:
                yield f"{path}.{attribute}" if path else attribute, held, form

"""The sites of a model that is not run: its linears, convolutions and tables, under the names a capture gives them.

Modules of other classes that hold one matrix (`Conv1D` of the transformers library, which is [K, N]) are captured by
themselves, one of each class and shape, on a row of zeros: whatever a capture of the model would make of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from qpass.calibrate import buffers_kept
from qpass.capture import capture, front_end, tensor_names
from qpass.convolutions import MODULES, geometry_of_module
from qpass.passes.annotate import describe_sites
from qpass.passes.other_sites import LOOKUP
from qpass.site_info import SiteInfo
from qpass.sites import SiteNames


def module_sites(model: nn.Module) -> dict[str, SiteInfo]:
    """Name -> site, in the order of the model's modules."""
    found: dict[str, SiteInfo] = {}
    known: dict[tuple, list[SiteInfo]] = {}
    for path, module in model.named_modules():
        for info in _sites(module, known):
            name = f"{path}:{info.name.rpartition(':')[2]}"
            weight = f"{path}.{info.weight}" if path else info.weight
            found[name] = dataclasses.replace(info, name=name, weight=weight)
    return found


def _sites(module: nn.Module, known: dict[tuple, list[SiteInfo]]) -> list[SiteInfo]:
    """The sites of one module by itself, its own path left out of names and weights."""
    if isinstance(module, MODULES):
        walk = geometry_of_module(module)
        return [SiteInfo(f":{walk.operation}.0", walk.operation, "weight", walk=walk)]
    if isinstance(module, nn.Linear):
        return [SiteInfo(":linear.0", "linear", "weight")]
    if isinstance(module, nn.Embedding):
        return [SiteInfo(f":{LOOKUP}.0", LOOKUP, "weight")] if _looks_up(module) else []
    if next(module.children(), None) is not None or type(module).__module__.startswith("torch.nn."):
        return []
    shapes = [(name, tuple(p.shape)) for name, p in module.named_parameters()]
    matrices = [shape for _, shape in shapes if len(shape) == 2]
    if len(matrices) != 1:
        return []
    key = (type(module), *shapes)
    if key not in known:
        known[key] = next((sites for k in dict.fromkeys(matrices[0]) if (sites := _captured(module, k))), [])
    return known[key]


def _looks_up(module: nn.Embedding) -> bool:
    """Whether a table is read by its ids (tables of positions may be sliced instead)."""
    names = type(module).forward.__code__.co_names
    return "embedding" in names or "super" in names


def _captured(module: nn.Module, width: int) -> list[SiteInfo]:
    """The linears of a module that is called with rows of some width; none where it does not run on these."""
    parameter = next(module.parameters())
    tensors, found = tensor_names(module), []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        _, infos = describe_sites(capture(gm, inputs, tensors), SiteNames())
        found.extend(info for info in infos if info.operation == "linear" and info.weight)
        return gm.forward

    try:
        with buffers_kept(module):
            front_end(module, backend)(torch.zeros(2, width, dtype=parameter.dtype, device=parameter.device))
    except Exception:  # it takes other inputs: example_inputs show how it is called
        return []
    return found

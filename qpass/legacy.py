"""quantize_dynamic: the call PyTorch is removing, kept for those who rely on it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qpass.api import compile
from qpass.backends import backend_named
from qpass.checks import device_of
from qpass.convolutions import MODULES
from qpass.errors import QpassError


def quantize_dynamic(
    model: nn.Module,
    qconfig_spec: Iterable[type[nn.Module] | str] | None = None,
    dtype: torch.dtype = torch.qint8,
    mapping: None = None,
    inplace: bool = False,
) -> nn.Module:
    """Drop-in for torch.ao.quantization.quantize_dynamic: int8 weights, inputs quantized at run time.

    qconfig_spec: module types or names to quantize, as there; None is every linear and convolution. torch.qint8 becomes
    `w8a8-dynamic` (`w7a8-dynamic` on processors whose 8-bit products saturate). `mapping` is refused:
    there are no quantized module classes here.
    """
    if mapping is not None:
        raise QpassError("mapping names classes to swap modules for; qpass keeps your modules, leave it out.")
    usual = backend_named("auto", device_of(model)).scheme(static=False)
    scheme = {torch.qint8: usual, torch.float16: "w8a16"}.get(dtype)
    if scheme is None:
        raise QpassError(f"dtype {dtype} is not one of torch.qint8 (per-row int8) and torch.float16 (weights alone).")
    training = [module for module in model.modules() if module.training]
    model.eval()  # as the call it replaces: it is used on freshly loaded models
    try:
        return compile(model, scheme, recipe=_recipe(model, qconfig_spec, scheme), inplace=inplace)
    finally:
        if not inplace:
            for module in training:
                module.training = True


def _recipe(
    model: nn.Module, spec: Iterable[type[nn.Module] | str] | None, scheme: str
) -> dict[str, str | None] | None:
    if spec is None:
        return None
    wanted = tuple(spec)
    types = tuple(w for w in wanted if isinstance(w, type))
    names = {w for w in wanted if isinstance(w, str)}
    chosen: dict[str, str | None] = {}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Linear, *MODULES)):
            inside = any(path == name or path.startswith(f"{name}.") for name in names)
            chosen[path] = scheme if inside or isinstance(module, types) else None
    return {path: value for path, value in chosen.items() if value is None} or None

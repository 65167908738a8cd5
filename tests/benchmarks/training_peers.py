"""Other packages' quantization-aware training on the same runs, where they are installed: `training.py --method torchao`.

A peer takes a model, a scheme, batches for first steps and the layers that are kept (None: float, else their scheme). What
comes back is trained like any other model; scored is its own fake-quantized forward pass. A scheme it lacks is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpass.schemes import Scheme

Peer = Callable[[nn.Module, str, list[Tensor], Mapping[str, str | None]], nn.Module | None]


def _parts(scheme: str) -> tuple[int, int, int | None, bool]:
    """(weight bits, input bits or 16, group or None for channels, whether inputs are static)."""
    parsed = Scheme.parse(scheme)
    assert parsed.weight is not None
    inputs = 16 if parsed.activation is None else parsed.activation.bits
    static = parsed.activation is not None and not parsed.dynamic
    return parsed.weight.bits, inputs, parsed.weight.group, static


def torchao(model: nn.Module, scheme: str, batches: list[Tensor], kept: Mapping[str, str | None]) -> nn.Module | None:
    """Steps from the largest values at each call, straight-through; linears alone, inputs per token alone."""
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    bits, inputs, group, static = _parts(scheme)
    if static or any(isinstance(m, nn.Conv2d) for m in model.modules()):
        return None
    size: dict[str, Any] = {"group_size": group} if group else {"granularity": "per_channel"}
    weight = IntxFakeQuantizeConfig(getattr(torch, f"int{bits}"), **size, is_symmetric=inputs < 16)
    read = (
        None if inputs > 8 else IntxFakeQuantizeConfig(getattr(torch, f"int{inputs}"), "per_token", is_symmetric=False)
    )
    chosen = lambda module, name: isinstance(module, nn.Linear) and name not in kept
    quantize_(model, QATConfig(activation_config=read, weight_config=weight, step="prepare"), filter_fn=chosen)
    return model


def brevitas(model: nn.Module, scheme: str, batches: list[Tensor], kept: Mapping[str, str | None]) -> nn.Module | None:
    """Learned steps, one a channel of a weight (for groups of 128 too) and one an input; first ones from a calibration."""
    from brevitas import nn as qnn
    from brevitas import quant
    from brevitas.graph.calibrate import calibration_mode

    _, read, size, static = _parts(scheme)
    if size == 32 or (read < 16 and not static):
        return None
    quants = {nn.Linear: qnn.QuantLinear, nn.Conv2d: qnn.QuantConv2d}
    for name, module in list(model.named_modules()):
        mine = kept.get(name, scheme)
        if type(module) not in quants or mine is None:
            continue
        bits, inputs, _, _ = _parts(mine)
        options: dict[str, Any] = {
            "bias": module.bias is not None,
            "weight_quant": quant.Int8WeightPerChannelFloat,
            "weight_bit_width": bits,
            "weight_scaling_impl_type": "parameter_from_stats",
            "input_quant": None if inputs > 8 else quant.ShiftedUint8ActPerTensorFloat,
        }
        options |= {} if inputs > 8 else {"input_bit_width": inputs}
        if isinstance(module, nn.Conv2d):
            shape = {n: getattr(module, n) for n in ("stride", "padding", "dilation", "groups")}
            new = quants[nn.Conv2d](module.in_channels, module.out_channels, module.kernel_size, **shape, **options)
        else:
            new = quants[nn.Linear](module.in_features, module.out_features, **options)
        new.weight.data.copy_(module.weight.data)
        if module.bias is not None:
            new.bias.data.copy_(module.bias.data)
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, new)
    with torch.no_grad(), calibration_mode(model.eval()):
        for batch in batches:
            model(batch)
    return model


PEERS: dict[str, Peer] = {"torchao": torchao, "brevitas": brevitas}

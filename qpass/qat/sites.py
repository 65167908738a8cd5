"""Modules whose product is fake-quantized: the same module, of a class made from its own, its weight where it was.

    Linear          y = linear(Q_x(x), Q_w(weight), bias); with factors of the channels of x, of the products (channels.py)
    Conv*           the same, behind the module's own padding
    any other       its own forward on Q_x(x), with Q_w(weight) under the weight's name for the time of the call; of
                    nn.MultiheadAttention that of attention.py, whose output layer is a Linear of its own

Parameters, hooks, names in state_dict and isinstance stay; two submodules are added, `weight_quantizer` and
`input_quantizer`. Sites that read one value, or one weight, share the first one's quantizer, and refer to it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from qpass.qat.attention import Attention, of_one_value, whole
from qpass.qat.channels import carried
from qpass.qat.product import convolution, linear
from qpass.qat.quantizer import Quantizer, product_dtype

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHT, INPUT = "weight_quantizer", "input_quantizer"


class Trained:
    """What the class of a trained module has before its own class: `base`, and a forward that fake-quantizes."""

    base: type[nn.Module]
    weight_name: str
    used: tuple[Quantizer, Quantizer | None]  # of weight and input; a tuple, so that none is registered a second time

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, of a fake-quantized input and weight."""
        multiplied = keeps_factors(self) and all(quantizer.on for quantizer in self.used)
        args, kwargs = self._rounded(args, kwargs, multiplied)
        raw = getattr(self, self.weight_name)
        dtype = raw.dtype if isinstance(self, nn.Embedding) else product_dtype(raw)
        weight = self.used[0](raw, dtype=dtype, multiplied=multiplied)
        if self.base.forward is nn.Linear.forward:
            bias = self._shifted_bias(weight) if multiplied else self.bias
            return linear(*args, **kwargs, weight=weight, bias=bias)
        if any(self.base.forward is kind.forward for kind in CONVOLUTIONS):
            return convolution(self, *args, **kwargs, weight=weight)
        vars(self)[self.weight_name] = weight  # found before a parameter of that name
        try:
            return self.base.forward(self, *args, **kwargs)
        finally:
            del vars(self)[self.weight_name]

    def _shifted_bias(self, weight: Tensor) -> Tensor | None:
        """The bias, and what the shift of the input's channels adds to it; weight: as it is multiplied."""
        channels = self.used[1].channels()
        if channels is None or channels[1] is None:
            return self.bias
        moved = carried(weight, channels[1])
        return (moved if self.bias is None else self.bias + moved).to(weight.dtype)

    def _rounded(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], multiplied: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, the first one fake-quantized."""
        quantizer = self.used[1]
        if quantizer is None:
            return args, kwargs
        name = None if args else next(iter(kwargs))
        value = args[0] if args else kwargs[name]
        if isinstance(self, Attention) and not of_one_value(*args, **kwargs):
            return args, kwargs  # products of a part of the matrix are other sites, which stay float
        reader = 0 if torch.compiler.is_compiling() else id(self)  # it is compiled for this module alone
        rounded = quantizer(value, reader, product_dtype(value), multiplied)
        if isinstance(self, Attention):
            kwargs = {n: rounded if v is value else v for n, v in kwargs.items()}
            return tuple(rounded if v is value else v for v in args), kwargs
        return ((rounded, *args[1:]), kwargs) if args else (args, {**kwargs, name: rounded})

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        return _remade, (self.base,), self.__getstate__()


@functools.cache
def _trained_class(base: type[nn.Module]) -> type[nn.Module]:
    return type(f"Trained{base.__name__}", (Trained, base), {"base": base, "__module__": base.__module__})


def _remade(base: type[nn.Module]) -> nn.Module:
    kind = _trained_class(base)
    return kind.__new__(kind)


def make_trained(module: nn.Module, name: str, weight: Quantizer, x: Quantizer | None, owned: set[int]) -> None:
    """Turns a module into a trained one, in place. name: of its weight; owned: ids of what other modules have registered."""
    module.__class__ = _trained_class(type(module))
    module.weight_name, module.used = name, (weight, x)
    if x is not None:
        x.coded = x.coded and any(module.base.forward is kind.forward for kind in (nn.Linear, *CONVOLUTIONS))
    for attribute, quantizer in ((WEIGHT, weight), (INPUT, x)):
        if quantizer is not None and id(quantizer) not in owned:
            owned.add(id(quantizer))
            setattr(module, attribute, quantizer.train(module.training))


def holder_of(module: nn.Module | None, parameter: Tensor | None) -> nn.Module | None:
    """The module that a site's weight is held by as its own, of the module that the site is in; None where that is another.

    That of nn.MultiheadAttention's output is `out_proj`, a module inside that is not called until it is in training.
    """
    candidates = [] if module is None else [module]
    if isinstance(module, nn.MultiheadAttention):  # a class of a user's may have another forward
        ours = type(module) is nn.MultiheadAttention or isinstance(module, Attention)
        candidates = [module, module.out_proj] if ours else []
    return next((each for each in candidates if own_name(each, parameter)), None)


def own_name(module: nn.Module, parameter: Tensor | None) -> str | None:
    """What a module calls a parameter of its own; a plan names one by its first path in the model."""
    mine = (name for name, each in module._parameters.items() if each is not None and each is parameter)
    return next(mine, None)


def keeps_factors(module: nn.Module) -> bool:
    """Whether a trained module multiplies values that have the factors of its input's channels, and shifts its bias."""
    x = module.used[1]
    return module.base.forward is nn.Linear.forward and x is not None and x.factor is not None


def make_float(module: nn.Module) -> None:
    """Turns a trained module into what it was, in place."""
    module.__class__ = module.base
    for name in (WEIGHT, INPUT):
        module._modules.pop(name, None)
    for name in ("weight_name", "used"):
        vars(module).pop(name)


def make_all_float(model: nn.Module) -> None:
    """Every trained module of a model, in place."""
    for module in trained_modules(model).values():
        make_float(module)
    for module in model.modules():
        whole(module)


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> module, of those that are fake-quantized."""
    return {path: module for path, module in model.named_modules() if isinstance(module, Trained)}


def quantizers(model: nn.Module) -> list[Quantizer]:
    """Every quantizer of a model, once."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a trained module, in float."""
    return getattr(module, module.weight_name)

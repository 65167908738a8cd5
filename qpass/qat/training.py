"""A model in training: made of a float model and its plan, and made into a float model and a plan again.

    plan: site -> types, first steps, codes   ->   modules that are fake-quantized, with these for a start
    trained weights, steps, clips, offsets    ->   plan: the same sites and types, codes and steps as trained

The second way nothing is chosen anew: a weight's codes are its fake-quantized values over its step, an input's step and zero
point are those the training ended with.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpass import affine
from qpass.calibrate import Batch, call_arguments
from qpass.errors import QpassError
from qpass.packing import Packed, pack
from qpass.plan import Decision, Plan
from qpass.qat.arguments import with_other_operands
from qpass.qat.attention import split
from qpass.qat.channels import carried
from qpass.qat.fast_path import allow_fast_path, leave_fast_path
from qpass.qat.quantizer import Quantizer
from qpass.qat.sites import Trained, holder_of, make_all_float, make_trained, own_name, weight_of
from qpass.qat.subgradients import Method
from qpass.qparams import QParams
from qpass.storage import fingerprint
from qpass.trained import RECORD, Training, training_of

TENSORS = ("packed", "input_scale", "input_zero", "input_shift", "bias")  # of a decision: the model holds them
MARGIN = 0.05  # of a step: how far from the edge of its code's range a weight starts
TWO_WEIGHTS = "its module has {} fake-quantized already, and training does so with one weight of a module"
OTHER_OPERAND = (
    "the product in its module is not that of the module's first argument, which is what training fake-quantizes; a weight-"
    "only scheme can be trained there"
)
NO_MODULE = "its product is not that of a module of its own, and training fake-quantizes modules"


def trainable(model: nn.Module, plan: Plan, example: Batch | None = None) -> Plan:
    """The plan, with the sites that no module stands for left in float. example: what the model is called with."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    held: dict[nn.Module, str] = {}  # the parameter of a module that is fake-quantized
    rounded: dict[nn.Module, Decision] = {}
    kept = Plan(plan.scheme, parameters=plan.parameters, notes=list(plan.notes))
    for d in plan:
        if d.is_output:
            continue
        module = holder_of(modules.get(_path(d)), parameters.get(d.weight))
        if not d.quantized or module is None:
            d = d.as_float(d.why or NO_MODULE)
        elif held.setdefault(module, d.weight) != d.weight:
            d = d.as_float(TWO_WEIGHTS.format(held[module]))
        elif d.input_type is not None:
            rounded.setdefault(module, d)
        kept.decisions[d.site] = d
    names = {module: own_name(module, parameters[d.weight]) for module, d in rounded.items()}
    for module in with_other_operands(names, _calls(model, rounded, example)):
        for d in [d for d in kept.quantized if holder_of(modules[_path(d)], parameters[d.weight]) is module]:
            kept.decisions[d.site] = d.as_float(OTHER_OPERAND)
    return kept


def _path(d: Decision) -> str:
    return d.site.rpartition(":")[0]


def _calls(model: nn.Module, sites: Mapping[nn.Module, Decision], example: Batch | None) -> Iterator[Callable[[], Any]]:
    """Calls that come to the modules: that of the model, else one of each module with rows of zeros."""
    if example is not None:
        args, kwargs = call_arguments(example, "example_inputs")
        yield lambda: model(*args, **kwargs)
        return
    for module, d in sites.items():
        weight = next(module.parameters(recurse=False))
        yield functools.partial(module, weight.new_zeros(2, d.shape[1]))


def install_training(model: nn.Module, plan: Plan, method: Method, start: str) -> None:
    """Makes the modules of a plan's sites trained ones, in place. start: of weights.

    `published`: with the method's own steps; `steps`: with the plan's; `rounded`: with these, moved to its codes.
    """
    weights: dict[str, Quantizer] = {}
    inputs: dict[Hashable, Quantizer] = {}
    owned: set[int] = set()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    for d in plan.quantized:
        outer = modules[_path(d)]
        module = holder_of(outer, parameters[d.weight])
        if type(outer) is nn.MultiheadAttention:
            split(outer)
        if hasattr(module, "used"):
            inputs.setdefault(_shared_by(d), module.used[1])
            continue
        name = own_name(module, parameters[d.weight])
        parameter = module._parameters[name]
        learns = any(p.requires_grad for p in module.parameters(recurse=False))
        if d.weight not in weights:
            weights[d.weight] = _of_weight(d, parameter, method, start, learns)
        value = _shared_by(d)
        if d.input_type is not None and value not in inputs:
            inputs[value] = _of_input(d, method, learns)
        elif d.input_type is not None:
            inputs[value].readers += 1
        make_trained(module, name, weights[d.weight], inputs[value] if d.input_type else None, owned)
    bare = {n: dataclasses.replace(d, **dict.fromkeys(TENSORS)) for n, d in plan.decisions.items()}
    record = Training(dataclasses.replace(plan, decisions=bare), method.name)
    vars(model)[RECORD] = record
    leave_fast_path(model)


def _shared_by(d: Decision) -> Hashable:
    """What sites have in common that share an input's quantizer: what they read, its first steps, and its factors."""
    held = (d.input_scale, d.input_zero, None if d.packed is None else d.packed.in_mul)
    return d.group, d.input_type, *(None if t is None else fingerprint(t) for t in held)


def _of_weight(d: Decision, parameter: Tensor, method: Method, start: str, learns: bool) -> Quantizer:
    packed, rule = d.packed, method.weights
    params = QParams(packed.scale, packed.zero, packed.type).to(parameter.device)
    made = functools.partial(
        Quantizer, f"{d.site}.weight", packed.type, rule, is_weight=True, learns=learns, factor=packed.in_mul
    )
    quantizer = made(params=params).to(parameter.device)
    if start == "published" and rule.start is not None:
        return made(params=rule.start(quantizer.seen(parameter.detach()), packed.type)).to(parameter.device)
    if rule.learns and start == "rounded":
        with torch.no_grad():
            near = near_codes(quantizer.seen(parameter), packed.data.to(parameter.device), params)
            parameter.copy_(quantizer.undone(near))
    return quantizer


def near_codes(weight: Tensor, codes: Tensor, params: QParams) -> Tensor:
    """The weights, each moved to the nearest value that rounds to its code, MARGIN of a step from the edge."""
    step = affine.expand(params.scale, params.type, weight.dim())
    middle = affine.dequantize(codes, params.scale, params.zero, params.type)
    reach = (0.5 - MARGIN) * step
    return weight.float().clamp(middle - reach, middle + reach).to(weight.dtype)


def _of_input(d: Decision, method: Method, learns: bool) -> Quantizer:
    factors = dict(factor=d.packed.in_mul, shift=d.input_shift)
    static = d.input_scale is not None
    params = QParams(d.input_scale, d.input_zero, d.input_type) if static else None
    positive = static and (d.input_zero is None or int(d.input_zero) <= d.input_type.qmin)  # rows may be anything
    rule = method.inputs if positive else method.negative_inputs
    return Quantizer(f"{d.site}.input", d.input_type, rule, params, False, learns, **factors)


def lowered(model: nn.Module, inplace: bool = False) -> tuple[nn.Module, Plan]:
    """(the float model with the trained weights, its plan with the trained codes and steps) of a model in training.

    It is a copy unless inplace; the plan can be compiled with the float model.
    """
    plan = trained_plan(model)
    return float_model(model, inplace), plan


def trained_plan(model: nn.Module) -> Plan:
    """The plan of a model in training, with the codes and steps it has now."""
    record = training_of(model)
    assert record is not None
    plan = dataclasses.replace(record.plan, decisions={})
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters(remove_duplicate=False))
    packed: dict[str, Packed] = {}
    prints: dict[str, str] = {}
    for name, d in record.plan.decisions.items():
        if not d.quantized:
            plan.decisions[name] = d
            continue
        module = holder_of(modules.get(_path(d)), parameters.get(d.weight))
        if not isinstance(module, Trained):
            raise QpassError(f"{d.site}: this site was prepared for training, and its module is there no more.")
        if d.weight not in packed:
            packed[d.weight] = _codes(module.used[0], weight_of(module))
            prints[d.weight] = fingerprint(weight_of(module).detach())
        d = dataclasses.replace(d, packed=packed[d.weight], made_from=prints[d.weight])
        plan.decisions[name] = _with_input(d, module.used[1])
    return plan


def _codes(quantizer: Quantizer, weight: Tensor) -> Packed:
    params = quantizer.params(weight).check(quantizer.site)
    codes = affine.quantize(quantizer.seen(weight.detach()), params.scale, params.zero, params.type)
    factor = None if quantizer.factor is None else quantizer.factor.to(torch.float32, copy=True)
    return pack(codes, params.scale, params.type, factor, params.zero).to("cpu")


def _with_input(d: Decision, quantizer: Quantizer | None) -> Decision:
    if quantizer is None:
        return d
    if not quantizer.dynamic:
        params = quantizer.params().check(quantizer.site).to("cpu")
        d = dataclasses.replace(d, input_scale=params.scale, input_zero=params.zero)
    elif quantizer.clip is not None:
        d = dataclasses.replace(d, input_type=dataclasses.replace(d.input_type, clip=quantizer.clip))
    if quantizer.shift is None:
        return d
    shift, packed = quantizer.shift.to("cpu", torch.float32, copy=True), d.packed
    weight = affine.dequantize(packed.data, packed.scale, packed.zero, packed.type)
    weight = weight.t() if d.transposed else weight
    return dataclasses.replace(d, input_shift=shift, bias=carried(weight, shift * packed.in_mul))


def float_model(model: nn.Module, inplace: bool = False) -> nn.Module:
    """The model without fake quantization: its float weights as they are trained. A copy unless inplace."""
    target = model if inplace else copy.deepcopy(model)
    make_all_float(target)
    vars(target).pop(RECORD, None)
    allow_fast_path(target)
    return target

"""What is wrong with the input of a call, said before anything is done: the place, what was expected, what to do."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from qpass.calibrate import Batch, call_arguments
from qpass.errors import QpassError
from qpass.install import packed_weights
from qpass.interrupts import stop_if_asked
from qpass.plan import Plan
from qpass.processes import everywhere
from qpass.schemes import Scheme
from qpass.site_info import SiteInfo
from qpass.slices import tensor_of
from qpass.storage import fingerprint


def check_module(model: object) -> None:
    """A module at all."""
    if not isinstance(model, nn.Module):
        raise QpassError(f"model is a {type(model).__name__}; expected a torch.nn.Module.")


def check_model(model: object) -> None:
    """A model that can be quantized: an eval-mode module with real float tensors that is not compiled yet."""
    check_module(model)
    kind = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise QpassError("model is already compiled by torch.compile; pass the module itself, model._orig_mod.")
    if model.__dict__.get("_compiled_call_impl") is not None:
        done = "qpass" if packed_weights(model) else "model.compile()"
        raise QpassError(f"this {kind} is already compiled by {done}; compile the float model it was made from.")
    if packed_weights(model):
        raise QpassError(f"the weights of this {kind} are packed already; compile the float model it was made from.")
    for path, module in model.named_modules():
        if module.training:
            which = f"{path!r} of this {kind}" if path else f"this {kind}"
            raise QpassError(f"{which} is in training mode; call model.eval() first (dropout and batch norm differ).")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise QpassError(f"{name} is on the meta device, so it has no values; load the weights first.")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not _finite(parameter.detach()):
            raise QpassError(f"{name} holds NaN or infinity; a quantized weight needs finite values.")


def _finite(values: Tensor) -> bool:
    """Whether all values are finite; nothing of their size is allocated."""
    real = values if values.itemsize > 1 else values.float()
    return not real.numel() or all(math.isfinite(float(end)) for end in real.aminmax())


def device_of(model: nn.Module) -> torch.device:
    """The one device of a model's tensors; cpu where it has none."""
    devices = {t.device for t in (*model.parameters(), *model.buffers())}
    if len(devices) > 1:
        raise QpassError(f"the model is spread over {', '.join(map(str, devices))}; move it to one device with .to().")
    return devices.pop() if devices else torch.device("cpu")


def check_calibration(schemes: list[Scheme], calibration: object) -> None:
    """A static scheme, and a solver that looks at inputs, have calibration batches, and they can be iterated."""
    static = next((s for s in schemes if s.needs_calibration), None)
    if static is not None and calibration is None:
        raise QpassError(
            f"scheme {static} has static input scales and needs calibration=[batch, ...]; without data use "
            f"'{static.name}-dynamic'."
        )
    blind = next((s for s in schemes if s.solver_needs_data), None)
    if blind is not None and calibration is None:
        raise QpassError(
            f"scheme {blind}: solver={blind.solver} looks at what the weights read; pass calibration=[batch, ...], or "
            "take solver=rtn or solver=hqq, which need no data."
        )
    if calibration is not None and (
        isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable)
    ):
        raise QpassError(
            f"calibration is a {type(calibration).__name__}; expected an iterable of batches, such as [batch, ...]."
        )


def check_checkpoint(checkpoint: object, calibration: object) -> None:
    """There is something to keep in a directory."""
    if checkpoint is not None and calibration is None:
        raise QpassError("checkpoint keeps what calibration has finished, and there is no calibration; leave it out.")


def check_counts(batches: Sequence[int]) -> None:
    """At least one calibration batch came; batches: how many to each process."""
    if not any(batches):
        raise QpassError(
            "calibration gave no batches (empty, or an iterator used up); pass a list or a fresh iterator."
        )
    if not all(batches):
        raise QpassError(
            f"process {batches.index(0)} of {len(batches)} has no calibration batch, of {sum(batches)} in all; give each "
            f"process one at least (calibration[rank::{len(batches)}]), or start fewer processes."
        )


def check_same_sites(sites: Mapping[str, SiteInfo]) -> None:
    """Every process has come to the same sites, in the same order."""
    first, *others = everywhere(list(sites))
    for number, other in enumerate(others, 1):
        pair = next((pair for pair in zip_longest(first, other) if pair[0] != pair[1]), None)
        if pair is not None:
            raise QpassError(
                f"process {number} of {len(others) + 1} comes to other sites than process 0: first to "
                f"{pair[1] or 'none'} where that comes to {pair[0] or 'none'}. Their batches are captured as different "
                "graphs; give all of them batches that run the same code, or calibrate in one process."
            )


def check_plan_alone(plan: object, *others: object) -> None:
    """A plan is given instead of what it is made from."""
    if not isinstance(plan, Plan):
        raise QpassError(f"plan is a {type(plan).__name__}; expected a Plan from qpass.analyze or Plan.load.")
    if any(value is not None for value in others):
        raise QpassError("plan already holds the scheme, calibration and recipe it was made with; pass it alone.")


def check_trained_alone(*others: object) -> None:
    """A model that was trained for a scheme is lowered as it was trained."""
    if any(value is not None for value in others):
        raise QpassError(
            "this model was prepared for a scheme and trained; it is compiled as it was trained: pass neither scheme, "
            "calibration, recipe, checkpoint nor plan (qpass.qat.float_model gives its float weights, for another scheme)."
        )


def check_plan_fits(plan: Plan, weights: Mapping[str, Tensor], whole: str | None) -> None:
    """The plan was made from this model. whole: the model's class, where `weights` are all of its parameters."""
    for d in plan.quantized:
        found = tensor_of(weights, d.weight)
        if found is None:
            if whole is None:
                continue
            raise QpassError(
                f"{d.site}: the plan has a weight {d.weight!r} that this {whole} lacks; compile the model the plan was "
                "made from."
            )
        if d.packed is not None and found.shape != d.packed.shape:
            raise QpassError(
                f"{d.site}: the plan's weight {d.weight!r} is {d.packed.shape}, the model's "
                f"{tuple(found.shape)}; compile the model the plan was made from."
            )
        if d.made_from and d.made_from != fingerprint(found):
            raise QpassError(
                f"{d.site}: the plan's integers stand for other values than {d.weight!r} has now; call qpass.analyze on "
                "this model (qpass.save and qpass.load carry weights from one model to another)."
            )


def check_inputs(model: nn.Module, batch: Batch, what: str) -> None:
    """A batch that fits the model's signature and is not empty."""
    args, kwargs = call_arguments(batch, what)
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        wanted = inspect.signature(model.forward)
        raise QpassError(
            f"{what} does not fit {type(model).__name__}.forward{wanted}: {error}. Pass a tensor, a tuple of positional "
            "arguments or a mapping of keyword arguments."
        ) from error
    for name, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == 0:
            raise QpassError(
                f"{what}[{name!r}] of shape {tuple(value.shape)} is empty; a batch needs at least one row."
            )


def checked(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, each checked as it comes."""
    for i, batch in enumerate(batches):
        stop_if_asked()
        check_inputs(model, batch, f"calibration batch {i}")
        yield batch


def check_sites(model: nn.Module, sites: Mapping[str, SiteInfo], ran: bool = True) -> None:
    """The model has something to quantize. ran: whether it was run to find out."""
    if not ran and not sites:
        raise QpassError(
            f"{type(model).__name__} has no nn.Linear or convolution module; pass example_inputs, so that it can be run "
            "to find its other products with a weight."
        )
    if not any((info.operation == "linear" or info.walk) and info.weight for info in sites.values()):
        found = ", ".join(sorted({info.operation for info in sites.values()})) or "no matrix product at all"
        raise QpassError(
            f"{type(model).__name__} has no site to quantize: no linear or convolution with a parameter as weight was "
            f"reached (found: {found})."
        )


def warm_up(model: nn.Module, batch: Batch) -> Any:
    """Calls a compiled model once, so that the first call of the user is fast."""
    args, kwargs = call_arguments(batch, "example_inputs")
    return model(*args, **kwargs)


def check_one_width(plan: Plan, why: str) -> None:
    """No weight that is read at several widths; why: what cannot be done with one."""
    for d in plan.nested:
        assert d.weight_type is not None
        raise QpassError(f"{d.site}: its weight is {d.weight_type}. {why}; use one width, such as w4a16.")

"""Save a compiled model and load it into a fresh float model of the same architecture, equal to the last bit.

As one file, or as a directory of the kind that transformers keeps (shards.py): the model's configuration beside its weights.
"""

from __future__ import annotations

import os
from pathlib import Path

from torch import Tensor, nn

from qpass import checks
from qpass.backends import backend_named
from qpass.backends.cuda_graphs import check_mode
from qpass.bits import bits_set, nested_weights
from qpass.errors import QpassError
from qpass.install import copy_for_packing, float_slices, install, packed_weights
from qpass.plan import Plan
from qpass.runtime import all_or_nothing, attach, runtime_of
from qpass.shards import config_texts, read_directory, write_directory
from qpass.slices import slice_of, with_slices
from qpass.storage import plan_from_data, plan_to_data, read, write


def save(model: nn.Module, path: str | os.PathLike[str], shard_size: int | None = None) -> None:
    """Writes a model that qpass has compiled: its plan with the integers, and every other parameter and buffer.

    path: a file; or a directory, where one is there, the path ends in a slash, or shard_size is given. shard_size: bytes that
    a file of the directory holds at most (5 GB unless given). Whole or not at all.
    """
    runtime = runtime_of(model)
    if runtime is None:
        raise QpassError(f"this {type(model).__name__} was not compiled by qpass; compile it first.")
    data, tensors = plan_to_data(runtime.plan)
    rest = {f"state|{name}": t for name, t in _other_state(model).items()}
    header = {"plan": data, "model": type(model).__name__, "backend": runtime.backend.name, "bits": bits_set(model)}
    if shard_size is not None or os.fspath(path).endswith(("/", os.sep)) or Path(path).is_dir():
        write_directory(path, "model", header, tensors | rest, config_texts(model), shard_size)
    else:
        write(path, "model", header, tensors | rest)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    backend: str = "auto",
    inplace: bool = False,
    mode: str | None = None,
) -> nn.Module:
    """The saved model, made from a float model of the same architecture (its own weights do not matter).

    path: the file or directory that `save` wrote; with a directory comes the generation_config of the saved model.
    backend, mode: as in `compile`; they are not saved.
    """
    checks.check_model(model)
    header, tensors = read_directory(path, "model") if Path(path).is_dir() else read(path, "model")
    plan = plan_from_data(header["plan"], {k: t for k, t in tensors.items() if not k.startswith("state|")})
    state = {k.removeprefix("state|"): t for k, t in tensors.items() if k.startswith("state|")}
    _check_fits(plan, state, model, header["model"])
    chosen = backend_named(backend, checks.device_of(model))
    target = model if inplace else copy_for_packing(model, plan.packed)
    with all_or_nothing(target):
        install(target, plan.packed, plan.biases)
        attach(target, plan, chosen, check_mode(mode))
    own = dict(_other_state(target))
    for name, value in state.items():
        own[name].data.copy_(value)
    for name, form in nested_weights(target).items():
        form.bits.fill_(header.get("bits", {}).get(name, form.widths[0]))
    _take_generation_config(target, Path(path))
    return target


def _take_generation_config(model: nn.Module, directory: Path) -> None:
    """How the saved model generates, where it said so."""
    own = getattr(model, "generation_config", None)
    if (directory / "generation_config.json").is_file() and hasattr(own, "from_pretrained"):
        model.generation_config = type(own).from_pretrained(directory)


def _other_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are not part of a packed weight, and the float slices of those packed in part."""
    packed = tuple({_prefix(name) for name in packed_weights(model)})
    named = [*model.named_parameters(), *model.named_buffers()]
    others = {name: t for name, t in named if not name.startswith(packed)} if packed else dict(named)
    return others | float_slices(model)


def _prefix(weight: str) -> str:
    path, _, attribute = slice_of(weight)[0].rpartition(".")
    return f"{path}.parametrizations.{attribute}.".lstrip(".")


def _check_fits(plan: Plan, state: dict[str, Tensor], model: nn.Module, saved: str) -> None:
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    kind, advice = type(model).__name__, "build the model with the configuration it was saved with."
    shapes_of = {name: packed.shape for name, packed in plan.packed.items()}
    wanted = shapes_of | {name: tuple(t.shape) for name, t in state.items()}
    named = with_slices(named, wanted)
    for name, shape in wanted.items():
        if name not in named:
            raise QpassError(f"the file holds a {saved} with {name!r}, which this {kind} lacks; {advice}")
        if named[name].shape != shape:
            shapes = f"{shape} in the file and {tuple(named[name].shape)}"
            raise QpassError(f"{name!r} is {shapes} in this {kind}; {advice}")
        if name in state and named[name].dtype != state[name].dtype:
            dtype = state[name].dtype
            raise QpassError(
                f"{name!r} is {dtype} in the file and {named[name].dtype} in this {kind}; load into model.to({dtype})."
            )
    covered = {id(named[each]) for name in wanted for each in (name, slice_of(name)[0])}
    for name, tensor in named.items():
        if id(tensor) not in covered:
            raise QpassError(f"this {kind} has {name!r}, which the saved {saved} lacks; {advice}")

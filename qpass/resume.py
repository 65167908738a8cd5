"""What an interrupted calibration has finished, on disk: the decisions of each group of sites, solved in order of execution.

    DIR/group-00000.safetensors    a plan of the first group alone; its header says what it was made of: the scheme and
    DIR/group-00001.safetensors    recipe, a digest of the weights, and one of the calibration batches

A run that is made of the same goes on behind the last file of an unbroken row from the first. Each file is written beside its
place and moved there before the next group is begun, so none is there in part.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qpass.errors import QpassError
from qpass.plan import Decision, Plan
from qpass.processes import agree, count, first_alone
from qpass.schemes import Recipe, Scheme
from qpass.site_info import SiteInfo
from qpass.storage import digest, plan_from_data, plan_to_data, read, write

LOG = logging.getLogger("qpass")
NOTHING_TO_RESUME = "{} holds nothing of this run, as it is calibrated in one pass: an interrupted one begins again"
OTHER = (
    "{} holds what another run has finished: its {} not those of this one. Go on with what that run was started with{}, or "
    "give another folder, or delete this one."
)
AGREE = "all are to calibrate one model in one way; load its weights from one file, or seed what makes them."
ANY_SCHEME = Scheme.parse("w8a16")  # of the plan in a file, which is of one group; its decisions hold their own types


def facts(model: nn.Module, recipe: Recipe) -> dict[str, str]:
    """What a calibration is made of besides its batches: the text of scheme and recipe, and a digest of all tensors."""
    rules = [f"{glob}={'float' if scheme is None else scheme}" for glob, scheme in recipe.rules]
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {
        "scheme": " ".join([str(recipe.default), *rules]),
        "weights": _joint(f"{name} {digest(tensor)}" for name, tensor in tensors),
    }


def batch_digest(given: Iterable[Any], model: nn.Module) -> str:
    """A digest of what a graph is called with, but for the model's own tensors."""
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return _joint(digest(v) if isinstance(v, Tensor) else repr(v) for v in given if id(v) not in own)


def batches_digest(each: Iterable[str]) -> str:
    """A digest of all batches, in whatever order: no plan depends on it, nor on who has which."""
    return _joint(sorted(each))


def _joint(texts: Iterable[str]) -> str:
    return hashlib.blake2b("\n".join(texts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Checkpoint:
    """A directory, and what the decisions in it are made of."""

    directory: Path
    made_of: Mapping[str, str]


def begin(model: nn.Module, recipe: Recipe, directory: str | os.PathLike[str] | None) -> Checkpoint | None:
    """The checkpoint in a directory, if there is one; raises where it cannot be written, and where processes do not agree."""
    if directory is None and count() == 1:
        return None
    if directory is not None:
        first_alone(prepare, directory)
    made_of = facts(model, recipe)
    agree(made_of | {"checkpoint": directory is not None}, AGREE)
    return None if directory is None else Checkpoint(Path(directory), made_of)


def prepare(directory: str | os.PathLike[str]) -> None:
    """Makes the directory; raises where files cannot be written there."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(b"qpass")
    except OSError as error:
        raise QpassError(f"the checkpoint {directory} cannot be written to: {error}; give another folder.") from error


def part(directory: str | os.PathLike[str] | None, bits: int) -> Path | None:
    """The directory within that of a nested scheme's run for one of its widths."""
    return None if directory is None else Path(directory) / f"w{bits}"


def files(directory: str | os.PathLike[str]) -> list[Path]:
    """The files of finished groups."""
    return sorted(Path(directory).glob("group-*.safetensors"))


def finished(checkpoint: Checkpoint, groups: Sequence[Sequence[SiteInfo]]) -> list[dict[str, Decision]]:
    """The decisions of the first groups, as far as there are files of them. Another run's files are an error."""
    found: dict[int, dict[str, Decision]] = {}
    damaged: list[QpassError] = []
    for path in files(checkpoint.directory):
        try:
            header, tensors = read(path, "group")
        except QpassError as error:
            damaged.append(error)
            continue
        _check_same(checkpoint, header["made_of"])
        found[header["number"]] = plan_from_data(header["plan"], tensors).decisions
    whole = 0
    while whole < len(groups) and found.get(whole, {}).keys() == {info.name for info in groups[whole]}:
        whole += 1
    for error in damaged:
        LOG.warning(
            "%s It is solved again, with those behind it: from group %d of %d on.", error, whole + 1, len(groups)
        )
    if whole:
        LOG.info("%s: %d of %d groups are finished already", checkpoint.directory, whole, len(groups))
    return [found[i] for i in range(whole)]


def _check_same(checkpoint: Checkpoint, theirs: Mapping[str, str]) -> None:
    ours = checkpoint.made_of
    other = [name for name, value in ours.items() if theirs.get(name) != value]
    if other:
        was = f" ({theirs.get('scheme')}; this one: {ours['scheme']})" if "scheme" in other else ""
        which = f"{' and '.join(other)} {'is' if other == ['scheme'] else 'are'}"
        raise QpassError(OTHER.format(checkpoint.directory, which, was))


def save(checkpoint: Checkpoint, number: int, decisions: Mapping[str, Decision]) -> None:
    """Writes what was decided of a group, whole or not at all."""
    data, tensors = plan_to_data(Plan(ANY_SCHEME, dict(decisions)))
    header = {"made_of": dict(checkpoint.made_of), "number": number, "plan": data}
    write(checkpoint.directory / f"group-{number:05d}.safetensors", "group", header, tensors)

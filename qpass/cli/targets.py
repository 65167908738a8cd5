"""What a MODEL on the command line stands for: a built-in example, a factory in a module, or a saved file."""

from __future__ import annotations

import importlib
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qpass.calibrate import Batch
from qpass.demo import example
from qpass.errors import QpassError, nearest

EXAMPLES = ("mlp", "minilm")
EXPECTED = "mlp, minilm, package.module:factory"


@dataclass(frozen=True)
class Target:
    """A float model with the inputs it came with; None where it came without."""

    name: str
    model: nn.Module
    batch: Batch | None = None
    calibration: Any = None


def is_file(text: str) -> bool:
    """Whether a MODEL is a saved file rather than something to build."""
    return text not in EXAMPLES and ":" not in text and Path(text).is_file()


def build(text: str, may_be_file: bool = False) -> Target:
    """The float model of a MODEL; raises QpassError with what is wrong in it."""
    if text in EXAMPLES:
        return Target(text, *example(text))
    if ":" not in text:
        also = " or a saved file" if may_be_file else ""
        raise QpassError(f"{text!r} is not one of {EXPECTED}{also}.{nearest(text, EXAMPLES)}")
    return _target(text, _call(text, attribute(text)))


def attribute(text: str) -> Any:
    """What `package.module:name` names; raises QpassError with what is wrong in it."""
    path, _, name = text.partition(":")
    if not path or not name:
        raise QpassError(f"{text!r} needs a module and a name in it, as in package.module:factory.")
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise QpassError(
            f"{text!r}: there is no module {error.name!r}; run from the folder it is in, or install it."
        ) from error
    except Exception as error:
        raise QpassError(f"{text!r}: importing {path} raised {_described(error)}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [n for n in vars(found) if not n.startswith("_")]
            raise QpassError(f"{text!r}: {path} has no {part!r}.{nearest(part, public)}")
        found = getattr(found, part)
    return found


def _call(text: str, found: Any) -> Any:
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise QpassError(f"{text!r} is a {type(found).__name__}; expected a model or a function that returns one.")
    try:
        return found()
    except Exception as error:
        raise QpassError(f"{text}() raised {_described(error)}") from error


def _described(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"


def _target(text: str, made: Any) -> Target:
    parts = made if isinstance(made, tuple) else (made,)
    if not parts or not isinstance(parts[0], nn.Module) or len(parts) > 3:
        raise QpassError(
            f"{text}() returned a {type(made).__name__}; expected a torch.nn.Module, (model, example_inputs) or "
            "(model, example_inputs, calibration)."
        )
    return Target(text, *parts)

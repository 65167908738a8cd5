"""Positional arguments at full arity: the one way a call is written in a canonical graph."""

from __future__ import annotations

from typing import Any

import torch


def full_arity(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an operator in schema order with defaults written out; keyword-only ones stay keywords."""
    if not isinstance(target, torch._ops.OpOverload):
        return tuple(args), dict(kwargs)
    positional, keywords = list(args), dict(kwargs)
    named: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if argument.kwarg_only:
            if argument.name in keywords:
                named[argument.name] = keywords.pop(argument.name)
            elif argument.has_default_value():
                named[argument.name] = argument.default_value
        elif i >= len(positional):
            positional.append(keywords.pop(argument.name, argument.default_value))
    return tuple(positional), {**named, **keywords}

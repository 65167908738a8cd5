"""What the launchers of the matmuls share: checks, the configuration, the output, the ops.

Each kind has a file with its kernels, `check`, `sums` (the exact product, in float64), `launch` and its op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass_kernels.configs import Config, rule
from qpass_kernels.epilogue import ARGUMENTS, Epilogue
from qpass_kernels.finished import finish_sums
from qpass_kernels.launch import cdiv, check_device, chip_of
from qpass_kernels.layouts import why_no_group
from qpass_kernels.measured import known

LIBRARY = torch.library.Library("qpass_kernels", "DEF")
FLOATS = (torch.bfloat16, torch.float16)
KERNELS: dict[str, Callable[..., Any]] = {}  # what each op runs on CUDA; the interpreter runs it on CPU tensors


def define(schema: str, launch: Callable[..., Any], reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Registers an op: its kernel on CUDA, its reference on CPU, its shape rule for everything that traces."""
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    KERNELS[name] = launch
    LIBRARY.impl(name, launch, "CUDA")
    LIBRARY.impl(name, reference, "CPU")
    torch.library.register_fake(f"qpass_kernels::{name}", fake, lib=LIBRARY)


def define_linear(
    name: str,
    weights: str,
    count: int,
    check: Callable[..., None],
    sums: Callable[..., Tensor],
    launch: Callable[..., Tensor],
) -> None:
    """Registers `name(x, weights..., epilogue...)`. weights: the schema of its `count` weight arguments."""

    def kernel(x: Tensor, *rest: Any) -> Tensor:
        check_device(name, x)
        return run(name, x, rest[:count], Epilogue(*rest[count:]), check, launch)

    def reference(x: Tensor, *rest: Any) -> Tensor:
        held, epilogue = rest[:count], Epilogue(*rest[count:])
        prepare(name, x, held, epilogue, check)
        return epilogue.reference(sums(x.reshape(x.shape[:-1].numel(), x.shape[-1]), *held)).reshape(
            *x.shape[:-1], held[0].shape[0]
        )

    def fake(x: Tensor, *rest: Any) -> Tensor:
        return x.new_empty((*x.shape[:-1], rest[0].shape[0]), dtype=rest[-1])

    define(f"{name}(Tensor x, {weights}, {ARGUMENTS}) -> Tensor", kernel, reference, fake)


def prepare(name: str, x: Tensor, weights: tuple[Any, ...], epilogue: Epilogue, check: Callable[..., None]) -> None:
    """Raises ValueError where the arguments of a linear do not fit together."""
    if x.dim() < 1:
        raise ValueError(f"{name}: x must be [..., K], not a scalar")
    for weight in weights:
        if weight is not None and weight.device != x.device:
            raise ValueError(f"{name}: a weight is on {weight.device}, x on {x.device}")
    check(name, x, *weights)
    epilogue.check(name, x.shape[:-1].numel(), weights[0].shape[0], x.device)


def run(
    name: str,
    x: Tensor,
    weights: tuple[Any, ...],
    epilogue: Epilogue,
    check: Callable[..., None],
    launch: Callable[..., Tensor],
    config: Config | None = None,
) -> Tensor:
    """The launcher of a linear on any shape of x: [..., K] -> [..., N]."""
    prepare(name, x, weights, epilogue, check)
    n, k, m = weights[0].shape[0], x.shape[-1], x.shape[:-1].numel()
    y = torch.empty((*x.shape[:-1], n), dtype=epilogue.out_dtype, device=x.device)
    if m == 0 or n == 0:
        return y
    if k == 0:
        finish_sums(torch.zeros((m, n), dtype=torch.float32, device=x.device), y.view(m, n), epilogue)
        return y
    launch(x.reshape(m, k).contiguous(), *weights, y=y.view(m, n), epilogue=epilogue, config=config)
    return y


def config_for(kind: str, m: int, n: int, k: int, x: Tensor, given: Config | None) -> Config:
    """The configuration given, measured, or ruled, in this order."""
    chip = chip_of(x.device)
    return given or known(kind, m, n, k, chip) or rule(kind, m, n, k, chip)


def tiles(m: int, n: int, config: Config) -> tuple[int, int, int]:
    """The grid of a streamed kernel: tiles of outputs, of tokens, slices of K."""
    return cdiv(n, config.bn), cdiv(m, config.bm), config.split


def residual(epilogue: Epilogue, y: Tensor) -> Tensor | None:
    """The residual as contiguous rows of the output."""
    return None if epilogue.other is None else epilogue.other.reshape(y.shape).contiguous()


def check_float_input(op: str, x: Tensor) -> None:
    """Raises ValueError unless x is a 16-bit float."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x must be bfloat16 or float16, not {x.dtype}")


def check_words(op: str, words: Tensor, dtype: torch.dtype, row: int, k: int) -> None:
    """Raises ValueError unless words are the packed rows, of `row` words each, of K codes."""
    if words.dtype != dtype or words.dim() != 2 or not words.is_contiguous():
        raise ValueError(
            f"{op}: the packed weight must be contiguous {dtype} [N, {row}], not {words.dtype} {tuple(words.shape)}"
        )
    if words.shape[1] != row:
        raise ValueError(f"{op}: x has {k} columns, of which a packed row has {row} words, not {words.shape[1]}")


def check_groups(op: str, name: str, value: Tensor | None, dtype: torch.dtype, n: int, k: int, kind: str) -> None:
    """Raises ValueError unless value is [G, N] of groups that a kernel of `kind` takes."""
    if value is None:
        return
    if value.dtype != dtype or value.dim() != 2 or value.shape[1] != n or not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous {dtype} [G, {n}], not {value.dtype} {tuple(value.shape)}")
    groups = value.shape[0]
    why = f"{groups} groups do not divide {k} inputs" if k % max(groups, 1) or not groups else None
    why = why or (why_no_group(kind, k // groups, k) if name == "scale" or groups > 1 else None)
    if why:
        raise ValueError(f"{op}: {name}: {why}")

"""The kernels and configurations that ship, as arguments for a compiler: types, constants, tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import triton.language as tl

from qpass_kernels import w4a8, w4a16, w8a8, w8a16
from qpass_kernels.configs import BUCKETS, Config, rule
from qpass_kernels.launch import Chip
from qpass_kernels.layouts import block_of

CHIPS = {
    "sm_80": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912),
    "sm_90": Chip("NVIDIA H200", (9, 0), 132, 232448),
    "sm_100": Chip("NVIDIA B200", (10, 0), 148, 232448),
}
N, K = 14336, 4096
FLOATS = dict.fromkeys(("alpha", "beta", "row_scale"), "*fp32")
SIZES = dict.fromkeys("MNK", "i32") | dict.fromkeys(("inverse", "zero"), "fp32")


@dataclass(frozen=True)
class Case:
    """One compilation. kernel: makes the jit function; weights: of a step of its main loop, where they are counted."""

    name: str
    chip: str
    kernel: Callable[[], Any]
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 4
    weights: int = 0


class Kernel:
    """A kernel by its module and name; unlike the kernel itself, it can be sent to another process."""

    def __init__(self, module: Any, name: str):
        self.path = module.__name__, name

    def __call__(self) -> Any:
        """The jit function."""
        from importlib import import_module

        return getattr(import_module(self.path[0]), self.path[1])


def linears() -> Iterator[Case]:
    """Every configuration that the rules give for a 14336 x 4096 weight, on each chip."""
    for chip in CHIPS:
        for kind in ("w8a8", "fp8", "w8a16", "w4a16", "w4a8"):
            if kind == "fp8" and chip == "sm_80":
                continue  # it has no float8
            configs = dict.fromkeys(rule(kind, m, N, K, CHIPS[chip]) for m in BUCKETS)
            for config in configs:
                for dtype, group in _variants(kind, config):
                    fit = w4a16.fitted(config, group) if kind == "w4a16" else config
                    yield _case(kind, chip, replace(fit, split=min(fit.split, 2)), dtype, group)


def _variants(kind: str, config: Config) -> list[tuple[str, int]]:
    """Dtypes of x and groups to compile a configuration for."""
    if kind in ("w8a8", "fp8"):
        return [("i8" if kind == "w8a8" else "fp8e4nv", 0)]
    if kind == "w8a16":
        return [("bf16", 0), ("fp16", 0)]
    if kind == "w4a16":
        return [("bf16", 128), ("bf16", 64), ("bf16", 32), ("bf16", 0), ("fp16", 128)]
    return [("i8", 128), ("i8", 64), ("i8", 32), ("i8", 0)]


def _case(kind: str, chip: str, config: Config, dtype: str, group: int) -> Case:
    integers = kind in ("w8a8", "w4a8")
    name = (
        f"{kind} {config.how} {dtype} g{group} {config.bm}x{config.bn} w{config.warps} s{config.stages} /{config.split}"
    )
    types = {**FLOATS, **SIZES, "x": f"*{dtype}", "y": "*bf16", "other": "*bf16", "scale": "*fp16", "z": "*u8"}
    types |= {"w": f"*{dtype}" if kind in ("w8a8", "fp8") else "*u8" if kind == "w4a8" else "*u16"}
    types |= {"offset": "*fp32" if kind == "w4a8" else "*i32", "row_zero": "*i32", "counters": "*i32"}
    exact = kind == "w8a8" or (kind == "w4a8" and not group)
    types["partial"] = "*i32" if exact else "*fp32"
    constants = {
        "BM": config.bm, "BN": config.bn, "BK": block_of(kind, group) if kind == "w4a8" else config.bk, "SPLIT": config.split,
        "ACC": tl.int32 if exact else tl.float32, "GROUP": group, "WHOLE": True, "PLAIN": False,
        "ACT": "silu", "CODES": False,
    }  # fmt: skip
    if not group:
        constants["scale"] = None
    if not integers:
        constants |= {"offset": None, "row_zero": None}
    module = {"w8a8": w8a8, "fp8": w8a8, "w8a16": w8a16, "w4a16": w4a16, "w4a8": w4a8}[kind]
    if config.how == "persistent":
        constants |= {"PROGRAMS": CHIPS[chip].processors, "GROUP": config.band}
        types |= {"x_at": _descriptor(dtype, config.bm, config.bk), "w_at": _descriptor(dtype, config.bn, config.bk)}
    if config.how == "dequantized":
        types["real"] = f"*{dtype}"
        return Case(name, chip, Kernel(module, "dequantized"), types, constants)
    weights = config.bn * constants["BK"] if config.how == "streamed" else 0
    kernel = Kernel(module, config.how)
    return Case(name, chip, kernel, types, constants, config.warps, config.stages, weights)


def _descriptor(dtype: str, rows: int, columns: int) -> str:
    return f"tensordesc<{dtype}[{rows},{columns}]>"


CASES = tuple({(case.name, case.chip): case for case in linears()}.values())

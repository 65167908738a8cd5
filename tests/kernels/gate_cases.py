"""The kernels and configurations that ship, as arguments for a compiler: types, constants, tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import triton.language as tl

from qpass_kernels import act_quantize, conv, norm_quantize, quantize, w4a8, w4a16, w8a8, w8a16
from qpass_kernels.configs import BUCKETS, Config, rule
from qpass_kernels.launch import Chip
from qpass_kernels.layouts import block_of
from qpass_kernels.rows import shapes

CHIPS = {
    "sm_80": Chip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 166912),
    "sm_90": Chip("NVIDIA H200", (9, 0), 132, 232448),
    "sm_100": Chip("NVIDIA B200", (10, 0), 148, 232448),
}
# lane instructions a weight in the main loop of a decode kernel (up to 16 tokens, groups of 128): the budget of an H200 is
# 3.45 for 4 bits at the speed of its memory; sm_80 has twice as many a byte, and no wgmma
BUDGETS = {"sm_90": {"w4a16": 2.8, "w4a8": 1.6, "w8a16": 3.5, "w8a8": 1.0}, "sm_80": {"w4a16": 3.5, "w4a8": 1.6}}
N, K = 14336, 4096
FLOATS = dict.fromkeys(("alpha", "beta", "row_scale"), "*fp32")
SIZES = dict.fromkeys("MNK", "i32") | dict.fromkeys(("inverse", "zero"), "fp32")


class Kernel:
    """A kernel by its module and name; unlike the kernel itself, it can be sent to another process."""

    def __init__(self, module: Any, name: str):
        self.path = module.__name__, name

    def __call__(self) -> Any:
        """The jit function."""
        from importlib import import_module

        return getattr(import_module(self.path[0]), self.path[1])


@dataclass(frozen=True)
class Case:
    """One compilation. kernel: makes the jit function; weights: of a step of its main loop, where they are counted."""

    name: str
    chip: str
    kernel: Kernel
    types: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    warps: int = 4
    stages: int = 4
    weights: int = 0


def budget(name: str, chip: str) -> float | None:
    """The lane instructions that the main loop of a case may take for each weight; None for what is no decode kernel."""
    kind, how, *_ = name.split()
    most = BUDGETS.get(chip, {}).get(kind)
    if most is None or how != "streamed":
        return None
    _, _, _, group, tile, *_ = name.split()
    return most if tile.startswith("16x") and group in ("g0", "g128") else None


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


# pixels of a batch of 32, outputs, channels, kernel: layers of ResNet-50 and its stem, one of a small batch (split K)
LAYERS = (
    (32 * 112**2, 64, 4, 7),
    (32 * 56**2, 64, 64, 3),
    (32 * 28**2, 128, 128, 3),
    (32 * 14**2, 256, 256, 3),
    (32 * 28**2, 256, 256, 3),
    (49, 512, 512, 3),
)


def convolutions() -> Iterator[Case]:
    """The tiles of the rule for LAYERS, with everything an epilogue can have."""
    for chip in CHIPS:
        for (m, n, c, taps), own in ((layer, own) for layer in LAYERS for own in (False, True)):
            k = taps * taps * c
            tiles = conv.rule(m, n, c, k, 1, CHIPS[chip])
            name = f"conv i8 c{c} k{taps} {tiles.bm}x{tiles.bn} w{tiles.warps} s{tiles.stages} /{tiles.split}"
            name += " own" if own else ""  # a scale and a zero point for each image
            types = {**FLOATS, **SIZES, "x": "*i8", "w": "*i8", "y": "*i8", "other": "*i8", "correction": "*i32"}
            types |= {"partial": "*i32", "counters": "*i32", "other_scale": "fp32", "other_zero": "fp32"}
            types |= dict.fromkeys(("H", "W", "OH", "OW"), "i32") | {"sample_scale": "*fp32", "sample_zero": "*i32"}
            types |= dict.fromkeys((f"{name}_{axis}" for name in ("stride", "pad", "dil") for axis in "hw"), "i32")
            constants = {
                "C": c, "GROUPS": 1, "KH": taps, "KW": taps, "BM": tiles.bm, "BN": tiles.bn, "BK": tiles.bk,
                "SPLIT": tiles.split, "BAND": tiles.band, "ACC": tl.int32, "ACT": "relu", "CODES": True, "slope": None,
            }  # fmt: skip
            constants |= {} if own else {"sample_scale": None, "sample_zero": None}
            yield Case(name, chip, Kernel(conv, "implicit"), types, constants, tiles.warps, tiles.stages)


def rows() -> Iterator[Case]:
    """The quantizes of rows of 4096 bfloat16, by themselves and with a norm or a gate."""
    for chip in CHIPS:
        sizes = shapes(2048, 4096)
        warps = sizes.pop("num_warps")
        types = dict.fromkeys(("x", "residual", "weight", "gate", "total", "kept"), "*bf16")
        types |= {"codes": "*i8", "scale": "*fp32", "zero": "*i32", "M": "i32", "K": "i32", "eps": "fp32"}
        types |= dict.fromkeys(("stride", "gate_stride", "residual_stride"), "i32")
        options = {"SYMMETRIC": False, "TOP": 255.0, "LEAST": -128.0, "E4M3": False, "ACT": "silu", "RMS": True}
        options |= {"mul": None, "add": None, "bias": None, "out_scale": 1.0, "out_zero": 0.0}
        for module, name in (
            (quantize, "own_scales"),
            (norm_quantize, "normed_codes"),
            (act_quantize, "activated_codes"),
        ):
            yield Case(f"rows {name}", chip, Kernel(module, name), types, {**sizes, **options}, warps)


CASES = tuple({(case.name, case.chip): case for case in (*linears(), *convolutions(), *rows())}.values())

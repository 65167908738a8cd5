"""What others offer for the same product, called as their documentation says. Each is a row of PEERS.

build(problem) makes (what is held for a weight, a function of it that multiplies), and may raise whatever it likes: a peer
that is not installed, or does not run here, becomes a row that says so. What is held is copied for the rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Held = Any


@dataclass(frozen=True, eq=False)
class Problem:
    """x [M, K] and w [N, K], random, in the 16-bit float of the plain path."""

    x: Tensor
    w: Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.x.shape[0], *self.w.shape


@dataclass(frozen=True)
class Peer:
    """scheme: what it is compared with. bytes: of a weight. loose: the largest plausible error of its quantization."""

    name: str
    scheme: str
    bytes: float
    build: Callable[[Problem], tuple[Held, Callable[[Held], Tensor]]]
    loose: float = 0.1


def plain(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
    """The plain path: torch's own linear."""
    return (problem.w,), lambda held: functional.linear(problem.x, held[0])


def rows_as(value: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(codes, scale float32 [rows, 1]), symmetric."""
    top = 127 if dtype == torch.int8 else 448
    scale = value.float().abs().amax(1, keepdim=True).clamp(min=1e-6) / top
    codes = value.float() / scale
    return (codes.round() if dtype == torch.int8 else codes).to(dtype), scale


def groups_of_4_bits(w: Tensor, group: int = 128) -> tuple[Tensor, Tensor, Tensor]:
    """(codes 0 .. 15 uint8 [N, K], scale, least value [N, G] float32)."""
    parts = w.float().reshape(w.shape[0], -1, group)
    least, most = parts.amin(2), parts.amax(2)
    scale = (most - least).clamp(min=1e-6) / 15
    codes = ((parts - least[..., None]) / scale[..., None]).round().clamp(0, 15)
    return codes.to(torch.uint8).reshape(w.shape), scale, least


def scaled_mm(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
    """The fp8 of cuBLAS, a scale for each row and output; codes of x are given."""
    x, sx = rows_as(problem.x, torch.float8_e4m3fn)
    w, sw = rows_as(problem.w, torch.float8_e4m3fn)
    out = torch.bfloat16
    return (w, sw.t().contiguous()), lambda held: torch._scaled_mm(
        x, held[0].t(), sx, held[1], out_dtype=out, use_fast_accum=True
    )


def int_mm(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
    """The int8 of cuBLAS to int32, and the scales in two passes of torch; codes of x are given."""
    x, sx = rows_as(problem.x, torch.int8)
    w, sw = rows_as(problem.w, torch.int8)
    return (w, sw.t().contiguous()), lambda held: (torch._int_mm(x, held[0].t()) * sx * held[1]).to(problem.x.dtype)


def tinygemm(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
    """The 4-bit kernel of torch; groups of 128."""
    codes, scale, least = groups_of_4_bits(problem.w)
    packed = torch._convert_weight_to_int4pack((codes[:, ::2] << 4) | codes[:, 1::2], 8)
    pairs = torch.stack([scale, least + 8 * scale], 2).to(problem.x.dtype).transpose(0, 1).contiguous()
    return (packed, pairs), lambda held: torch._weight_int4pack_mm(problem.x, held[0], 128, held[1])


def humming(weight: dict[str, Any], given: dict[str, Any] | None = None) -> Callable[..., Any]:
    """Peer humming-kernels: HummingLayer, its own choice of tiles; quantizes x itself where it is not float."""

    def build(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
        from humming.layer import HummingLayer

        _, n, k = problem.size
        layer = HummingLayer(
            shape_n=n,
            shape_k=k,
            weight_config=dict(weight),
            input_config=dict(given) if given else None,
            torch_dtype=problem.x.dtype,
        ).to(problem.x.device)
        layer.load_from_unquantized(problem.w)
        layer.transform()
        return layer, lambda held: held(problem.x)

    return build


def gemlite(name: str) -> Callable[..., Any]:
    """Peer gemlite: a helper of 16- or 8-bit inputs and 8-bit weights, from float weights."""

    def build(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
        from gemlite import helper

        made = getattr(helper, name)(device=str(problem.x.device), dtype=problem.x.dtype)
        return made.from_weights(problem.w.clone()), lambda held: held(problem.x)

    return build


def gemlite_4(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
    """Peer gemlite: 4-bit weights in groups of 128 with zero points."""
    from gemlite.helper import A16W4_HQQ_INT

    codes, scale, least = groups_of_4_bits(problem.w)
    dtype = problem.x.dtype
    made = A16W4_HQQ_INT(device=str(problem.x.device), dtype=dtype)
    return made.from_weights(codes, scale.to(dtype), (-least / scale).to(dtype)), lambda held: held(problem.x)


def torchao(config: Callable[[], Any]) -> Callable[..., Any]:
    """Peer torchao: `quantize_` of a linear, compiled, as it is meant to be used."""

    def build(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
        from torchao.quantization import quantize_

        torch._dynamo.reset()  # beyond eight shapes dynamo would go on without a compiler
        layer = nn.Linear(problem.w.shape[1], problem.w.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(problem.w.clone(), requires_grad=False)
        quantize_(layer, config())
        compiled = torch.compile(lambda x, w: functional.linear(x, w), dynamic=False)
        return layer, lambda held: compiled(problem.x, held.weight)

    return build


def _torchao(name: str, **options: Any) -> Any:
    from torchao import quantization

    made = {key: value() if callable(value) else value for key, value in options.items()}
    return getattr(quantization, name)(set_inductor_config=False, **made)


def _per_row() -> Any:
    from torchao.quantization import PerRow

    return PerRow()


def fbgemm_fp8(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
    """Peer fbgemm-gpu-genai: quantizes the rows of x, then multiplies."""
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401  registers torch.ops.fbgemm

    w, scale = torch.ops.fbgemm.quantize_fp8_per_row(problem.w)

    def call(held: Held) -> Tensor:
        x, sx = torch.ops.fbgemm.quantize_fp8_per_row(problem.x)
        return torch.ops.fbgemm.f8f8bf16_rowwise(x, held[0], sx, held[1], use_fast_accum=True)

    return (w, scale), call


def fbgemm_int8(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
    """Peer fbgemm-gpu-genai: int8 with one scale for all; codes of x are given."""
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401

    sx, sw = (float(value.abs().max()) / 127 for value in (problem.x, problem.w))
    x, w = ((value / s).round().to(torch.int8) for value, s in ((problem.x, sx), (problem.w, sw)))
    return (w,), lambda held: torch.ops.fbgemm.i8i8bf16(x, held[0], sx * sw, 1)


def fbgemm_4(problem: Problem) -> tuple[Held, Callable[[Held], Tensor]]:
    """Peer fbgemm-gpu-genai: 4-bit weights in groups of 128; scale and middle are [G, N]."""
    import fbgemm_gpu.experimental.gen_ai  # noqa: F401

    codes, scale, least = groups_of_4_bits(problem.w)
    signed = codes.to(torch.int8) - 8
    packed = (signed[:, ::2] & 15) | (signed[:, 1::2] << 4)
    pairs = [value.t().contiguous().to(problem.x.dtype) for value in (scale, least + 8 * scale)]
    return (packed, *pairs), lambda held: torch.ops.fbgemm.bf16i4bf16_rowwise(problem.x, *held)


GROUPS = {"dtype": "int4", "group_size": 128}
PEERS = (
    Peer("torch _scaled_mm, without quantize", "fp8", 1, scaled_mm),
    Peer("torch _int_mm, without quantize", "w8a8", 1, int_mm),
    Peer("torch _weight_int4pack_mm", "w4a16", 0.5, tinygemm, 0.3),
    Peer("humming", "w8a8", 1, humming({"dtype": "int8"}, {"dtype": "int8"})),
    Peer("humming", "fp8", 1, humming({"dtype": "float8e4m3"}, {"dtype": "float8e4m3"})),
    Peer("humming", "w8a16", 1, humming({"dtype": "int8"})),
    Peer("humming", "w4a16", 0.5, humming(GROUPS), 0.3),
    Peer("humming", "w4a8", 0.5, humming({"dtype": "int4"}, {"dtype": "int8"}), 0.4),
    Peer("gemlite", "w8a8", 1, gemlite("A8W8_int8_dynamic")),
    Peer("gemlite", "fp8", 1, gemlite("A8W8_fp8_dynamic")),
    Peer("gemlite", "w8a16", 1, gemlite("A16W8_INT8")),
    Peer("gemlite", "w4a16", 0.5, gemlite_4, 0.3),
    Peer("torchao", "w8a8", 1, torchao(lambda: _torchao("Int8DynamicActivationInt8WeightConfig"))),
    Peer(
        "torchao",
        "fp8",
        1,
        torchao(lambda: _torchao("Float8DynamicActivationFloat8WeightConfig", granularity=_per_row)),
    ),
    Peer("torchao", "w8a16", 1, torchao(lambda: _torchao("Int8WeightOnlyConfig"))),
    Peer(
        "torchao",
        "w4a16",
        0.5,
        torchao(lambda: _torchao("Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d")),
        0.3,
    ),
    Peer("fbgemm", "fp8", 1, fbgemm_fp8),
    Peer("fbgemm, without quantize", "w8a8", 1, fbgemm_int8, 0.3),
    Peer("fbgemm", "w4a16", 0.5, fbgemm_4, 0.3),
)
PACKAGES = ("humming-kernels", "gemlite", "torchao", "fbgemm-gpu-genai")

"""The triton backend: fused ops on the kernels of qpass_kernels for CUDA; on CPU tensors, on their references.

    what                                   becomes
    qpass.linear                           w8a8_linear, w4a8_linear, w8a16_linear, w4a16_linear     linear.py
    qpass.nested_linear                    w4a16_linear, once or twice                                  nested.py
    quantize of rows, with what makes them quantize_rows, norm_quantize, act_quantize               quantize.py
    qpass.conv, qpass.max_pool             conv2d, depthwise2d, max_pool2d on channels-last images conv.py
    pointwise, reductions                  one generated kernel a region

Codes are int8 between kernels (codes.py). Which kernel and which tiles an op runs with is the package's own choice, by shape.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qpass.backends import Backend
from qpass.backends.emit import emit
from qpass.backends.inductor import compile_region
from qpass.backends.laid_out import laid_out_calls
from qpass.backends.regions import extract, find_regions, replace_regions, signature
from qpass.backends.triton import conv, linear, nested, quantize
from qpass.backends.triton.codes import cancel
from qpass.backends.triton.package import kernels, unavailable

Q = torch.ops.qpass

LOWERINGS = (
    (Q.linear.default, linear.why_not, linear.lower),
    (Q.nested_linear.default, nested.why_not, nested.lower),
    (Q.conv.default, conv.why_not, conv.lower),
    (Q.max_pool.default, conv.why_not_max_pool, conv.lower_max_pool),
)
TARGETS = tuple(target for target, _, _ in LOWERINGS)
KERNELS: dict[str, Callable[..., Any]] = {}  # of this process: another capture or model finds them by signature


def why_not(node: fx.Node) -> str | None:
    """None where this backend can run a node of TARGETS, or the sentence that says why not."""
    return next(check(node) for target, check, _ in LOWERINGS if target is node.target)


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What computes a node of TARGETS here."""
    return next(build(gm, node) for target, _, build in LOWERINGS if target is node.target)


def absorb(gm: fx.GraphModule) -> int:
    """Quantizes with what makes their value, then what turns codes back and forth; returns the number of edits."""
    return quantize.absorb(gm) + cancel(gm)


def finish(gm: fx.GraphModule) -> Callable[..., Any]:
    """The lowered graph as one Python function: our ops, torch's, and a generated kernel for each region."""
    for device in {value.device for node in gm.graph.nodes if isinstance(value := node.meta.get("val"), torch.Tensor)}:
        if device.type == "cuda":
            kernels().reserve(device)
    wanted: list[str] = []
    regions = find_regions(gm)
    for region in regions:
        part = extract(gm, region)
        wanted.append(signature(part))
        if wanted[-1] not in KERNELS:
            KERNELS[wanted[-1]] = compile_region(part)
    nodes = replace_regions(gm, regions)
    calls = {node: (KERNELS[key], node.args) for node, key in zip(nodes, wanted, strict=True)}
    return emit(gm, calls | laid_out_calls(gm, calls))


def images() -> tuple[Any, ...]:
    """The ops whose images are channels last."""
    if unavailable() is not None:
        return ()
    kernels()
    return tuple(getattr(torch.ops.qpass_kernels, name).default for name in ("conv2d", "depthwise2d", "max_pool2d"))


BACKEND = Backend("triton", unavailable, why_not, lower, TARGETS, absorb, finish, images, merges_activations=True)

"""Values between convolutions whose channels can be multiplied by positive factors where they are made, exactly.

    producer -> [batch norm] -> relu, relu6, max_pool, ... -> readers, all of them convolutions

    act(y) * m = act(y * m)       relu, leaky relu, prelu, pools, zero pads: positively homogeneous, channels kept apart
    clamp(y, 0, h) * m = clamp(y * m, 0, h * m)                        relu6 and its like; the bound becomes one a channel

Whoever else reads the value (a residual add, a concatenate, a mean, the caller) would see the factor, so there is none.

1. the producer's bias, and a batch norm's statistics and weights, are constants; the value is float32;
2. a pad adds zeros, and only to spatial axes.
"""

from __future__ import annotations

import torch
from torch import fx

from qpass.convolutions import is_convolution
from qpass.graphs import PADS, constant, single_user
from qpass.passes.conv_values import BATCH_NORM, OUTPUT
from qpass.passes.fold_norm import norm_affine
from qpass.site_info import Source

aten = torch.ops.aten

HOMOGENEOUS = (
    aten.relu.default,
    aten.leaky_relu.default,
    aten.prelu.default,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.clone.default,
    aten.contiguous.default,
)
ADDS_NOTHING = (None, 0, 0.0)


def sources(gm: fx.GraphModule, outputs: dict[str, fx.Node]) -> dict[str, Source]:
    """Site, or name of an output, -> what makes the value it stands for. gm: with named sites; outputs: of conv_values."""
    found: dict[str, Source] = {}
    for node in gm.graph.nodes:
        if not is_convolution(node) or "site" not in node.meta or (readers := readers_of(node)) is None:
            continue
        names = tuple(reader.meta["site"] for reader in readers)
        source = Source(node.meta["site"], names)
        found |= dict.fromkeys(names, source)
        if source.site + OUTPUT in outputs:
            found[source.site + OUTPUT] = source
    return found


def readers_of(producer: fx.Node) -> list[fx.Node] | None:
    """The convolutions that read what a convolution makes, where nothing else does; else None."""
    value = producer.meta["val"]
    if value.dtype is not torch.float32 or (producer.args[2] is not None and constant(producer.args[2]) is None):
        return None
    norm = norm_behind(producer)
    if norm is not None and norm_affine(norm) is None:
        return None
    found: list[fx.Node] = []
    left = [norm or producer]
    while left:
        made = left.pop()
        for user in made.users:
            if is_convolution(user) and user.args[0] is made and made not in user.args[1:] and "site" in user.meta:
                found.append(user)
            elif passes(user, made):
                left.append(user)
            else:
                return None
    return found or None


def norm_behind(producer: fx.Node) -> fx.Node | None:
    """The batch norm that alone reads a convolution, or None."""
    user = single_user(producer)
    return user if user is not None and user.target is BATCH_NORM and user.args[0] is producer else None


def passes(node: fx.Node, value: fx.Node) -> bool:
    """Whether a factor of the channels of `value` can be taken from the result of `node` to its input."""
    if node.op != "call_function" or node.args[0] is not value or value in node.args[1:]:
        return False
    if node.target in PADS:
        mode = "constant" if node.target is aten.constant_pad_nd.default else node.args[2]
        return len(node.args[1]) <= 2 * (value.meta["val"].dim() - 2) and (
            mode != "constant" or node.args[-1] in ADDS_NOTHING
        )
    return node.target in HOMOGENEOUS or upper_bound(node) is not None


def upper_bound(node: fx.Node) -> float | None:
    """H of a clamp(x, 0, h); None for other nodes."""
    if node.target is aten.relu6.default:
        return 6.0
    if node.target not in (aten.hardtanh.default, aten.clamp.default):
        return None
    low, high = node.args[1:3]
    fixed = all(isinstance(limit, int | float) for limit in (low, high))
    return float(high) if fixed and low == 0 and high > 0 else None

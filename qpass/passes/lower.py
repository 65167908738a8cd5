"""Replace each fused op by what the backend runs; one that it cannot run keeps its reference. Leaves level `lowered`.

What reads a result that lies otherwise now, such as attention's with its heads side by side, is told so; images are laid out
by a pass of their own (layout.py).
"""

from __future__ import annotations

import torch
from torch import fx

from qpass.passes.strides import follow_all, strides
from qpass.passes.widen import widen

Q = torch.ops.qpass
IMAGES = (Q.conv.default, Q.max_pool.default, Q.pad.default)


def lower(gm: fx.GraphModule, context) -> int:
    """Asks the backend about each fused op, as it is and on bytes; a sentence why not goes to `meta["kept"]` and the log."""
    edits = 0
    moved: set[fx.Node] = set()
    for node in list(gm.graph.nodes):
        if node.target not in context.backend.targets:
            continue
        why = context.backend.why_not(node)
        if why and (wide := _on_bytes(gm, node, context)) is not None:
            node, why = wide, None
        if why:
            node.meta["kept"] = why
            context.kept.append((node.meta.get("site", node.name), why))
            continue
        replacement = context.backend.lower(gm, node)
        if replacement is not node:
            replacement.meta.setdefault("site", node.meta.get("site", ""))
            if node.target not in IMAGES and strides(replacement) != strides(node):
                moved.add(replacement)
            node.replace_all_uses_with(replacement)
            gm.graph.erase_node(node)
            edits += 1
    follow_all(gm, moved)
    gm.graph.eliminate_dead_code()
    return edits + context.backend.absorb(gm)


def _on_bytes(gm: fx.GraphModule, node: fx.Node, context) -> fx.Node | None:
    """The op in the node's place that reads and writes bytes, where the backend runs that one."""
    found = widen(gm, node)
    if found is None:
        return None
    wide, result = found
    if context.backend.why_not(wide):
        for made in dict.fromkeys((result, wide)):
            gm.graph.erase_node(made)
        return None
    node.replace_all_uses_with(result)
    gm.graph.erase_node(node)
    context.widened.append(wide.meta.get("site", wide.name))
    return wide

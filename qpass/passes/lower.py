"""Replace each fused op by what the backend runs; one that it cannot run keeps its reference. Leaves level `lowered`."""

from __future__ import annotations

from torch import fx


def lower(gm: fx.GraphModule, context) -> int:
    """Asks the backend about each fused linear; a sentence why not goes to `meta["kept"]` and the log."""
    edits = 0
    for node in list(gm.graph.nodes):
        if node.target not in context.backend.targets:
            continue
        why = context.backend.why_not(node)
        if why:
            node.meta["kept"] = why
            context.kept.append((node.meta.get("site", node.name), why))
            continue
        replacement = context.backend.lower(gm, node)
        if replacement is not node:
            replacement.meta.setdefault("site", node.meta.get("site", ""))
            node.replace_all_uses_with(replacement)
            gm.graph.erase_node(node)
            edits += 1
    gm.graph.eliminate_dead_code()
    return edits + context.backend.absorb(gm)

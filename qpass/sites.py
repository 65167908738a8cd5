"""Stable names for the places of a graph that can be quantized.

A site is `module path : operation . ordinal within that module`, as in
`encoder.layer.0.attention.self.query:linear.0`; its input is the site's name with `.input`. The path comes from the
module stack that the front end keeps on every node, so the name is the same in every capture of the model: another
shape, a decode step, a second process.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

from torch import fx

# the model as the front end calls it; a wrapper of its forward may have it as the first of its arguments
ROOT = re.compile(r"^[LG]\['(?:args'\]\[0|[^']*')\]")
ITEM = re.compile(r"\._(?:modules|parameters|buffers)\['([^']+)'\]|\[['\"]?([^'\"\]]+)['\"]?\]")


def module_path(node: fx.Node) -> str:
    """Path of the innermost module a node comes from; the root module is the empty string."""
    stack = node.meta.get("nn_module_stack")
    return path_of(next(reversed(stack.values()))[0]) if stack else ""


@functools.lru_cache(maxsize=8192)
def path_of(raw: str) -> str:
    """`L['self']._modules['layers'].0` -> `layers.0`."""
    raw = ROOT.sub("", raw)
    return ITEM.sub(lambda m: "." + (m.group(1) or m.group(2)), raw).strip(".")


@dataclass
class SiteNames:
    """Gives names, the same for the same place of every graph captured from one model.

    The ordinal counts the operation within its module. Where a graph was broken in the middle of a module, the
    second part would count from 0 again: a name that is taken by another weight moves on to the next ordinal.
    """

    taken: dict[str, str | None] = field(default_factory=dict)

    def name(self, path: str, operation: str, weight: str | None, used: set[str]) -> str:
        """The name of an operation at `path` with parameter `weight`; `used` are this graph's names so far."""
        ordinal = 0
        while True:
            name = f"{path}:{operation}.{ordinal}"
            if name not in used and self.taken.get(name, weight) == weight:
                self.taken[name] = weight
                used.add(name)
                return name
            ordinal += 1

"""Which of the front end's guards a compiled model needs. It would keep some thousand, half a millisecond a call.

1. Guards on code are dropped: that classes, functions, modules and what they close over are those that were captured.
2. Guards on what hangs directly in a module, its parameters and buffers too, are dropped: qpass/watch.py looks at these, at a
   tenth of the price.
3. Where a module has hooks, how many stays: one that is removed no longer runs.
4. Guards on data stay: the arguments of the call, other tensors, configurations, globals that are numbers, lists and
their lengths.
"""

from __future__ import annotations

import re
from typing import Any

CODE = (
    "BUILTIN_MATCH",
    "CLASS_MATCH",
    "CLOSURE_MATCH",
    "EMPTY_NN_MODULE_HOOKS_DICT",
    "FUNCTION_MATCH",
    "MODULE_MATCH",
    "NOT_PRESENT_IN_GENERIC_DICT",
)
OF_A_CLASS = re.compile(r"\btype\(|__class__|__closure__|__defaults__|__code__|__mro__")
IN_A_MODULE = re.compile(r"^root(\._modules\['[^']*'\])*(\.\w+)?$")  # `root` is what front_end calls the model

HOOKS = re.compile(r"\._(forward|forward_pre)_hooks$")
OWN_TENSOR = re.compile(r"^root(\._modules\['[^']*'\])*\._(parameters|buffers)\['[^']*'\]$")


def needed(guard: Any) -> bool:
    """Whether a guard is to be evaluated on every call."""
    if guard.guard_type == "SEQUENCE_LENGTH" and HOOKS.search(guard.name):
        return True
    if guard.guard_type in CODE or OF_A_CLASS.search(guard.name) or OWN_TENSOR.match(guard.name):
        return False
    return guard.guard_type == "TENSOR_MATCH" or IN_A_MODULE.match(guard.name) is None

"""mode="reduce-overhead": a compiled graph is recorded as a CUDA graph once, and replayed from then on.

Recording, memory and the lifetime of results are torch's own (cudagraph_trees, as under torch.compile): a result is valid
until the next call. Inputs are copied to where they were recorded, but for those that stay where they are: parameters,
buffers, and tensors marked static (the caches of transformers). A graph that writes to another input, or works on the CPU,
is run as it is, and a warning says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, fx

from qpass.errors import QpassError, nearest

LOG = logging.getLogger("qpass")
MODES = ("default", "reduce-overhead")


def check_mode(mode: str | None) -> str:
    """A mode, checked."""
    if mode is None:
        return MODES[0]
    if mode not in MODES:
        raise QpassError(f"mode {mode!r} is not one of {', '.join(MODES)}.{nearest(str(mode), MODES)}")
    return mode


def static_inputs(placeholders: Sequence[fx.Node], values: Sequence[Any], known: Collection[int]) -> list[int]:
    """Which inputs of a graph of the front end stay where they are. known: identities of the model's own tensors."""
    fixed = []
    for i, (node, value) in enumerate(zip(placeholders, values, strict=True)):
        marked = "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
        if isinstance(value, Tensor) and (id(value) in known or marked):
            fixed.append(i)
    return fixed


def replayed(function: Callable[..., Any], gm: fx.GraphModule, static: Sequence[int]) -> Callable[..., Any]:
    """`function`, which computes what the lowered graph does, as a CUDA graph that its first call records."""
    try:
        why, options = _why_not(gm, static)
    except Exception as error:  # what is asked of torch here is not public
        why, options = f"this torch cannot record it: {type(error).__name__}: {error}", {}
    if why:
        LOG.warning("mode 'reduce-overhead' has no effect on a graph of %d operations: %s", len(gm.graph.nodes), why)
        return function
    recorded: list[Callable[[list[Any]], Any]] = []

    def run(*args: Any) -> Any:
        if not recorded:
            from torch._inductor.cudagraph_trees import cudagraphify_impl

            recorded.append(cudagraphify_impl(lambda given: list(function(*given)), list(args), static, **options))
        return recorded[0](list(args))

    return run


def _why_not(gm: fx.GraphModule, static: Sequence[int]) -> tuple[str | None, dict[str, Any]]:
    """(why a graph cannot be recorded, what torch has to know to record it)."""
    from torch._dynamo.backends.cudagraphs import find_input_mutations, get_device_node_mapping
    from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes, get_placeholder_info

    devices = get_device_node_mapping(gm)
    if not any(device.type == "cuda" for device in devices):
        return "it works on no CUDA device", {}
    if why := check_multiple_devices_or_any_cpu_nodes(dict(devices)):
        return why, {}
    written = find_input_mutations(gm.graph)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if moved := sorted(written - set(static)):
        names = ", ".join(str(placeholders[i].target) for i in moved)
        return f"it writes to {names}; torch._dynamo.mark_static_address says that a tensor stays where it is", {}
    (results,) = next(node for node in reversed(gm.graph.nodes) if node.op == "output").args
    traces = [node.meta.get("stack_trace") if isinstance(node, fx.Node) else None for node in results]
    return None, {
        "device_index": next(device.index for device in devices if device.type == "cuda"),
        "is_backward": False,
        "is_inference": True,
        "stack_traces": traces,
        "placeholders": get_placeholder_info(gm.graph),
        "mutated_input_idxs": tuple(sorted(written)),
    }

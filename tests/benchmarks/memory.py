"""Bytes of MiniLM's linears before and after, and what compiling takes: python tests/benchmarks/memory.py [MODEL]

The storage of every tensor of the compiled model is counted, tied ones once, so a float weight that was kept somewhere
would show. Exit status 1 where the quantized weights take more than 0.26 of their float32 bytes.
"""

from __future__ import annotations

import resource
import sys

import qpass
from qpass.demo import example
from qpass.runtime import runtime_of

TARGET = 0.26
MEGA = 1e6


def storage_bytes(model) -> int:
    """Bytes of the storages behind a model's parameters and buffers, each once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGA


def main() -> int:
    model, batch, calibration = example(sys.argv[1] if len(sys.argv) > 1 else "minilm")
    before, resting = storage_bytes(model), peak()
    q = qpass.compile(model, "w8a8", example_inputs=batch, calibration=calibration)
    packed = {d.weight: d.packed for d in runtime_of(q).plan.quantized}
    full = sum(4 * p.data.numel() for p in packed.values())
    now = sum(p.nbytes for p in packed.values())
    print(
        f"weights of the quantized sites  {full / MEGA:8.2f} MB in fp32 {now / MEGA:8.2f} MB packed  {now / full:.3f}"
    )
    print(f"storage of the whole model      {before / MEGA:8.2f} MB in fp32 {storage_bytes(q) / MEGA:8.2f} MB packed")
    print(f"peak memory of the process      {resting:8.0f} MB before  {peak():8.0f} MB after compiling")
    return int(now > TARGET * full)


if __name__ == "__main__":
    raise SystemExit(main())

"""Peak memory of qpass.compile on a Llama-shaped model (bfloat16, random weights), in sizes of the float model. Linux.

python tests/benchmarks/peak.py [--layers N] [--scheme SCHEME]

Each case is a process of its own: what it holds before the model is there does not count, what it holds at most while it
compiles does, the float model among it. The rest of a size: the head and the embedding, which stay float.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import sys
from pathlib import Path

import qpass

sys.path.insert(0, str(Path(__file__).parent))
from decode import llama
from memory import storage_bytes
from minilm import markdown, where

GOALS = {False: 1.3, True: 1.05}  # in place or not
FLOAT = {"lm_head": None}


def held(what: str) -> int:
    """Bytes that /proc says this process holds (VmRSS) or held at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def case(scheme: str, inplace: bool, layers: int) -> tuple[int, float, float, float]:
    """(bytes of the float model; peak and rest in sizes of it; the compiled model's own storage)."""
    qpass.compile(llama(1, 64, 128, 2), scheme, recipe=FLOAT)  # imports and libraries are there
    gc.collect()
    before = held("VmRSS")
    model = llama(layers)
    gc.collect()
    size = storage_bytes(model)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    q = qpass.compile(model, scheme, recipe=FLOAT, inplace=inplace)
    peak, rest = held("VmHWM") - before, held("VmRSS") - before
    return size, peak / size, rest / size, storage_bytes(q) / size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--scheme", default="w4a16,solver=rtn")
    options = parser.parse_args()
    print(where(), flush=True)
    rows = [("", "float model, MB", "peak", "goal", "afterwards", "the compiled model's own")]
    for inplace in (False, True):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            size, *found = pool.apply(case, (options.scheme, inplace, options.layers))
        peak, rest, own = (f"{value:.2f}" for value in found)
        name = f"{options.scheme}{', in place' if inplace else ''}"
        rows.append((name, f"{size / 1e6:.0f}", peak, f"{GOALS[inplace]}", rest, own))
    print(markdown(rows))


if __name__ == "__main__":
    main()

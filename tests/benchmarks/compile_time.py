"""How long qpass.compile takes, and that it grows with the number of nodes and not faster.

python tests/benchmarks/compile_time.py [--layers 2 8 32] [--minilm]

Calibration is not counted: the plan is made before. Each size is compiled twice in this process and the second time
is shown too, since kernels generated once are found again. --minilm also splits MiniLM's time into phases.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

import qpass
from qpass.demo import example
from qpass.runtime import runtime_of

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.models import encoder

WIDTH = 64


def seconds(call):
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def compiled(model, scheme, batch, calibration):
    """(analyze seconds, compile seconds, compiled model)"""
    plan, analyzing = seconds(lambda: qpass.analyze(model, scheme, batch, calibration))
    q, compiling = seconds(lambda: qpass.compile(model, plan=plan, example_inputs=batch))
    return analyzing, compiling, q


def sizes(layers: list[int]) -> None:
    print(f"{'layers':>6} {'nodes':>6} {'compile s':>10} {'again s':>8} {'passes s':>9} {'passes ms per node':>19}")
    for count in layers:
        model, data = encoder(count, WIDTH), [torch.randn(4, 16, WIDTH) for _ in range(4)]
        torch._dynamo.reset()
        _, first, q = compiled(model, "w8a8", data[0], data)
        torch._dynamo.reset()
        _, again, q = compiled(model, "w8a8", data[0], data)
        steps = runtime_of(q).records[0].steps
        nodes, passes = len(steps[0].text.splitlines()) - 2, sum(step.seconds for step in steps)
        print(
            f"{count:6d} {nodes:6d} {first:10.2f} {again:8.2f} {passes:9.3f} {passes / nodes * 1e3:19.3f}", flush=True
        )


def phases() -> None:
    model, batch, calibration = example("minilm")
    analyzing, compiling, q = compiled(model, "w8a8", batch, calibration)
    record = runtime_of(q).records[0]
    passes = sum(step.seconds for step in record.steps)
    rows = [
        ("analyze: capture, calibrate, solve", analyzing),
        ("compile, in all", compiling),
        ("  front end, pack, first call", compiling - record.seconds),
        ("  capture and backend (generated kernels)", record.seconds - passes),
        *((f"  pass {step.name}", step.seconds) for step in record.steps[1:]),
    ]
    print("\nMiniLM, w8a8")
    for name, value in rows:
        print(f"{name:<44}{value:8.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--minilm", action="store_true", help="also MiniLM, by phase")
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes(options.layers)
    if options.minilm:
        phases()


if __name__ == "__main__":
    main()

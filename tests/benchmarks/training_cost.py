"""What a step of quantization-aware training costs beside a float step: time and peak memory, byte GPT and CNN. Linux.

python tests/benchmarks/training_cost.py [--rounds N] [--steps N] [--threads N] [--write]

Times: float and each scheme take turns, `--steps` steps each a round, in one process; the ratio is of the medians over
rounds. Memory: each case is a process of its own; the bytes of tensors at the peak of a step, by torch's profiler, and what
the process holds at most above what it held before the model was there, which has the allocator's gaps in it and varies by
a fifth; in sizes of the same for float. GPT: batches of 32 sequences of 256 bytes, float32 and bfloat16 autocast. CNN:
batches of 64 images of 32 x 32.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import qpass
from qpass.memory import give_back

sys.path.insert(0, str(Path(__file__).parent))
import byte_gpt
import digits_nets
from minilm import markdown, where
from peak import held

ROOT = Path(__file__).resolve().parents[2]
GOALS = (1.35, 1.2)  # time, memory
CASES = {
    "gpt": ("w4a4", "w4a4-dynamic", "w4a8-dynamic", "w2a16-g32"),
    "gpt, autocast": ("w4a4", "w4a4-dynamic", "w4a8-dynamic", "w2a16-g32"),
    "cnn": ("w4a4", "w2a2"),
}


def wide_cnn() -> nn.Module:
    """The residual net of the digits, four times as wide, on images of 32 x 32 with 3 channels."""
    conv_norm, Residual = digits_nets.conv_norm, digits_nets.Residual
    blocks = (Residual(64, 64), Residual(64, 128, 2), Residual(128, 192, 2))
    return nn.Sequential(conv_norm(3, 64), *blocks, *digits_nets.mean_linear(192))


def setting(kind: str) -> tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Tensor]]:
    """(model, batch, loss) of a case."""
    torch.manual_seed(0)
    if kind == "cnn":
        labels = torch.randint(10, (64,))
        return wide_cnn(), torch.randn(64, 3, 32, 32), lambda model, x: F.cross_entropy(model(x), labels)
    tokens = torch.randint(256, (byte_gpt.BATCH, byte_gpt.LENGTH + 1))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in kind):
            return byte_gpt.loss(model, x)

    return byte_gpt.ByteGpt(), tokens, loss


def prepared(kind: str, scheme: str, model: nn.Module, batch: Tensor) -> nn.Module:
    """The model in training under a scheme; `float`: as it is."""
    if scheme == "float":
        return model
    recipe = {} if kind == "cnn" else {"head": None}
    example = batch if kind == "cnn" else batch[:, :-1]
    return qpass.prepare_qat(model, f"{scheme},solver=rtn", example[:8], None, recipe)


def stepper(kind: str, scheme: str) -> Callable[[], None]:
    """One step of training."""
    model, batch, loss = setting(kind)
    t = prepared(kind, scheme, model.eval(), batch).train()
    optimizer = torch.optim.AdamW(qpass.qat.param_groups(t, 1e-4))

    def step() -> None:
        found = loss(t, batch)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()

    return step


def times(kind: str, rounds: int, steps: int) -> dict[str, float]:
    """Scheme -> median seconds a step."""
    run = {scheme: stepper(kind, scheme) for scheme in ("float", *CASES[kind])}
    found: dict[str, list[float]] = {scheme: [] for scheme in run}
    for number in range(rounds + 1):
        for scheme, step in run.items():
            start = time.perf_counter()
            for _ in range(steps):
                step()
            if number:  # the first round makes kernels
                found[scheme].append((time.perf_counter() - start) / steps)
    return {scheme: statistics.median(values) for scheme, values in found.items()}


def peak(kind: str, scheme: str, threads: int) -> tuple[int, int]:
    """(bytes of tensors at the peak of a step, bytes of the process above what it held before)."""
    torch.set_num_threads(threads)
    for case in ("w4a4", scheme):
        stepper(kind, case)()  # libraries are loaded and kernels made, for float too
    gc.collect()
    give_back()
    before = held("VmRSS")
    step = stepper(kind, scheme)
    gc.collect()
    give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    for _ in range(3):
        step()
    of_process = held("VmHWM") - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    # what was there before the step, weights and the optimizer's, is not counted
    return max(accumulate(e.nbytes() for e in events if e.name() == "[memory]")), of_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", action="append", choices=list(CASES))
    parser.add_argument("--write", action="store_true", help="keep the table")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = [f"times float (wanted {goal})" for goal in GOALS]
    rows = [("", "ms a step", wanted[0], "peak MB of tensors", wanted[1], "of the process", "times float")]
    for kind in options.case or CASES:
        seconds = times(kind, options.rounds, options.steps)
        peaks = {}
        for scheme in seconds:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[scheme] = pool.apply(peak, (kind, scheme, options.threads))
            cells = [f"{1e3 * seconds[scheme]:.0f}", f"{seconds[scheme] / seconds['float']:.2f}"]
            for found, of_float in zip(peaks[scheme], peaks["float"], strict=True):
                cells += [f"{found / 1e6:.0f}", f"{found / of_float:.2f}"]
            rows.append((f"{kind}, {scheme}", *cells))
            print(*rows[-1], sep="   ", flush=True)
    today = datetime.date.today().isoformat()
    text = "\n\n".join([f"# Cost of training, {today}", f"{where()}; {options.threads} threads", markdown(rows)]) + "\n"
    print(text)
    if options.write:
        (ROOT / f"tests/benchmarks/results/training-cost-{today}.md").write_text(text)


if __name__ == "__main__":
    main()

"""How calls are timed: CUDA graphs on a GPU, or a clock that only pretends, for a dry run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qpass_kernels import timing
from qpass_kernels.timing import Times


@dataclass(frozen=True)
class GraphClock:
    """Graphs of all cases of a shape, replayed in turn."""

    device: torch.device
    seconds: float = 0.3  # for each case

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> tuple[Any, int]:
        """Captures calls; raises what they raise."""
        return timing.captured(calls, self.device)

    def measure(self, graphs: Sequence[tuple[Any, int]]) -> list[Times]:
        """The times of a call of each."""
        return timing.replayed(graphs, self.device, self.seconds * len(graphs)) if graphs else []


@dataclass
class DryClock:
    """Runs each call once, and counts instead of timing."""

    ticks: int = field(default=0)

    def prepare(self, calls: Sequence[Callable[[], Any]]) -> tuple[Any, int]:
        """Runs the first call, so that what fails is seen."""
        calls[0]()
        return None, 1

    def measure(self, graphs: Sequence[tuple[Any, int]]) -> list[Times]:
        """100, 101, ... microseconds."""
        found = []
        for _ in graphs:
            self.ticks += 1
            found.append(Times(99.0 + self.ticks, 98.0 + self.ticks, 101.0 + self.ticks))
        return found


@dataclass(frozen=True)
class Ceilings:
    """Measured on this card in this run: copy in bytes a second, rates in operations a second, None where not to be had."""

    copy: float
    rates: dict[str, float | None]
    why_not: dict[str, str]

    def bound(self, moved: float, operations: float, rate: str) -> tuple[float, str]:
        """(the least microseconds, what of: copy or the rate)."""
        by_bytes = moved / self.copy * 1e6
        peak = self.rates.get(rate)
        by_rate = operations / peak * 1e6 if peak else 0.0
        return (by_rate, rate) if by_rate > by_bytes else (by_bytes, "copy")


def ceilings(clock: Any, device: torch.device, size: int = 8192, length: int = 1 << 30) -> Ceilings:
    """The copy bandwidth over `length` bytes, and what cuBLAS reaches on square products."""
    copied = 2 * length / (clock.measure([clock.prepare([_copy(length, device)] * 2)])[0].median * 1e-6)
    rates: dict[str, float | None] = {}
    why_not = {}
    for name, make in (("bf16", _bf16), ("fp8", _fp8), ("int8", _int8)):
        try:
            rates[name] = 2.0 * size**3 / (clock.measure([clock.prepare([make(size, device)] * 2)])[0].median * 1e-6)
        except Exception as error:
            rates[name], why_not[name] = None, timing.reason(error)
            timing.alive(device)
    return Ceilings(copied, rates, why_not)


def replayed_call(
    call: Callable[[], Tensor], back: Callable[[], Any], device: torch.device, dry: bool, seconds: float = 4.0
) -> tuple[Tensor, Times]:
    """(what a call returns, its times as a replayed graph, or made-up ones). back: what to do before each call, not timed."""
    if dry:
        back()
        return call(), Times(100.0, 99.0, 101.0)
    stream = timing.stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            back()
            call()
        back()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = call()
        spent: list[float] = []
        until = time.monotonic() + seconds
        while len(spent) < 10 or time.monotonic() < until:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            back()
            torch.cuda._sleep(timing.WAIT)
            start.record(stream)
            graph.replay()
            end.record(stream)
            torch.cuda.synchronize(device)
            spent.append(1000 * start.elapsed_time(end))
        found = result.clone()
    torch.cuda.synchronize(device)
    return found, timing.summary(spent[2:])


def _copy(length: int, device: torch.device) -> Callable[[], Any]:
    source = torch.empty(length, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _bf16(size: int, device: torch.device) -> Callable[[], Any]:
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return lambda: torch.mm(a, b.t())


def _fp8(size: int, device: torch.device) -> Callable[[], Any]:
    a, b = (torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _int8(size: int, device: torch.device) -> Callable[[], Any]:
    a, b = (torch.randint(-128, 128, (size, size), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())

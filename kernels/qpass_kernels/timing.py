"""Timing on CUDA: calls captured in graphs that go through copies of the weights, replayed in turn.

A layer's weights come from memory, not from the cache: the calls of a graph read one copy after another, together more than
three times what the second-level cache holds. Graphs of the cases to compare are replayed one after the other, so that a
change of clocks meets all of them, and the median counts. The GPU waits before each replay, so that it never waits within.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
LEAST = 10  # calls of a graph: what a launch of it costs is spread over them
WAIT = 100_000  # clock ticks before a replay, while the host queues it


@dataclass(frozen=True)
class Times:
    """Microseconds a call: the median of the replays, and the 10th and 90th of 100."""

    median: float
    low: float
    high: float


class Lost(RuntimeError):
    """The CUDA context is gone: nothing more can be run in this process."""


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """What the second-level cache holds."""
    if device.type != "cuda":
        return 0
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)


def copies_of(size: int, device: torch.device) -> int:
    """Copies of `size` bytes that together are more than three times the cache, two to 64."""
    return max(2, min(64, 3 * cache_bytes(device) // max(size, 1) + 1))


@functools.cache
def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The one stream that graphs are warmed up and captured on: kernels keep counters by stream."""
    return torch.cuda.Stream(device)


def captured(calls: Sequence[Call], device: torch.device) -> tuple[torch.cuda.CUDAGraph, int]:
    """(a graph of calls in turn, how many it makes); raises what they raise, RuntimeError where they cannot be captured."""
    turns = [*calls] * -(-LEAST // len(calls))
    stream = stream_of(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for call in (*calls, *calls[:2]):
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in turns:
            call()
    torch.cuda.synchronize(device)
    return graph, len(turns)


def replayed(
    graphs: Sequence[tuple[torch.cuda.CUDAGraph, int]], device: torch.device, seconds: float, least: int = 20
) -> list[Times]:
    """Times of graphs of so many calls each, replayed in turn for about `seconds` in all and `least` times at the least."""
    stream = stream_of(device)
    spent: list[list[float]] = [[] for _ in graphs]
    with torch.cuda.stream(stream):
        for graph, _ in graphs:
            graph.replay()
        torch.cuda.synchronize(device)
        until = time.monotonic() + seconds
        while len(spent[0]) < least or time.monotonic() < until:
            marks = []
            for graph, _ in graphs:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda._sleep(WAIT)
                start.record(stream)
                graph.replay()
                end.record(stream)
                marks.append((start, end))
            torch.cuda.synchronize(device)
            for times, (start, end), (_, calls) in zip(spent, marks, graphs, strict=True):
                times.append(1000 * start.elapsed_time(end) / calls)
    return [summary(times) for times in spent]


def timed(calls: Sequence[Call], seconds: float) -> Times:
    """Times of calls on the current CUDA device, alone."""
    device = torch.device("cuda", torch.cuda.current_device())
    return replayed([captured(calls, device)], device, seconds)[0]


def summary(times: Sequence[float]) -> Times:
    """Median, 10th and 90th of 100."""
    if len(times) < 2:
        return Times(times[0], times[0], times[0])
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return Times(statistics.median(times), tenths[0], tenths[-1])


def alive(device: torch.device) -> None:
    """Raises Lost where an earlier failure took the CUDA context with it; gives memory of failed calls back."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        raise Lost(f"the CUDA context is lost: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """An error in one line of at most 200 letters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:200]

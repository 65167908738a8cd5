"""Counters of sums that are split: whose they are, and when a launch has its own."""

import pytest
import torch

from qpass_kernels import launch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(launch, "_counters", {})
    monkeypatch.setattr(launch, "_slots", {})


def counters(tiles=8):
    return launch.scratch(torch.ones(1), tiles, 2, 16, torch.int32)[1]


def test_not_split():
    assert launch.scratch(torch.ones(1), 8, 1, 16, torch.int32) == (None, None)
    assert not launch._counters


def test_partial_sums():
    partial, _ = launch.scratch(torch.ones(1), 8, 4, 16, torch.int32)
    assert partial.numel() == 8 * 4 * 16
    assert partial.dtype == torch.int32


def test_a_stream_keeps_its_counters():
    assert counters().data_ptr() == counters(9).data_ptr()
    assert not counters().any()


def test_streams_have_their_own(monkeypatch):
    first = counters()
    monkeypatch.setitem(launch._slots, (CPU, 7), 1)
    del launch._slots[CPU, 0]
    second = counters()
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.data_ptr() != second.data_ptr()


@pytest.mark.parametrize("state", ["capturing", "no slot", "many tiles"])
def test_a_launch_that_zeroes_its_own(state, monkeypatch):
    tiles = 8
    if state == "capturing":  # memory of a graph must not be handed to another
        monkeypatch.setattr(launch, "_capturing", lambda device: True)
    elif state == "no slot":
        monkeypatch.setattr(launch, "_slots", {(CPU, i): i for i in range(1, launch.SLOTS + 1)})
    else:
        tiles = launch.SLOT + 1
    one, two = counters(tiles), counters(tiles)
    assert one.numel() == tiles
    assert one.data_ptr() != two.data_ptr()
    assert not one.any()


def test_reserved_before_a_capture(monkeypatch):
    launch.reserve(CPU)
    monkeypatch.setattr(launch, "_capturing", lambda device: True)
    assert counters().data_ptr() == counters().data_ptr()

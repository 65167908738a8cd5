"""What stands beside other packages' searches, without one of them installed."""

import importlib
from pathlib import Path

import pytest
from torch import nn

from qpass.search.groups import Group
from qpass.search.program import total

FOLDER = Path(__file__).parent / "benchmarks"
LOW, HIGH = "w4a16", "w8a16"


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("searching_peers")


def test_a_package_that_is_not_installed_is_left_out(peers, monkeypatch, capsys):
    monkeypatch.setattr(peers, "PEERS", (("no-such-package", "at all", None, (peers.PAIR,)),))
    assert list(peers.choices(nn.Identity(), [])) == []
    assert "no-such-package at all: left out" in capsys.readouterr().out


def test_what_goes_wrong_in_a_peer_is_a_row(peers, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such format\nat all")

    monkeypatch.setattr(peers, "PEERS", (("torch", "broken", broken, (peers.PAIR,)),))
    table, misses = peers.rows(nn.Identity(), [], [], {}, None)
    assert [row[2] for row in table[1:]] == ["RuntimeError: no such format"]
    assert misses == []


def test_found_stands_beside_a_peer_in_no_more_bits(peers, monkeypatch):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 16), "head": nn.Linear(8, 8)})
    groups = [Group(f"{name}:linear.0", (f"{name}:linear.0",), (LOW, HIGH, "float")) for name in "abc"]
    groups.append(Group("head:linear.0", ("head:linear.0",), ("float",)))
    loss = {(g.name, s): value for g in groups for s, value in ((LOW, 0.1), (HIGH, 0.01), ("float", 0.0))}
    loss["b:linear.0", LOW] = 1.0  # what a peer does not know
    chosen = {"a": HIGH, "b": LOW, "c": LOW}
    monkeypatch.setattr(peers, "choices", lambda model, batches: iter([(peers.PAIR, "peer", chosen)]))
    table, misses = peers.rows(model, [], groups, loss, lambda choice: total(loss, choice))
    (row,) = table[1:]
    assert row == ("w4a16, w8a16", "peer", "5.00", "1.11000", "0.21000", "0.19", "1 of 3")
    assert misses == []
    table, misses = peers.rows(model, [], groups, loss, lambda choice: float(choice["a:linear.0"] == LOW) + 1)
    assert misses == ["peer, 5.00 bits of w4a16, w8a16: 2.000 of its KL"]

"""Parts of a compiled model that are called by themselves: compiled there, and plain inside of a call of the model."""

import copy

import pytest
import torch
from torch import nn

import qpass
from qpass.calls import parts_of
from qpass.runtime import runtime_of
from tests.models_generate import build, prompt


class Tower(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x, twice=False):
        for layer in self.layers:
            x = x + layer(x).relu()
        return 2 * x if twice else x


class Pair(nn.Module):
    """Two towers and a head. broken: what is between them is no part of a graph."""

    def __init__(self, broken=False):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.head, self.broken = Tower(32), Tower(32), nn.Linear(32, 4), broken

    def forward(self, x):
        y = self.left(x)
        if self.broken:
            torch._dynamo.graph_break()
        return self.head(self.right(y))

    def features(self, x):
        return self.left(x, twice=True)


def compiled(model, backend="reference"):
    torch._dynamo.reset()
    torch.manual_seed(1)
    batches = [torch.randn(8, 32) for _ in range(4)]
    return qpass.compile(model.eval(), "w8a8", batches[0], batches, backend=backend)


def plainly(q, call):
    """What the packed model gives in eager mode."""
    mine, q._compiled_call_impl = q._compiled_call_impl, None
    try:
        with torch.no_grad():
            return call()
    finally:
        q._compiled_call_impl = mine


def sites(q):
    return [record.sites for record in runtime_of(q).records]


def test_a_part_by_itself_is_compiled():
    q, x = compiled(Pair()), torch.randn(5, 32)
    assert [path for path, _ in parts_of(q)] == ["left", "right"]  # a single layer is none
    q(x)
    assert len(sites(q)) == 1
    found, twice = q.left(x), q.features(x)
    assert sites(q)[1] == sites(q)[2] == ["left.layers.0:linear.0", "left.layers.1:linear.0"]
    wanted = plainly(q, lambda: q.left(x))
    assert not torch.equal(found, wanted)  # in eager mode weights alone are rounded
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
    assert torch.equal(twice, 2 * found)
    q(x)
    q.left(x)
    assert len(sites(q)) == 3


@pytest.mark.parametrize("broken", [False, True])
def test_inside_of_a_call_it_is_as_any_module(broken):
    q = compiled(Pair(broken))
    q(torch.randn(5, 32))
    assert sum(map(len, sites(q))) == 5
    assert len(sites(q)) == 1 + broken


def test_hooks_run_and_copies_are_compiled():
    q, x, seen = compiled(Pair()), torch.randn(5, 32), []
    hook = q.left.register_forward_hook(lambda *_: seen.append(1))
    q.left(x)
    count = len(seen)
    assert count
    hook.remove()
    q.left(x)
    assert len(seen) == count
    twin, alone = copy.deepcopy(q), copy.deepcopy(q.left)
    assert torch.equal(twin.left(x), q.left(x))
    assert sites(twin) == [["left.layers.0:linear.0", "left.layers.1:linear.0"]]
    assert torch.equal(alone(x), plainly(q, lambda: q.left(x)))  # a module by itself runs from its packed weights
    assert "_compiled_call_impl" not in vars(alone)


def test_a_weight_that_is_written_to():
    q, x = compiled(Pair()), torch.randn(5, 32)
    before = q.left(x)
    state = {name: value.clone() for name, value in q.state_dict().items()}
    name = next(n for n in state if n.startswith("left") and n.endswith("original0"))
    state[name].zero_()
    q.load_state_dict(state)
    with pytest.warns(UserWarning, match="after qpass.compile"):
        after = q.left(x)
    assert not torch.equal(before, after)


def test_a_monitor_sees_calls_of_parts():
    q = compiled(Pair())
    with qpass.monitor(q, share=None) as m:
        for _ in range(9):
            q.left(torch.randn(8, 32))
        q(torch.randn(8, 32))
    looks = {row.site: row.stats.looks for row in m.report()}
    assert looks["left.layers.0:linear.0"] == 10
    assert looks["right.layers.0:linear.0"] == 1


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_generate_calls_a_compiled_encoder(name):
    inputs = prompt(name)
    q = qpass.compile(build(name), "w8a8-dynamic", backend="cpu")
    tokens = q.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert all("encoder" in site for site in sites(q)[0])
    assert not any("encoder." in site.replace("decoder.", "") for graph in sites(q)[1:] for site in graph)
    wanted = plainly(q, lambda: q.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert tokens.shape == wanted.shape

"""A batch on its way through a graph in parts: the same values as in one go, wherever it stops and whatever it drops."""

import torch
from torch import nn
from torch.nn import functional

from qpass.calibrate import Session
from qpass.sequential import caught
from qpass.walk import Walk, mutates, narrow


class Residual(nn.Module):
    """Two blocks around a stream of values; each is wide inside."""

    def __init__(self, writes=False):
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(16, 128) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(128, 16) for _ in range(2))
        self.head = nn.Linear(16, 8)
        self.writes = writes
        self.register_buffer("seen", torch.zeros(16))

    def forward(self, x):
        for up, down in zip(self.ups, self.downs, strict=True):
            if self.writes:
                self.seen.add_(x.mean(tuple(range(x.dim() - 1))))
                x = x + self.seen
            x = x + down(functional.gelu(up(x)))
        return self.head(x)


def captured(model, x):
    session = Session(model)
    found = caught(session, x, "a batch")
    graph, nodes, lifted = session.graphs[found.index]
    model.seen.zero_()  # the first call of a graph is run to its end
    return graph, nodes, (*found.given, *lifted)


def inputs(model, x):
    """Site -> what its module reads, by hooks."""
    found = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(f"{name}:linear.0", args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def walked(model, x, keep):
    graph, nodes, args = captured(model, x)
    walk = Walk(graph, args, {node: name for name, node in nodes.items()}, {})
    sites = [name for name in nodes if ":linear" in name]
    return {name: walk.look(nodes[name], keep(nodes[name], graph, nodes)) for name in sites}


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value)


def test_stops_give_what_the_model_computes():
    torch.manual_seed(0)
    model, x = Residual().eval(), torch.randn(3, 5, 16)
    wanted = inputs(model, x)
    for keep in (
        lambda *_: True,
        lambda *_: False,
        lambda node, graph, nodes: node in narrow(graph, [*nodes.values()]),
    ):
        same(walked(model, x, keep), wanted)


def test_a_graph_that_writes_to_a_buffer_is_not_run_twice():
    torch.manual_seed(0)
    model, x = Residual(writes=True).eval(), torch.randn(3, 5, 16)
    wanted = inputs(model, x)
    model.seen.zero_()
    graph, _, _ = captured(model, x)
    assert mutates(graph)
    same(walked(model, x, lambda *_: False), wanted)
    assert not model.seen.any(), "the walk wrote to the model's own buffer"


def test_wide_places_are_not_kept():
    model, x = Residual().eval(), torch.randn(3, 5, 16)
    graph, nodes, _ = captured(model, x)
    kept = narrow(graph, [*nodes.values()])
    assert {name for name, node in nodes.items() if node in kept} == {
        "ups.0:linear.0",
        "ups.1:linear.0",
        "head:linear.0",
    }


def test_what_was_read_for_the_last_time_is_dropped():
    model, x = Residual().eval(), torch.randn(3, 5, 16)
    graph, nodes, args = captured(model, x)
    walk = Walk(graph, args, {}, {})
    walk.look(nodes["head:linear.0"], True)
    alive = [node.name for node in walk.stored if node.op != "placeholder"]
    assert len(alive) == 1

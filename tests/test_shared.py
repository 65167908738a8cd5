"""Tensors that graphs share: equal ones once, nothing kept alive, nothing of the model's own."""

import gc

import torch
from torch import fx, nn

from qpass.shared import made_once, share_constants


def graph(tensor, placeholder=None):
    """A graph that holds a tensor; its input is a tensor of the model."""
    gm = fx.GraphModule(nn.Module(), fx.Graph())
    gm.register_buffer("held", tensor)
    x = gm.graph.placeholder("x")
    x.meta["value"] = placeholder
    gm.graph.output(gm.graph.call_function(torch.add, (x, gm.graph.get_attr("held"))))
    return gm


def test_equal_constants_become_one():
    values = torch.randn(64, 64)
    first, second = graph(values.clone()), graph(values.clone())
    assert (share_constants(first), share_constants(second)) == (0, 1)
    assert second.held is first.held
    for other in (values + 1, values.t().contiguous().t(), values.view(32, 128).clone(), values.double()):
        assert share_constants(graph(other)) == 0


def test_small_ones_and_the_models_own_are_left():
    values = torch.randn(64, 64)
    held = [graph(values.clone())]
    share_constants(held[0])
    own = values.clone()
    assert share_constants(graph(own, own)) == 0
    small = torch.randn(8)
    pair = graph(small.clone()), graph(small.clone())
    assert [share_constants(gm) for gm in pair] == [0, 0]


def test_what_no_graph_holds_goes():
    made = []

    def make(source):
        made.append(1)
        return source * 2

    source = torch.randn(40, 40)
    kept = made_once("double", source, make)
    assert made_once("double", source.clone(), make) is kept
    assert made_once("other", source, make) is not kept
    assert len(made) == 2
    del kept
    gc.collect()
    made_once("double", source, make)
    assert len(made) == 3

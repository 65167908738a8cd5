"""Parts of a merged product have gaps between their rows: heads split from them in any spelling give what eager mode does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from tests.graphs import Strides, lowered
from tests.models import encoder, relative

HEADS, WIDTH = 4, 32


def rotated(x):
    """A step of arithmetic as of rotary positions, which is generated into one kernel."""
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1) * 0.5 + x


def attended(q, k, v):
    return F.scaled_dot_product_attention(rotated(q), rotated(k), v)


def unflatten(q, k, v):
    return attended(*(x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


def viewed(q, k, v):
    b, s, _ = q.shape
    return attended(*(x.view(b, s, HEADS, -1).transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)


def permuted(q, k, v):
    b, s, _ = q.shape
    return attended(*(x.reshape(b, s, HEADS, -1).permute(0, 2, 1, 3) for x in (q, k, v))).transpose(1, 2).flatten(2)


def heads_beside_sequences(q, k, v):
    """`view(length, batch * heads, width)`, as fairseq has it: no view of a part is that."""
    b, s, _ = q.shape
    q, k, v = (x.view(b, s * HEADS, -1).transpose(0, 1) for x in (q, k, v))
    weights = torch.softmax(torch.bmm(rotated(q), rotated(k).transpose(1, 2)), -1)
    return torch.bmm(weights, v).transpose(0, 1).reshape(b, s, -1)


def split(q, k, v):
    found = [torch.stack(x.split(WIDTH // HEADS, -1), 1) for x in (q, k, v)]
    return attended(*found).transpose(1, 2).flatten(2)


def unbound(q, k, v):
    firsts = [x.unflatten(-1, (HEADS, -1)).unbind(2)[1] for x in (q, k, v)]
    return torch.cat([rotated(x) for x in firsts] * HEADS, -1)[..., :WIDTH]


def flat(q, k, v):
    b, s, _ = q.shape
    return (q.view(-1, WIDTH).sigmoid() * k.view(-1, WIDTH) + v.flatten(0, 1)).view(b, s, WIDTH)


def as_columns(q, k, v):
    return (
        (q.mT.unflatten(1, (HEADS, -1)).cos() + k.mT.unflatten(1, (HEADS, -1)) * v.mT.unflatten(1, (HEADS, -1)))
        .flatten(1, 2)
        .mT
    )


SPELLINGS = (unflatten, viewed, permuted, heads_beside_sequences, split, unbound, flat, as_columns)


class Siblings(nn.Module):
    def __init__(self, spelled):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.spelled = spelled

    def forward(self, x):
        return self.out(self.spelled(self.q(x), self.k(x), self.v(x)))


@pytest.mark.parametrize("spelled", SPELLINGS, ids=lambda f: f.__name__)
def test_heads_split_in_any_spelling(spelled):
    model, x = Siblings(spelled).eval(), torch.randn(3, 5, WIDTH)
    q = qpass.compile(model, "w8a16", x, backend="cpu", guard=False)
    merged = {step.name: step.edits for step in qpass.inspect(q).records[0].steps}["merge-siblings"]
    assert merged >= 1
    for batch in (x, torch.randn(2, 7, WIDTH)):
        with torch.no_grad():
            assert relative(q(batch), model(batch)) < 0.02


def test_attention_of_torch_twice_on_one_input():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))

        def forward(self, x):
            return self.a(x, x, x)[0] + self.b(x, x, x)[0]

    model, x = Twice().eval(), torch.randn(3, 5, WIDTH)
    q = qpass.compile(model, "w8a16", x, backend="cpu", guard=False)
    with torch.no_grad():
        assert relative(q(x), model(x)) < 0.02


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("spelled", [*SPELLINGS, None], ids=lambda f: f.__name__ if f else "encoder")
def test_strides_are_as_told(spelled, backend):
    model = encoder(2) if spelled is None else Siblings(spelled).eval()
    x = torch.randn(3, 5, WIDTH)
    gm, values = lowered(model, qpass.analyze(model, "w8a8-dynamic", x), x, backend=backend)
    with torch.no_grad():
        assert relative(Strides(gm).run(*values)[0], model(x)) < 0.02

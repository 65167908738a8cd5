"""Small models that several tests use."""

import torch
from torch import nn
from torch.nn import functional


class FeedForward(nn.Module):
    """Norm, widen, activate, narrow, residual: a transformer's block without attention."""

    def __init__(self, width=32, inner=96, act=functional.gelu):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.act = act

    def forward(self, x):
        return x + self.down(self.act(self.up(self.norm(x))))


class Attention(nn.Module):
    """Self-attention with three sibling projections."""

    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        b, s, w = x.shape
        q, k, v = (p(x).view(b, s, self.heads, -1).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, s, w)
        return self.norm(x + self.out(y))


class TwoGraphs(nn.Module):
    """The front end cannot look into what is between its layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.a(x)
        torch._dynamo.graph_break()
        return self.b(y.relu())


def encoder(layers=1, width=32):
    """A post-norm encoder of `layers` blocks."""
    blocks = []
    for _ in range(layers):
        blocks += [Attention(width), FeedForward(width, 3 * width)]
    return nn.Sequential(*blocks).eval()


def relative(found, wanted):
    """Relative RMS error."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def batches(count=4, shape=(4, 6, 32)):
    return [torch.randn(shape) for _ in range(count)]

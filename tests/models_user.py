"""Modules as people write them: each is a way of using weights, of calling or of returning that a compiler can trip on."""

import dataclasses
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 16


def parameter(*shape):
    return nn.Parameter(torch.randn(shape) / shape[-1] ** 0.5)


class Module(nn.Module):
    """A module whose forward is `run(self, ...)`, with some layers and parameters at hand."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.same = nn.Linear(WIDTH, WIDTH)


class Functional(nn.Module):
    """Every spelling of a product with a parameter. All seven are sites, and quantized."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = parameter(WIDTH, WIDTH), parameter(WIDTH)
        self.w2, self.w3, self.w4, self.w5, self.w6, self.w7 = (parameter(WIDTH, WIDTH) for _ in range(6))

    def forward(self, x):
        x = F.linear(x, self.w1, self.b1)
        x = torch.tanh(torch.matmul(x, self.w2))
        x = torch.tanh(x @ self.w3.T)
        x = torch.tanh(torch.einsum("...k,nk->...n", x, self.w4))
        x = torch.tanh(torch.einsum("bsk,kn->bsn", x, self.w5))
        flat = torch.addmm(self.b1, x.flatten(0, 1), self.w6).view(x.shape)
        return (self.w7 @ flat.transpose(1, 2)).transpose(1, 2)


class Unusual(nn.Module):
    """Products that no scheme quantizes; each is a site with a sentence."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.bilinear = nn.Bilinear(WIDTH, WIDTH, WIDTH)
        self.heads = parameter(4, WIDTH, WIDTH)
        self.register_buffer("fixed", torch.randn(WIDTH, WIDTH) / 4)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x):
        x = self.a(x)
        x = torch.tanh(self.bilinear(x, x))
        x = torch.einsum("bsk,hkn->bsn", x, self.heads)
        x = torch.matmul(x.unsqueeze(1), self.heads).sum(1)
        x = F.linear(torch.tanh(x), self.fixed)
        x = F.linear(x, self.heads[0] * 2)
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


class Tied(nn.Module):
    """An autoencoder that reads one weight both ways, and a table tied to a linear."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(40, WIDTH)
        self.head = nn.Linear(WIDTH, 40, bias=False)
        self.head.weight = self.table.weight
        self.code = nn.Linear(WIDTH, 8)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(F.linear(torch.relu(self.code(x)), self.code.weight.t()))


class Recurrent(nn.Module):
    """An LSTM and a GRU between linears."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.lstm, self.gru = nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.down = nn.Linear(WIDTH, 4)

    def forward(self, x):
        x, _ = self.lstm(self.up(x))
        x, last = self.gru(x)
        return self.down(x), last


class Twice(Module):
    """One layer called twice, on inputs of very different size."""

    def forward(self, x):
        return self.same(10 * torch.tanh(self.same(x))) + self.b(torch.relu(self.a(x)))


class Branch(Module):
    """Takes one of two ways, by its data."""

    def forward(self, x):
        y = torch.relu(self.a(x))
        if y.sum() > 1e6:
            return x
        return self.b(y)


class Depth(nn.Module):
    """Runs as many of its layers as it is told."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x, depth=3):
        for layer in self.layers[:depth]:
            x = torch.relu(layer(x))
        return x


@dataclasses.dataclass
class Result:
    y: torch.Tensor
    rows: int
    nothing: None = None


class Pair(NamedTuple):
    y: torch.Tensor
    z: torch.Tensor


class Returns(Module):
    """Returns of every kind in one."""

    def forward(self, x):
        y = self.a(x)
        return {"a": y, "pair": Pair(self.b(y), x), "result": Result(y, 3), "list": [None, 5, "text", (y,)]}


class Counter(Module):
    """Keeps count and a running mean in buffers, and works in place on its activations."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x):
        self.calls += 1
        y = self.same(x)
        self.mean.mul_(0.5).add_(y.mean((0, 1)))
        y.add_(1).mul_(2)
        y[..., 0] = 0
        return F.relu_(self.b(F.relu_(self.a(y))))


class Mutates(Module):
    """Writes to its input."""

    def forward(self, x):
        x.mul_(0.5)
        return self.same(x)


class Keywords(Module):
    """Takes keywords alone."""

    def forward(self, *, left, right=None, scale=1.0):
        y = self.same(left) * scale
        return y if right is None else y + self.same(right)


class Autocast(Module):
    """Casts inside."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.b(F.gelu(self.a(x)))
        return y.float() + self.same(x)


class Vectors(nn.Module):
    """Linears on one vector, and on five axes."""

    def __init__(self):
        super().__init__()
        self.same = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.same(torch.tanh(self.same(x)))


class CrossAttention(nn.Module):
    """torch's own attention: of x over x, and of x over y."""

    def __init__(self):
        super().__init__()
        self.own = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        x = x + self.own(x, x, x, need_weights=False)[0]
        y, weights = self.cross(x, x.flip(1), x * 2)
        return x + y, weights


class Mapped(Module):
    """torch.func.vmap inside."""

    def forward(self, x):
        return torch.func.vmap(lambda row: torch.relu(self.a(row)))(x) @ self.b.weight.t()


def transformer():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def sequential():
    return nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Sequential(nn.Linear(24, WIDTH), nn.Tanh()))

"""Small models to be trained, and the step of an ordinary loop."""

import torch
from torch import nn

import qpass
from qpass.qat.quantizer import Quantizer
from tests.models import Attention, FeedForward


class Gated(nn.Module):
    """A gated MLP with dropout: two linears read one value."""

    def __init__(self, width=16):
        super().__init__()
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(0.1)
        self.gate, self.up, self.down = nn.Linear(width, 32), nn.Linear(width, 32), nn.Linear(32, width)

    def forward(self, x):
        h = self.norm(x)
        return x + self.drop(self.down(torch.relu(self.gate(h)) * self.up(h)))


class Images(nn.Module):
    """Convolutions with batch norm of its own figures, dropout, a buffer, and a linear."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-3, momentum=0.3)
        self.second, self.drop, self.head = nn.Conv2d(8, 8, 3, groups=4), nn.Dropout(0.1), nn.Linear(8, 5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        x = torch.relu(self.norm(self.first(x)))
        return self.head(self.drop(torch.relu(self.second(x)).mean((2, 3))))


class Outliers(nn.Module):
    """A transformer's block whose norms make channels that reach far, as those of language models do."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.attention, self.block = nn.LayerNorm(32), Attention(), FeedForward()
        for norm in (self.first, self.block.norm):
            norm.weight.data[3], norm.weight.data[17] = 25.0, 12.0
            norm.bias.data[3], norm.bias.data[9] = 40.0, -15.0
        for layer in self.modules():
            if isinstance(layer, nn.Linear) and layer.in_features == 32:
                layer.weight.data[:, [3, 9, 17]] *= 0.1
                layer.bias = layer.bias if bias else None

    def forward(self, x):
        return self.block(self.attention(self.first(x)))


def prepared(model, scheme="w4a4", example=None, **options):
    """A model in training, in train mode."""
    return qpass.prepare_qat(model, scheme, example, **options).train()


def loss_of(model, x):
    """A loss that is not flat anywhere."""
    return (model(x) - 0.3).square().mean()


def grads(model):
    """Name -> gradient, of those there are."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def quantized_calls(monkeypatch):
    """A list that takes the site of each fake-quantization from now on."""
    sites, plain = [], Quantizer._quantized

    def counted(self, x, dtype):
        sites.append(self.site)
        return plain(self, x, dtype)

    monkeypatch.setattr(Quantizer, "_quantized", counted)
    return sites

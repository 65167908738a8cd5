"""Small models to be trained, and the step of an ordinary loop."""

import torch
from torch import nn

import qpass
from qpass.qat.quantizer import Quantizer


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

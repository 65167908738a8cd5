"""A gated block behind a norm, whose input channels differ in size: three norms, in three spellings."""

import torch
from torch import nn
from torch.nn import functional as F


class Rms(nn.Module):
    """A root mean square norm, spelled out as language models have it."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Gated(nn.Module):
    """Two linears read what a norm makes of inputs whose channels differ in size; a third reads their product."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.gate, self.up, self.down = norm, nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x):
        h = self.norm(x)
        return self.down(F.silu(self.gate(h)) * self.up(h))


NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "spelled": Rms}


def gated(norm):
    torch.manual_seed(0)
    model = Gated(NORMS[norm](64)).eval().requires_grad_(False)
    model.norm.weight.copy_(torch.ones(64))
    model.norm.weight[::16] *= 8
    for linear in (model.gate, model.up, model.down):
        nn.init.normal_(linear.weight, std=0.1)
    mixing = torch.randn(64, 64) / 8
    return model, [torch.randn(64, 64) @ mixing for _ in range(4)]

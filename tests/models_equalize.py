"""Convolutions whose channels differ in size, for the tests of equalization, and how their plans are made."""

import torch
from torch import nn
from torch.nn import functional as F

import qpass
from tests.models import relative

GROUPED, UP = nn.Conv2d(8, 12, 3, groups=4), nn.ConvTranspose2d(8, 6, 3, 2, groups=2)


class Depthwise(nn.Module):
    """Expand, depthwise, project. Channels differ in size by 100, and what reads them undoes it."""

    def __init__(self, act=F.relu, between=lambda x: x, spread=1.0):
        super().__init__()
        self.expand, self.depth, self.project = (
            nn.Conv2d(3, 24, 1),
            nn.Conv2d(24, 24, 3, 1, 1, 1, 24),
            nn.Conv2d(24, 8, 1),
        )
        self.a, self.b, self.act, self.between = nn.BatchNorm2d(24), nn.BatchNorm2d(24), act, between
        with torch.no_grad():
            for norm, reader in ((self.a, self.depth.weight[:, 0, 0]), (self.b, self.project.weight[:, :, 0, 0].t())):
                norm.weight.copy_(torch.logspace(-spread, spread, 24)[torch.randperm(24)])
                norm.bias.copy_(norm.weight * torch.rand(24))
                norm.running_mean.uniform_(-0.2, 0.2)
                reader.div_(norm.weight.reshape(-1, 1, *[1] * (reader.dim() - 2)))

    def forward(self, x):
        x = self.between(self.act(self.a(self.expand(x))))
        return self.project(self.act(self.b(self.depth(x))))


class Chain(nn.Module):
    """Two convolutions, and what stands between them."""

    def __init__(self, between, first=None, second=None):
        super().__init__()
        self.first, self.second = first or nn.Conv2d(3, 8, 3, padding=1), second or nn.Conv2d(8, 5, 3, padding=1)
        self.between, self.slope = between, nn.Parameter(torch.rand(8))
        with torch.no_grad():
            self.first.weight *= torch.logspace(-1, 1, 8).reshape(
                [-1 if n == 8 else 1 for n in self.first.weight.shape]
            )

    def forward(self, x):
        return self.second(self.between(self, self.first(x)))


def images(count=32, seed=1):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def plan(model, scheme="w8a8", **options):
    batches = [images(seed=i) for i in range(4)]
    return qpass.analyze(model.eval(), scheme, batches[0][:4], batches, **options)


def factors(found):
    return {d.site.partition(":")[0]: d.packed.in_mul for d in found.quantized if d.packed.in_mul is not None}


def error(model, found, backend="reference"):
    torch._dynamo.reset()
    x = images(seed=9)
    with torch.no_grad():
        return relative(qpass.compile(model, plan=found, backend=backend)(x), model(x))


class Shared(nn.Module):
    """One value, two readers, one behind a pool."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 4, 1)
        with torch.no_grad():
            self.a.weight *= torch.logspace(-1, 1, 8).reshape(-1, 1, 1, 1)

    def forward(self, x):
        y = F.relu(self.a(x))
        return F.max_pool2d(self.b(y), 2) + self.c(F.max_pool2d(y, 2))

"""Models for processes that calibrate together: each gives (model, example input, calibration batches of this process)."""

import os

import torch
from torch import nn

from tests.test_sequential import data, stack

RANK = int(os.environ.get("RANK", 0))


def net():
    return stack(), data(1)[0], (batch for batch in data(5))


def wide():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 1400), nn.GELU(), nn.Linear(1400, 64)).eval()
    return model, data(1)[0], data(4)


def images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 16)).eval()
    generator = torch.Generator().manual_seed(1)
    seen = [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)]
    return model, seen[0], seen


def few():
    return stack(), data(1)[0], data(1)


def unseeded():
    torch.manual_seed(RANK)
    model = nn.Sequential(nn.Linear(64, 64)).eval()
    return model, data(1)[0], data(4)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.one(x) if x.shape[1] == 20 else self.two(x)


def branches():
    torch.manual_seed(0)
    return Branch().eval(), None, data(4, (20, 7))


def broken():
    def seen():
        yield from data(3)
        yield "text" if RANK else data(1)[0]
        yield from data(2)

    return stack(), data(1)[0], seen()


def killed():
    def seen():
        yield from data(3)
        if RANK:
            os._exit(7)
        yield from data(3)

    return stack(), data(1)[0], seen()

"""scikit-learn's handwritten digits, and three small CNNs trained on them in a minute each, kept in the user's cache.

1797 images of 8 x 8, enlarged to 16 x 16: a fixed stratified split of 1437 to train on and 360 to score. A net's weights
are found again by a hash of this file, of torch's version, its name and the seed; any edit of this file trains anew. They
are written whole or not at all, and what cannot be read is trained again.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from qpass.backends.native.build import cache_folder
from qpass.files import replacing

TEST, SIDE = 360, 16
EPOCHS, BATCH, RATE, DECAY, SMOOTHING = 40, 64, 4e-3, 0.05, 0.1
SHIFT = 2.5  # pixels of 16 either way


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images [1437, 1, 16, 16], their labels, test images [360, 1, 16, 16], their labels; mean 0, deviation 1."""
    found = load_digits()
    images = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None], size=SIDE, mode="bilinear")
    labels = torch.tensor(found.target)
    train, test = train_test_split(range(len(labels)), test_size=TEST, stratify=found.target, random_state=0)
    images = (images - images[train].mean()) / images[train].std()
    return images[train], labels[train], images[test], labels[test]


def conv_norm(c: int, n: int, k: int = 3, act: type[nn.Module] | None = nn.ReLU, **options: int) -> nn.Sequential:
    layers = [nn.Conv2d(c, n, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(n)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Residual(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes (ResNet's basic block)."""

    def __init__(self, c: int, n: int, stride: int = 1) -> None:
        super().__init__()
        self.a, self.b = conv_norm(c, n, stride=stride), conv_norm(n, n, act=None)
        self.down = conv_norm(c, n, 1, None, stride=stride) if c != n or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b(self.a(x)) + self.down(x))


class Inverted(nn.Module):
    """Expand by 4, 3x3 depthwise, project; the input is added where it fits (MobileNetV2)."""

    def __init__(self, c: int, n: int, stride: int = 1) -> None:
        super().__init__()
        wide = 4 * c
        depthwise = conv_norm(wide, wide, 3, nn.ReLU6, stride=stride, groups=wide)
        self.body = nn.Sequential(conv_norm(c, wide, 1, nn.ReLU6), depthwise, conv_norm(wide, n, 1, None))
        self.add = c == n and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.add else self.body(x)


def mean_linear(c: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10)]


def residual() -> nn.Sequential:
    return nn.Sequential(
        *(conv_norm(1, 16), Residual(16, 16), Residual(16, 32, 2), Residual(32, 48, 2)), *mean_linear(48)
    )


def depthwise() -> nn.Sequential:
    blocks = (Inverted(12, 12), Inverted(12, 24, 2), Inverted(24, 24), Inverted(24, 40, 2), Inverted(40, 40))
    return nn.Sequential(conv_norm(1, 12, act=nn.ReLU6), *blocks, conv_norm(40, 96, 1, nn.ReLU6), *mean_linear(96))


def plain() -> nn.Sequential:
    """VGG's shape: pairs of convolutions and max pools, then linears."""
    widths, layers = (1, 16, 32, 48), []
    for c, n in pairwise(widths):
        layers += [conv_norm(c, n), conv_norm(n, n), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 4, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10))


NETS = {"residual": residual, "depthwise": depthwise, "plain": plain}


def shifted(images: Tensor) -> Tensor:
    """Each image moved by a random part of SHIFT pixels along both axes."""
    theta = torch.eye(2, 3).repeat(len(images), 1, 1)
    theta[:, :, 2] = (2 * torch.rand(len(images), 2) - 1) * SHIFT * 2 / SIDE
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int = EPOCHS) -> nn.Module:
    """AdamW, one cosine from a short rise to zero, label smoothing, small shifts; the model in eval mode.

    What is random comes from torch's own generator; every tenth epoch is printed.
    """
    model.train()
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    rise = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / rise) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images))
        for at in range(0, len(images) - BATCH + 1, BATCH):
            chosen = order[at : at + BATCH]
            loss = F.cross_entropy(model(shifted(images[chosen])), labels[chosen], label_smoothing=SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 0:
            print(f"epoch {epoch} of {epochs}: loss {loss.item():.3f} on the last batch", flush=True)
    return model.eval()


def weights_file(name: str, seed: int) -> Path:
    """Where a net's weights are kept: named by what made them."""
    made_by = hashlib.sha256(Path(__file__).read_bytes() + f"{torch.__version__} {name} {seed}".encode()).hexdigest()[
        :12
    ]
    return cache_folder() / "digits" / f"{name}-{seed}-{made_by}.safetensors"


def trained(name: str, seed: int = 0) -> nn.Module:
    """A net of NETS with its trained weights, in eval mode: from the cache, or trained now and kept there."""
    target = weights_file(name, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETS[name]()
        if restored(model, target):
            return model.eval()
        start = time.perf_counter()
        print(f"training {name}, seed {seed}: about half a minute on one core", flush=True)
        images, labels, _, _ = digits()
        train(model, images, labels)
    print(f"trained {name}, seed {seed}, in {time.perf_counter() - start:.0f} s", flush=True)
    with contextlib.suppress(OSError):  # a full or read-only disk: trained again the next time
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            save_file(model.state_dict(), part)
    return model


def restored(model: nn.Module, path: Path) -> bool:
    """Whether a model got the weights in a file; a damaged one, or one of other shapes, changes nothing."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError):
        return False
    own = model.state_dict()
    if {key: (t.shape, t.dtype) for key, t in own.items()} != {key: (t.shape, t.dtype) for key, t in weights.items()}:
        return False
    model.load_state_dict(weights)
    return True

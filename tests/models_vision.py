"""Convolutional networks as people write them, at test size: name -> (factory, shape of one input)."""

import torch
from torch import nn
from torch.nn import functional as F


def conv_norm(c, n, k=3, act=nn.ReLU, **options):
    layers = [nn.Conv2d(c, n, k, padding=k // 2, bias=False, **options), nn.BatchNorm2d(n)]
    return nn.Sequential(*layers, *([act()] if act else []))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut that is a convolution where the shape changes."""

    def __init__(self, c, n, stride=1, groups=1):
        super().__init__()
        self.a, self.b = conv_norm(c, n // 2, 1), conv_norm(n // 2, n // 2, 3, stride=stride, groups=groups)
        self.c = conv_norm(n // 2, n, 1, None)
        self.down = conv_norm(c, n, 1, None, stride=stride) if c != n or stride > 1 else nn.Identity()

    def forward(self, x):
        return F.relu(self.c(self.b(self.a(x))) + self.down(x))


class ResNet(nn.Module):
    """Stem, max pool, bottlenecks, mean, linear."""

    def __init__(self, groups=1):
        super().__init__()
        self.stem = conv_norm(3, 16, 7, stride=2)
        self.blocks = nn.Sequential(
            Bottleneck(16, 32, groups=groups), Bottleneck(32, 32), Bottleneck(32, 48, 2, groups)
        )
        self.head = nn.Linear(48, 10)

    def forward(self, x):
        x = F.max_pool2d(self.stem(x), 3, 2, 1)
        return self.head(F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1))


class Inverted(nn.Module):
    """Expand, depthwise, project, and the input added where it fits."""

    def __init__(self, c, n, stride=1, gate=False, act=nn.ReLU6):
        super().__init__()
        wide = 3 * c
        self.expand, self.depth = conv_norm(c, wide, 1, act), conv_norm(wide, wide, 3, act, stride=stride, groups=wide)
        self.gate = (
            nn.Sequential(nn.Conv2d(wide, 8, 1), nn.ReLU(), nn.Conv2d(8, wide, 1), nn.Hardsigmoid()) if gate else None
        )
        self.project, self.add = conv_norm(wide, n, 1, None), c == n and stride == 1

    def forward(self, x):
        y = self.depth(self.expand(x))
        if self.gate is not None:
            y = y * self.gate(F.adaptive_avg_pool2d(y, 1))
        y = self.project(y)
        return x + y if self.add else y


def mobilenet(gate=False, act=nn.ReLU6):
    blocks = [Inverted(16, 16, 1, gate, act), Inverted(16, 24, 2, gate, act), Inverted(24, 24, 1, gate, act)]
    layers = [conv_norm(3, 16, 3, act, stride=2), *blocks, conv_norm(24, 64, 1, act)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class UNet(nn.Module):
    """Two levels down and up again; what was there before is concatenated."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (self.twice(c, n) for c, n in ((3, 8), (8, 16), (16, 32)))
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.back2, self.back1, self.head = self.twice(32, 16), self.twice(16, 8), nn.Conv2d(8, 2, 1)

    def twice(self, c, n):
        return nn.Sequential(conv_norm(c, n), conv_norm(n, n))

    def forward(self, x):
        a = self.one(x)
        b = self.two(F.max_pool2d(a, 2))
        c = self.three(F.max_pool2d(b, 2))
        b = self.back2(torch.cat([self.up2(c), b], 1))
        return self.head(self.back1(torch.cat([self.up1(b), a], 1)))


class DenseNet(nn.Module):
    """Norm and activation come first; every layer reads all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(self.layer(16 + 8 * i) for i in range(3))
        self.shrink = nn.Sequential(nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 20, 1), nn.AvgPool2d(2))
        self.norm, self.head = nn.BatchNorm2d(20), nn.Linear(20, 10)

    def layer(self, c):
        return nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 8, 3, padding=1, bias=False))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        x = F.relu(self.norm(self.shrink(x)))
        return self.head(x.mean((2, 3)))


class Shuffle(nn.Module):
    """Half of the channels go through, the other half past; then they are shuffled (ShuffleNetV2)."""

    def __init__(self, c):
        super().__init__()
        half = c // 2
        depth = conv_norm(half, half, 3, None, groups=half)
        self.branch = nn.Sequential(conv_norm(half, half, 1), depth, conv_norm(half, half, 1))

    def forward(self, x):
        a, b = x.chunk(2, 1)
        x = torch.cat([a, self.branch(b)], 1)
        batch, c, h, w = x.shape
        return x.view(batch, 2, c // 2, h, w).transpose(1, 2).reshape(batch, c, h, w)


def shufflenet():
    body = [
        conv_norm(3, 16, 3, stride=2),
        nn.MaxPool2d(3, 2, 1),
        Shuffle(16),
        Shuffle(16),
        conv_norm(16, 24, 1, groups=2),
    ]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10))


def vgg():
    body = [
        conv_norm(3, 8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(True),
        nn.MaxPool2d(2),
        conv_norm(8, 16),
        nn.MaxPool2d(2),
    ]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16 * 64, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10))


class Sound(nn.Module):
    """One axis, causal padding, dilation, PReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.act = nn.Conv1d(1, 12, 5, stride=2), nn.BatchNorm1d(12), nn.PReLU(12)
        self.b, self.c, self.leak = nn.Conv1d(12, 12, 3, dilation=2), nn.Conv1d(12, 5, 1), nn.LeakyReLU(0.2)
        self.up = nn.ConvTranspose1d(5, 4, 4, 2, 1)

    def forward(self, x):
        x = self.act(self.norm(self.a(x)))
        x = self.leak(self.b(F.pad(x, (4, 0)))) + x
        return self.up(self.c(x))


def video():
    body = [
        nn.Conv3d(1, 8, 3, padding=1),
        nn.BatchNorm3d(8),
        nn.ReLU(),
        nn.MaxPool3d(2),
        nn.Conv3d(8, 12, (1, 3, 3), padding=(0, 1, 1)),
    ]
    return nn.Sequential(
        *body, nn.GELU(), nn.Conv3d(12, 6, 2, stride=2), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 2 * 4 * 4, 5)
    )


class SuperResolution(nn.Module):
    """Pixel shuffle, a long residual, upsampling both ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(c, 12, 3, padding=1) for c in (3, 12, 12))
        self.up, self.out, self.last = (
            nn.Conv2d(12, 32, 3, padding=1),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(8, 3, 3, padding=1),
        )

    def forward(self, x):
        a = F.relu(self.a(x))
        y = self.c(F.hardswish(self.b(a))) + a
        y = F.relu(self.out(F.pixel_shuffle(self.up(y), 2)))
        y = F.interpolate(F.interpolate(y, scale_factor=2), scale_factor=0.5, mode="bilinear")
        return self.last(y)


def borders():
    kinds = [nn.Conv2d(3, 6, 3, padding=1, padding_mode=mode) for mode in ("reflect", "replicate", "circular")]
    return nn.Sequential(kinds[0], nn.ReLU(), *(nn.Conv2d(6, 6, k, padding="same", dilation=d) for k, d in ((3, 2),
    (4, 1))), nn.Tanh(),
                         nn.Conv2d(6, 3, 3, padding=(2, 1), stride=(1, 2), bias=False), kinds[1])  # fmt: skip


IMAGE = (3, 32, 32)
MODELS = {
    "resnet": (ResNet, IMAGE),
    "resnext": (lambda: ResNet(4), IMAGE),
    "mobilenet": (mobilenet, IMAGE),
    "mobilenet-v3": (lambda: mobilenet(True, nn.Hardswish), IMAGE),
    "efficientnet": (lambda: mobilenet(True, nn.SiLU), IMAGE),
    "unet": (UNet, IMAGE),
    "densenet": (DenseNet, IMAGE),
    "shufflenet": (shufflenet, IMAGE),
    "vgg": (vgg, IMAGE),
    "sound": (Sound, (1, 128)),
    "video": (video, (1, 8, 16, 16)),
    "super-resolution": (SuperResolution, (3, 16, 16)),
    "borders": (borders, (3, 16, 16)),
}


def smooth(count, shape):
    """Random inputs whose neighbours are alike, as those of images and sounds are."""
    coarse = torch.randn(count, shape[0], *(max(s // 4, 2) for s in shape[1:]))
    mode = ("linear", "bilinear", "trilinear")[len(shape) - 2]
    return F.interpolate(coarse, size=shape[1:], mode=mode) + 0.1 * torch.randn(count, *shape)


def alive(model, inputs):
    """The model with batch norms that have seen data and are no identities, in eval mode. inputs: called without
    arguments."""
    model.train()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                norm.momentum = 0.3
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
        for _ in range(8):
            batch = inputs()
            model(**batch) if isinstance(batch, dict) else model(batch)
    return model.eval()


def build(name):
    """(model, function that draws a batch of some size) of MODELS."""
    factory, shape = MODELS[name]
    torch.manual_seed(0)
    return alive(factory(), lambda: smooth(8, shape)), lambda count=4: smooth(count, shape)

"""Ops in a graph that torch.export ships: exported with a symbolic batch, written, read back, the same results."""

import dataclasses
import io

import pytest
import torch
from torch import nn

from qpass_kernels import ops  # noqa: F401, registers them
from qpass_kernels.conv_weights import Finish, correction, pack
from tests.kernels.samples import OPS, activations, epilogue, weights

Q = torch.ops.qpass_kernels


class Linear(nn.Module):
    """x -> a linear op on weights that are buffers."""

    def __init__(self, kind, n, k):
        super().__init__()
        held, top, column = weights(kind, n, k, 64 if kind.startswith("w4") else 0)
        after = epilogue(kind, 1, n, top, column, everything=False, act="gelu", out_dtype=torch.float16)
        self.kind, self.names = kind, [f"w{i}" for i in range(len(held))]
        self.rest = [getattr(after, field.name) for field in dataclasses.fields(after)][1:]
        for name, value in zip((*self.names, "alpha"), (*held, after.alpha), strict=True):
            self.register_buffer(name, value)

    def forward(self, x):
        op = getattr(Q, OPS[self.kind])
        return op(x, *(getattr(self, name) for name in self.names), self.alpha, *self.rest)


class Image(nn.Module):
    """float image -> codes -> convolution, depthwise convolution, pool."""

    def __init__(self):
        super().__init__()
        codes = torch.randint(-128, 128, (8, 4, 3, 3), dtype=torch.int8)
        self.register_buffer("weight", pack(codes))
        self.register_buffer("correction", correction(codes, 5))
        self.register_buffer("deep", torch.randint(-128, 128, (9, 8), dtype=torch.int8))
        self.register_buffer("alpha", torch.full((8,), 1e-3))
        self.rest = [getattr(Finish(self.alpha), field.name) for field in dataclasses.fields(Finish)][1:]
        self.codes = [*self.rest[:6], 0.1, 3, torch.int8, None, None]

    def forward(self, x):
        y = Q.conv2d(x, self.weight, self.correction, [3, 3], [1, 1], [1, 1], [1, 1], self.alpha, *self.codes, 1)
        y = Q.max_pool2d(y, [2, 2], [2, 2], [0, 0], [1, 1], False)
        return Q.depthwise2d(y, self.deep, 3, [3, 3], [1, 1], [1, 1], [1, 1], self.alpha, *self.rest, 8)


class Rows(nn.Module):
    """x -> norm and quantize -> activation and quantize."""

    def forward(self, x):
        weight = torch.ones(x.shape[-1])
        _, _, *first = Q.norm_quantize(x, None, weight, None, 1e-6, True, None, None, None, 0, torch.int8, False, True)
        return *first, *Q.quantize_rows(x, None, None, torch.float8_e4m3fn, True)


def shipped(model, x):
    """The model exported for any batch, written and read back."""
    batch = torch.export.Dim("batch", min=2, max=512)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert any("qpass_kernels" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("kind", OPS)
def test_linears(kind):
    model = Linear(kind, 24, 128)
    run = shipped(model, activations(kind, 6, 128))
    for m in (2, 17):
        x = activations(kind, m, 128)
        assert torch.equal(run(x), model(x))


def test_images():
    model = Image()
    run = shipped(model, torch.randint(-128, 128, (2, 4, 8, 8), dtype=torch.int8))
    x = torch.randint(-128, 128, (5, 4, 8, 8), dtype=torch.int8)
    assert torch.equal(run(x), model(x))


def test_rows():
    model, x = Rows(), torch.randn(5, 64)
    for found, expected in zip(shipped(model, torch.randn(3, 64))(x), model(x), strict=True):
        assert torch.equal(found.float(), expected.float())

"""Each rule of hoist: integers out of integers, equal to the last bit; what would be quantized twice stays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qpass.passes.hoist import hoist
from tests.graphs import captured, named, run, targets

aten = torch.ops.aten
Q = torch.ops.qpass
OURS = (Q.quantize.default, Q.dequantize.default)


class Moved(nn.Module):
    """quantize(move(dequantize(q))), of one or two values; scale and zero point as given."""

    def __init__(self, move, zero=117, again=None, qtype="u8/t"):
        super().__init__()
        self.move, self.qtype = move, qtype
        self.register_buffer("scale", torch.tensor(0.037))
        self.register_buffer("zero", torch.tensor(zero, dtype=torch.int32))
        self.register_buffer("again", torch.tensor(0.037 if again is None else again))

    def forward(self, *codes):
        real = [Q.dequantize(q, self.scale, self.zero, "u8/t", torch.float32) for q in codes]
        return Q.quantize(self.move(*real), self.again, self.zero, self.qtype)


def codes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


IMAGE = (2, 8, 6, 4)
MOVES = {
    "nothing": lambda x: x,
    "view": lambda x: x.view(2, 4, 12, 4),
    "reshape": lambda x: x.permute(0, 2, 3, 1).reshape(2, 48, 4),
    "flatten": lambda x: x.flatten(1),
    "squeeze": lambda x: x[:, :1].squeeze(1),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "contiguous": lambda x: x.transpose(1, 2).contiguous(),
    "clone": lambda x: x.clone(),
    "permute": lambda x: x.permute(0, 2, 3, 1),
    "transpose": lambda x: x.transpose(1, 3),
    "slice": lambda x: x[:, 2:7:2],
    "select": lambda x: x[:, 3],
    "pixel shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "channel shuffle": lambda x: torch.channel_shuffle(x, 4),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: x.split(3, 1)[2],
    "split by sizes": lambda x: x.split([1, 5, 2], 1)[1],
    "pad": lambda x: F.pad(x, (1, 2, 0, 3)),
    "pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "pool of one axis": lambda x: F.max_pool1d(x.flatten(2), 2),
    "pool of three axes": lambda x: F.max_pool3d(x.unsqueeze(2), (1, 2, 2)),
    "pool, rounded up": lambda x: F.max_pool2d(x, 3, 2, ceil_mode=True),
    "pool, dilated": lambda x: F.max_pool2d(x, 2, 1, dilation=2),
    "cat with itself": lambda x: torch.cat([x, x], 1),
    "several": lambda x: F.max_pool2d(F.pad(torch.cat([x, x[:, :2]], 1), (0, 1)), 2).flatten(1),
    "shuffled halves": lambda x: torch.channel_shuffle(torch.cat(x.chunk(2, 1)[::-1], 1), 2),
}


@pytest.mark.parametrize("name", MOVES)
def test_integers_move(name):
    gm, values = captured(Moved(MOVES[name]), codes(*IMAGE))
    wanted = run(gm, values)
    assert hoist(gm) > 0
    gm.recompile()
    assert not set(targets(gm)) & set(OURS)
    assert torch.equal(run(gm, values), wanted)
    assert hoist(gm) == 0


def test_two_values_of_one_scale():
    model = Moved(lambda a, b: torch.cat([a, F.max_pool2d(b, 2)], 1))
    gm, values = captured(model, codes(2, 3, 4, 4), codes(2, 5, 8, 8))
    wanted = run(gm, values)
    hoist(gm)
    gm.recompile()
    assert not set(targets(gm)) & set(OURS)
    assert torch.equal(run(gm, values), wanted)


@pytest.mark.parametrize("zero", [0, 1, 255])
def test_a_zero_point_at_the_border_clamps_as_relu_does(zero):
    """Of values that are integers of another scale already: one quantize is left, the relu goes where code 0 is 0."""
    gm, values = captured(Moved(torch.relu, zero, again=0.02), codes(*IMAGE))
    wanted = run(gm, values)
    hoist(gm)
    gm.recompile()
    assert (aten.relu.default in targets(gm)) == (zero != 0)
    assert torch.equal(run(gm, values), wanted)


@pytest.mark.parametrize("value", [0.0, 0.5, -1.0])
def test_only_zeros_are_padded_as_codes(value):
    gm, values = captured(Moved(lambda x: F.pad(x, (1, 1), value=value)), codes(*IMAGE))
    wanted = run(gm, values)
    hoist(gm)
    gm.recompile()
    assert (Q.quantize.default in targets(gm)) == (value != 0)
    assert torch.equal(run(gm, values), wanted)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_pads_of_values_stay(mode):
    gm, values = captured(Moved(lambda x: F.pad(x, (1, 1, 1, 1), mode=mode)), codes(*IMAGE))
    wanted = run(gm, values)
    hoist(gm)
    gm.recompile()
    assert torch.equal(run(gm, values), wanted)


STAYS = {
    "another scale": Moved(MOVES["flatten"], again=0.05),
    "another type": Moved(MOVES["flatten"], qtype="u7/t"),
    "values change": Moved(lambda x: x * 2),
    "an average": Moved(lambda x: F.avg_pool2d(x, 2)),
    "bilinear": Moved(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")),
}


@pytest.mark.parametrize("name", STAYS)
def test_stays(name):
    gm, values = captured(STAYS[name], codes(*IMAGE))
    before, wanted = targets(gm), run(gm, values)
    assert hoist(gm) == 0
    assert targets(gm) == before
    assert torch.equal(run(gm, values), wanted)


class Made(nn.Module):
    """A convolution of integers whose result is moved and quantized by one or two readers."""

    def __init__(self, use):
        super().__init__()
        self.use = use
        self.register_buffer("w", torch.randint(-127, 128, (8, 3, 3, 3), dtype=torch.int8))
        self.register_buffer("s", torch.rand(8) / 1000)
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("other", torch.tensor(0.03))
        self.register_buffer("zero", torch.tensor(100, dtype=torch.int32))

    def q(self, x, scale=None):
        return Q.quantize(x, self.scale if scale is None else scale, self.zero, "u8/t")

    def forward(self, q):
        x = Q.dequantize(q, self.scale, self.zero, "u8/t", torch.float32)
        return self.use(self, F.conv2d(x, Q.dequantize(self.w, self.s, None, "i8/c0", torch.float32)))


def first_reader(gm):
    """What reads the convolution, through the activation behind it."""
    (conv,) = named(gm, aten.convolution.default)
    (user,) = conv.users
    return next(iter(user.users)) if user.target is aten.relu.default else user


USES = {
    "moved": lambda m, y: m.q(F.max_pool2d(y, 2).flatten(1)),
    "activated and moved": lambda m, y: m.q(F.max_pool2d(torch.relu(y), 2)),
    "read twice, one scale": lambda m, y: (m.q(y), m.q(y.flatten(1))),
    "equal quantizes": lambda m, y: (m.q(y), m.q(y).flatten(1)),
}


@pytest.mark.parametrize("name", USES)
def test_what_a_convolution_makes_is_quantized_at_once(name):
    gm, values = captured(Made(USES[name]), codes(2, 3, 8, 8))
    wanted = run(gm, values)
    hoist(gm)
    gm.recompile()
    assert len(named(gm, Q.quantize.default)) == 1
    assert first_reader(gm).target is Q.quantize.default
    found = run(gm, values)
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_two_scales_are_two_quantizes():
    """Neither reader's integers serve the other: the move stays on float values, made once."""
    gm, values = captured(
        Made(lambda m, y: (m.q(F.max_pool2d(y, 2)), m.q(F.max_pool2d(y, 2), m.other))), codes(2, 3, 8, 8)
    )
    wanted = run(gm, values)
    hoist(gm)
    gm.recompile()
    assert len(named(gm, Q.quantize.default)) == 2
    assert all(torch.equal(a, b) for a, b in zip(run(gm, values), wanted, strict=True))


def test_values_that_others_read_as_float_stay_right():
    gm, values = captured(Made(lambda m, y: (m.q(y.flatten(1)), y.mean((2, 3)))), codes(2, 3, 8, 8))
    wanted = run(gm, values)
    hoist(gm)
    gm.recompile()
    assert all(torch.equal(a, b) for a, b in zip(run(gm, values), wanted, strict=True))


def test_a_pool_that_a_residual_reads_too_is_of_integers():
    """As in a ResNet's first block: a convolution reads the pool as integers, the add behind it as a float value."""

    def use(m, y):
        pooled = F.max_pool2d(Q.dequantize(m.q(y), m.scale, m.zero, "u8/t", torch.float32), 2)
        return m.q(pooled), pooled + 1, pooled * 2

    gm, values = captured(Made(use), codes(2, 3, 8, 8))
    wanted = run(gm, values)
    hoist(gm)
    gm.recompile()
    assert len(named(gm, Q.max_pool.default)) == 1
    assert not named(gm, aten.max_pool2d.default)
    readers = [user for node in named(gm, Q.dequantize.default) for user in node.users]
    assert len(readers) == len(named(gm, Q.dequantize.default))
    assert all(torch.equal(a, b) for a, b in zip(run(gm, values), wanted, strict=True))
    assert hoist(gm) == 0

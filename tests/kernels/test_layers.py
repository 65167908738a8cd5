"""Convolutions of networks: their samples, what the tuner tries for them, where what it measured is looked up."""

from dataclasses import replace

import pytest
import torch

from qpass_kernels import conv, layers, tuning
from qpass_kernels.candidates import for_convolution
from qpass_kernels.configs import PIXELS, Config, bucket, conv_kind, why_no_convolution
from qpass_kernels.conv_weights import Window, depth
from qpass_kernels.launch import INTERPRETER, Chip
from qpass_kernels.layers import DEPTHWISE, MOBILENET, RESNET50, Layer
from qpass_kernels.measured import known, read, remember, user_file
from qpass_kernels.timing import Times
from tests.kernels.entries import fresh

TINY = Layer(8, 24, 3, 2, 9)
CHIP = Chip("Test GPU", (9, 0), 132, 232448)


KIND, M, N, K = layers.key(TINY, 2)


def test_layers_are_those_of_the_networks():
    """Multiply-adds of an image: ResNet-50 without its classifier has 4.09 G, each layer as often as it occurs."""
    often = {layer: 1 for layer in RESNET50}
    for size, inner, outer, count in ((56, 64, 256, 3), (28, 128, 512, 4), (14, 256, 1024, 6), (7, 512, 2048, 3)):
        often[Layer(inner, inner, 3, 1, size)] = count - (size < 56)
        often[Layer(inner, outer, 1, 1, size)] = count
        often[Layer(outer, inner, 1, 1, size)] = count - 1
    often[Layer(64, 256, 1, 1, 56)] += 1  # the first shortcut
    total = sum(count * layer.out**2 * layer.n * layer.c * layer.kernel**2 for layer, count in often.items())
    assert total == pytest.approx(4.09e9, rel=0.01)
    assert all(layer.is_depthwise for layer in DEPTHWISE)
    assert str(TINY) == "8>24 3x3/2 at 9"
    assert str(DEPTHWISE[1]) == "depthwise 3x3/2 at 112"


@pytest.mark.parametrize(("name", "held"), [("ResNet", RESNET50), ("MobileNetV2", MOBILENET)])
def test_layers_are_those_of_transformers(name, held):
    """Channels, outputs, kernel, stride, groups and the result's size; images may be padded before."""
    hub, found = pytest.importorskip("transformers"), set()
    with torch.device("meta"):
        model = getattr(hub, f"{name}ForImageClassification")(getattr(hub, f"{name}Config")()).eval()

    def seen(conv, args, y):
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        found.add((conv.in_channels, conv.out_channels, kernel, stride, conv.groups, y.shape[-1]))

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(seen)
    model(pixel_values=torch.zeros(1, 3, 224, 224, device="meta"))
    assert found == {(layer.c, layer.n, layer.kernel, layer.stride, layer.groups, layer.out) for layer in held}


def test_keys():
    """What was measured serves the same channels, kernel, stride and groups alone; stride 1 is as it was filed before."""
    one, two = Layer(128, 128, 3, 1, 28), Layer(128, 128, 3, 2, 56)
    assert layers.product(one, 32) == layers.product(two, 32)
    assert layers.key(one, 32) == ("conv3x3c128g1", 25088, 128, 1152)
    assert layers.key(two, 32) == ("conv3x3s2x2c128g1", 25088, 128, 1152)
    assert conv_kind((1, 7), (1, 2), 4, 3) == "conv1x7s1x2c4g3"
    assert len({layers.key(layer, 32) for layer in RESNET50}) == len(RESNET50)
    remember({layers.key(layer, 32): (Config(), 1.0) for layer in (one, two)}, CHIP)
    assert {kind for kind, *_ in read(user_file(CHIP), CHIP)} == {"conv3x3c128g1", "conv3x3s2x2c128g1"}


@pytest.mark.parametrize("layer", [*RESNET50, *MOBILENET, Layer(6, 8, 1, 1, 4), Layer(8, 8, 1, 1, 4, 2)], ids=str)
def test_what_is_called_as_a_matmul(layer):
    sample = layers.images(replace(layer, size=layer.kernel), 1, "cpu")
    whole = depth(layer.c // layer.groups) == layer.c
    assert layer.is_matmul == (whole and conv.is_matmul(layer.window, sample.after, layer.groups))
    assert not conv.is_matmul(layer.window, layers.images(layer, 1, "cpu", True).after, layer.groups)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "layer", [TINY, Layer(3, 16, 7, 2, 11), Layer(16, 16, 3, 1, 5, 16), Layer(16, 8, 1, 1, 4)], ids=str
)
def test_samples(layer, residual):
    sample = layers.images(layer, 2, "cpu", residual)
    assert sample.steps_off(sample.run(), [0, 1]) <= 1
    assert sample.steps_off(sample.run(), [1]) <= 1
    assert sample.exact([0, 1]).unique().numel() > 20
    assert sample.copies(2)[1].weights[0].data_ptr() != sample.weights[0].data_ptr()


def test_candidates():
    for layer in (*RESNET50, Layer(24, 24, 3, 1, 14)):
        for batch in (1, 32):
            m, n, c, k = layers.product(layer, batch)
            found = for_convolution(m, n, c, k, layer.groups, CHIP)
            assert found[0] == conv.rule(m, n, c, k, layer.groups, CHIP)
            assert 1 < len(set(found)) == len(found) < 300
            for config in found:
                assert why_no_convolution(config, CHIP) is None
                assert config.split == 1 or config.split * config.bk <= k


def test_candidates_are_right():
    sample = layers.images(TINY, 2, "cpu")
    m, n, c, k = layers.product(TINY, 2)
    wanted = sample.run(Config(bm=16, bn=16, bk=32))
    for config in for_convolution(m, n, c, k, 1, INTERPRETER)[:12]:
        assert torch.equal(sample.run(config), wanted), config


def test_buckets_of_pixels():
    assert [bucket(m, "conv3x3c8g1") for m in (1, 64, 65, 401408, 10**9)] == [64, 64, 256, 4**10, PIXELS[-1]]


def test_look_up(monkeypatch):
    """A configuration given, measured, ruled; and what is launched is what was found."""
    given = M, N, 8, TINY.window
    ruled = conv.chosen(*given, 1, INTERPRETER)
    mine, launched = Config(bm=16, bn=16, bk=64, split=2), []
    remember({(KIND, bucket(M, KIND), N, K): (mine, 2.0)}, INTERPRETER)
    assert conv.chosen(*given, 1, INTERPRETER) == mine != ruled
    assert conv.chosen(*given, 2, INTERPRETER) != mine
    assert conv.chosen(*given[:3], Window((3, 3), (1, 1), (1, 1), (1, 1)), 1, INTERPRETER) != mine
    assert fresh(INTERPRETER) is None
    assert known(KIND, M, N, K, INTERPRETER) == mine
    sample, kernel = layers.images(TINY, 2, "cpu"), conv.implicit
    monkeypatch.setattr(conv, "implicit", Spy(kernel, launched))
    assert sample.steps_off(sample.run(), [0, 1]) <= 1
    sample.run(ruled)
    assert launched == [(16, 16, 64, 2), (ruled.bm, ruled.bn, ruled.bk, ruled.split)]


class Spy:
    """A kernel that notes its tiles."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        def launch(*args, **sizes):
            self.launched.append(tuple(sizes[name] for name in ("BM", "BN", "BK", "SPLIT")))
            return self.kernel[grid](*args, **sizes)

        return launch


@pytest.mark.parametrize("kind", ["conv", "conv3x3", "conv3x3c8", "convAxBcCgG", "conv3x3s2c8g1", "conv3x3c8g1 "])
def test_kinds_that_are_none(kind):
    remember({(KIND, 64, N, K): (Config(), 2.0)}, CHIP)
    path = user_file(CHIP)
    path.write_text(path.read_text().replace(f"{KIND} 64", f"{kind} 64"))
    with pytest.raises(ValueError, match="not a kind and a shape"):
        read(path, CHIP)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"how": "persistent"}, "streamed"),
        ({"bm": 8}, "16 x 16 x 32"),
        ({"bn": 8}, "16 x 16 x 32"),
        ({"bk": 16}, "16 x 16 x 32"),
        ({"bk": 48}, "powers of two"),
        ({"split": 16}, "8 slices"),
        ({"warps": 64}, "32 warps"),
        ({"bm": 256, "bn": 256, "stages": 8}, "more than 232448 bytes"),
    ],
    ids=str,
)
def test_configurations_that_the_kernel_cannot_run(changed, why):
    """They are found when a file is read, not by a call that fails."""
    remember({(KIND, 64, N, K): (replace(Config(), **changed), 2.0)}, CHIP)
    with pytest.raises(ValueError, match=why):
        read(user_file(CHIP), CHIP)
    assert fresh(CHIP) is None
    assert known(KIND, 64, N, K, CHIP) is None


class Bench:
    """Times made up from configurations; those in `wrong` give another result, two steps off in one place."""

    def __init__(self, best, wrong=()):
        self.best, self.wrong, self.last, self.lines = best, wrong, None, []

    def run(self, sample, config):
        self.last = config
        y = sample.exact(list(range(sample.x.shape[0])))
        if config in self.wrong:
            y[0, 0, 0, 0] += 2 if y[0, 0, 0, 0] < 0 else -2
        return y

    def timer(self, calls, seconds):
        calls[0]()
        us = 1.0 if self.last in self.wrong else 5.0 if self.last == self.best else 10.0
        return Times(us, us, us)


def test_the_fastest_right_one_is_kept():
    tried = for_convolution(M, N, 8, K, 1, INTERPRETER)
    bench = Bench(tried[3], (tried[0], tried[2]))
    assert tuning.tune_layer(TINY, 2, "cpu", 60.0, bench.lines.append, bench.timer, bench.run) == tried[3]
    assert known(KIND, M, N, K, INTERPRETER) == tried[3]
    assert "\n".join(bench.lines).count("wrong result: off by 2 steps of a code") == 2


def test_the_real_kernel_is_tuned():
    found = tuning.tune_layer(TINY, 1, "cpu", 0.0, timer=lambda calls, s: [c() for c in calls] and Times(1.0, 1.0, 1.0))
    assert found == for_convolution(*layers.product(TINY, 1), 1, INTERPRETER)[0]


def test_command(monkeypatch, capsys):
    """Each layer that is not depthwise for the kernel of convolutions, matmuls of pixels for that of w8a8 too."""
    made, products = [], []
    monkeypatch.setattr(tuning, "tune_layer", lambda layer, *rest: made.append((layer, rest[0])) or Config())
    make = lambda *key_and_more: products.append(key_and_more[:4]) or Config()
    assert tuning.main(["--network", "resnet50", "--batch", "4"], make) == 0
    assert made == [(layer, 4) for layer in RESNET50]
    assert len(products) == sum(layer.is_matmul for layer in RESNET50) == 12
    assert products[0] == ("w8a8", 4 * 56 * 56, 64, 64)
    out = capsys.readouterr().out
    assert out.count("4 x 512>512 3x3 at 7  streamed 16x128x128") == 1
    assert out.count("4 x 64>256 1x1 at 56, as a matmul  streamed") == 1
    assert out.count("4 x 64>256 1x1 at 56, with a residual  streamed") == 1
    assert tuning.main(["--network", "mobilenet-v2"], make) == 0
    assert [layer for layer, _ in made[len(RESNET50) :]] == [layer for layer in MOBILENET if not layer.is_depthwise]
    with pytest.raises(SystemExit):
        tuning.main([])
    assert "name --shapes of products or a --network" in capsys.readouterr().err

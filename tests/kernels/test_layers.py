"""Convolutions of networks: their samples, what the tuner tries for them, where what it measured is looked up."""

import pytest
import torch

from qpass_kernels import conv, layers, samples, tuning
from qpass_kernels.candidates import for_convolution
from qpass_kernels.configs import PIXELS, Config, bucket, conv_kind
from qpass_kernels.launch import INTERPRETER, Chip
from qpass_kernels.layers import MOBILENET, RESNET50, Layer
from qpass_kernels.measured import known, read, remember, user_file
from qpass_kernels.timing import Times
from tests.kernels.entries import fresh

TINY = Layer(8, 24, 3, 2, 9)
CHIP = Chip("Test GPU", (9, 0), 132, 232448)


def product(layer=TINY, batch=2):
    m, n, c, k = layers.product(layer, batch)
    return conv_kind(layer.window.kernel, c, layer.groups), m, n, k


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
    assert all(layer.is_depthwise for layer in MOBILENET)
    assert str(TINY) == "8>24 3x3/2 at 9"
    assert str(MOBILENET[1]) == "depthwise 3x3/2 at 112"


@pytest.mark.parametrize(
    "layer", [TINY, Layer(3, 16, 7, 2, 11), Layer(16, 16, 3, 1, 5, 16), Layer(16, 8, 1, 1, 4)], ids=str
)
def test_samples(layer):
    sample = layers.images(layer, 2, "cpu")
    wanted = sample.exact([0, 1])
    found = sample.run()
    assert (found.int() - wanted.int()).abs().max() <= 1
    assert wanted.unique().numel() > 20
    assert sample.copies(2)[1].weights[0].data_ptr() != sample.weights[0].data_ptr()


def test_candidates():
    for layer in (*RESNET50, Layer(24, 24, 3, 1, 14)):
        for batch in (1, 32):
            m, n, c, k = layers.product(layer, batch)
            found = for_convolution(m, n, c, k, layer.groups, CHIP)
            assert found[0] == conv.rule(m, n, c, k, layer.groups, CHIP)
            assert 1 < len(set(found)) == len(found) < 300
            for config in found:
                assert config.stages * config.bk * (config.bm + config.bn) <= CHIP.shared
                assert config.split == 1 or config.split * config.bk <= k


def test_candidates_are_right():
    sample = layers.images(TINY, 2, "cpu")
    m, n, c, k = layers.product(TINY, 2)
    wanted = sample.run(Config(bm=16, bn=16, bk=32))
    for config in for_convolution(m, n, c, k, 1, INTERPRETER)[:12]:
        assert torch.equal(sample.run(config), wanted), config


def test_buckets_of_pixels():
    assert [bucket(m, "conv3x3c8g1") for m in (1, 64, 65, 401408, 10**9)] == [64, 64, 256, 4**10, PIXELS[-1]]


def test_look_up():
    kind, m, n, k = product()
    ruled = conv.chosen(m, n, 8, (3, 3), 1, INTERPRETER)
    mine = Config(bm=16, bn=16, bk=64, split=2)
    remember({(kind, bucket(m, kind), n, k): (mine, 2.0)}, INTERPRETER)
    assert conv.chosen(m, n, 8, (3, 3), 1, INTERPRETER) == mine != ruled
    assert conv.chosen(m, n, 8, (3, 3), 2, INTERPRETER) != mine
    assert fresh(INTERPRETER) is None
    assert known(kind, m, n, k, INTERPRETER) == mine
    sample = layers.images(TINY, 2, "cpu")
    assert (sample.run().int() - sample.exact([0, 1]).int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["conv", "conv3x3", "conv3x3c8", "convAxBcCgG", "conv3x3c8g1 "])
def test_kinds_that_are_none(kind):
    real, _, n, k = product()
    remember({(real, 64, n, k): (Config(), 2.0)}, CHIP)
    path = user_file(CHIP)
    path.write_text(path.read_text().replace(f"{real} 64", f"{kind} 64"))
    with pytest.raises(ValueError, match="not a kind and a shape"):
        read(path, CHIP)


class Bench:
    """Times made up from configurations; those in `wrong` give another result."""

    def __init__(self, best, wrong=()):
        self.best, self.wrong, self.last, self.lines = best, wrong, None, []

    def run(self, sample, config):
        self.last = config
        y = sample.exact(list(range(sample.x.shape[0])))
        return (y.int() // 2).to(torch.int8) if config in self.wrong else y

    def timer(self, calls, seconds):
        calls[0]()
        us = 1.0 if self.last in self.wrong else 5.0 if self.last == self.best else 10.0
        return Times(us, us, us)


def test_the_fastest_right_one_is_kept():
    kind, m, n, k = product()
    tried = for_convolution(m, n, 8, k, 1, INTERPRETER)
    bench = Bench(tried[3], (tried[0], tried[2]))
    assert tuning.tune_layer(TINY, 2, "cpu", 60.0, bench.lines.append, bench.timer, bench.run) == tried[3]
    assert known(kind, m, n, k, INTERPRETER) == tried[3]
    assert "\n".join(bench.lines).count("wrong result") == 2


def test_the_real_kernel_is_tuned():
    found = tuning.tune_layer(TINY, 1, "cpu", 0.0, timer=lambda calls, s: [c() for c in calls] and Times(1.0, 1.0, 1.0))
    assert found == for_convolution(*layers.product(TINY, 1), 1, INTERPRETER)[0]


def test_command(monkeypatch, capsys):
    made = []
    monkeypatch.setattr(tuning, "tune_layer", lambda layer, *rest: made.append((layer, rest[0])) or Config())
    assert tuning.main(["--network", "resnet50", "--batch", "4"], make=None) == 0
    assert [layer for layer, _ in made] == list(RESNET50)
    assert capsys.readouterr().out.count("4 x 512>512 3x3 at 7  streamed 16x128x128") == 1
    assert tuning.main(["--network", "mobilenet-v2"], make=None) == 0
    assert len(made) == len(RESNET50), "depthwise layers have one kernel and one rule"
    with pytest.raises(SystemExit):
        tuning.main([])
    assert "name --shapes of products or a --network" in capsys.readouterr().err


def test_a_shift_of_all_codes_is_wrong():
    sample = layers.images(TINY, 2, "cpu")
    y = sample.exact([0, 1])
    assert samples.errors(y, y)[0] == 0
    assert samples.errors((y.int() + 8).clamp(max=127), y)[0] > 0.06

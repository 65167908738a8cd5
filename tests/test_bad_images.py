"""Images and networks that are unusual or wrong: they work, or the error says what the model's own error says."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.errors import QpassError
from tests.graphs import lowered, run
from tests.models import relative
from tests.untouched import untouched


def conv_norm(c, n, k=3, **options):
    return nn.Sequential(nn.Conv2d(c, n, k, padding=k // 2, **options), nn.BatchNorm2d(n), nn.ReLU())


class Net(nn.Module):
    """Stem, a residual, mean, linear: of any width."""

    def __init__(self, c=3, width=8):
        super().__init__()
        self.stem, self.body = conv_norm(c, width), conv_norm(width, width)
        self.last = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        y = self.stem(x)
        y = F.relu(self.last(self.body(y)) + y)
        return self.head(y.mean((2, 3)))


def images(count=4, c=3, size=(10, 9)):
    return torch.randn(count, c, *size)


def build(model, backend="reference", data=None, **options):
    data = [images() for _ in range(3)] if data is None else data
    return qpass.compile(model, options.pop("scheme", "w8a8"), data[0], data, backend=backend, **options)


def error(q, model, x):
    with torch.no_grad():
        found, wanted = q(x), model(x)
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    return relative(found, wanted)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def quantized(net):
    return build(net)


@pytest.mark.parametrize("size", [(10, 9), (20, 20), (3, 31), (17, 5)])
def test_another_size_than_calibrated(net, quantized, size):
    assert error(quantized, net, images(2, size=size)) < 0.1


def test_a_single_pixel(net, quantized):
    """Nearly all of what the kernels read is padding, which calibration has hardly seen: the sizes are right at least."""
    assert error(quantized, net, images(2, size=(1, 1))) < 0.5


@pytest.mark.parametrize("count", [1, 3, 9])
def test_another_batch(net, quantized, count):
    assert error(quantized, net, images(count)) < 0.05


@pytest.mark.parametrize("width", [1, 3, 5, 17])
def test_channels_that_fill_no_block(width):
    """Of the integers that both backends compute: lowered graphs, without the kernels generated between."""
    model, data = Net(width, width).eval(), [images(2, width) for _ in range(3)]
    plan = qpass.analyze(model, "w8a8", data[0], data)
    found, wanted = (run(*lowered(model, plan, data[0], backend=name)) for name in ("cpu", "reference"))
    assert relative(found, wanted) < 0.02
    assert error(qpass.compile(model, plan=plan, backend="reference"), model, data[0]) < 0.1


def test_a_norm_without_statistics():
    """It normalizes by the batch at hand, in float; what stands around it is quantized."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ).eval()
    q = build(model)
    assert len(qpass.inspect(q).plan.quantized) == 2
    assert error(q, model, images()) < 0.05


@pytest.mark.parametrize(
    ("scheme", "backend"), [("w8a8", "cpu"), ("w8a8", "reference"), ("w4a8", "cpu"), ("w8a8-dynamic", "reference")]
)
def test_dead_channels(scheme, backend):
    """Zero weights give exact zeros, and no scale that is zero or not finite."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(), nn.Conv2d(6, 4, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[2:4] = 0
        model[2].weight[1] = 0
    x = images()
    plan = qpass.analyze(model, scheme, x, [x])
    assert all(bool((d.packed.scale > 0).all() and d.packed.scale.isfinite().all()) for d in plan.quantized)
    y = run(*lowered(model, plan, x, backend=backend))
    assert (
        float(y[:, 1].abs().max()) == 0 or scheme == "w8a8"
    )  # a corrected bias moves its mean by what rounding leaves
    assert float(y[:, 1].abs().max()) < 1e-3
    assert relative(y, model(x).detach()) < (0.3 if scheme == "w4a8" else 0.05)


def test_every_weight_dead():
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    nn.init.zeros_(model[0].weight)
    assert error(build(model), model, images()) < 0.02


class Far(nn.Module):
    """What is added is a thousand times what it is added to."""

    def __init__(self, factor):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.b.weight.data *= factor
        self.b.bias.data *= factor

    def forward(self, x):
        return self.c(F.relu(self.a(x) + self.b(x)))


@pytest.mark.parametrize("factor", [1e-3, 1e3])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_residual_of_another_scale(factor, backend):
    model, data = Far(factor).eval(), [images() for _ in range(3)]
    plan = qpass.analyze(model, "w8a8", data[0], data)
    assert relative(run(*lowered(model, plan, data[0], backend=backend)), model(data[0]).detach()) < 0.05


def test_a_model_that_lies_channels_last():
    model, data = Net().eval(), [images() for _ in range(3)]
    wanted = build(model, data=data)
    model = model.to(memory_format=torch.channels_last)
    data = [x.contiguous(memory_format=torch.channels_last) for x in data]
    with torch.no_grad():
        torch.testing.assert_close(build(model, data=data)(data[0]), wanted(data[0]))


# name -> (images of some kind, what the float model's error says)
WRONG = {
    "channels at the end": (torch.randn(4, 10, 9, 3), r"expected input.*to have 3 channels, but got 10 channels"),
    "another number of channels": (images(c=4), r"expected input.*to have 3 channels, but got 4 channels"),
    "two axes": (torch.randn(3, 10), r"[Ee]xpected 3D|4D|dim"),
    "uint8": (torch.randint(0, 256, (4, 3, 10, 9), dtype=torch.uint8), r"Byte|uint8|unsigned char"),
    "float64": (images().double(), r"[Dd]ouble|same (d)?type"),
    "bfloat16": (images().bfloat16(), r"BFloat16|same (d)?type"),
}


def own_error(model, x):
    with pytest.raises(Exception) as caught, torch.no_grad():  # noqa: PT011
        model(x)
    return str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_images_say_what_the_model_says(net, name):
    x, said = WRONG[name]
    own = own_error(net, x)
    with untouched(net), pytest.raises(QpassError, match=said) as caught:
        qpass.compile(net, "w8a8", images(), [images(), x])
    assert own in str(caught.value)
    assert "calibration batch 1" in str(caught.value)
    with untouched(net), pytest.raises(QpassError, match="example_inputs") as caught:
        qpass.compile(net, "w8a8-dynamic", x)
    assert own in str(caught.value)


@pytest.mark.parametrize("name", ["channels at the end", "another number of channels", "two axes"])
def test_wrong_images_of_a_compiled_model(quantized, name):
    q, (x, _) = quantized, WRONG[name]
    good = images()
    with torch.no_grad():
        wanted = q(good)
    with pytest.raises(Exception, match=r"channel|dim|shape|size|3D"), torch.no_grad():
        q(x)
    with torch.no_grad():
        assert torch.equal(q(good), wanted)


def test_no_images(net, quantized):
    assert quantized(images(0)).shape == (0, 5)
    with pytest.raises(QpassError, match=r"calibration batch 0.*\(0, 3, 10, 9\) is empty; a batch needs"):
        qpass.compile(net, "w8a8", images(), [images(0)])


@pytest.mark.parametrize("value", [0.0, -2.5])
def test_one_constant_image_to_calibrate_with(net, value):
    x = torch.full((1, 3, 10, 9), value)
    plan = qpass.analyze(net, "w8a8", x, [x])
    assert all(float(d.input_scale) > 0 for d in plan.quantized)
    q = qpass.compile(net, plan=plan, backend="reference")
    with torch.no_grad():
        assert error(q, net, x) < 0.1
        assert q(images()).isfinite().all()


def test_an_image_with_one_pixel_that_is_no_number(net):
    x = images()
    x[1, 2, 3, 4] = float("nan")
    with untouched(net), pytest.raises(QpassError, match=r"stem.0:conv2d.0.input, calibration batch 1: .*not finite"):
        qpass.compile(net, "w8a8", images(), [images(), x])


def test_outliers_in_one_batch(net):
    """A pixel a million times the rest: limits of least squared error do not follow it to the end, values stay finite."""
    x = images()
    x[0, 0, 0, 0] = 1e6
    q = build(net, data=[images(), x])
    with torch.no_grad():
        assert q(x).isfinite().all()
        assert q(images()).isfinite().all()


def test_sizes_that_leave_nothing():
    """A kernel larger than the image is the model's own error, with its words."""
    model = nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    q = build(model, data=[images()])
    own = own_error(model, images(size=(4, 4)))
    assert "Kernel size can't be greater" in own
    with pytest.raises(Exception, match=r"[Kk]ernel size can't be greater|size"), torch.no_grad():
        q(images(size=(4, 4)))
    assert error(q, model, images()) < 0.05

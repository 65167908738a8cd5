"""Random small graphs: reference = fused = lowered to accumulator rounding, and compiled = eager packed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import qpass
from tests.graphs import lowered, run
from tests.models import relative

WIDTH = 16
STEPS = st.lists(
    st.sampled_from(["linear", "norm", "add", "cat", "view", "relu", "gelu", "shared"]), min_size=2, max_size=6
)


class Random(nn.Module):
    """A chain of steps over values of width WIDTH; `cat` and `add` look back at an earlier value."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.linears = nn.ModuleList(nn.Linear(2 * WIDTH if s == "cat" else WIDTH, WIDTH) for s in steps)
        self.norm = nn.LayerNorm(WIDTH)
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        values = [x]
        for step, linear in zip(self.steps, self.linears, strict=True):
            v = values[-1]
            values.append(self.apply_step(step, linear, v, values[len(values) // 2 - 1]))
        return self.shared(values[-1])

    def apply_step(self, step, linear, v, earlier):
        if step == "linear":
            return linear(v)
        if step == "norm":
            return self.norm(v)
        if step == "add":
            return linear(v) + earlier
        if step == "cat":
            return linear(torch.cat([v, earlier], -1))
        if step == "view":
            return linear(v.reshape(-1, WIDTH)).view(v.shape)
        if step == "shared":
            return self.shared(v)
        return getattr(functional, step)(linear(v))


@settings(max_examples=8, deadline=None)
@given(STEPS, st.sampled_from(["w8a8", "w8a8-dynamic", "w8a16"]), st.integers(0, 99))
def test_backends_agree(steps, scheme, seed):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = Random(steps).eval()
    data = [torch.randn(3, 5, WIDTH) for _ in range(3)]
    plan = qpass.analyze(model, scheme, data[0], data)
    assert all(d.quantized for d in plan), str(plan)
    reference = qpass.compile(model, plan=plan, backend="reference")
    cpu = qpass.compile(model, plan=plan, backend="cpu")
    x = torch.randn(2, 7, WIDTH)
    with torch.no_grad():
        wanted, found, full = reference(x), cpu(x), model(x)
        assert relative(found, wanted) < 2e-2  # a code may fall on either side of an edge
        assert relative(wanted, full) < 0.1
        if scheme == "w8a16":
            torch.testing.assert_close(wanted, reference._call_impl(x), rtol=1e-3, atol=1e-4)


CHANNELS = 5
IMAGE_STEPS = st.lists(
    st.sampled_from(
        ["conv", "depthwise", "pool", "relu", "relu6", "hardswish", "add", "sum", "cat", "norm", "upsample"]
    ),
    min_size=2,
    max_size=6,
)


class RandomImages(nn.Module):
    """A chain of steps over images of CHANNELS channels and one size; `cat`, `add`, `sum` look back at an earlier value."""

    def __init__(self, steps):
        super().__init__()
        self.steps, c = steps, CHANNELS
        self.convolutions, self.norms = nn.ModuleList(self.convolution(s) for s in steps), nn.ModuleList()
        for _ in steps:
            self.norms.append(norm := nn.BatchNorm2d(c))
            nn.init.normal_(norm.running_mean, 0, 0.3)
            nn.init.uniform_(norm.weight, -1.5, 1.5)
        self.first, self.last = nn.Conv2d(3, c, 3, padding=1), nn.Conv2d(c, 4, 1)

    def convolution(self, step):
        wide, groups = 2 * CHANNELS if step == "cat" else CHANNELS, CHANNELS if step == "depthwise" else 1
        return nn.Conv2d(wide, CHANNELS, 3, padding=1, groups=groups)

    def forward(self, x):
        values = [self.first(x)]
        for step, conv, norm in zip(self.steps, self.convolutions, self.norms, strict=True):
            values.append(self.apply_step(step, conv, norm, values[-1], values[len(values) // 2 - 1]))
        return self.last(values[-1])

    def apply_step(self, step, conv, norm, v, earlier):
        if step == "pool":
            return functional.max_pool2d(v, 3, 1, 1)
        if step == "upsample":
            return functional.max_pool2d(functional.interpolate(v, scale_factor=2.0), 2)
        if step == "cat":
            return conv(torch.cat([v, earlier], 1))
        if step == "add":
            return conv(v) + earlier
        if step == "sum":
            return functional.relu(v + earlier)
        if step == "norm":
            return norm(conv(v))
        return conv(v) if step in ("conv", "depthwise") else getattr(functional, step)(conv(v))


def images(steps, scheme, seed):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    model = RandomImages(steps).eval()
    data = [torch.randn(2, 3, 6, 5) for _ in range(3)]
    plan = qpass.analyze(model, scheme, data[0], data)
    assert all(d.quantized for d in plan if not d.is_output), str(plan)
    return model, plan, data[0]


@settings(max_examples=12, deadline=None)
@given(IMAGE_STEPS, st.sampled_from(["w8a8", "w8a8", "w8a8-dynamic", "w8a16", "w4a8"]), st.integers(0, 99))
def test_lowered_images_agree(steps, scheme, seed):
    """The graphs that the backends run, without the generated kernels between."""
    model, plan, x = images(steps, scheme, seed)
    found, wanted = (run(*lowered(model, plan, x, backend=name)) for name in ("cpu", "reference"))
    assert relative(found, wanted) < 3e-2  # a code may fall on either side of an edge
    with torch.no_grad():
        assert relative(wanted, model(x)) < (0.8 if scheme == "w4a8" else 0.15)


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(IMAGE_STEPS, st.sampled_from(["w8a8", "w8a8-dynamic"]), st.integers(0, 99))
def test_compiled_images_agree(steps, scheme, seed):
    model, plan, _ = images(steps, scheme, seed)
    cpu, reference = (qpass.compile(model, plan=plan, backend=name) for name in ("cpu", "reference"))
    for shape in ((2, 3, 6, 5), (1, 3, 6, 5), (3, 3, 9, 4)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative(cpu(x), reference(x)) < 3e-2

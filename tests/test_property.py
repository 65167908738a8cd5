"""Random small graphs: reference = fused = lowered to accumulator rounding, and compiled = eager packed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import qpass
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

"""Padding: rows that a batch's attention_mask leaves out teach calibration nothing; other masks are not read."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import qpass
from qpass.padding import mask_of, unpadded
from tests.models import relative


class Tokens(nn.Module):
    """Linears over tokens, and a mask that only the caller's pooling would read."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x, attention_mask=None):
        return self.down(torch.relu(self.up(x)))


def model():
    torch.manual_seed(0)
    return Tokens().eval()


def batches(count=6):
    """(padded batches with their masks, the same tokens without padding): what is padded is far from every token."""
    generator = torch.Generator().manual_seed(2)
    padded, plain = [], []
    for i in range(count):
        x, mask = torch.randn(3, 8, 32, generator=generator), torch.ones(3, 8, dtype=torch.int64)
        mask[0, 5:], mask[1, : i % 4] = 0, 0
        x[mask == 0] = 50.0
        padded.append({"x": x, "attention_mask": mask})
        plain.append({"x": x[mask == 1].unsqueeze(0)})
    return padded, plain


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g32", "w4a16-g32,sequential=no", "w4a8-g32"])
def test_padded_batches_teach_what_their_tokens_do(scheme):
    m, (padded, plain) = model(), batches()
    found, wanted = (qpass.analyze(m, scheme, calibration=data) for data in (padded, plain))
    for d in wanted.quantized:
        other = found[d.site]
        assert (other.lo, other.hi) == pytest.approx((d.lo, d.hi))
        assert (other.packed.data == d.packed.data).float().mean() > 0.98
        torch.testing.assert_close(other.bias, d.bias, rtol=1e-2, atol=1e-3)
    bare = qpass.analyze(m, scheme, calibration=[{"x": batch["x"]} for batch in padded])
    assert bare.quantized[0].hi == 50.0


def test_positional_too():
    m, (padded, _) = model(), batches()
    plan = qpass.analyze(m, "w8a8", calibration=[(b["x"], b["attention_mask"].bool()) for b in padded])
    assert plan.quantized[0].hi < 10


def test_masks_that_say_nothing_of_rows():
    m, x = model(), torch.randn(2, 3, 32)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert torch.equal(mask_of(m, (), {"attention_mask": mask}), mask.bool())
    for other in (
        torch.ones(2, 3),
        torch.zeros(2, 3, dtype=torch.int64),
        torch.ones_like(mask),
        mask[:, None],
        None,
        "no",
    ):
        assert mask_of(m, (), {"attention_mask": other}) is None
    assert mask_of(m, (x, mask, 1, 2), {}) is None  # the call itself says what is wrong
    m.config = SimpleNamespace(is_encoder_decoder=True)
    assert mask_of(m, (), {"attention_mask": mask}) is None
    assert unpadded(x, mask.bool()).shape == (5, 32)
    for other in (x[:, :2], x.flatten(0, 1), x[None]):
        assert unpadded(other, mask.bool()) is other
    assert unpadded(x, None) is x


def test_a_compiled_model_still_computes_padded_rows():
    m, (padded, _) = model(), batches()
    q = qpass.compile(m, "w8a16", calibration=padded, backend="reference")
    with torch.no_grad():
        assert relative(q(**padded[0]), m(**padded[0])) < 0.02

"""QParams say what is wrong with them."""

import pytest
import torch

from qpass.errors import QpassError
from qpass.qparams import QParams
from qpass.qtype import QType


def qparams(scale=1.0, zero=None, text="i8/t", **kwargs):
    zero = None if zero is None else torch.tensor(zero, dtype=kwargs.get("zero_dtype", torch.int32))
    return QParams(torch.tensor(scale, dtype=kwargs.get("dtype", torch.float32)), zero, QType.parse(text))


def test_check_returns_good_parameters():
    for good in (qparams(), qparams(zero=3, text="u8/t"), qparams([1.0, 2.0], text="i8/c0")):
        assert good.check() is good


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        (qparams(0.0), r"^layer \(i8/t\): 1 of 1 scales"),
        (qparams([1.0, -2.0, float("nan")], text="i8/c0"), r"2 of 3 scales .*the first is -2"),
        (qparams(float("inf")), "not finite"),
        (qparams(dtype=torch.float64), "must be float32"),
        (qparams(zero=1), "no zero point"),
        (qparams(text="u8/t"), "needs a zero point"),
        (qparams(zero=1, text="u8/t", zero_dtype=torch.int64), "must be int32"),
        (qparams(zero=[1, 2], text="u8/t"), "must be equal"),
        (qparams(zero=256, text="u8/t"), r"0\.\.255"),
        (qparams(zero=-1, text="u4/t"), r"0\.\.15"),
    ],
)
def test_check_names_the_fault(bad, match):
    with pytest.raises(QpassError, match=match):
        bad.check("layer")


def test_to_moves_both_tensors():
    moved = qparams(zero=3, text="u8/t").to("meta")
    assert moved.scale.is_meta
    assert moved.zero.is_meta
    assert qparams().to("meta").zero is None

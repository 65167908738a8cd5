"""QType prints and parses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qpass.errors import QpassError
from qpass.qtype import QType, scale_shape, shortest

INTEGERS = [f"{sign}{bits}" for sign in "iu" for bits in range(2, 9)]
NUMBERS = st.sampled_from([*INTEGERS, "e4m3", "e5m2"])
GRANULARITIES = st.one_of(
    st.sampled_from(["t", "token", "token*0.85", "sample*0.123456789", "token*1e-06"]),
    st.integers(0, 5).map("c{}".format),
    st.integers(1, 4096).map("g{}".format),
)


@given(NUMBERS, GRANULARITIES)
def test_text_round_trips(number, granularity):
    text = f"{number}/{granularity}"
    parsed = QType.parse(text)
    assert str(parsed) == text
    assert QType.parse(str(parsed)) == parsed
    assert parsed.number == number


def test_parse_is_cached_and_takes_a_type():
    assert QType.parse("i8/c0") is QType.parse("i8/c0")
    assert QType.parse(QType.parse("i8/c0")) is QType.parse("i8/c0")


@pytest.mark.parametrize(
    ("text", "qmin", "qmax", "levels", "symmetric", "storage"),
    [
        ("i8/t", -127, 127, 255, True, torch.int8),
        ("i4/g32", -7, 7, 15, True, torch.int8),
        ("i2/t", -1, 1, 3, True, torch.int8),
        ("u8/token", 0, 255, 256, False, torch.uint8),
        ("u4/g128", 0, 15, 16, False, torch.uint8),
        ("u2/t", 0, 3, 4, False, torch.uint8),
        ("e4m3/c0", -448, 448, 253, True, torch.float8_e4m3fn),
        ("e5m2/c0", -57344, 57344, 247, True, torch.float8_e5m2),
    ],
)
def test_what_derives_from_a_type(text, qmin, qmax, levels, symmetric, storage):
    t = QType.parse(text)
    assert (t.qmin, t.qmax, t.levels, t.symmetric, t.storage) == (qmin, qmax, levels, symmetric, storage)


@pytest.mark.parametrize("text", ["e4m3/t", "e5m2/t"])
def test_float_levels_count_the_finite_values(text):
    t = QType.parse(text)
    values = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(t.storage).float()
    assert values[values.isfinite()].unique().numel() == t.levels
    assert values[values.isfinite()].max() == t.qmax


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("i8", "no granularity"),
        ("i9/t", r"'i9' is no number format.*Did you mean 'i8'"),
        ("i1/t", "no number format"),
        ("e4m4/t", "Did you mean 'e4m3'"),
        ("i8/tokn", r"'tokn' is no granularity.*Did you mean 'token'"),
        ("u4/token*", "'' is no number"),
        ("u4/token*x", "'x' is no number"),
        ("u4/token*-1", "clip above 0"),
        ("u4/token*0", "clip above 0"),
        ("u4/token*nan", "clip above 0"),
        ("u4/token*inf", "clip above 0"),
        ("u4/t*0.5", "goes with granularity token or sample"),
        ("i4/c0*0.5", "goes with granularity token or sample"),
        ("i8/c", "no granularity"),
        ("i8/c-1", "no granularity"),
        ("i8/c01", "no granularity"),
        ("u4/g0", "no granularity"),
        ("u4/g128 ", "no granularity"),
        ("", "no granularity"),
    ],
)
def test_malformed_text_says_what_is_wrong(text, match):
    with pytest.raises(QpassError, match=match):
        QType.parse(text)


def test_parse_rejects_what_is_not_text():
    with pytest.raises(QpassError, match="not int"):
        QType.parse(8)


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 9, "signed": True},
        {"bits": 1, "signed": False},
        {"bits": 8, "signed": True, "is_float": True},
        {"bits": 8, "signed": False, "is_float": True, "mantissa": 3},
        {"bits": 8, "signed": True, "mantissa": 3},
        {"bits": 8, "signed": True, "granularity": "row"},
        {"bits": 8, "signed": True, "granularity": "channel"},
        {"bits": 8, "signed": True, "granularity": "channel", "axis": -1},
        {"bits": 8, "signed": True, "axis": 0},
        {"bits": 8, "signed": True, "granularity": "group"},
        {"bits": 8, "signed": True, "granularity": "group", "group": 0},
        {"bits": 8, "signed": True, "granularity": "group", "group": -4},
        {"bits": 8, "signed": True, "group": 128},
    ],
)
def test_a_type_without_text_cannot_be_built(fields):
    with pytest.raises(QpassError, match="QType: "):
        QType(**fields)


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("i8/t", (), ()),
        ("i8/t", (3, 4), ()),
        ("i8/c0", (3, 4), (3,)),
        ("i8/c1", (3, 4, 5), (4,)),
        ("u4/g4", (3, 8), (3, 2)),
        ("u4/g4", (4,), (1,)),
        ("u8/token", (2, 3, 4), (2, 3, 1)),
        ("u8/token", (4,), (1,)),
    ],
)
def test_scale_shape(text, shape, expected):
    assert scale_shape(QType.parse(text), shape) == expected


@pytest.mark.parametrize(
    ("text", "shape", "match"),
    [
        ("u4/g128", (3, 130), "multiple of 128"),
        ("i8/c2", (3, 4), "3 axes"),
        ("u8/token", (), "1 axes"),
    ],
)
def test_scale_shape_says_what_does_not_fit(text, shape, match):
    with pytest.raises(QpassError, match=match):
        scale_shape(QType.parse(text), shape)


@given(st.floats(2**-20, 2**20, width=32))
def test_the_fewest_digits_are_the_same_number(value):
    number = torch.tensor(value)
    assert torch.tensor(shortest(number)) == number
    assert len(repr(shortest(number))) <= len(repr(value))

"""Schemes and recipes print as they parse, and say what is wrong with what they cannot parse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qpass.errors import QpassError
from qpass.schemes import NAMES, Recipe, Scheme

BITS = st.integers(2, 8)
INTEGER = st.builds(
    "w{}a{}{}{}".format, BITS, BITS, st.sampled_from(["", "-g32", "-g64"]), st.sampled_from(["", "-dynamic"])
)
WEIGHT_ONLY = st.builds("w{}a16{}".format, BITS, st.sampled_from(["", "-g32", "-g64"]))
RANGE = st.sampled_from(["", ",range=mse", ",range=percentile:99.9", ",range=entropy"])
SMOOTH = st.sampled_from(["", ",smooth=0.5", ",smooth=none"])
SOLVER = st.sampled_from(["", ",solver=rtn"])


@given(st.one_of(INTEGER, WEIGHT_ONLY, st.sampled_from(NAMES)), RANGE, SMOOTH, SOLVER)
def test_text_round_trips(name, range_option, smooth, solver):
    text = name + range_option + smooth + solver
    scheme = Scheme.parse(text)
    assert str(scheme) == text
    assert Scheme.parse(str(scheme)) == scheme
    assert Scheme.parse(scheme) is scheme


@pytest.mark.parametrize(
    ("text", "weight", "activation", "dynamic"),
    [
        ("w8a8", "i8/c0", "u8/t", False),
        ("w8a8-dynamic", "i8/c0", "u8/token", True),
        ("w8a16", "i8/c0", None, False),
        ("w4a16", "u4/g128", None, False),
        ("w4a16-g32", "u4/g32", None, False),
        ("w4a16-c", "i4/c0", None, False),
        ("w4a8", "i4/g128", "u8/t", False),
        ("w4a8-g64-dynamic", "i4/g64", "u8/token", True),
        ("w2a16", "u2/g128", None, False),
        ("w2a2", "u2/g128", "u2/t", False),
        ("w3a3-c", "i3/c0", "u3/t", False),
        ("w6a8-g32", "i6/g32", "u8/t", False),
        ("fp8", "e4m3/c0", "e4m3/token", True),
        ("fp8-static", "e4m3/c0", "e4m3/t", False),
    ],
)
def test_what_a_scheme_means(text, weight, activation, dynamic):
    scheme = Scheme.parse(text)
    assert str(scheme.weight) == weight
    assert (None if scheme.activation is None else str(scheme.activation)) == activation
    assert scheme.dynamic is dynamic
    assert scheme.needs_calibration == (activation is not None and not dynamic)


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("W8A8", "w8a8"),
        ("w4a16-g128", "w4a16"),
        ("w8a8-c", "w8a8"),
        ("w4a8-dynamic-g64", "w4a8-g64-dynamic"),
        ("w8a8 solver=rtn range=mse", "w8a8,range=mse,solver=rtn"),
        ("w8a8, smooth=0.50", "w8a8,smooth=0.5"),
        ("w8a8,range=auto,smooth=auto,solver=auto", "w8a8"),
    ],
)
def test_other_spellings_print_in_one_way(text, canonical):
    assert str(Scheme.parse(text)) == canonical
    assert Scheme.parse(text) == Scheme.parse(canonical)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("int8", "not known; expected w8a8"),
        ("w8a8-dynamc", "Did you mean 'w8a8-dynamic'"),
        ("fp8-statik", "Did you mean 'fp8-static'"),
        ("w9a8", r"2 to 8 bits.*Did you mean"),
        ("w8a1", "2 to 8"),
        ("w8a9", "16 to stay float"),
        ("w16a16", "2 to 8"),
        ("w4a16-dynamic", "drop '-dynamic'"),
        ("w4a8-g32-g64", "one of"),
        ("w4a8-c-g64", "one of"),
        ("w8a8-dynamic-dynamic", "once"),
        ("w4a16-g0", "not known"),
        ("w8a8,rnage=mse", "Did you mean 'range'"),
        ("w8a8,mse", "is no option"),
        ("w8a8,range=mean", "is not one of minmax"),
        ("w8a8,smooth=2", "from 0 to 1"),
        ("w8a8,smooth=nan", "from 0 to 1"),
        ("w8a8,smooth=much", "from 0 to 1"),
        ("w8a8,solver=gtpq", "Did you mean 'gptq'"),
    ],
)
def test_malformed_text_says_what_is_wrong(text, match):
    with pytest.raises(QpassError, match=match):
        Scheme.parse(text)


def test_parse_rejects_what_is_not_text():
    with pytest.raises(QpassError, match="not int"):
        Scheme.parse(8)


SITES = (
    "",
    "encoder.0.query:linear.0",
    "encoder.0.query:matmul.0",
    "encoder.1.query:linear.0",
    "head:linear.0",
)


def test_the_first_match_wins():
    recipe = Recipe.parse({"encoder.0.*": "w8a8", "encoder.*": "w4a16", "head": None}, "fp8")
    names = [scheme and scheme.name for scheme in map(recipe.scheme_for, SITES)]
    assert names == ["fp8", "w8a8", "w8a8", "w4a16", None]


def test_a_glob_with_a_colon_matches_sites():
    recipe = Recipe.parse({"*:matmul.*": None}, "w8a8")
    assert recipe.scheme_for("encoder.0.query:matmul.0") is None
    assert str(recipe.scheme_for("encoder.0.query:linear.0")) == "w8a8"
    assert str(recipe.scheme_for("encoder.0.query")) == "w8a8"


def test_globs_are_case_sensitive_and_paths_may_be_given_alone():
    recipe = Recipe.parse({"Head": None}, "w8a8")
    assert recipe.scheme_for("head") is not None
    assert Recipe.parse({"head": None}, "w8a8").scheme_for("head") is None


def test_an_empty_recipe_is_its_default():
    assert Recipe.parse(None).scheme_for("head") is None
    assert str(Recipe.parse(None, "w8a8,range=mse").scheme_for("head")) == "w8a8,range=mse"
    recipe = Recipe.parse({"head": "w8a8"})
    assert Recipe.parse(recipe) is recipe


def test_unmatched_globs_are_found():
    recipe = Recipe.parse({"encoder.0.*": None, "heat": None, "head:conv2d.*": None, "encoder.*": None})
    assert recipe.unmatched(SITES) == ("heat", "head:conv2d.*")
    with pytest.raises(QpassError, match=r"'heat' matches no module.*Did you mean 'head'"):
        recipe.check(SITES)
    Recipe.parse({"head": None}).check(SITES)


def test_recipe_errors_name_the_glob():
    with pytest.raises(QpassError, match=r"recipe: 'head': scheme 'w8a9'"):
        Recipe.parse({"head": "w8a9"})
    with pytest.raises(QpassError, match="not be a list"):
        Recipe.parse([("head", "w8a8")])


def test_a_recipe_prints_its_rules_in_order():
    recipe = Recipe.parse({"*.attention.*": "w4a16-g32", "head": None}, "w8a8,range=mse")
    assert str(recipe).splitlines() == ["*.attention.*: w4a16-g32", "head: float", "*: w8a8,range=mse"]

"""The choice within a budget, against every choice there is; the front; budgets as they are written."""

import itertools
import math
import random
import xml.etree.ElementTree as ElementTree

import pytest

import qpass
from qpass.search.budget import parse
from qpass.search.cost import Table
from qpass.search.front import Point, as_data, front, svg, undominated
from qpass.search.groups import Group
from qpass.search.program import best, cheapest, greedy, solve, total

NAMES = ("w2", "w4", "w8", "float")


def problem(seed, groups=6, spread=6.0):
    """Groups with losses over many orders of magnitude, and costs that are odd numbers."""
    rng = random.Random(seed)
    found = [Group(f"g{i}", (f"g{i}",), NAMES[: rng.randint(1, 4)]) for i in range(groups)]
    loss = {(g.name, c): 10 ** rng.uniform(-spread, 0) for g in found for c in g.takes}
    cost = {(g.name, c): rng.uniform(1, 9) * 10 ** rng.randint(2, 6) for g in found for c in g.takes}
    return found, loss, cost


def every(groups):
    return [
        dict(zip([g.name for g in groups], row, strict=True)) for row in itertools.product(*(g.takes for g in groups))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_the_choice_is_the_best_there_is(seed):
    groups, loss, cost = problem(seed)
    low, high = total(cost, cheapest(groups, loss, cost)), total(cost, best(groups, loss, cost))
    for share in (0.0, 0.03, 0.3, 0.7, 1.0):
        limit = low + share * max(high - low, 0.0)
        wanted = min(total(loss, c) for c in every(groups) if total(cost, c) <= limit * (1 + 1e-9))
        found = solve(groups, loss, cost, limit)
        assert total(cost, found) <= limit * (1 + 1e-9)
        assert total(loss, found) == pytest.approx(wanted, rel=1e-9)
        assert total(loss, greedy(groups, loss, cost, limit)) >= wanted * (1 - 1e-9)
    assert solve(groups, loss, cost, low * 0.999) is None
    assert greedy(groups, loss, cost, low * 0.999) is None


def test_losses_that_fall_are_taken():
    """What moves around a recipe add to its loss may be less than nothing."""
    groups = [Group("a", ("a",), ("x", "y")), Group("b", ("b",), ("x", "y"))]
    loss = {("a", "x"): -1.0, ("a", "y"): 0.0, ("b", "x"): -3.0, ("b", "y"): 0.0}
    cost = {("a", "x"): 2.0, ("a", "y"): 1.0, ("b", "x"): 2.0, ("b", "y"): 1.0}
    assert solve(groups, loss, cost, 3.0) == {"a": "y", "b": "x"}


def test_greedy_is_not_always_best():
    """The cheap step first leaves too little for the step that counts."""
    worse = 0
    for seed in range(30):
        groups, loss, cost = problem(seed, spread=2.0)
        low, high = total(cost, cheapest(groups, loss, cost)), total(cost, best(groups, loss, cost))
        limit = (low + high) / 2
        worse += total(loss, greedy(groups, loss, cost, limit)) > 1.001 * total(loss, solve(groups, loss, cost, limit))
    assert worse > 3


def test_the_front_falls_and_holds_the_best_of_each_budget():
    groups, loss, cost = problem(1)
    table = Table(1000.0, cost, 10.0)
    found = front(groups, loss, table, 0.5)
    assert [p.cost for p in found] == sorted(p.cost for p in found)
    assert all(a.loss > b.loss for a, b in itertools.pairwise(found))
    for p in found:
        limit = p.cost * 10.0 - 1000.0
        assert p.loss == pytest.approx(0.5 + total(loss, solve(groups, loss, cost, limit * (1 + 1e-9))), rel=1e-9)


def test_what_another_point_beats_is_dropped():
    points = [Point(3, 1.0, {}), Point(1, 5.0, {}), Point(2, 5.0, {}), Point(4, 2.0, {})]
    assert undominated(points) == [points[1], points[0]]


@pytest.mark.parametrize("losses", [(1e-3, 1e-5, 0.0), (0.0, 0.0, 0.0), (math.pi,)])
def test_the_picture_is_a_picture(losses):
    points = [Point(float(i), loss, {}) for i, loss in enumerate(losses)]
    data = as_data(points, "bits", "a <metric> & more", {"cost": 1.0, "predicted": 1e-4, "loss": None})
    root = ElementTree.fromstring(svg(data))
    assert len(root.findall(".//{*}circle")) == len(losses) + 1
    assert "nan" not in svg(data)


@pytest.mark.parametrize(
    ("text", "kind", "limit"),
    [
        (12345, "bytes", 12345),
        ("3.5 MB", "bytes", 3.5e6),
        ("3MiB", "bytes", 3 * 2**20),
        ("12,000 bytes", "bytes", 12000),
        ("4.25 bits", "bits", 4.25),
        ("3bits", "bits", 3),
        ("12 ms", "ms", 12),
        ("250 us", "ms", 0.25),
        (".5 s", "ms", 500),
    ],
)
def test_budgets_as_they_are_written(text, kind, limit):
    found = parse(text)
    assert (found.kind, found.limit) == (kind, pytest.approx(limit))


def test_a_scheme_is_a_budget():
    assert str(parse("w4a16-g32").like) == "w4a16-g32"


@pytest.mark.parametrize("budget", [0, -3, "0 MB", "4", "4 furlongs", "much", None, 3.5, True, "-1 bits", []])
def test_what_is_no_budget(budget):
    with pytest.raises(qpass.QpassError, match=r"budget=.*expected bytes as a whole number"):
        parse(budget)

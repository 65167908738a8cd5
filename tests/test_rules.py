"""Every rule of the tables, eagerly: pattern and replacement compute the same; and the engine itself."""

import inspect

import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from qpass.canonical import canonicalize
from qpass.passes.fuse import EPILOGUE, LINEAR
from qpass.rewrite import Match, Miss, RuleLog, apply, find, rule

aten = torch.ops.aten


def arguments(names):
    """Values for the parameters of the tables' patterns."""
    u8 = torch.randint(0, 256, (5, 16), dtype=torch.uint8)
    values = {
        "x": u8, "xs": torch.tensor(0.02), "xz": torch.tensor(120, dtype=torch.int32), "xt": "u8/t", "xd": torch.float32,
        "w": torch.randint(-127, 128, (8, 16), dtype=torch.int8), "ws": torch.rand(8) / 50 + 0.001, "wt": "i8/c0",
        "wd": torch.float32, "b": torch.randn(8), "other": torch.randn(5, 8), "act": "relu", "dtype": torch.float32,
        "scale": torch.tensor(0.05), "zero": torch.tensor(7, dtype=torch.int32), "qtype": "u8/t", "to": torch.bfloat16,
        "blocking": False, "copy": False, "memory": None, "i": torch.tensor([[1, 3], [0, 7]]), "padding": -1,
        "scaled": False, "sparse": False, "wz": None,
    }  # fmt: skip
    return {name: values.get(name) for name in names}


@pytest.mark.parametrize("each", [*LINEAR, *EPILOGUE], ids=lambda r: r.name)
def test_replacement_computes_the_pattern(each):
    given = arguments(inspect.signature(each.pattern).parameters)
    if each.name == "weight_only_linear":
        given |= {"x": torch.randn(5, 16), "wz": torch.randint(-7, 8, (8,), dtype=torch.int32)}
    if each.name == "halved_lookup":
        given |= {"wt": "i4/c0", "data": torch.randint(0, 256, (8, 16), dtype=torch.uint8)}
    if each.name == "grouped_lookup":
        given |= {"wt": "i8/g4", "ws": torch.rand(8, 4) / 50 + 0.001}
        given["wz"] = torch.randint(-7, 8, (8, 4), dtype=torch.int32)
    if each.name == "offset_lookup":
        given["wz"] = torch.randint(-7, 8, (8,), dtype=torch.int32)
    if each.name == "nested_linear":
        given |= {"x": torch.randn(5, 16), "wt": "u{8,4,2}/c0", "bits": torch.tensor(8), "b": torch.randn(8)}
        given |= {"planes": torch.randint(0, 256, (5, 8, 4), dtype=torch.uint8), "scale": torch.rand(3, 8) / 10}
        given["zero"] = torch.randint(0, 4, (3, 8), dtype=torch.uint8)
    wanted, found = each.pattern(**given), each.replacement(**given)
    assert wanted.dtype == found.dtype
    close = torch.float32 if wanted.dtype == torch.uint8 else wanted.dtype
    torch.testing.assert_close(
        found.to(close), wanted.to(close), rtol=1e-3 if close == torch.float32 else 2e-2, atol=1.01e-3
    )


def graph(function, *inputs):
    return canonicalize(make_fx(function, tracing_mode="fake", pre_dispatch=True)(*inputs))


@rule
def relu_of_add(x, y):
    """relu(x + y)  ->  clamp_min(x + y, 0)"""
    return aten.relu.default(aten.add.Tensor(x, aten.neg.default(y)))


@relu_of_add.to
def _(x, y):
    return aten.clamp_min.default(aten.sub.Tensor(x, y), 0)


def test_commutative_match_and_idempotence():
    gm = graph(lambda x, y: torch.relu(-y + x), torch.randn(3), torch.randn(3))
    assert apply(gm, (relu_of_add,)) == 1
    assert apply(gm, (relu_of_add,)) == 0
    x, y = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(gm(x, y), torch.relu(x - y))


def test_a_shared_interior_is_refused_with_a_sentence():
    def shared(x, y):
        n = -y
        return torch.relu(x + n), n

    gm, log = graph(shared, torch.randn(3), torch.randn(3)), RuleLog()
    assert apply(gm, (relu_of_add,), log) == 0
    assert any("has 2 users, a fused value must have one" in line for line in log.lines())


def test_check_refuses():
    @rule
    def doubled(x, n):
        return aten.mul.Tensor(x, n)

    doubled.check(lambda n: None if n == 2 else f"the factor is {n}, not 2")
    doubled.to(lambda x, n: aten.add.Tensor(x, x))
    gm = graph(lambda x: x * 3, torch.randn(3))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    found = find(doubled, node)
    assert isinstance(found, Miss)
    assert found.why == "the factor is 3, not 2"
    gm = graph(lambda x: x * 2, torch.randn(3))
    assert isinstance(find(doubled, next(n for n in gm.graph.nodes if n.op == "call_function")), Match)


def test_a_residual_of_another_dtype_stays():
    """The sum is of the wider type, the fused product of its own."""

    def widened(other, **given):
        return LINEAR[0].pattern(**given) + other

    given = arguments(inspect.signature(LINEAR[0].pattern).parameters)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in given.items() if name not in tensors}
    for dtype, fits in ((torch.float32, True), (torch.float64, False)):
        gm = graph(
            lambda other, *t: widened(other, **dict(zip(tensors, t, strict=True)), **rest),
            torch.randn(5, 8, dtype=dtype),
            *tensors.values(),
        )
        apply(gm, LINEAR)
        assert apply(gm, EPILOGUE) == fits


def test_time_grows_with_nodes_not_their_square():
    import time

    def long(n):
        def f(x, y):
            for _ in range(n):
                x = torch.relu(x + -y)
            return x

        gm = graph(f, torch.randn(3), torch.randn(3))
        start = time.perf_counter()
        assert apply(gm, (relu_of_add,)) == n
        return time.perf_counter() - start

    long(5)
    assert long(160) < 12 * long(40) + 0.05


def test_emitted_nodes_are_canonical():
    gm = graph(lambda x, y: torch.relu(x + -y), torch.randn(3), torch.randn(3))
    apply(gm, (relu_of_add,))
    made = [n for n in gm.graph.nodes if n.meta.get("rule")]
    assert {n.meta["rule"] for n in made} == {"relu_of_add"}
    assert all("val" in n.meta for n in made)
    assert isinstance(gm, fx.GraphModule)

"""Modules as people write them: what comes back is what they return, close to float, and nothing stays float in silence."""

import copy
import dataclasses
import io
import threading

import pytest
import torch
from torch import nn

import qpass
from qpass.runtime import runtime_of
from tests import models_user as user
from tests.models import encoder, relative

NONE_LEFT = ()
COMPUTED = "its weight is computed, not a parameter of the model"
UNKNOWN = "reads its weight in another way"


def rows(*shape):
    return lambda batch: (torch.randn(batch, *shape),)


def ids(batch):
    return (torch.randint(0, 40, (batch, 5)),)


def vector(batch):
    return (torch.randn(user.WIDTH),)


def turned(batch):
    return (torch.randn(user.WIDTH, 5, batch).permute(2, 1, 0),)


def keywords(batch):
    return dict(left=torch.randn(batch, 5, user.WIDTH), right=torch.randn(batch, 5, user.WIDTH))


X = rows(5, user.WIDTH)
# module, inputs, quantized sites, graphs for all batches but 1, words of the reason of each site that stays float
CASES = (
    (user.Functional, X, 7, 1, NONE_LEFT),
    (user.Unusual, X, 2, 1, (UNKNOWN, "no operand", "no operand", "a buffer", COMPUTED)),
    (user.Tied, ids, 1, 1, ("looked up", "the other way round", "an output layer")),
    (user.Recurrent, X, 2, 1, ("recurrent", "recurrent")),
    (user.Twice, X, 4, 1, NONE_LEFT),
    (user.Branch, X, 2, 2, NONE_LEFT),
    (user.Depth, X, 3, 1, NONE_LEFT),
    (user.Returns, X, 2, 1, NONE_LEFT),
    (user.Counter, X, 3, 1, NONE_LEFT),
    (user.Mutates, X, 1, 1, NONE_LEFT),
    (user.Keywords, keywords, 2, 1, NONE_LEFT),
    (user.Autocast, X, 3, 1, NONE_LEFT),
    (user.Vectors, vector, 2, 1, NONE_LEFT),
    (user.Vectors, rows(2, 3, 2, user.WIDTH), 2, 1, NONE_LEFT),
    (user.Vectors, turned, 2, 1, NONE_LEFT),
    (user.CrossAttention, X, 6, 1, ("no operand", "no operand", "no operand")),
    (user.Mapped, X, 2, 1, NONE_LEFT),
    (user.transformer, X, 8, 1, ("no operand", "no operand")),
    (user.sequential, X, 2, 1, NONE_LEFT),
)


def call(model, batch):
    batch = copy.deepcopy(batch)
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(*batch)


def flat(value):
    """Leaves of nested results, types of the containers included."""
    if dataclasses.is_dataclass(value):
        return [type(value), *flat(vars(value))]
    if isinstance(value, dict):
        return [type(value), *value, *(leaf for v in value.values() for leaf in flat(v))]
    if isinstance(value, list | tuple):
        return [type(value), *(leaf for v in value for leaf in flat(v))]
    return [value]


def check_same(found, wanted, bound):
    for a, b in zip(flat(found), flat(wanted), strict=True):
        if isinstance(b, torch.Tensor) and b.is_floating_point():
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert relative(a, b) < bound
        else:
            assert a == b


BOUNDS = {"w8a8": 0.1, "w8a8-dynamic": 0.03, "w8a16": 0.03}
RUNS = [(case, scheme) for case in CASES for scheme in BOUNDS if scheme != "w8a16" or case in CASES[:3]]


@pytest.mark.parametrize(("case", "scheme"), RUNS, ids=[f"{case[0].__name__}-{scheme}" for case, scheme in RUNS])
def test_module(case, scheme):
    build, inputs, quantized, graphs, reasons = case
    model = build().eval()
    data = [inputs(64) for _ in range(256 if inputs is vector else 8)] if scheme == "w8a8" else None
    example = copy.deepcopy(inputs(2))  # a view is another kind of input to the front end than a tensor of its own
    q = qpass.compile(model, scheme, example, data, backend="reference")
    plan = runtime_of(q).plan
    assert len(plan.quantized) == quantized
    left = [d.why for d in plan if not d.quantized]
    assert len(left) == len(reasons)
    assert all(words in why for words, why in zip(reasons, left, strict=True))
    for batch in (2, 3, 7):
        x = inputs(batch)
        check_same(call(q, x), call(model, x), BOUNDS[scheme])
    assert len(runtime_of(q).records) == graphs


def test_state_is_kept_and_inputs_are_written_to():
    q = qpass.compile(user.Counter().eval(), "w8a8-dynamic", backend="reference")
    for _ in range(3):
        call(q, X(2))
    assert int(q.calls) == 3
    q = qpass.compile(user.Mutates().eval(), "w8a8-dynamic", backend="reference")
    x = torch.ones(2, 5, user.WIDTH)
    with torch.no_grad():
        q(x)
    assert torch.equal(x, torch.full_like(x, 0.5))


def test_a_depth_of_its_own_is_a_graph_of_its_own():
    model = user.Depth().eval()
    q = qpass.compile(model, "w8a8-dynamic", X(2), backend="reference")
    for depth in (1, 2, 3, 1):
        x = X(3)[0]
        assert relative(call(q, dict(x=x, depth=depth)), call(model, dict(x=x, depth=depth))) < 0.03
    assert len(runtime_of(q).records) <= 4  # one more of the default depth


def test_hooks_from_before_run():
    model, seen = user.Twice().eval(), []
    model.a.register_forward_hook(lambda module, inputs, out: seen.append(1) or out * 2)
    q = qpass.compile(model, "w8a8-dynamic", backend="reference")
    x = X(2)
    found, count = call(q, x), len(seen)
    assert count == 1
    assert relative(found, call(model, x)) < 0.03


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16"])
def test_bfloat16_model(scheme):
    model, x = encoder().bfloat16(), torch.randn(4, 6, 32).bfloat16()
    data = [torch.randn(64, 6, 32).bfloat16() for _ in range(4)] if scheme == "w8a8" else None
    q = qpass.compile(model, scheme, x, data, backend="reference")
    check_same(call(q, (x,)), call(model, (x,)), 0.03)
    assert torch.equal(call(q, (x,)), call(q, (x,)))


@pytest.fixture
def pair():
    model, x = encoder(), torch.randn(4, 6, 32)
    return model, qpass.compile(model, "w8a8-dynamic", x, backend="reference"), x


def test_result_has_no_gradient(pair):
    model, q, x = pair
    found = q(x.requires_grad_())
    assert not found.requires_grad
    assert relative(found, call(model, (x,))) < 0.03


def test_deepcopy_is_compiled_and_its_own(pair):
    _, q, x = pair
    twin = copy.deepcopy(q)
    assert type(twin) is type(q)
    assert torch.equal(call(twin, (x,)), call(q, (x,)))
    assert len(runtime_of(twin).records) == 1
    before = call(q, (x,))
    with torch.no_grad():
        twin[1].norm.weight.zero_()
    assert not torch.equal(call(twin, (x,)), before)
    assert torch.equal(call(q, (x,)), before)
    assert copy.deepcopy(twin) is not twin


def test_state_dict_goes_round(pair):
    _, q, x = pair
    before, file = call(q, (x,)), io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    q.load_state_dict(torch.load(file))
    with pytest.warns(UserWarning, match="compile it again"):
        assert relative(call(q, (x,)), before) < 0.01


def test_training_mode_warns(pair):
    _, q, x = pair
    before = call(q, (x,))
    with pytest.warns(UserWarning, match="compiled for inference"):
        call(q.train(), (x,))
    assert torch.equal(call(q.eval(), (x,)), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(pair, dtype):
    model, q, x = pair
    wanted = call(model, (x,))
    found = call(q.to(dtype), (x.to(dtype),))
    assert found.dtype is dtype
    assert relative(found, wanted) < 0.03
    assert q.state_dict()["0.q.parametrizations.weight.original0"].dtype is torch.int8


def test_threads(pair):
    model, q, _ = pair
    batches = [torch.randn(2 + i % 3, 3 + i, 32) for i in range(6)]
    found = [None] * len(batches)

    def work(i):
        for _ in range(3):
            found[i] = call(q, (batches[i],))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(relative(y, call(model, (x,))) < 0.03 for x, y in zip(batches, found, strict=True))


@pytest.mark.parametrize("build", [user.Functional, user.sequential, user.Recurrent])
@torch._dynamo.config.patch(allow_rnn=True)
def test_torch_compile_spelling(build):
    model = build().eval()
    x = X(3)
    wanted = call(model, x)
    options = {"scheme": "w8a8-dynamic", "backend": "reference"}
    check_same(call(torch.compile(model, backend="qpass", options=options), x), wanted, 0.03)
    if not isinstance(model, nn.Sequential):  # torch itself skips Module.compile of a bare Sequential
        model.compile(backend="qpass", options=options)
        found = call(model, x)
        check_same(found, wanted, 0.03)
        assert not torch.equal(flat(found)[-1], flat(wanted)[-1])  # it did run in integers


def test_fast_path_is_on_again():
    q = qpass.compile(user.transformer().eval(), "w8a8-dynamic", X(2), backend="reference")
    call(q, X(2))
    assert torch.backends.mha.get_fastpath_enabled()

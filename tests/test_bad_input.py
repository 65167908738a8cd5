"""Bad arguments of a call: an error that names what, where and what to do, and the caller's model as it was."""

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QpassError
from tests.models import Attention, FeedForward, relative
from tests.untouched import untouched


def model():
    return FeedForward().eval()


def data(*shape):
    return torch.randn(shape or (4, 6, 32))


def poisoned(value):
    x = data()
    x[1, 2, 3] = value
    return x


def last(batch):
    """Good batches, then this one."""
    return {"example_inputs": data(), "calibration": [data(), batch]}


def failing():
    yield data()
    raise ValueError("the disk is gone")


def used_up():
    batches = iter([data()])
    list(batches)
    return batches


ONE = {"example_inputs": data(), "calibration": [data()]}
NO_INTEGERS = {"scheme": "w8a8-dynamic", "example_inputs": data()}

# name, arguments of compile beside w8a8, what the error says
CASES = (
    ("scheme misspelt", {"scheme": "w8a8-dinamic"}, r"'w8a8-dinamic'.*Did you mean 'w8a8-dynamic'\?"),
    ("scheme of impossible width", {"scheme": "w8a9"}, r"'w8a9'.*2 to 8 bits.*Did you mean 'w8a8'\?"),
    ("scheme empty", {"scheme": "", **ONE}, "scheme is empty; expected w8a8"),
    ("scheme of another type", {"scheme": 8}, "scheme must be text.*not int"),
    ("scheme option misspelt", {"scheme": "w8a8,rang=mse"}, r"'rang=mse'.*Did you mean 'range'\?"),
    ("scheme option value misspelt", {"scheme": "w8a8,range=mze"}, r"'mze'.*Did you mean 'mse'\?"),
    ("no calibration", {"example_inputs": data()}, "w8a8 has static.*needs calibration=.*'w8a8-dynamic'"),
    ("calibration is one tensor", {"calibration": data()}, "calibration is a Tensor; expected an iterable"),
    ("calibration is a function", {"calibration": data}, "calibration is a function; expected an iterable"),
    ("calibration empty", {"calibration": []}, "no batches.*fresh iterator"),
    ("calibration used up", {"calibration": used_up()}, "no batches.*used up"),
    ("too many inputs", {**ONE, "example_inputs": (data(), data())}, r"example_inputs does not fit .*forward\(x\)"),
    ("unknown keyword", {**ONE, "example_inputs": {"y": data()}}, "missing a required argument: 'x'"),
    ("inputs in a list", {**ONE, "example_inputs": [data()]}, "example_inputs is a list; expected a tensor, a tuple"),
    (
        "inputs of another width",
        {**ONE, "example_inputs": data(2, 3)},
        r"example_inputs \(float32 \[2, 3\]\): .*pass inputs",
    ),
    ("inputs of another type", {**ONE, "example_inputs": data().long()}, r"example_inputs \(int64 \[4, 6, 32\]\)"),
    ("inputs without rows", {**ONE, "example_inputs": data(0, 6, 32)}, r"example_inputs\[0\].*\(0, 6, 32\) is empty"),
    ("batch without rows", last(data(0, 6, 32)), "calibration batch 1.*is empty; a batch needs"),
    ("batch of another signature", last({"y": data()}), "calibration batch 1 does not fit FeedForward.forward"),
    (
        "batch of another width",
        last(data(2, 31)),
        r"calibration batch 1 \(float32 \[2, 31\]\): FeedForward.forward raised",
    ),
    ("batch in a list", last([data()]), "calibration batch 1 is a list"),
    (
        "NaN",
        last(poisoned(float("nan"))),
        "up:linear.0.input, calibration batch 1: .*not finite.*leave such batches out",
    ),
    ("infinity", last(poisoned(float("inf"))), "up:linear.0.input, calibration batch 1: .*not finite"),
    ("recipe matches nothing", {**ONE, "recipe": {"upp.*": None}}, r"'upp\.\*' matches no module.*Did you mean 'up'\?"),
    ("recipe with unknown scheme", {**ONE, "recipe": {"up": "w8a9"}}, "recipe: 'up': scheme 'w8a9'"),
    ("recipe is a list", {**ONE, "recipe": ["up"]}, "recipe must map module-path globs"),
    ("recipe glob is no text", {**ONE, "recipe": {3: None}}, "recipe: 3 is a int; a rule begins with a glob"),
    ("backend misspelt", {**ONE, "backend": "cpuu"}, r"'cpuu'.*Did you mean 'cpu'\?"),
    ("plan is a path", {"scheme": None, "plan": "a.plan"}, "plan is a str; expected a Plan"),
)


@pytest.mark.parametrize(("arguments", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_refused(arguments, message):
    m = model()
    with untouched(m), pytest.raises(QpassError, match=message):
        qpass.compile(m, **{"scheme": "w8a8", "backend": "reference"} | arguments)


def test_a_message_has_no_lines_of_the_graph():
    with pytest.raises(QpassError) as caught:
        qpass.analyze(model(), "w8a8", **last(poisoned(float("nan"))))
    assert "\n" not in str(caught.value)


def test_an_error_of_the_iterator_is_its_own():
    m = model()
    with untouched(m), pytest.raises(ValueError, match="the disk is gone") as caught:
        qpass.compile(m, "w8a8", data(), failing())
    assert not isinstance(caught.value, QpassError)


def test_a_mapping_may_follow_a_tensor_in_calibration():
    m, x = model(), data()
    q = qpass.compile(m, "w8a8", x, [x, {"x": x[:2, :3]}], backend="reference")
    with torch.no_grad():
        assert relative(q(x), m(x)) < 0.03


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_call_without_rows(backend):
    q = qpass.compile(model(), "w8a8", **ONE, backend=backend)
    assert q(data(0, 6, 32)).shape == (0, 6, 32)
    assert q(data()).shape == (4, 6, 32)


@pytest.fixture
def planned():
    m = model()
    return m, qpass.analyze(m, "w8a8", **ONE)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: FeedForward(64).eval(), r"'up.weight' is \(96, 32\), the model's \(96, 64\)"),
        (lambda: Attention().eval(), "'up.weight' that this Attention lacks"),
        (model, "other values than 'up.weight' has now; call qpass.analyze"),
    ],
    ids=["other width", "other class", "other weights"],
)
def test_a_plan_of_another_model(planned, other, message):
    m = other()
    with untouched(m), pytest.raises(QpassError, match=message):
        qpass.compile(m, plan=planned[1], backend="reference")


def test_a_plan_of_another_model_in_the_torch_compile_spelling(planned):
    compiled = torch.compile(model(), backend="qpass", options={"plan": planned[1]})
    with pytest.raises(Exception, match=r"other values than 'up.weight'"), torch.no_grad():
        compiled(data())


def test_a_plan_beside_a_scheme(planned):
    with pytest.raises(QpassError, match="pass it alone"):
        qpass.compile(planned[0], "w8a8", plan=planned[1])


def test_a_plan_beside_inputs_that_do_not_fit(planned):
    with untouched(planned[0]), pytest.raises(QpassError, match="example_inputs does not fit"):
        qpass.compile(planned[0], plan=planned[1], example_inputs={"y": data()})


def test_a_plan_edited_by_hand(planned):
    m, plan = planned
    plan["*up"] = None
    q = qpass.compile(m, plan=plan, example_inputs=data(), backend="reference")
    assert [d.site for d in qpass.inspect(q).plan.quantized] == ["down:linear.0"]
    assert isinstance(q.up, nn.Linear)
    assert q.up.weight.dtype == torch.float32
    x = data()
    with torch.no_grad():
        assert relative(q(x), m(x)) < 0.03
    plan["*"] = None
    q = qpass.compile(m, plan=plan, backend="reference")
    with torch.no_grad():
        torch.testing.assert_close(q(x), m(x))


@pytest.mark.parametrize("value", ["w8a16", 3])
def test_a_plan_takes_no_scheme(planned, value):
    with pytest.raises(QpassError, match=r"takes None or a reason.*recipe=.*qpass.analyze"):
        planned[1]["*"] = value


def test_a_plan_glob_that_matches_nothing(planned):
    before = str(planned[1])
    with pytest.raises(QpassError, match=r"no site of the plan matches 'upp'.*Did you mean"):
        planned[1]["upp"] = None
    assert str(planned[1]) == before

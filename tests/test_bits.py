"""The bits that are read of nested weights: by model, by site, by request."""

import copy
import threading

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QpassError
from qpass.interchange.compressed import _why_not as why_not_compressed
from qpass.runtime import runtime_of
from tests.models import FeedForward, relative

SCHEME = "w{8,4,2}a16-g32"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(FeedForward(32, 64), FeedForward(32, 64)).eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def alone(model, x):
    """What weights of one width give."""
    return {bits: qpass.compile(model, f"w{bits}a16-g32,bias=none", x, backend="reference")(x) for bits in (4, 2)}


@pytest.fixture(params=["reference", "cpu"])
def q(model, x, request):
    return qpass.compile(model, SCHEME, x, backend=request.param)


def test_a_width_is_chosen_at_run_time(model, q, x, alone):
    packed = {name: (t, t.data_ptr(), t._version) for name, t in q.state_dict().items() if "original" in name}
    records = len(runtime_of(q).records)
    wanted = model(x).detach()
    assert relative(q(x), wanted) < 0.01
    for bits in (4, 2, 4):
        assert set(qpass.set_bits(q, bits).values()) == {bits}
        torch.testing.assert_close(q(x), alone[bits], rtol=1e-3, atol=1e-3)
    assert relative(qpass.set_bits(q, 8) and q(x), wanted) < 0.01
    assert len(runtime_of(q).records) == records  # nothing was captured anew
    now = q.state_dict()
    assert all(now[name].data_ptr() == at and now[name]._version == v for name, (_, at, v) in packed.items())


def test_it_warns_of_no_change(q, x, recwarn):
    for bits in (2, 8):
        qpass.set_bits(q, bits)
        q(x)
    assert not recwarn.list


def test_some_sites(q, x):
    found = qpass.set_bits(q, 2, "1.*")
    assert found == {"0.up.weight": 8, "0.down.weight": 8, "1.up.weight": 2, "1.down.weight": 2}
    few = q(x)
    qpass.set_bits(q, 4, "0.up:linear.0")
    assert qpass.bits_of(q)["0.up.weight"] == 4
    assert not torch.equal(q(x), few)


def test_one_request(q, x):
    whole = q(x)
    with qpass.at_bits(q, 2):
        few = q(x)
        assert set(qpass.bits_of(q).values()) == {2}
        with qpass.at_bits(q, 4, "0.*"):
            assert sorted(set(qpass.bits_of(q).values())) == [2, 4]
        assert torch.equal(q(x), few)
    assert torch.equal(q(x), whole)
    with pytest.raises(ZeroDivisionError), qpass.at_bits(q, 2):
        raise ZeroDivisionError
    assert torch.equal(q(x), whole)
    qpass.set_bits(q, 2)
    assert torch.equal(q(x), few)


def test_requests_of_other_threads_are_not_disturbed(q, x):
    wanted = {}
    for bits in (8, 4, 2):
        with qpass.at_bits(q, bits):
            wanted[bits] = q(x)
    wrong, barrier = [], threading.Barrier(3)

    def serve(bits):
        with qpass.at_bits(q, bits):
            barrier.wait()
            for _ in range(20):
                if not torch.equal(q(x), wanted[bits]):
                    wrong.append(bits)

    threads = [threading.Thread(target=serve, args=(bits,)) for bits in (8, 4, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_has_bits_of_its_own(q, x):
    twin = copy.deepcopy(q)
    qpass.set_bits(q, 2)
    assert set(qpass.bits_of(twin).values()) == {8}
    assert not torch.equal(twin(x), q(x))


def test_a_state_dict_holds_the_bits(model, q, x):
    qpass.set_bits(q, 2, "1.*")
    wanted, state = q(x), {name: t.clone() for name, t in q.state_dict().items()}
    qpass.set_bits(q, 8)
    q.load_state_dict(state)
    assert sorted(set(qpass.bits_of(q).values())) == [2, 8]
    torch.testing.assert_close(q._call_impl(x), wanted, rtol=1e-4, atol=1e-4)


def test_a_saved_model_is_loaded_at_the_bits_it_had(model, q, x, tmp_path):
    qpass.set_bits(q, 4)
    qpass.set_bits(q, 2, "1.up")
    wanted, bits = q(x), qpass.bits_of(q)
    for path in (tmp_path / "m.safetensors", f"{tmp_path}/folder/"):
        qpass.save(q, path)
        loaded = qpass.load(path, copy.deepcopy(model), backend=runtime_of(q).backend.name)
        assert qpass.bits_of(loaded) == bits
        assert torch.equal(loaded(x), wanted)
        qpass.set_bits(loaded, 8)
        qpass.set_bits(q, 8)
        assert torch.equal(loaded(x), q(x))
        qpass.set_bits(q, 4)
        qpass.set_bits(q, 2, "1.up")


def test_a_plan_is_saved_with_its_nested_weights(model, x, tmp_path):
    plan = qpass.analyze(model, SCHEME, x)
    plan.save(tmp_path / "plan")
    again = qpass.Plan.load(tmp_path / "plan")
    assert str(again) == str(plan)
    a, b = (qpass.compile(model, plan=p, backend="reference") for p in (plan, again))
    for bits in (8, 4, 2):
        qpass.set_bits(a, bits)
        qpass.set_bits(b, bits)
        assert torch.equal(a(x), b(x))


def test_another_dtype_leaves_the_bits_on_the_cpu(model, x):
    q = qpass.compile(copy.deepcopy(model).to(torch.bfloat16), SCHEME, backend="reference")
    qpass.set_bits(q, 4)
    assert q(x.to(torch.bfloat16)).dtype == torch.bfloat16
    q._apply(lambda t: t.to(torch.float16) if t.is_floating_point() else t.clone())
    assert set(qpass.bits_of(q).values()) == {4}


def test_tied_weights_have_one_width(x):
    torch.manual_seed(2)
    tied = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    tied[1].weight = tied[0].weight
    q = qpass.compile(tied, SCHEME, x, backend="reference")
    assert qpass.set_bits(q, 2, "1") == {"0.weight": 2, "1.weight": 2}


def test_calibration_rounds_each_width_as_it_is_alone(model, x):
    batches = [torch.randn(40, 32) for _ in range(3)]
    plan = qpass.analyze(model, SCHEME, x, iter(batches))
    q = qpass.compile(model, plan=plan, backend="reference")
    for bits in (4, 2):
        other = qpass.compile(model, f"w{bits}a16-g32,bias=none", x, batches, backend="reference")
        qpass.set_bits(q, bits)
        torch.testing.assert_close(q(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("bits", "sites", "match"),
    [
        (3, "*", "0.up.weight is packed to be read at 8, 4, 2 bits, not 3"),
        (16, "*", "not 16"),
        (True, "*", "not True"),
        ("4", "*", "not '4'"),
        (4, "2.*", "no nested weight is read by a site that matches '2.*'"),
        (4, "0.upp", "Did you mean '0.up'"),
    ],
)
def test_bad_input(q, bits, sites, match):
    for call in (lambda: qpass.set_bits(q, bits, sites), lambda: qpass.at_bits(q, bits, sites).__enter__()):
        with pytest.raises(QpassError, match=match):
            call()
    assert set(qpass.bits_of(q).values()) == {8}


def test_models_without_nested_weights(model, x):
    with pytest.raises(QpassError, match=r"has float weights; compile it first.*w\{8,4,2\}a16"):
        qpass.set_bits(model, 4)
    single = qpass.compile(model, "w4a16-g32", x, backend="reference")
    with pytest.raises(QpassError, match="have one width"):
        qpass.set_bits(single, 4)
    with pytest.raises(QpassError, match="is a str"):
        qpass.set_bits("model", 4)


def test_a_program_is_read_at_the_bits_of_its_export(model, q, x, tmp_path):
    for bits in (4, 8):
        qpass.set_bits(q, bits)
        qpass.export(q, x, tmp_path / f"{bits}.pt2")
        program = torch.export.load(tmp_path / f"{bits}.pt2").module()
        qpass.set_bits(q, 2)
        with torch.no_grad():
            found = program(x)
        qpass.set_bits(q, bits)
        torch.testing.assert_close(found, q(x), rtol=1e-4, atol=1e-4)


def test_what_has_one_width_refuses(model, q, x, tmp_path):
    site = r"0.up:linear.0: its weight is u\{8,4,2\}/g32"
    with pytest.raises(QpassError, match=f"{site}.*ONNX"):
        qpass.export(q, x, tmp_path / "m.onnx")
    decision = runtime_of(q).plan["0.up:linear.0"]
    assert "the format has one width" in why_not_compressed(decision, q[0].up, [], None)
    with pytest.raises(QpassError, match=f"{site}.*Training"):
        qpass.prepare_qat(model, SCHEME, x)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="so nobody could choose their bits"):
        torch.compile(copy.deepcopy(model), backend="qpass", options={"scheme": SCHEME})(x)
    with pytest.raises(QpassError, match=f"{site}.*reduce-overhead"):
        qpass.compile(model, SCHEME, x, mode="reduce-overhead")


def test_the_report_says_what_is_read(q, x):
    qpass.set_bits(q, 2, "1.*")
    report = qpass.inspect(q)
    assert "read now: 2 weights at 8 bits, 2 weights at 2 bits (of 8, 4, 2)" in str(report)
    text = report.explain("1.up")
    assert "u{8,4,2}/g32" in text

"""`.pt2` files: read by torch with qpass alone, integers inside, equal to the model, lowered again where they are read."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.export import Dim

import qpass
from qpass.errors import QpassError
from qpass.interchange import pt2
from tests.models import FeedForward, batches, encoder, relative
from tests.models_transformers import NAMED
from tests.models_vision import build
from tests.test_layers import ROOT

MODELS = {name: (make, inputs) for name, make, inputs in NAMED}
ROUNDING = 1e-5  # float32 sums in another order; half a step of a code does not come up at these seeds


def compiled(model, scheme, example, backend="reference", **options):
    calibration = [example] if qpass.Scheme.parse(scheme).needs_calibration else None
    return qpass.compile(model, scheme, example, calibration, backend=backend, **options)


def loaded(path):
    return torch.export.load(path).module()


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16", "w4a16-g32", "w4a8", "fp8"])
def test_runs_as_the_model_at_any_batch(tmp_path, scheme):
    x, other = batches(2)
    q = compiled(encoder(), scheme, x)
    qpass.export(q, x, tmp_path / "m.pt2", dynamic_shapes={"input": {0: Dim("batch")}})
    program = loaded(tmp_path / "m.pt2")
    for value in (x, torch.cat([other, x])):
        assert relative(program(value), q(value)) < ROUNDING
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]


@pytest.mark.parametrize("name", ["resnet", "unet"])
def test_convolutions(tmp_path, name):
    model, draw = build(name)
    x = draw(2)
    q = compiled(model, "w8a8", x)
    qpass.export(q, x, tmp_path / "m.pt2")
    assert relative(loaded(tmp_path / "m.pt2")(x), q(x)) < ROUNDING


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16-g64"])
def test_weights_are_integers(tmp_path, scheme):
    model = nn.Sequential(nn.Linear(512, 1024), nn.GELU(), nn.Linear(1024, 512)).eval()
    x = torch.randn(3, 512)
    qpass.export(compiled(model, scheme, x), x, tmp_path / "m.pt2")
    program = torch.export.load(tmp_path / "m.pt2")
    large = [t for t in program.state_dict.values() if t.numel() >= 512 * 1024 // (2 if "w4" in scheme else 1)]
    assert {t.dtype for t in large} <= {torch.int8, torch.uint8}
    assert len(large) == 2
    float_bytes = sum(p.nbytes for p in model.parameters())
    assert (tmp_path / "m.pt2").stat().st_size < (0.17 if "w4" in scheme else 0.3) * float_bytes
    assert any("qpass.dequantize" in str(node.target) for node in program.graph.nodes)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "scheme"), [("resnet", "w8a8"), ("encoder", "w8a8-dynamic")])
def test_the_backend_lowers_a_program_as_it_lowers_the_model(tmp_path, name, scheme):
    model, draw = (encoder(), lambda: batches(1)[0]) if name == "encoder" else build(name)
    x = draw()
    q = compiled(model, scheme, x, backend="auto")
    qpass.export(q, x, tmp_path / "m.pt2")
    with torch.no_grad():
        again = torch.compile(loaded(tmp_path / "m.pt2"), backend="qpass")(x)
    assert torch.equal(again, q(x))


def test_a_site_left_float_stays_float_when_lowered_again(tmp_path):
    x = batches(1)[0]
    q = compiled(encoder(), "w8a8-dynamic", x, recipe={"0.*": None})
    qpass.export(q, x, tmp_path / "m.pt2")
    again = torch.compile(loaded(tmp_path / "m.pt2"), backend="qpass", options={"backend": "reference"})
    with torch.no_grad():
        assert relative(again(x), q(x)) < 1e-6


READ = """
import sys, torch, qpass
program = torch.export.load(sys.argv[1]).module()
inputs, wanted = torch.load(sys.argv[2])
with torch.no_grad():
    found = program(**inputs)
assert type(found) is dict and found.keys() == wanted.keys(), found.keys()
for key, value in wanted.items():
    assert float((found[key] - value).norm() / value.norm()) < 1e-5, key
assert "transformers" not in sys.modules
"""


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_reader_needs_torch_and_qpass_alone(tmp_path, name):
    make, inputs = MODELS[name]
    example = inputs() | ({} if name == "bert" else {"use_cache": False})
    q = compiled(make().eval(), "w8a8", example)
    qpass.export(q, example, tmp_path / "m.pt2")
    wanted = {key: value for key, value in q(**example).items() if isinstance(value, torch.Tensor)}
    torch.save((example, wanted), tmp_path / "wanted")
    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path / "m.pt2", tmp_path / "wanted"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT).encode() not in (tmp_path / "m.pt2").read_bytes()


def test_the_model_still_runs_compiled(tmp_path):
    x = batches(1)[0]
    q = compiled(encoder(), "w8a8", x)
    call, before = q._compiled_call_impl, q(x)
    qpass.export(q, x, tmp_path / "m.pt2")
    assert q._compiled_call_impl is call
    assert torch.equal(q(x), before)


class Branching(FeedForward):
    """Goes another way by the values it is given."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def cached():
    make, inputs = MODELS["llama"]
    return make().eval(), inputs()


X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))
# what is wrong, the model, arguments beside it, what the error says
WRONG = (
    (
        "float model",
        lambda: FeedForward().eval(),
        (X, "m.pt2"),
        "FeedForward was not compiled by qpass; compile it first",
    ),
    ("no model", lambda: 3, (X, "m.pt2"), "model is a int; expected a model that qpass.compile gave back"),
    ("a directory", None, (X, ""), "is a directory; name a file in it"),
    (
        "another suffix",
        None,
        (X, "m.pt"),
        r"ends in '.pt'; qpass.export writes .pt2 or .onnx files. Did you mean '.pt2'",
    ),
    ("no such folder", None, (X, "no/m.pt2"), "there is no directory .*no; make it first"),
    ("too many inputs", None, ((X, X), "m.pt2"), r"example_inputs does not fit FeedForward.forward\(x\)"),
    ("an unknown input", None, ({"y": X}, "m.pt2"), "example_inputs does not fit FeedForward.forward"),
    ("a wrong width", None, (torch.randn(4, 6, 31), "m.pt2"), "torch.export cannot capture FeedForward with these"),
    (
        "a wrong name",
        None,
        (X, "m.pt2", {"y": {0: Dim("b")}}),
        "torch.export cannot capture FeedForward with these .*dynamic",
    ),
)


@pytest.mark.parametrize(("make", "given", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_refused(tmp_path, make, given, message):
    q = make() if make else compiled(FeedForward().eval(), "w8a8", X)
    example, name, *rest = given
    with pytest.raises(QpassError, match=message):
        qpass.export(q, example, tmp_path / name, *rest)
    assert not list(tmp_path.iterdir())


def test_a_branch_on_data_is_refused(tmp_path):
    q = compiled(Branching().eval(), "w8a8-dynamic", X)
    with pytest.raises(QpassError, match="cannot capture Branching with these"):
        qpass.export(q, X, tmp_path / "m.pt2")


def test_a_cache_among_the_outputs_is_refused(tmp_path):
    model, example = cached()
    q = compiled(model, "w8a8-dynamic", example)
    with pytest.raises(QpassError, match=r"returns a DynamicCache.*use_cache=False"):
        qpass.export(q, example, tmp_path / "m.pt2")


def test_a_changed_model_is_refused(tmp_path):
    q = compiled(FeedForward().eval(), "w8a8", X)
    q.norm = nn.LayerNorm(32)
    with pytest.raises(QpassError, match="was replaced or written to after"):
        qpass.export(q, X, tmp_path / "m.pt2")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    q, path = compiled(FeedForward().eval(), "w8a8", X), tmp_path / "m.pt2"
    qpass.export(q, X, path)
    old = path.read_bytes()

    def full(program, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pt2.torch.export, "save", full)
    with pytest.raises(QpassError, match=r"cannot write .*m.pt2: .*No space left on device; free some space"):
        qpass.export(q, X, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]

"""ONNX files, run by onnxruntime: equal to the model, integers inside and integer products made of them."""

import collections
import importlib.util
import statistics

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

import qpass
from qpass.backends import cpu
from qpass.errors import QpassError
from qpass.interchange import onnx_qdq
from qpass.interchange.program import qdq_program
from tests.models import Attention, FeedForward, batches, encoder, relative
from tests.models_transformers import NAMED
from tests.models_vision import build

MODELS = {name: (make, inputs) for name, make, inputs in NAMED}
ROUNDING = 1e-4


def mlp():
    return nn.Sequential(
        nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 48), nn.GELU(), nn.Linear(48, 8, bias=False)
    ).eval()


def compiled(model, scheme, example, **options):
    """With attention and residuals in the model's own dtype, as the file has them."""
    calibration = [example] if qpass.Scheme.parse(scheme).needs_calibration else None
    plan = qpass.analyze(model, scheme, example, calibration, **options)
    plan.attention = None
    plan.decisions = {name: d for name, d in plan.decisions.items() if d.operation != "operand"}
    return qpass.compile(model, plan=plan, backend="reference")


class Reader:
    """onnxruntime on CPU. run(inputs): outputs by name; optimized: how often each kind of node is in what it runs."""

    def __init__(self, path):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(path.with_suffix(".optimized"))
        options.log_severity_level = 3
        if cpu.saturates():  # so do its products of u8 by s8 (docs/export.md): this computes them in float
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # else it quantizes the inputs of products whose weights alone are integers
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [each.name for each in self.session.get_inputs()]
        self.outputs = [each.name for each in self.session.get_outputs()]
        nodes = onnx.load(options.optimized_model_filepath).graph.node
        self.optimized = collections.Counter(node.op_type for node in nodes)

    def run(self, *args, **kwargs):
        given = dict(zip(self.inputs, args, strict=False)) | kwargs
        found = self.session.run(None, {name: given[name].numpy() for name in self.inputs})
        return dict(zip(self.outputs, map(torch.from_numpy, found), strict=True))


def test_an_mlp_at_any_batch_runs_on_integer_products(tmp_path):
    x, path = torch.randn(5, 64), tmp_path / "m.onnx"
    q = compiled(mlp(), "w8a8", x)
    qpass.export(q, x, path, dynamic_shapes={"input": {0: Dim("batch")}})
    reader = Reader(path)
    assert (reader.inputs, reader.outputs) == (["input"], ["output"])
    for value in (x, torch.randn(9, 64)):
        assert relative(reader.run(value)["output"], q(value)) < ROUNDING
    if not cpu.saturates():
        assert reader.optimized["MatMulIntegerToFloat"] == 3
        assert not reader.optimized["MatMul"] + reader.optimized["Gemm"]


def test_the_file_is_qdq_with_integer_weights(tmp_path):
    x, path = torch.randn(5, 64), tmp_path / "m.onnx"
    qpass.export(compiled(mlp(), "w8a8", x), x, path)
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(each.domain, each.version) for each in model.opset_import if not each.domain] == [("", onnx_qdq.OPSET)]
    count = collections.Counter(node.op_type for node in model.graph.node)
    assert (count["QuantizeLinear"], count["DequantizeLinear"]) == (3, 6)
    weights = [t.data_type for t in model.graph.initializer if len(t.dims) == 2]
    assert weights == [onnx.TensorProto.INT8] * 3
    zeros = {t.data_type for t in model.graph.initializer if "zero" in t.name}
    assert zeros == {onnx.TensorProto.UINT8}


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_an_encoder(tmp_path, scheme):
    x, path = batches(1)[0], tmp_path / "m.onnx"
    q = compiled(encoder(), scheme, x)
    qpass.export(q, x, path)
    assert relative(Reader(path).run(x)["output"], q(x)) < ROUNDING


CODE = 1e-2  # what one code of an early layer, on the other side of a tie, makes of an image


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_convolutions(tmp_path, name):
    """Biases in int32, as onnxruntime wants them, move some codes by one: by less than what quantizing costs."""
    model, draw = build(name)
    x, path = draw(4), tmp_path / "m.onnx"
    q = compiled(model, "w8a8", x)
    qpass.export(q, x, path)
    reader = Reader(path)
    found = reader.run(x)["output"]
    plan = onnx_qdq.without_bfloat16(qpass.inspect(q).plan)
    with torch.no_grad():
        same = qdq_program(q, x, None, plan, onnx_qdq.PASSES, onnx_qdq.to_onnx_form).module()(x)
        errors = [relative(a, b) for a, b in zip(found, same, strict=True)]
        assert statistics.median_low(errors) < ROUNDING, errors
        assert max(errors) < CODE, errors
        assert relative(found, q(x)) < relative(q(x), model(x))
    assert torch.equal(found.argmax(-1), q(x).argmax(-1))
    assert cpu.saturates() or reader.optimized["QLinearConv"] >= 3


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_transformers(tmp_path, name):
    make, inputs = MODELS[name]
    model, example, path = make().eval(), inputs(), tmp_path / "m.onnx"
    q = compiled(model, "w8a8", example)
    qpass.export(q, example, path)
    found, wanted = Reader(path).run(**example), q(**example)
    assert found.keys() == wanted.keys()
    for key, value in found.items():
        assert relative(value, wanted[key]) < ROUNDING


def test_a_language_model_at_any_length(tmp_path):
    make, inputs = MODELS["llama"]
    example, path = inputs() | {"use_cache": False}, tmp_path / "m.onnx"
    q = compiled(make().eval(), "w8a8", example)
    shapes = {"input_ids": {0: Dim("batch", min=1), 1: Dim("length", min=2, max=64)}, "use_cache": None}
    qpass.export(q, example, path, dynamic_shapes=shapes)
    for ids in (example["input_ids"], inputs(3, 11)["input_ids"]):
        assert relative(Reader(path).run(input_ids=ids)["logits"], q(input_ids=ids, use_cache=False).logits) < ROUNDING


class Exponential(nn.Module):
    """An operation that torch.onnx cannot translate."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, x):
        return torch.linalg.matrix_exp(self.mix(x))


class Within(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))
# what ONNX cannot express, the model, scheme, example, what the error says
REFUSED = (
    (
        "scales at run time",
        FeedForward,
        "w8a8-dynamic",
        X,
        "^up:linear.0: its input gets its scale at run time.*u8/token",
    ),
    (
        "groups",
        FeedForward,
        "w4a16-g32",
        X,
        "^up:linear.0: type u4/g32 has no QuantizeLinear in opset 18; compile with",
    ),
    ("few bits", FeedForward, "w8a6", X, "^up:linear.0: its input is u6/t, and QuantizeLinear fills 8 bits"),
    ("8-bit floats", Attention, "fp8-static", X, "^q:linear.0: type e4m3/.* has no QuantizeLinear in opset 18"),
    (
        "an operation",
        lambda: Within(Exponential()),
        "w8a8",
        X[0, :, :8].repeat(2, 4, 1)[:, :8],
        "^inner: aten.linalg_matrix_exp.default has no translation to ONNX; leave it out",
    ),
)


@pytest.mark.parametrize(("make", "scheme", "x", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, make, scheme, x, message):
    q = compiled(make().eval(), scheme, x)
    with pytest.raises(QpassError, match=message):
        qpass.export(q, x, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_without_the_packages_says_what_to_install(tmp_path, monkeypatch):
    q, found = compiled(FeedForward().eval(), "w8a8", X), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else found(name))
    with pytest.raises(QpassError, match=r"an ONNX file needs onnxscript: pip install 'qpass-torch\[onnx\]'"):
        qpass.export(q, X, tmp_path / "m.onnx")


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    q, path = compiled(FeedForward().eval(), "w8a8", X), tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def full(self, part, **options):
        part.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", full)
    with pytest.raises(QpassError, match=r"cannot write .*m.onnx: .*No space left on device; free some space"):
        qpass.export(q, X, path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]

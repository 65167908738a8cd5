"""The triton backend on CPU tensors: the graph it makes, and that it computes what the reference backend does."""

import pytest
import torch
from torch import nn

import qpass
from qpass.backends import backend_named, triton
from qpass.backends.triton import package

SCHEMES = (
    "w8a8",
    "w8a8-dynamic",
    "w8a16",
    "w4a16",
    "w4a16-g32",
    "w4a16-c",
    "w4a8",
    "w4a8-dynamic",
    "w4a8-c",
    "w3a8",
    "w6a8-dynamic",
    "fp8",
    "fp8-static",
)


def sqnr_db(wanted, found):
    """Signal to noise of a result, in decibels."""
    noise = (wanted.double() - found.double()).norm().clamp(min=1e-30)
    return float(20 * torch.log10(wanted.double().norm() / noise))


class Block(nn.Module):
    """A norm, a gated product and a projection added to the input: what a transformer's layer is made of."""

    def __init__(self, width=128, inner=256, norm=nn.RMSNorm, act=nn.functional.silu, bias=False):
        super().__init__()
        self.norm = norm(width)
        self.gate, self.up = nn.Linear(width, inner, bias=bias), nn.Linear(width, inner, bias=bias)
        self.down, self.act = nn.Linear(inner, width, bias=bias), act

    def forward(self, x):
        h = self.norm(x)
        return x + self.down(self.act(self.gate(h)) * self.up(h))


class Mlp(nn.Module):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.norm, self.up, self.down = norm(96), nn.Linear(96, 160), nn.Linear(160, 96)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


def compiled(model, scheme, x, backend="triton", **options):
    return qpass.compile(model, scheme=scheme, example_inputs=x, calibration=[x], backend=backend, **options)


def lowered(q):
    return qpass.inspect(q).graph("layout")


def same(model, scheme, x, **options):
    """The triton and the reference backend, as SQNR of one to the other, and the triton graph."""
    model = model.to(x.dtype).eval()
    plan = qpass.analyze(model, scheme, example_inputs=x, calibration=[x], **options)
    found, wanted = (qpass.compile(model, plan=plan, example_inputs=x, backend=b) for b in ("triton", "reference"))
    with torch.no_grad():
        ours, theirs, real = found(x), wanted(x), model(x)
    assert ours.dtype == theirs.dtype == x.dtype
    return sqnr_db(theirs, ours), sqnr_db(real, ours), lowered(found)


CASES = [(scheme, torch.bfloat16) for scheme in SCHEMES]
CASES += [(s, d) for s in ("w8a8", "w8a8-dynamic", "w4a16", "w4a8", "fp8") for d in (torch.float16, torch.float32)]


@pytest.mark.parametrize(("scheme", "dtype"), CASES, ids=str)
def test_schemes(scheme, dtype):
    x = torch.randn(2, 7, 128, dtype=dtype)
    to_reference, to_float, graph = same(Block(bias=True), scheme, x)
    assert to_reference > 35, graph
    assert to_float > (12 if "w3" in scheme or "w4" in scheme else 28)
    packed = "linear(" in graph.replace("qpass.linear(", "").replace("aten.linear(", "")
    assert packed != (scheme.endswith(("a16", "a16-g32", "a16-c")) and dtype is torch.float32)
    assert "to_signed" not in graph
    assert "to_unsigned" not in graph


@pytest.mark.parametrize(
    ("scheme", "calls"),
    [
        ("w8a8", ["norm_quantize", "w8a8_linear", "act_quantize", "w8a8_linear"]),
        ("w8a8-dynamic", ["norm_quantize", "w8a8_linear", "act_quantize", "w8a8_linear"]),
        ("w4a8-dynamic", ["norm_quantize", "w4a8_linear", "act_quantize", "w4a8_linear"]),
    ],
)
def test_what_runs(scheme, calls):
    """Two projections of one input are one launch, and each quantize is part of the kernel in front of it."""
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    _, _, graph = same(Block(), scheme, x)
    found = [line.split("qpass_kernels.")[1].split("(")[0] for line in graph.splitlines() if "qpass_kernels." in line]
    assert found == calls, graph


def test_codes_from_one_linear_to_the_next():
    x = torch.randn(5, 96, dtype=torch.bfloat16)
    _, _, graph = same(Mlp(), "w8a8", x)
    first, second = (line for line in graph.splitlines() if "w8a8_linear(" in line)
    assert "gelu" in first
    assert first.split("#")[1].split()[0].startswith("int8[")
    assert "int8" not in second.split("#")[1]


class Llama(nn.Module):
    """The norm as transformers writes it."""

    def __init__(self, width=96):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.weight * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("norm", [Llama, nn.LayerNorm, nn.RMSNorm], ids=lambda n: n.__name__)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_norms(norm, scheme, dtype):
    x = torch.randn(4, 96, dtype=dtype) * torch.logspace(-3, 2, 4)[:, None].to(dtype)
    to_reference, _, graph = same(Mlp(norm), scheme, x)
    assert to_reference > 35
    assert "norm_quantize" in graph


class TwoReaders(Mlp):
    def forward(self, x):
        h = self.norm(x)
        return h + self.down(nn.functional.gelu(self.up(h)))


def test_a_norm_that_others_read_too():
    x = torch.randn(4, 96, dtype=torch.bfloat16)
    to_reference, _, graph = same(TwoReaders(), "w8a8-dynamic", x)
    assert to_reference > 35
    assert graph.count("norm_quantize") == 1
    assert "layer_norm" not in graph


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_other_batches(rows):
    model = Block().to(torch.bfloat16).eval()
    x = torch.randn(6, 128, dtype=torch.bfloat16)
    q, r = (compiled(model, "w8a8-dynamic", x, backend) for backend in ("triton", "reference"))
    other = torch.randn(rows, 128, dtype=torch.bfloat16)
    assert sqnr_db(r(other), q(other)) > 35
    assert q(torch.randn(0, 128, dtype=torch.bfloat16)).shape == (0, 128)


def test_what_stays(monkeypatch):
    """A GPU that is too old keeps the references, and the report says why."""
    monkeypatch.setattr(package, "capability", lambda device: (7, 5))
    x = torch.randn(3, 128, dtype=torch.bfloat16)
    q = compiled(Block().to(torch.bfloat16).eval(), "w8a8-dynamic", x)
    assert "this GPU has compute capability 7.5; quantized kernels need 8.0" in str(qpass.inspect(q))
    assert "qpass.linear" in lowered(q)


@pytest.mark.parametrize(
    ("scheme", "dtype", "says"),
    [
        ("w4a16", torch.float32, "multiply bfloat16 and float16 by packed weights, not torch.float32"),
        ("w8a4", torch.bfloat16, "codes of fewer bits read as bytes: "),
    ],
)
def test_sentences(scheme, dtype, says):
    x = torch.randn(3, 128, dtype=dtype)
    q = compiled(Block().to(dtype).eval(), scheme, x)
    assert says in str(qpass.inspect(q))


def test_without_triton(monkeypatch):
    monkeypatch.setattr(package.importlib.util, "find_spec", lambda name: None)
    package.unavailable.cache_clear()
    try:
        with pytest.raises(qpass.QpassError, match=r"'triton' cannot run here: triton is not installed; pip install"):
            backend_named("triton", torch.device("cpu"))
    finally:
        monkeypatch.undo()
        package.unavailable.cache_clear()


def test_backend_by_device():
    assert backend_named("auto", torch.device("cuda")).name == "triton"
    assert backend_named("auto", torch.device("meta")).name == "reference"
    with pytest.raises(qpass.QpassError, match="its kernels run on cuda, their references on cpu"):
        backend_named("triton", torch.device("meta"))
    assert triton.BACKEND.unavailable() is None

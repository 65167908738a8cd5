"""Codes of few bits, two a byte: what a model keeps of a packed weight, and what it is read as."""

import pytest
import torch
from torch import nn

import qpass
from qpass.install import packed_weights
from qpass.packing import halved, halves, pack, whole
from qpass.qtype import QType
from qpass.solvers.rtn import round_to_nearest
from tests.models import relative


@pytest.mark.parametrize("text", ["u2/g4", "i2/c0", "u3/c0", "i3/g4", "u4/g4", "i4/c0"])
@pytest.mark.parametrize("shape", [(1, 4), (3, 8), (5, 12), (0, 4)])
def test_there_and_back(text, shape):
    qtype = QType.parse(text)
    codes = torch.randint(qtype.qmin, qtype.qmax + 1, shape).to(qtype.storage)
    data = halved(codes)
    assert data.shape == (shape[0], shape[1] // 2)
    assert data.dtype is torch.uint8
    assert torch.equal(whole(data, qtype), codes)
    found = torch.ops.qpass.whole(data, text)
    assert torch.equal(found, codes)
    assert found.dtype is qtype.storage
    torch.library.opcheck(torch.ops.qpass.whole.default, (data, text))


def test_extremes():
    codes = torch.tensor([[-8, 7, -1, 0]], dtype=torch.int8)
    assert whole(halved(codes), QType.parse("i4/c0")).tolist() == codes.tolist()


def test_which_codes_share_a_byte():
    codes = torch.zeros(4, 6, dtype=torch.int8)
    assert halves(codes, QType.parse("i4/c0"))
    assert not halves(codes, QType.parse("i5/c0"))
    assert not halves(codes[:, :5], QType.parse("i4/c0"))
    assert not halves(codes[..., None, None], QType.parse("i4/c0"))


def stored(module, name):
    forms = module.get_submodule(name).parametrizations.weight
    return sum(t.nbytes for t in forms.buffers())


@pytest.mark.parametrize(
    ("scheme", "most"), [("w4a16", 0.27), ("w8a16", 0.51), ("w2a16-g128", 0.27), ("w4a8-dynamic", 0.27)]
)
def test_storage_beside_bfloat16(scheme, most):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 256, bias=False)).to(torch.bfloat16).eval()
    q = qpass.compile(model, scheme, backend="reference")
    ratio = stored(q, "0") / (1024 * 256 * 2)
    assert ratio <= most
    plan = qpass.analyze(model, scheme)
    assert plan["0:linear.0"].packed.nbytes == stored(q, "0")


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "scheme", ["w4a16-g32", "w4a16-c", "w2a16-g32", "w4a8-g32-dynamic", "w4a8-c-dynamic", "w3a16-g30"]
)
def test_compiled_equals_what_the_codes_stand_for(scheme, backend):
    torch.manual_seed(0)
    width = 90 if "g30" in scheme else 96
    model = nn.Sequential(nn.Linear(width, 33), nn.GELU(), nn.Linear(33, 32), nn.Linear(32, 7)).eval()
    x = torch.randn(5, width)
    plan = qpass.analyze(model, scheme)
    q = qpass.compile(model, plan=plan, backend=backend)
    assert packed_weights(q).keys() == {"0.weight", "2.weight", "3.weight"}
    twin = nn.Sequential(*model)
    for name, form in packed_weights(q).items():
        module, _, _ = name.partition(".")
        d = plan[f"{module}:linear.0"]
        held = q.get_submodule(module).parametrizations.weight.original0
        assert held.dtype is (torch.uint8 if form.halves else d.packed.data.dtype)
        assert torch.equal(whole(held, d.packed.type) if form.halves else held, d.packed.data)
    wanted = q._call_impl(x)  # the eager model, from its packed weights
    tolerance = 2e-2 if scheme.endswith("dynamic") else 1e-5
    assert relative(q(x), wanted) < tolerance
    assert relative(q(x), twin(x)) < 1


def test_a_table_of_few_bits_is_looked_up_in_halves():
    """The op that unpacks reads the rows that were looked up, not the table."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(500, 32), nn.Linear(32, 4)

        def forward(self, ids):
            return self.out(self.table(ids))

    torch.manual_seed(0)
    model, ids = Tokens().eval(), torch.randint(0, 500, (3, 7))
    q = qpass.compile(model, "w4a16-g32", ids, recipe={"table": "w4a16-g32"}, backend="reference")
    text = qpass.inspect(q).graph("lower")
    unpacking = [line for line in text.splitlines() if "qpass.whole" in line]
    assert unpacking, text
    assert relative(q(ids), q._call_impl(ids)) < 1e-5
    assert all("500" not in line.split("=")[0] for line in unpacking), unpacking


def test_nbytes_counts_what_is_kept():
    weight = torch.randn(8, 64)
    four, eight = (round_to_nearest(weight, QType.parse(text)) for text in ("u4/g32", "i8/c0"))
    assert four.nbytes == 8 * 32 + 8 * 2 * (4 + 1)
    assert eight.nbytes == 8 * 64 + 8 * 4
    odd = pack(torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), QType.parse("i4/c0"))
    assert odd.nbytes == 6 + 8

"""True-sequential calibration: each linear is rounded on what the rounded ones before it make of the batches."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional

import qpass
from qpass import affine
from qpass.observations import Observed
from qpass.ranges import Range
from qpass.schemes import Scheme
from qpass.solvers.solve import solve
from tests.models import relative


class Stack(nn.Module):
    """Blocks on a stream of values; some channels are large, and all go together."""

    def __init__(self, depth=3, width=64, tied=False):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.ups = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(depth))
        self.downs = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(depth))
        if tied:
            self.ups = nn.ModuleList([self.ups[0]] * depth)

    def forward(self, x):
        for norm, up, down in zip(self.norms, self.ups, self.downs, strict=True):
            x = x + down(functional.gelu(up(norm(x))))
        return x


class Broken(nn.Module):
    """Python between two graphs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Stack(1), Stack(1)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def stack(**options):
    torch.manual_seed(0)
    return Stack(**options).eval()


def data(count=6, lengths=(20,)):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(64, 64, generator=generator) / 8
    shapes = (lengths[i % len(lengths)] for i in range(count))
    return [torch.randn(4, length, 64, generator=generator) @ mixing for length in shapes]


def as_planned(model, plan):
    """The model with its rounded weights in float."""
    twin = copy.deepcopy(model)
    for d in plan.quantized:
        packed = d.packed
        real = affine.dequantize(packed.data, packed.scale, packed.zero, packed.type)
        twin.get_parameter(d.weight).data.copy_(real)
    for name, more in plan.biases.items():
        twin.get_parameter(name).data.add_(more)
    return twin


def test_the_second_linear_is_rounded_on_what_the_first_rounded_one_makes():
    model, batches = stack(depth=1), data()
    plan = qpass.analyze(model, "w3a16-g32", calibration=batches)
    half = as_planned(model, plan)
    read = {}
    for name, net in (("rounded", half), ("float", model)):
        x = torch.cat([functional.gelu(net.ups[0](net.norms[0](b))).flatten(0, 1) for b in batches]).detach()
        read[name] = x
    observed = Observed(Range.empty(channels=128), moment=torch.zeros(128, 128, dtype=torch.float64))
    observed.add(read["rounded"])
    observed.add_drift(read["rounded"], read["float"])
    wanted = solve(
        [model.downs[0].weight.detach()], Scheme.parse("w3a16-g32"), observed, True, False, biased=True
    ).packed[0]
    found = plan["downs.0:linear.0"].packed
    same = (found.data == wanted.data).float().mean()
    assert same > 0.97, same
    once = qpass.analyze(model, "w3a16-g32,sequential=no", calibration=batches)["downs.0:linear.0"].packed
    assert (once.data == wanted.data).float().mean() < 0.9


@pytest.mark.parametrize("scheme", ["w2a16-g32", "w3a16-g32", "w3a16-g32,solver=gptq", "w4a8-g32-dynamic", "w3a8-g32"])
def test_outputs_are_closer_to_float_than_after_one_pass(scheme):
    model, batches = stack(depth=4), data(24)
    fresh = data(40)[24:]
    wanted = torch.cat([model(x) for x in fresh]).detach()
    errors = {}
    for order in ("yes", "no"):
        plan = qpass.analyze(model, f"{scheme},sequential={order}", calibration=batches)
        assert len(plan.quantized) == 8
        compiled = qpass.compile(model, plan=plan, backend="reference")
        errors[order] = relative(torch.cat([compiled(x) for x in fresh]), wanted)
    assert errors["yes"] < 0.95 * errors["no"], errors


def test_batches_of_different_lengths():
    model = stack()
    plan = qpass.analyze(model, "w4a16-g32", calibration=data(6, (7, 20, 1)))
    assert not plan.notes
    assert len(plan.quantized) == 6


def why(model, batches, scheme="w4a16-g32"):
    """The note of a plan made in one pass, which is the plan that was asked to be."""
    plan = qpass.analyze(model, scheme, calibration=batches)
    once = qpass.analyze(model, f"{scheme},sequential=no", calibration=batches)
    assert not once.notes
    for d in once.quantized:
        assert torch.equal(d.packed.data, plan[d.site].packed.data)
    (note,) = plan.notes
    assert note.startswith("calibrated in one pass, on the float model's values: ")
    assert note in plan.summary()
    return note


def test_a_call_of_several_graphs_is_calibrated_in_one_pass_and_says_so():
    assert "captured as 2 graphs" in why(Broken().eval(), data(2))


def test_a_call_that_is_captured_anew_each_time_is_calibrated_in_one_pass_and_says_so():
    model, called = stack(), []
    model.ups[0].register_forward_hook(lambda *args: called.append(len(called)))
    assert "captured anew" in why(model, data(2))
    assert len(called) < 20


def test_a_weight_read_at_several_depths():
    assert "read one weight at different depths" in why(stack(tied=True), data(2))


def test_convolutions():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 32)).eval()
    batches = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    assert "0:conv2d.0 is a convolution" in why(model, batches, "w4a8-g32-dynamic")
    plan = qpass.analyze(model, "w4a8-g32-dynamic", calibration=batches, recipe={"0": None})
    assert not plan.notes


def test_who_is_rounded_in_order():
    asked = ["w4a16", "w2a16-g32", "w4a8-dynamic", "w8a8,sequential=yes", "w3a16,solver=gptq"]
    assert all(Scheme.parse(text).in_order for text in asked)
    not_asked = ["w8a16", "w8a8", "w4a16,sequential=no", "w4a16,solver=rtn", "fp8"]
    assert not any(Scheme.parse(text).in_order for text in not_asked)
    assert str(Scheme.parse("w4a16 sequential=no")) == "w4a16,sequential=no"


def test_the_float_model_is_left_as_it_was_and_no_statistics_are_kept():
    model, batches = stack(), data(2)
    before = copy.deepcopy(model.state_dict())
    plan = qpass.analyze(model, "w4a16-g32", batches[0], batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(d.lo is not None and d.rows == 80 for d in plan)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = data()[rank::2]
    qpass.analyze(stack(), "w3a16-g32", mine[0], mine).save(f"{folder}/plan{rank}")
    dist.destroy_process_group()


def test_two_processes_one_plan(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    whole = qpass.analyze(stack(), "w3a16-g32", data()[0], data())
    first, second = (qpass.Plan.load(tmp_path / f"plan{rank}") for rank in range(2))
    for d in whole.quantized:
        assert torch.equal(first[d.site].packed.data, second[d.site].packed.data)
        assert (d.packed.data == first[d.site].packed.data).float().mean() > 0.99

"""DistributedDataParallel: two processes train a prepared model as one does on both batches."""

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import qpass
from tests.models_training import Gated, grads, loss_of, prepared

STEPS = 2


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, 16, generator=generator) for _ in range(STEPS)]


def model(batch):
    """Prepared on a batch, or by all processes together, each on its own: factors of channels count the rows they saw."""
    torch.manual_seed(0)
    t = prepared(Gated(), "w4a4", batch)
    t.drop.p = 0.0  # processes draw different masks
    return t


def trained(t, call, batches):
    """Gradients of each step."""
    optimizer, seen = torch.optim.SGD(t.parameters(), lr=0.05), []
    for batch in batches:
        optimizer.zero_grad()
        loss_of(call, batch).backward()
        seen.append(grads(t))
        optimizer.step()
    return seen


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    t = model(data()[0].chunk(2)[rank])
    wrapped = DistributedDataParallel(t)
    seen = trained(t, wrapped, [batch.chunk(2)[rank] for batch in data()])
    q = qpass.compile(wrapped.module.eval(), backend="reference")
    torch.save((seen, t.state_dict(), q(data()[0]).detach(), t(data()[0]).detach()), f"{folder}/{rank}")
    dist.destroy_process_group()


def test_two_processes_train_as_one(tmp_path):
    sys.setrecursionlimit(5000)
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / str(rank)) for rank in range(2))
    t = model(data()[0])
    assert t.gate.used[1].factor is not None
    whole = trained(t, t, data())
    for ours, a, b in zip(whole, one[0], two[0], strict=True):
        assert ours.keys() == a.keys() == b.keys()
        assert any("log_step" in name for name in ours)
        for name, grad in ours.items():
            assert torch.equal(a[name], b[name]), name
            torch.testing.assert_close(a[name], grad, rtol=1e-4, atol=1e-6)
    for name, value in t.state_dict().items():
        assert torch.equal(one[1][name], two[1][name]), name
        torch.testing.assert_close(one[1][name], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(one[2], two[2])
    torch.testing.assert_close(one[2], one[3], rtol=1e-4, atol=1e-5)

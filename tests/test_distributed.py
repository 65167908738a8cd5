"""Calibration split over two processes gives the plan of one."""

import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import qpass
from tests.models import FeedForward


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 6, 32, generator=generator) for _ in range(6)]


def model():
    torch.manual_seed(0)
    return FeedForward().eval()


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = data()[rank::2]
    qpass.analyze(model(), "w8a8", mine[0], mine).save(f"{folder}/plan{rank}")
    dist.destroy_process_group()


def test_two_processes_one_plan(tmp_path):
    sys.setrecursionlimit(5000)
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
    torch.set_num_threads(1)
    whole = qpass.analyze(model(), "w8a8", data()[0], data())
    for rank in range(2):
        part = qpass.Plan.load(tmp_path / f"plan{rank}")
        for d in whole:
            other = part[d.site]
            assert (d.lo, d.hi, str(d.input_type)) == (other.lo, other.hi, str(other.input_type))
            assert torch.equal(d.packed.data, other.packed.data)
            assert torch.equal(d.packed.scale, other.packed.scale)
            assert torch.equal(d.input_scale, other.input_scale)
            torch.testing.assert_close(d.bias, other.bias)

"""Chains of convolutions and pools: bit for bit what their kernels give one by one, for every batch and team."""

import threading

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import qpass
from qpass.backends import cpu
from qpass.backends.native import chain
from qpass.backends.native.chain import Step, place
from tests.models_vision import Inverted, ResNet, smooth
from tests.test_native import needs_kernels

pytestmark = pytest.mark.usefixtures("kernels_of_ours")


class Branches(nn.Module):
    """Two images, a residual, a value that a float operator reads in the middle, and channels of a wider image."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(*sizes, 3, padding=1) for sizes in ((3, 24), (24, 24), (24, 8)))
        self.d, self.e = nn.Conv2d(8, 40, 1), nn.Conv2d(40, 6, 5, stride=2, padding=2)

    def forward(self, x, y):
        a = F.relu(self.a(x))
        b = F.max_pool2d(F.relu(self.b(a) + a), 3, 2, 1)
        c = self.c(b)
        d = F.relu6(self.d(c))
        return self.e(d), b.mean((2, 3)), F.relu(self.b(self.a(y)))


def net(kind):
    torch.manual_seed(1)
    if kind == "branches":
        return Branches().eval(), lambda n, size=26: (
            smooth(n, (3, size, size - 3)),
            smooth(n + 1, (3, size, size))[:n],
        )
    made = {
        "resnet": ResNet,
        "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 16, 3), Inverted(16, 16), Inverted(16, 24, 2)),
    }
    return made[kind]().eval(), lambda n, size=33: (smooth(n, (3, size, size)),)


def compiled(kind, join, monkeypatch):
    model, inputs = net(kind)
    made = []

    def joined(gm):
        made.append(chain.join_chains(gm) if join else 0)

    monkeypatch.setattr(cpu, "join_chains", joined)
    q = qpass.compile(model, "w8a8", inputs(2), [inputs(4)], backend="cpu")
    q(*inputs(2))
    return q, inputs, made


def tensors(y):
    return [y] if isinstance(y, torch.Tensor) else list(y)


@needs_kernels
@pytest.mark.parametrize("kind", ["branches", "resnet", "depthwise"])
def test_equal_to_single_calls(kind, monkeypatch):
    """Those of one thread: the front end captures a model anew for each number of threads."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single, inputs, _ = compiled(kind, False, monkeypatch)
        batches = [inputs(batch, size) for batch, size in ((1, 33), (2, 33), (3, 33), (5, 47), (8, 33))]
        wanted = [tensors(single(*x)) for x in batches]
        q, _, made = compiled(kind, True, monkeypatch)
        assert sum(made) >= 1
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for x, values in zip(batches, wanted, strict=True):
                for found, value in zip(tensors(q(*x)), values, strict=True):
                    assert torch.equal(found, value)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_threads_of_python_do_not_share_a_buffer(monkeypatch):
    q, inputs, _ = compiled("resnet", True, monkeypatch)
    x = [inputs(3, 33 + i)[0] + i for i in range(4)]
    wanted, found = [q(v) for v in x], [[] for _ in x]

    def serve(i):
        found[i] += [q(x[i]) for _ in range(20)]

    workers = [threading.Thread(target=serve, args=(i,)) for i in range(len(x))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for some, one in zip(found, wanted, strict=True):
        assert len(some) == 20
        assert all(torch.equal(y, one) for y in some)


@needs_kernels
def test_no_memory_is_an_error(monkeypatch):
    functions = chain._function
    monkeypatch.setattr(chain, "_function", lambda name: (lambda *_: 1) if name.endswith("run") else functions(name))
    with pytest.raises(MemoryError, match="a smaller batch needs less"):
        compiled("resnet", True, monkeypatch)


def test_place():
    """Values that are alive at once do not overlap; the others share."""
    chained = [Step(chain.POOL, None, f"v{i}", "v1" if i == 3 else None, f"v{i + 1}", torch.uint8) for i in range(6)]
    sizes = {f"v{i}": 1000 * (i % 3 + 1) for i in range(1, 6)}
    offsets, room = place(chained, sizes)
    alive = {"v1": (0, 3), "v2": (1, 2), "v3": (2, 3), "v4": (3, 4), "v5": (4, 5)}
    for a, (born, last) in alive.items():
        for b, (other_born, other_last) in alive.items():
            if a < b and born <= other_last and other_born <= last:
                assert offsets[a] + sizes[a] <= offsets[b] or offsets[b] + sizes[b] <= offsets[a]
    assert all(offset % 64 == 0 and offset + sizes[name] <= room for name, offset in offsets.items())
    assert room < sum(sizes.values())


@needs_kernels
def test_what_reads_a_chain_comes_behind_it():
    """A reader between two steps moves behind the call; a step that needs what it makes begins another chain."""

    def step(graph, x):
        node = graph.call_function(torch.ops.qpass.packed_max_pool.default, (x, [3, 3], [1, 1], [1, 1], [1, 1], False))
        node.meta["val"] = torch.empty(2, 3, 8, 8, dtype=torch.uint8)
        return node

    graph = fx.Graph()
    x = graph.placeholder("x")
    a = step(graph, x)
    read = graph.call_function(torch.add, (a, 1))
    free = graph.call_function(torch.add, (x, 1))
    b = step(graph, step(graph, a))
    both = graph.call_function(torch.add, (read, free))
    c = step(graph, step(graph, both))
    graph.output((b, c))
    gm = fx.GraphModule(nn.Module(), graph)
    image = torch.randint(0, 200, (2, 3, 14, 14), dtype=torch.uint8)
    wanted = fx.Interpreter(gm).run(image)
    assert chain.join_chains(gm) == 2
    named = [n.name.split("_")[0] for n in gm.graph.nodes if n.op == "call_function"]
    assert [name for name in named if name != "getitem"] == ["add", "chain", "add", "add", "chain"]
    for found, one in zip(fx.Interpreter(gm).run(image), wanted, strict=True):
        assert torch.equal(found, one)

"""What watching costs: a share of the time, nobody who waits, and nothing once it is over."""

import threading
import time

import pytest
import torch

import qpass
from qpass.runtime import runtime_of
from qpass.serving.sampling import Budget
from tests.models import encoder
from tests.test_monitor import compiled


@pytest.fixture
def q():
    return compiled(encoder())


def test_the_budget_is_kept_and_looks_are_spread():
    """A clock of our own: calls of 1 ms in a rhythm of 10, looks of 7 ms."""
    budget, looked = Budget(0.02), []
    for i in range(20000):
        if budget.due():
            looked.append(i)
            budget.served(0.001, 0.007)
        else:
            budget.served(0.001)
        assert budget.looking <= 0.02 * budget.serving + 1e-9
    assert len(looked) > 20000 * 0.02 / 7 * 0.7
    beats = [sum(i % 10 == k for i in looked) for k in range(10)]
    assert min(beats) > 0
    assert max(beats) < len(looked) / 4


def test_threads_serve_while_one_looks(q):
    """Nobody waits for a look; all calls are counted, and results are right."""
    m = qpass.monitor(q, share=None)
    x = torch.randn(4, 6, 32)
    wanted, wrong = q(x), []
    tap = next(iter(m.taps))
    began = threading.Event()
    kept = runtime_of(q).kept[0]
    look = kept.served.look

    def held(given):
        if getattr(m._local, "look", None) is not None:
            began.set()
            time.sleep(1)
        look(given)

    kept.served.look = held

    def serve(count):
        wrong.extend(1 for _ in range(count) if not torch.equal(q(x), wanted))

    first = threading.Thread(target=serve, args=(1,))
    first.start()
    assert began.wait(5)
    serve(3)  # the look of the other thread is still on
    assert first.is_alive()
    first.join()
    others = [threading.Thread(target=serve, args=(3,)) for _ in range(3)]
    kept.served.look = look
    for t in others:
        t.start()
    for t in others:
        t.join()
    assert not wrong
    assert m.budget.calls == 1 + 1 + 3 + 9
    assert m.seen()[tap].looks >= 3


def test_no_monitor_no_cost(q):
    """An unwatched graph is two lookups away from its function; nothing is kept of a monitor that was stopped."""
    m = qpass.monitor(q, share=None)
    m.stop()
    assert runtime_of(q).monitor is None
    assert all(kept.served.look is None for kept in runtime_of(q).kept)
    assert qpass.monitor(q) is not m

"""qpass.interrupts: an interrupt that was lost in a callback is raised again; a program's own handler stays."""

import os
import signal
import threading
import weakref

import pytest
import torch

import qpass
from qpass.interrupts import heard, stop_if_asked
from tests.models import FeedForward
from tests.untouched import untouched

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Callback:
    """Its finalizer is interrupted: Python prints the exception and drops it."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


def lose_one():
    Callback()


def test_what_was_lost_is_raised_at_the_next_step():
    with heard():
        lose_one()
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()
        stop_if_asked()  # once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_callback_of_a_weak_reference():
    class Thing:
        pass

    thing = Thing()
    reference = weakref.ref(thing, lambda _: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), heard():
        del thing
    assert reference() is None


def test_one_that_arrives_is_raised_once():
    with pytest.raises(KeyboardInterrupt), heard():
        os.kill(os.getpid(), signal.SIGINT)
    with heard():
        stop_if_asked()
    stop_if_asked()


def test_what_was_lost_in_the_last_step_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt), heard():
        lose_one()


def test_nested():
    with pytest.raises(KeyboardInterrupt), heard(), heard():
        lose_one()
    with heard(), heard():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_programs_own_handler_stays():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        with heard():
            os.kill(os.getpid(), signal.SIGINT)
            stop_if_asked()
        assert seen == [1]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with heard():
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_another_thread():
    found = []

    def work():
        with heard():
            stop_if_asked()
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
def test_lost_in_calibration(scheme):
    m, x, seen = FeedForward().eval(), torch.randn(4, 6, 32), []

    def batches():
        for i in range(100):
            seen.append(i)
            if i == 3:
                lose_one()
            yield x

    with untouched(m), pytest.raises(KeyboardInterrupt):
        qpass.compile(m, scheme, x, batches(), backend="reference")
    assert seen[-1] in (3, 4)


def test_lost_while_packing(monkeypatch):
    m, x = FeedForward().eval(), torch.randn(4, 6, 32)
    real = qpass.api.attach

    def losing(*args):
        real(*args)
        lose_one()

    monkeypatch.setattr(qpass.api, "attach", losing)
    with untouched(m), pytest.raises(KeyboardInterrupt):
        qpass.compile(m, "w8a8-dynamic", x, backend="reference", inplace=True)

"""Signals only ask while the context lasts, and are what they were before after it."""

import contextlib
import os
import signal
import threading

import pytest

from tfm.training.signals import Stopped, stop_signals


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_and_says_with_which_status_to_end(number, status):
    before = signal.getsignal(number)
    with stop_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert (stop.name, stop.status) == (number.name, status)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_is_not_waited_out():
    with pytest.raises(KeyboardInterrupt), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_ignored_signal_stays_ignored():
    """As Ctrl-C is by what a script starts with `&`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_ends_at_once_is_no_error_to_go_on_after():
    """As JAX does, whatever goes wrong with its cache of compiled programs."""
    with stop_signals() as stop, pytest.raises(Stopped), stop.at_once():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal was taken for an error")


def test_what_can_wait_ends_at_once():
    with stop_signals() as stop:
        with pytest.raises(Stopped), stop.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal was waited out")
        assert (stop.requested, stop.status) == (True, 143)
        with pytest.raises(Stopped), stop.at_once():
            pytest.fail("the signal had come before")
        os.kill(os.getpid(), signal.SIGTERM)  # what cannot wait goes on


def test_another_thread_gets_no_signals_and_no_error():
    asked = []

    def run() -> None:
        with stop_signals() as stop:
            asked.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert asked == [False]

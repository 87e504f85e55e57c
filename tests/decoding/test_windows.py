"""Reading ahead: what is there is taken in order, and nobody waits for more than one line."""

import threading
import time

import pytest

from tfm import hosts
from tfm.decoding import windows as module
from tfm.decoding.windows import Windows


def everything(windows: Windows[int]) -> list[list[int]]:
    found = []
    while not windows.ended:
        if taken := windows.take(wait=True):
            found.append(taken)
    return found


def test_windows_are_full_but_for_the_last():
    assert everything(Windows(range(10), 4)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert everything(Windows([], 4)) == []


def test_what_is_there_is_given_and_the_rest_is_waited_for_only_if_asked():
    go_on = threading.Event()

    def slow():
        yield from (1, 2)
        go_on.wait(10)
        yield 3

    windows = Windows(slow(), 100)
    assert windows.take(wait=True) == [1, 2]
    assert windows.take(wait=False) == [] and not windows.ended
    go_on.set()
    assert windows.take(wait=True) == [3]
    assert windows.take(wait=True) == [] and windows.ended


def test_a_large_window_may_take_as_much_longer_to_fill(monkeypatch):
    monkeypatch.setattr(module, "_LINES", 10)

    def steady():
        for number in range(200):
            time.sleep(0.005)
            yield number

    assert len(Windows(steady(), 500, patience=0.5).take(wait=True)) == 200  # in a second


def test_an_error_waits_for_those_who_wait():
    def broken():
        yield 1
        raise OSError("unplugged")

    windows = Windows(broken(), 100)
    assert windows.take(wait=True) == [1]
    assert windows.take(wait=False) == [] and not windows.ended
    with pytest.raises(OSError, match="unplugged"):
        windows.take(wait=True)


def test_no_more_is_read_than_a_window_ahead_and_nothing_after_closing():
    read = []

    def endless():
        while True:
            read.append(0)
            yield 0

    windows = Windows(endless(), 5)
    assert windows.take(wait=True) == [0] * 5
    windows.close()
    [thread] = [thread for thread in threading.enumerate() if thread.name == "reader"] or [None]
    if thread is not None:
        thread.join(10)
        assert not thread.is_alive()
    assert len(read) <= 5 + 5 + 1


def test_a_trickle_is_not_waited_for_till_a_window_is_full():
    def trickle():
        for item in range(60):
            yield item
            time.sleep(0.01)

    windows = everything(Windows(trickle(), 1000))
    assert [item for window in windows for item in window] == list(range(60))
    assert len(windows) > 2


def test_several_hosts_do_not_go_by_their_clocks(monkeypatch):
    """Each would make other batches of an input that comes slowly."""
    assert module.patience() == module.PATIENCE
    monkeypatch.setattr(hosts, "count", lambda: 2)
    assert module.patience() is None

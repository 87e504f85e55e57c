"""SIGTERM and Ctrl-C as requests: a run that is told to end finishes its step and saves first.

Among several hosts, JAX's runtime takes SIGTERM itself, and tells all of them at which step to end.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tfm import hosts

_log = logging.getLogger(__name__)


class Stopped(BaseException):
    """What was being done when a signal came is to be left as it is. No library takes it for an error and goes on."""


class StopRequest:
    """A signal that asked the run to save and end."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._at_once = False

    def __call__(self, number: int, frame: Any) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C is not to be waited out
        self._signal = signal.Signals(number)
        _log.warning("%s: the run ends after this step and its checkpoint", self._signal.name)
        if self._at_once:
            raise Stopped

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """While it lasts, a signal raises Stopped; so does one that came before. Not to be nested."""
        self._at_once = True
        try:
            if self._signal is not None:
                raise Stopped
            yield
        finally:
            self._at_once = False

    @property
    def requested(self) -> bool:
        return self._signal is not None

    def after_step(self, step: int) -> bool:
        """Is the run to end after this step? To be asked once a step: hosts agree on one."""
        if self._signal is None and hosts.told_to_stop(step):
            self._signal = signal.Signals.SIGTERM
            _log.warning("SIGTERM, here or on another host: the run ends after this step and its checkpoint")
        return self.requested

    @property
    def name(self) -> str:
        return self._signal.name if self._signal is not None else ""

    @property
    def status(self) -> int:
        return 143 if self._signal == signal.SIGTERM else 130


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """While it lasts, SIGTERM and Ctrl-C only ask; one that is ignored, as Ctrl-C is by what `&` starts, stays so."""
    stop = StopRequest()
    if hosts.count() > 1:  # Ctrl-C ends the host, and then the others
        hosts.heed_sigterm()
        yield stop
        return
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread alone
        yield stop
        return
    heeded = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

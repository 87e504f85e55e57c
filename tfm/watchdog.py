"""A host that is alive but stuck ends, so that the others, which wait for it, do."""

from __future__ import annotations

import faulthandler
from typing import Literal

from tfm import hosts
from tfm.config import HostsConfig

Work = Literal["compiling", "stepping", "evaluating", "saving"]


class Watchdog:
    """Ends this process, with the stacks of all its threads on stderr, when what it does takes far too long.

    For a host that is alive but stuck, which keeps all others waiting: the scheduler can start them anew only when they
    have ended. The timer is the C library's, and needs nothing that a stuck Python could hold.
    """

    def __init__(self, config: HostsConfig):
        limits: dict[Work, int] = {
            "compiling": config.compile_timeout,
            "stepping": config.step_timeout,
            "evaluating": config.evaluation_timeout,
            "saving": config.save_timeout,
        }
        # When the first host ends, JAX ends the others at once, before they could say where they were. And when they
        # have ended, JAX ends the first for want of their heartbeats, the last of which may be half the time-out old.
        extra = max(1, min(max(5, config.step_timeout // 10), config.heartbeat_timeout // 3)) if hosts.is_first() else 0
        self._limits = {work: limit and limit + extra for work, limit in limits.items()} if hosts.count() > 1 else {}

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, *_: object) -> None:
        faulthandler.cancel_dump_traceback_later()

    def begins(self, work: Work) -> None:
        """From now on, that much time for this; whatever was begun before is done."""
        faulthandler.cancel_dump_traceback_later()
        if limit := self._limits.get(work):
            faulthandler.dump_traceback_later(limit, exit=True)

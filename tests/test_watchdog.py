"""When the watchdog is set, and for how long; that it bites is in test_processes.py."""

import faulthandler

from tfm import hosts
from tfm.config import HostsConfig
from tfm.watchdog import Watchdog


def test_a_host_alone_is_never_ended(monkeypatch):
    armed = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *args, **kwargs: armed.append(args))
    with Watchdog(HostsConfig(step_timeout=1)) as watchdog:
        watchdog.begins("stepping")
    assert not armed


def test_among_others_each_kind_of_work_has_its_limit_and_the_first_host_is_patient(monkeypatch):
    armed = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: armed.append((seconds, exit)))
    monkeypatch.setattr(hosts, "count", lambda: 2)
    limits = HostsConfig(compile_timeout=70, step_timeout=10, evaluation_timeout=0, save_timeout=30)
    for index, expected in ((1, [70, 10, 30]), (0, [75, 15, 35])):
        monkeypatch.setattr(hosts, "index", lambda index=index: index)
        armed.clear()
        with Watchdog(limits) as watchdog:
            for work in ("compiling", "stepping", "evaluating", "saving"):
                watchdog.begins(work)
        assert armed == [(seconds, True) for seconds in expected]


def test_the_first_host_is_not_so_patient_that_it_is_ended_before_it_shows_where_it_was(monkeypatch):
    """JAX ends it for want of the others' heartbeats, which end with them."""
    armed = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: armed.append(seconds))
    monkeypatch.setattr(hosts, "count", lambda: 2)
    for limits in (HostsConfig(), HostsConfig(step_timeout=10, heartbeat_timeout=10)):
        with Watchdog(limits) as watchdog:
            watchdog.begins("stepping")
        assert 0 < armed.pop() - limits.step_timeout < hosts._patience(limits.heartbeat_timeout) / 2


def test_work_without_a_limit_has_not_that_of_the_work_before(monkeypatch):
    timers = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda seconds, exit: timers.append(seconds))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", timers.clear)
    monkeypatch.setattr(hosts, "count", lambda: 2)
    with Watchdog(HostsConfig(evaluation_timeout=0)) as watchdog:
        watchdog.begins("stepping")
        assert timers
        watchdog.begins("evaluating")
        assert not timers
        watchdog.begins("stepping")
    assert not timers

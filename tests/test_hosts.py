"""One host alone, for which all of it is a no-op; several of them are in test_processes.py."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import pytest

from tfm import hosts
from tfm.config import Config, ConfigError, HostsConfig, InputError, fields_of
from tfm.training.signals import stop_signals


def test_one_host_agrees_with_itself_and_waits_for_nobody():
    with hosts.together(Config()):
        assert (hosts.index(), hosts.count(), hosts.is_first()) == (0, 1, True)
        assert hosts.agreed({"a": [1, None]}) == {"a": [1, None]}
        assert hosts.first_does(lambda: 7) == 7
        hosts.meet()
        assert not hosts.told_to_stop(3)


def test_what_goes_wrong_on_one_host_is_raised_as_it_is():
    with pytest.raises(InputError, match="no such thing"), hosts.together(Config()):
        hosts.first_does(lambda: (_ for _ in ()).throw(InputError("no such thing")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"coordinator": "here"}, "expected HOST:PORT"),
        ({"coordinator": "here:port"}, "expected HOST:PORT"),
        ({"coordinator": "here:1", "count": 2, "index": 2}, "hosts.index=2: expected 0 to 1, since hosts.count=2"),
    ],
)
def test_options_that_make_no_program(fields, message):
    with pytest.raises(ConfigError, match=message), hosts.together(Config(hosts=HostsConfig(**fields))):
        pass


def test_a_number_of_the_environment_has_to_be_one(monkeypatch):
    monkeypatch.setenv("JAX_PROCESS_ID", "two")
    expected = "JAX_PROCESS_ID=two in the environment: expected a number"
    with pytest.raises(ConfigError, match=expected), hosts.together(Config()):
        pass


def test_a_cluster_that_is_not_understood_is_no_single_host(monkeypatch):
    """Else each of its hosts would train alone, in the same directory."""

    def refuse(**_):
        raise ValueError("invalid literal for int() with base 10: ''")  # of JAX_LOCAL_DEVICE_IDS=0,1,

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    with pytest.raises(ConfigError, match=r"cannot be understood .*: mend its environment"), hosts.together(Config()):
        pass


ALONE = """
import os, signal, subprocess, sys, time
from tfm import hosts
from tfm.config import Config, HostsConfig, InputError
from tfm.__main__ import main
from tfm.commands import prepare

def work(argv):
    with hosts.together(Config(hosts=HostsConfig("localhost:PORT", 1, 0))):
        print("begun", flush=True)
        if sys.argv[1] == "wrong":
            raise InputError("no such thing")
        time.sleep(120)

prepare.main = work
sys.exit(main(["prepare"]))
"""


@pytest.mark.parametrize(
    ("what", "status", "said"),
    [
        ("wrong", 2, "tfm prepare: error: no such thing\n"),
        ("SIGINT", 130, "tfm: interrupted\n"),
        ("SIGTERM", -signal.SIGTERM, ""),
    ],
)
def test_the_only_host_of_a_cluster_ends_as_any_program(what, status, said):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        code = ALONE.replace("PORT", str(free.getsockname()[1]))
    process = subprocess.Popen(
        [sys.executable, "-c", code, what], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "begun\n"
        if what != "wrong":
            process.send_signal(signal.Signals[what])
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == status
    assert errors.endswith(said) and "Traceback" not in errors


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("no such\n thing"), 2, "tfm: error: host 1: no such thing\n"),
        (KeyboardInterrupt(), 130, "tfm: host 1: interrupted\n"),
        (ValueError("a defect"), 1, ""),
    ],
)
def test_one_of_several_hosts_ends_at_once_with_the_status_of_its_error(
    error, status, said, monkeypatch, capsys, caplog
):
    """Without Python's way out, which would wait for the others."""

    def leave(number: int) -> None:
        raise SystemExit(number)

    for name, value in {"_start": True, "count": 2, "index": 1, "_let_others_end": []}.items():
        monkeypatch.setattr(hosts, name, lambda *_, value=value: value)
    monkeypatch.setattr(hosts, "_refuse_different_hosts", lambda config: None)
    monkeypatch.setattr(os, "_exit", leave)
    caplog.set_level(logging.INFO, "tfm")  # to be put back: hosts but the first tell warnings alone
    with pytest.raises(SystemExit) as left, hosts.together(Config()):
        raise error
    assert left.value.code == status and capsys.readouterr().err == said


def test_the_hash_is_that_of_the_files_of_the_package():
    again = subprocess.run(
        [sys.executable, "-c", "from tfm import hosts; print(hosts.code_hash())"], capture_output=True, text=True
    )
    assert again.stdout.strip() == hosts.code_hash()


def test_the_hash_of_other_code_is_another(tmp_path, monkeypatch):
    package = shutil.copytree(Path(hosts.__file__).parent, tmp_path / "tfm", ignore=shutil.ignore_patterns("*.pyc"))
    mine = hosts.code_hash()
    monkeypatch.setattr(hosts, "__file__", str(package / "hosts.py"))
    assert hosts.code_hash() == mine
    with open(package / "model" / "layers.py", "ab") as file:
        file.write(b"#")
    assert hosts.code_hash() != mine


def test_what_a_network_disk_shows_later_is_waited_for_and_not_for_ever(tmp_path, monkeypatch):
    threading.Timer(0.2, (tmp_path / "3").mkdir).start()
    assert hosts.wait_until((tmp_path / "3").exists)
    monkeypatch.setattr(hosts, "_SEEN_WITHIN", 0.0)
    assert not hosts.wait_until((tmp_path / "4").exists)


def test_what_a_host_has_not_said_yet_is_asked_for_again_and_an_error_is_one(monkeypatch):
    asked = []

    class Slow:
        def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
            asked.append(key)
            if key == "gone":
                raise jax.errors.JaxRuntimeError("UNAVAILABLE: the service has ended")
            if len(asked) < 3:
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: nothing was said")
            return "value"

    monkeypatch.setattr(hosts, "_client", Slow)
    assert hosts._get("said") == "value" and asked == ["said"] * 3
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
        hosts._get("gone")
    assert len(asked) == 4


class Client:
    """The key-value store of the coordination service, for one process."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.gone = False

    def key_value_set(self, key: str, value: str) -> None:
        if self.gone:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE")
        self.values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
        return self.values[key]


def test_a_host_that_ends_knows_of_whom_nothing_is_heard(monkeypatch):
    client = Client()
    monkeypatch.setattr(hosts, "_client", lambda: client)
    monkeypatch.setattr(hosts, "count", lambda: 4)
    monkeypatch.setattr(hosts.time, "sleep", lambda seconds: None)
    for index, silent in ((1, []), (0, [2, 3]), (3, []), (0, [2]), (2, []), (0, [])):
        monkeypatch.setattr(hosts, "index", lambda index=index: index)
        assert hosts._let_others_end() == silent
    client.gone = True
    monkeypatch.setattr(hosts, "index", lambda: 1)
    assert hosts._let_others_end() == [0]


def test_hosts_notice_a_dead_one_early_enough_to_end_in_time():
    assert [hosts._patience(seconds) for seconds in (1, 2, 10, 100)] == [1, 1, 9, 90]


def test_a_run_remembers_no_hosts(tmp_path):
    from tfm.checkpoint import RunDirectory

    config = Config(hosts=HostsConfig(coordinator="there:1", count=2, index=0))
    run = RunDirectory.create(tmp_path / "run", config)
    assert json.loads(run.config_path.read_text())["hosts"]["coordinator"] is None
    RunDirectory.create(tmp_path / "run", config)


def test_signals_of_one_host_are_its_own():
    with stop_signals() as stop:
        assert not stop.after_step(1)


def test_other_code_on_the_last_host_is_named(monkeypatch):
    client = Client()
    monkeypatch.setattr(hosts, "_client", lambda: client)
    monkeypatch.setattr(hosts, "count", lambda: 3)
    monkeypatch.setattr(hosts, "index", lambda: 0)
    mine = {name: repr(value) for name, value in fields_of(Config()).items() if not name.startswith("hosts.")}
    mine |= {"the code of tfm": hosts.code_hash(), "the version of JAX": jax.__version__}
    other = mine | {"the code of tfm": "other"}
    client.values = {"tfm/config/1": json.dumps(mine), "tfm/config/2": json.dumps(other)}
    with pytest.raises(ConfigError, match=r"the code of tfm is \w+ on host 0 and other on host 2"):
        hosts._refuse_different_hosts(Config())


def test_none_goes_on_before_all_have_said_whether_they_agree(monkeypatch):
    client, asked = Client(), []
    monkeypatch.setattr(hosts, "_client", lambda: client)
    monkeypatch.setattr(hosts, "count", lambda: 3)
    monkeypatch.setattr(hosts, "_get", lambda key: asked.append(key) or "false")
    assert not hosts.all_agree(False) and len(asked) == 3


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_is_none_is_named(port):
    with pytest.raises(ConfigError, match="expected HOST:PORT"):
        hosts._start(HostsConfig(coordinator=f"localhost:{port}", count=2, index=0))

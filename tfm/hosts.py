"""Many hosts as one program: how they start together, wait for one another, agree, and end.

A host is a process of JAX's distributed runtime, with devices of its own. What is said here goes through that
runtime's coordination service and never through the devices, so that waiting may last as long as it takes (host 0
tokenizes a corpus for an hour) and still ends when a host dies: each sends a sign of life to the first, and JAX ends
those that are left, with a message that names the missing one, when it stays out for `hosts.heartbeat_timeout`.

Everything is a no-op where there is one host.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from tfm.config import Config, ConfigError, HostsConfig, InputError, fields_of

T = TypeVar("T")

_log = logging.getLogger(__name__)

_LAST_WORDS = 5.0  # seconds that the first host, failing, leaves the others: with it, JAX ends them at once
_LONGER = 10  # seconds that JAX would wait for the others after this module has given up
_SEEN_WITHIN = 60.0  # seconds
_WAIT_MILLISECONDS = 30_000  # of one request; there is another after it, for as long as the hosts live
# Of `agreed` and `all_agree`, which give each a name of its own: all hosts make the same calls in the same order.
_calls = itertools.count()


def index() -> int:
    """Number of this host, from 0."""
    return jax.process_index()


def count() -> int:
    """Hosts of this program."""
    return jax.process_count()


def is_first() -> bool:
    """Is this the host that writes what is written once?"""
    return index() == 0


@contextlib.contextmanager
def together(config: Config) -> Iterator[None]:
    """Joins the other hosts of this program, if there are any; to be entered before anything asks for a device.

    TPU pods, SLURM, Open MPI and Kubernetes are found out by JAX; elsewhere `hosts.coordinator`, `hosts.count` and
    `hosts.index` say it, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    A host on which anything fails ends at once, so that the others, which wait for it, notice: with status 2 for an
    InputError, 130 for Ctrl-C, and 1 otherwise.

    Raises:
      ConfigError: options that don't make a program, or hosts whose configs or code differ.
      InputError: a coordinator that cannot be reached, or whose port is taken.
    """
    if not _start(config.hosts):
        yield
        return
    if count() == 1:  # a cluster's job of one task: its errors and its Ctrl-C are those of any program
        yield  # and where it raises, JAX ends its service by itself, at exit
        jax.distributed.shutdown()
        return
    try:
        if not is_first():
            logging.getLogger("tfm").setLevel(logging.WARNING)
        _refuse_different_hosts(config)
        yield
        meet()  # JAX's own barrier at the end has one deadline, and aborts the hosts that still work when it is over
    except BaseException as error:
        # Python's way out would wait for the others at a barrier, and they wait for this host in the middle of a step.
        if isinstance(error, InputError):
            print(f"tfm: error: host {index()}: {' '.join(str(error).split())}", file=sys.stderr)
        elif isinstance(error, KeyboardInterrupt):
            print(f"tfm: host {index()}: interrupted", file=sys.stderr)
        else:
            _log.critical(
                "host %d of %d ends; if another has ended before, look there first", index(), count(), exc_info=error
            )
        sys.stdout.flush()
        sys.stderr.flush()
        silent = _let_others_end()
        if silent and not isinstance(error, InputError):
            named = ", ".join(map(str, silent[:10])) + (" and more" if len(silent) > 10 else "")
            _log.critical("no last word of host %s: dead, or still waiting for the others", named)
            sys.stderr.flush()
        os._exit(2 if isinstance(error, InputError) else 130 if isinstance(error, KeyboardInterrupt) else 1)
    jax.distributed.shutdown()


def _let_others_end() -> list[int]:
    """Has the first host wait a little for the others, which may have failed as it did and should end by themselves.

    Returns those of which nothing is heard, the dead among them: on the first host those that have not said that they
    end, on the others the first, if it cannot be told.
    """
    silent = []
    if not is_first():
        try:
            _client().key_value_set(f"tfm/ended/{index()}", "")
        except jax.errors.JaxRuntimeError:
            silent.append(0)
        return silent
    deadline = time.monotonic() + _LAST_WORDS
    for other in range(1, count()):
        left = max(1, int(1000 * (deadline - time.monotonic())))
        try:
            _client().blocking_key_value_get(f"tfm/ended/{other}", left)
        except jax.errors.JaxRuntimeError:
            silent.append(other)
    if not silent:
        time.sleep(1.0)  # they have said so, and are about to
    return silent


def _start(hosts: HostsConfig) -> bool:
    """Joins the other hosts; False where there are none."""
    address = hosts.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    size = hosts.count if hosts.count is not None else _number("JAX_NUM_PROCESSES")
    number = hosts.index if hosts.index is not None else _number("JAX_PROCESS_ID")
    if address is not None:
        port = address.rpartition(":")[2]
        if ":" not in address or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"hosts.coordinator={address}: expected HOST:PORT of the first host, PORT below 65536")
    if size is not None and number is not None and not 0 <= number < size:
        raise ConfigError(f"hosts.index={number}: expected 0 to {size - 1}, since hosts.count={size}")
    begun = time.monotonic()
    if address is not None and number == 0:
        _refuse_taken_port(address)
    if address is not None and size is not None and number:
        _wait_for_the_first(address, hosts.start_timeout)
    left = max(1, hosts.start_timeout - int(time.monotonic() - begun))
    # JAX would take SIGTERM for a request, which nothing but training ever looks for: see `heed_sigterm`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        with _at_most(left, hosts.start_timeout):
            jax.distributed.initialize(
                coordinator_address=address,
                num_processes=size,
                process_id=number,
                initialization_timeout=left + _LONGER,
                heartbeat_timeout_seconds=_patience(hosts.heartbeat_timeout),
                shutdown_timeout_seconds=hosts.heartbeat_timeout,
            )
    except ValueError as error:
        if (address, size, number) == (None, None, None):
            if "coordinator_address should be defined" in str(error):
                return False  # nothing says that there are others
            raise ConfigError(
                f"the cluster that JAX finds here cannot be understood ({error}): mend its environment variables, or "
                "give hosts.coordinator, hosts.count and hosts.index"
            ) from error
        raise ConfigError(
            f"hosts.coordinator={address}, hosts.count={size}, hosts.index={number}: {error}: give all three, or none "
            "where the cluster is one that JAX knows"
        ) from error
    except RuntimeError as error:
        message = " ".join(str(error).split())
        if "must be called before" in message or "only be called once" in message:
            return False  # the devices that there are, as when this is called from a program of one's own
        raise InputError(
            f"hosts.coordinator={address}: no program of several hosts can be made there ({message[:200]}): is its "
            "port free on the first host?"
        ) from error
    _log.info("host %d of %d, %d of %d devices", index(), count(), jax.local_device_count(), jax.device_count())
    return True


@contextlib.contextmanager
def _at_most(seconds: float, of: int) -> Iterator[None]:
    """Ends this process with one line where the others do not come in time; JAX would abort it, with a stack in C++.

    The seconds are what is left of `hosts.start_timeout`.
    """

    def give_up() -> None:
        message = f"not all hosts came within hosts.start_timeout={of} seconds: are hosts.count of them running?"
        print(f"tfm: error: {message}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _patience(seconds: int) -> int:
    """JAX's own heartbeat timeout, with which all hosts have ended within `seconds`: to look and to end takes time."""
    return max(1, seconds - max(1, seconds // 10))


def _refuse_taken_port(address: str) -> None:
    """Raises InputError where something listens already; JAX might break down at its end after that."""
    port = int(address.rpartition(":")[2])
    try:
        with socket.socket() as there:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            there.bind(("", port))
    except OSError as error:
        raise InputError(
            f"hosts.coordinator={address}: port {port} of this host cannot be listened on ({error.strerror}): take a "
            "free port"
        ) from error


def _wait_for_the_first(address: str, seconds: float) -> None:
    """Returns once the first host listens. JAX, too, would wait for it, and then abort this process without a word."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=min(5.0, seconds)).close()
            return
        except UnicodeError as error:
            raise ConfigError(f"hosts.coordinator={address}: no host can have that name ({error})") from error
        except OSError as error:
            if time.monotonic() >= deadline:
                raise InputError(
                    f"hosts.coordinator={address}: no answer within hosts.start_timeout={seconds} seconds ({error}): "
                    "is the first host running there, and may this one reach it?"
                ) from error
            time.sleep(0.2)


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ConfigError(f"{name}={value} in the environment: expected a number")
    return int(value)


def _client() -> Any:
    # The coordination service's key-value store has no public name; Orbax takes it from here, too.
    from jax._src import distributed

    return distributed.global_state.client


def _get(key: str) -> str:
    """What a host says under a key, as soon as it does."""
    while True:
        try:
            return str(_client().blocking_key_value_get(key, _WAIT_MILLISECONDS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _refuse_different_hosts(config: Config) -> None:
    """Raises ConfigError, on each host, naming what differs between the first and another."""
    mine = {name: repr(value) for name, value in fields_of(config).items() if not name.startswith("hosts.")}
    mine |= {"the code of tfm": code_hash(), "the version of JAX": jax.__version__}
    _client().key_value_set(f"tfm/config/{index()}", json.dumps(mine))
    first = json.loads(_get("tfm/config/0"))
    for other in range(1, count()):
        its = json.loads(_get(f"tfm/config/{other}"))
        differing = [
            f"{name} is {first.get(name)} on host 0 and {its.get(name)} on host {other}"
            for name in sorted(first.keys() | its.keys())
            if first.get(name) != its.get(name)
        ]
        if differing:
            raise ConfigError(f"{'; '.join(differing[:5])}: start all hosts with the same code and the same options")


def code_hash() -> str:
    """First digits of the SHA-256 over the package's source files."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def agreed(value: T) -> T:
    """The first host's value, on each host; it is plain JSON. All hosts call this together."""
    if count() == 1:
        return value
    key = f"tfm/agreed/{next(_calls)}"
    if is_first():
        _client().key_value_set(key, json.dumps(value))
        return value
    return json.loads(_get(key))


def first_does(work: Callable[[], T]) -> T | None:
    """Has the first host do something while the others wait; None on those. All hosts call this together.

    Raises InputError on each host when the first one failed.
    """
    if count() == 1:
        return work()
    if not is_first():
        if (failure := agreed(None)) is not None:
            raise InputError(f"host 0 failed: {failure}")
        return None
    try:
        result = work()
    except BaseException as error:
        agreed(f"{type(error).__name__}: {' '.join(str(error).split())}")
        raise
    agreed(None)
    return result


def meet() -> None:
    """Returns once all hosts have called this.

    Before they first compute together: the devices of one would not wait as long for the others as those may take to
    read their data. And before they end.
    """
    all_agree(True)


def all_agree(good: bool) -> bool:
    """Whether each host says so. All hosts call this together, and none goes on before all have."""
    if count() == 1:
        return good
    key = f"tfm/met/{next(_calls)}"
    _client().key_value_set(f"{key}/{index()}", json.dumps(good))
    return all([json.loads(_get(f"{key}/{other}")) for other in range(count())])


def wait_until(look: Callable[[], T]) -> T:
    """What a look gives, once that is true or a minute is over: a network disk shows some hosts later what one made."""
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (seen := look()) and time.monotonic() < deadline:
        time.sleep(0.5)
    return seen


def heed_sigterm() -> None:
    """From now on, SIGTERM on any host does not end it, but is what `told_to_stop` asks for. All hosts call this."""
    from jax._src import distributed  # the only way to begin later than at the start

    if count() > 1 and distributed.global_state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()


def told_to_stop(step: int) -> bool:
    """Has a host got SIGTERM, and is this the step at which all of them can stop? Asked after each step, by all hosts.

    After `heed_sigterm`.

    The answer is the same on all of them: JAX finds a step that none has finished yet.
    """
    return count() > 1 and multihost_utils.reached_preemption_sync_point(step)

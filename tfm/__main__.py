"""`python -m tfm COMMAND …`, the same as the console script `tfm`: finds the command and turns errors into statuses."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import io
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tfm import __version__
from tfm.allocator import keep_freed_memory
from tfm.config import InputError
from tfm.text import near

_INSISTENCE = 0.3  # seconds between one Ctrl-C and the next

COMMANDS = ("train", "prepare", "translate", "score", "evaluate", "explain", "plan", "benchmark", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 2 for wrong input, 130 for Ctrl-C, otherwise the command's own."""
    keep_freed_memory()  # before any thread is started, by a library or for Ctrl-C
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # as files and their names are, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    try:
        with _ctrl_c_is_never_lost():
            status = _dispatch(arguments)
        _flush()
        return status
    except InputError as error:
        name = " ".join(["tfm", *arguments[:1]]) if arguments and arguments[0] in COMMANDS else "tfm"
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        _drop_what_cannot_be_written()
        return 2
    except KeyboardInterrupt:
        print("tfm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _drop_buffered_output()  # whoever read it has had enough
        return 1
    except OSError as error:
        from tfm.files import FULL

        if error.filename is not None:
            print(f"tfm: error: {error.filename}: {error.strerror}", file=sys.stderr)
            _drop_what_cannot_be_written()
            return 2
        if error.errno not in FULL:
            raise
        _drop_buffered_output()
        print(f"tfm: error: what was being written has no more room ({error.strerror}): free some", file=sys.stderr)
        return 2


@contextmanager
def _ctrl_c_is_never_lost() -> Iterator[None]:
    """While it lasts, Ctrl-C is sent again and again to the main thread until it is on its way out of there.

    It goes unseen when it comes just before the main thread begins to wait, or to another thread than that, and Python
    drops what is raised in a callback of the garbage collector (JAX has one) or of a weak reference, and libraries drop
    what is raised while they look for an attribute. A run that takes Ctrl-C for a request has a handler of its own,
    and is not pressed.
    """
    main, unraisable, ended = threading.main_thread(), sys.unraisablehook, threading.Event()
    if threading.current_thread() is not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    # Python writes a signal's number there as it comes, whatever the main thread is at.
    told, telling = os.pipe()
    os.set_blocking(telling, False)

    def insist() -> None:
        with open(told, "rb", buffering=0) as signals:
            while number := signals.read(1):
                while number[0] == signal.SIGINT and not ended.wait(_INSISTENCE):
                    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
                        break
                    handled: Any = sys._current_exceptions().get(main.ident)
                    if not isinstance(handled[1] if isinstance(handled, tuple) else handled, KeyboardInterrupt):
                        signal.pthread_kill(main.ident, signal.SIGINT)

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            unraisable(dropped)

    threading.Thread(target=insist, daemon=True, name="ctrl-c").start()
    before = signal.set_wakeup_fd(telling, warn_on_full_buffer=False)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(before)
        os.close(telling)
        sys.unraisablehook = unraisable


def _flush() -> None:
    """Raises InputError where the last of the output cannot be written, as on a full disk."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_buffered_output()
        raise InputError(f"standard output: cannot be written: {error.strerror}") from error


def _drop_buffered_output() -> None:
    """What is still buffered must not be flushed at exit, into a pipe that nobody reads or onto a disk that is full."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _drop_what_cannot_be_written() -> None:
    """After an error: what standard output still holds is written, or else Python would fail at it again at exit."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        _drop_buffered_output()


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        raise InputError(f"no command: expected one of {', '.join(COMMANDS)}; see tfm --help")
    name, rest = arguments[0], arguments[1:]
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"tfm {__version__}")
        return 0
    if name not in COMMANDS:
        hint = near(name, COMMANDS, otherwise=f"; there are {', '.join(COMMANDS)}")
        raise InputError(f"{name}: no such command{hint}")
    _log_to_stderr()
    return importlib.import_module(f"tfm.commands.{name}").main(rest)


def _help() -> str:
    lines = [
        "usage: tfm COMMAND [OPTIONS]",
        "",
        "An encoder-decoder Transformer for translation, in JAX and Flax.",
        "",
        *(f"  {name:<10} {_summary(name)}" for name in COMMANDS),
        "",
        "tfm COMMAND --help shows a command's options with their values; tfm --version the version.",
    ]
    return "\n".join(lines)


def _summary(command: str) -> str:
    """First line of a command's docstring, read from its source: importing them all would take longer."""
    spec = importlib.util.find_spec(f"tfm.commands.{command}")
    if spec is None or spec.origin is None:
        return ""
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_bytes())) or ""
    return docstring.partition("\n")[0]


def _log_to_stderr() -> None:
    """Progress and warnings of this package, and the warnings alone of the libraries below it."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    logging.getLogger("tfm").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())

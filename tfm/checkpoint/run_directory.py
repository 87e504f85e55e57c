"""The directory of one run: its config, its tokenizer and its log; `tfm.checkpoint` keeps the state below it.

    WORKDIR/config.json  tokenizer.model  metrics.jsonl  checkpoints/STEP/  checkpoints/damaged/  and events and curves

A run directory stands alone: copied to another machine, it is all that translating needs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfm.config import Config, HostsConfig, InputError, fields_of, from_json
from tfm.files import FULL, as_path, without_client, write_atomically

if TYPE_CHECKING:
    from tfm.files import AnyPath

_log = logging.getLogger(__name__)

# What may differ between a run and its continuation: it changes where and how fast the same numbers are computed, what
# is reported and what is kept, and no parameter beyond the rounding of another order of summation.
MAY_CHANGE = {
    *("data.test_split", "data.store", "data.cache_dir", "data.read_ahead"),
    *("training.steps", "training.gradient_accumulation", "training.remat", "training.deterministic"),
    *("training.unroll_layers", "training.log_every", "training.checkpoint_every", "training.keep_last"),
    *("training.keep_best", "training.evaluate_every", "training.evaluate_sentences", "training.early_stopping"),
    "training.max_skipped_steps",
}
_SECTIONS_THAT_MAY_CHANGE = ("mesh.", "decoding.", "hosts.")
# What stands in a run directory before its config.json does: `prepare`, also one that was killed, a `train` that was
# killed at its start, and a shell's redirection write these.
_HARMLESS = ("store", "store.partial", "tokenizer.model", "lost+found")
_HARMLESS_ENDINGS = (".log", ".out", ".err", ".txt", ".sh")


class RunDirectory:
    """The files of one run, by name. Making the object touches nothing; `create` and `open` do."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = as_path(path)
        self.config_path = self.path / "config.json"
        self.tokenizer_path = self.path / "tokenizer.model"
        self.metrics_path = self.path / "metrics.jsonl"
        self.checkpoints_path = self.path / "checkpoints"

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """A run that stands already, to read from. Raises InputError where there is none, or a link in its place."""
        run = cls(path)
        for part in (run.config_path, run.tokenizer_path, run.checkpoints_path):
            refuse_link(part)
        if not run.exists():
            raise InputError(f"{run.path}: holds no run (no config.json): give the --workdir of a training run")
        return run

    def exists(self) -> bool:
        """Whether the config of a run is there, `has_begun` or not. Raises InputError where nobody can tell."""
        try:
            return self.config_path.exists()
        except ImportError as error:
            raise without_client(self.path, error) from error
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror or error})") from error

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        config: Config,
        is_first: bool = True,
        lock: contextlib.ExitStack | None = None,
    ) -> RunDirectory:
        """The directory to train `config` in: a new one, or the one that this run began in.

        Only the first host writes; it keeps other processes from training here until `lock` is closed. Raises
        InputError when the directory cannot be written, is being trained in, holds a run of another config (naming
        each field that differs), or holds files that are no run's.
        """
        run = cls(path)
        # The hosts of this start are none of the run's: whoever opens it elsewhere must not call them.
        config = dataclasses.replace(config, hosts=HostsConfig())
        try:
            for part in (run.config_path, run.tokenizer_path, run.checkpoints_path, run.metrics_path):
                refuse_link(part)
            run._refuse_others(config)
            if is_first:
                run.path.mkdir(parents=True, exist_ok=True)
                if lock is not None:
                    lock.enter_context(run.locked())
                    run._refuse_others(config)  # which may have begun before this one had the lock
                # Written even when it is the same: here, and not hours later, is where an unwritable directory shows.
                # That of a run that has begun stays what it was until nothing can refuse the new one: `adopt`.
                content = run.config_path.read_bytes() if run.has_begun() else config.to_json().encode()
                write_atomically(run.config_path, content)
        except ImportError as error:
            raise without_client(run.path, error) from error
        except OSError as error:
            raise unwritable(run.path, error) from error
        return run

    def _refuse_others(self, config: Config) -> None:
        if self.config_path.exists():
            there = from_json(self.config_path)
            if self.has_begun():
                _refuse_other_run(self.config_path, there, config)
        else:
            _refuse_foreign_files(self.path, config)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here meanwhile; on a local or network disk, not in an object store.

        Raises InputError where one does: two that write the same checkpoints and the same log would spoil both; and
        OSError.
        """
        if not isinstance(self.path, Path):
            yield
            return
        path = self.path / ".lock"
        refuse_link(path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(
                    f"{self.path}: another process is training in it: wait for it to end, or use another --workdir"
                ) from error
            except OSError as error:
                _log.warning("%s: cannot be locked (%s); start no second training in it", self.path, error.strerror)
            yield
        finally:
            os.close(descriptor)

    def adopt(self, config: Config) -> None:
        """Makes this the config of the run, and says what is new. Raises InputError where it cannot be written."""
        old, new = fields_of(self.config), fields_of(config := dataclasses.replace(config, hosts=HostsConfig()))
        for name in old:
            if old[name] != new[name]:
                _log.info("%s: the run goes on with %s=%r, %r so far", self.path, name, new[name], old[name])
        try:
            write_atomically(self.config_path, config.to_json().encode())
        except OSError as error:
            raise unwritable(self.path, error) from error

    def has_begun(self) -> bool:
        """Whether there are steps of a run here: a first start that was refused leaves none, and another may follow."""
        if self.checkpoints_path.exists() and any(True for _ in self.checkpoints_path.iterdir()):
            return True
        if not self.metrics_path.exists():
            return False
        with self.metrics_path.open("rb") as log:
            return bool(log.read(1))

    def brought_tokenizer(self, config: Config) -> AnyPath | None:
        """The tokenizer that a run brings along, and does not train: of the run it starts from, or `data.tokenizer`.

        Once the run has begun its own copy counts, and before that where the other has been moved.
        """
        if config.training.initialize_from is not None:
            brought = RunDirectory(config.training.initialize_from).tokenizer_path
        elif config.data.tokenizer is not None:
            brought = as_path(config.data.tokenizer)
        else:
            return None
        is_own = self.tokenizer_path.exists() and (self.has_begun() or not brought.exists())
        return self.tokenizer_path if is_own else brought

    @property
    def config(self) -> Config:
        """Raises ConfigError when config.json is not a config."""
        return from_json(self.config_path)

    def install_tokenizer(self, source: str | os.PathLike[str]) -> None:
        """Copies a SentencePiece model to tokenizer.model. Raises InputError when the run has begun with another."""
        model = as_path(source).read_bytes()
        if self.tokenizer_path.exists() and self.has_begun():
            if self.tokenizer_sha256() != hashlib.sha256(model).hexdigest():
                raise InputError(
                    f"{self.tokenizer_path}: differs from {source}, and the run's parameters belong to it: "
                    "use another --workdir"
                )
            return
        try:
            write_atomically(self.tokenizer_path, model)
        except OSError as error:
            raise unwritable(self.path, error) from error

    def tokenizer_sha256(self) -> str | None:
        """SHA-256 of tokenizer.model in hex, or None while there is none. Raises InputError when it is a link."""
        refuse_link(self.tokenizer_path)
        if not self.tokenizer_path.exists():
            return None
        return hashlib.sha256(self.tokenizer_path.read_bytes()).hexdigest()


def differing_fields(there: Config, now: Config) -> dict[str, tuple[Any, Any]]:
    """The fields that make `now` another run than `there`: dotted name -> (value there, value now)."""
    old, new = fields_of(there), fields_of(now)
    differing = {
        name: (old[name], new[name])
        for name in old
        if old[name] != new[name] and name not in MAY_CHANGE and not name.startswith(_SECTIONS_THAT_MAY_CHANGE)
    }
    names = []
    if now.optimizer.schedule != "inverse_sqrt":  # the others reach their end at the run's end
        names.append("training.steps")
    if there.rows_per_batch != now.rows_per_batch:  # a batch has a multiple of the micro-batches
        names.append("training.gradient_accumulation")
    return differing | {name: (old[name], new[name]) for name in names if old[name] != new[name]}


def truncate_metrics(path: str | os.PathLike[str], step: int) -> int:
    """Cuts what metrics.jsonl says of steps after `step`, so that a resumed run logs each step once.

    A last line without its end, which a kill leaves, goes too, and so does a line that is not JSON (with a warning).
    Returns the number of lines cut; the file is replaced in one move, or left as it is.
    Raises InputError when the file is a link, or when the shorter log has no room on the disk.
    """
    path = as_path(path)
    refuse_link(path)
    if not path.exists():
        return 0
    *lines, torn = path.read_bytes().split(b"\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            later = event.get("step", step) > step
        except (ValueError, TypeError, AttributeError):
            _log.warning("%s, line %d: not an event of a run, removed: %r", path, number, line[:80])
            continue
        if not later:
            kept.append(line + b"\n")
    cut = len(lines) - len(kept) + bool(torn)
    if cut:
        try:
            write_atomically(path, b"".join(kept))
        except OSError as error:
            raise unwritable(path.parent, error) from error
    return cut


def refuse_link(path: AnyPath) -> None:
    """Raises InputError when `path` is a symbolic link: a copied run directory must not reach outside itself."""
    if isinstance(path, Path) and path.is_symlink():
        raise InputError(
            f"{path}: is a link to {os.readlink(path)}: a run directory holds no links; put the file itself there"
        )


def unwritable(path: AnyPath, error: OSError) -> InputError:
    """The one line for an OSError on a run directory."""
    if error.errno in FULL:
        return InputError(f"{path}: no space left on the disk ({error.strerror}): free some, or use another --workdir")
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}): use a --workdir in which you can make files"
    )


def _refuse_other_run(path: AnyPath, there: Config, now: Config) -> None:
    differing = differing_fields(there, now)
    if differing:
        fields = ", ".join(f"{name} is {old!r} there and {new!r} now" for name, (old, new) in differing.items())
        raise InputError(
            f"{path.parent}: holds a run of another config: {fields}: set them back, or use another --workdir"
        )


def _refuse_foreign_files(path: AnyPath, config: Config) -> None:
    """Raises InputError where a directory without a config.json holds what is no run's, nor named by the config."""
    if not path.exists():
        return
    if isinstance(path, Path) and not stat.S_ISDIR(path.stat().st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    named = [as_path(place) for place in (config.data.store, config.data.cache_dir, config.data.tokenizer) if place]
    inside = {place.relative_to(path).parts[0] for place in named if place != path and place.is_relative_to(path)}
    harmless = {*_HARMLESS, *inside, *(f"{name}.partial" for name in inside)}
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in harmless and not entry.name.startswith(".") and not entry.name.endswith(_HARMLESS_ENDINGS)
    )
    if foreign:
        names = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InputError(f"{path}: holds {names} and no config.json, so it is not a run's: use another --workdir")

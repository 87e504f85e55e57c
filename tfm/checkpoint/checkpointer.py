"""Saves a run's state in the background, keeps the newest and the best, and resumes."""

from __future__ import annotations

import dataclasses
import errno
import logging
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tfm import hosts
from tfm.checkpoint import manifest as manifests
from tfm.checkpoint import storage
from tfm.checkpoint.manifest import Manifest
from tfm.checkpoint.reader import CheckpointReader, Restored, ranked
from tfm.checkpoint.run_directory import RunDirectory, unwritable
from tfm.config import InputError
from tfm.files import FULL, remove_tree

if TYPE_CHECKING:
    from tfm.files import AnyPath

_log = logging.getLogger(__name__)

_REMOVING = "removing-"
_DAMAGED = "damaged"
_NO_SPACE = ("no space left", "disk quota exceeded", "file too large")  # TensorStore's errors carry no errno
_SHARES_WITHIN = 1200  # seconds that the other hosts have for their hashes


class Checkpointer(CheckpointReader):
    """Saves the state of a run in training. A context manager: leaving it waits for the last save.

    All hosts call each method together, and share the file system, as Orbax also requires. The first alone writes
    manifests, moves and removes.
    """

    def __init__(
        self, run: RunDirectory, keep_last: int = 3, keep_best: int = 1, best: Literal["higher", "lower"] = "higher"
    ):
        """`best` says which metric is the better one."""
        super().__init__(run)
        self.keep_last, self.keep_best, self.best = max(1, keep_last), keep_best, best
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._finished = self._read_finished()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
            return
        try:
            self.wait()
        except (InputError, RuntimeError) as failure:  # what ended the run is reported, and not what came after it
            _log.error("%s", failure)

    def resume(self, abstract_state: Mapping[str, Any]) -> Restored | None:
        """`restore`, then makes room: what is half-written is removed, what is damaged moved to checkpoints/damaged.

        Nothing is moved when no checkpoint is usable, so that the same command does not start anew the next time.
        """
        restored, damaged = self._restore(abstract_state)
        unfinished = self._unfinished()
        if restored is None and len(unfinished) > 1:  # an interrupted save leaves one; this is a copy of a part
            damaged = dict(damaged) | {step: "has no manifest" for step in unfinished}
        if restored is None and damaged:
            raise self._none_usable(damaged)
        try:
            if hosts.is_first() and self.run.checkpoints_path.exists():
                for entry in list(self.run.checkpoints_path.iterdir()):
                    if storage.TEMPORARY in entry.name or entry.name.startswith(_REMOVING):
                        remove_tree(entry)
                for step in unfinished - damaged.keys():
                    self._put_away_unfinished(step)
                for step in damaged:
                    self._move_aside(step)
        except OSError as error:
            raise unwritable(self.run.path, error) from error
        hosts.meet()  # no host goes on before the first has made room
        self._finished = self._read_finished()
        return restored

    def save(self, step: int, state: Mapping[str, Any], metadata: Mapping[str, Any] | None = None) -> None:
        """Starts to save; returns once the arrays are copied from the device, so that they may be donated.

        Waits first for the save before this one, and raises as `wait` does when that failed. A step that is already
        saved is left as it is. `metadata` is plain JSON.
        """
        self.wait()
        if step in self._finished:
            return
        tokenizer = self.run.tokenizer_sha256()
        manifest = Manifest(step, dict(metadata or {}), None, self.best, tokenizer, storage.describe(state), files={})
        manifest.to_bytes()  # raises here, not in the thread, when the metadata is not JSON
        try:
            if hosts.is_first():
                self.run.checkpoints_path.mkdir(parents=True, exist_ok=True)
                if self._directory(step).exists():
                    self._put_away_unfinished(step)
            response = storage.begin_save(self._directory(step), state)
        except Exception as error:
            raise self._explained(step, error) from error
        self._thread = threading.Thread(target=self._finish, args=(response, manifest), name="checkpoint")
        self._thread.start()

    def note(self, step: int, metric: float, metadata: Mapping[str, Any] | None = None) -> None:
        """Adds to a saved step what its evaluation gave, so that it is kept for as long as it is among the best.

        After the save, and not with it: no step is to be lost because an evaluation failed or took too long. `metadata`
        joins that of the save; a metric that is not finite makes a step none of the best. Waits for the save under way
        and raises as `wait` does, and InputError where nothing can be written.
        """
        self.wait()
        found = self._finished[step]
        metric = float(metric) if math.isfinite(metric) else None
        noted = dataclasses.replace(
            found, metric=metric, best=self.best, metadata=found.metadata | dict(metadata or {})
        )
        if hosts.is_first():
            try:
                manifests.write(self._directory(step), noted)
            except OSError as error:
                raise unwritable(self.run.path, error) from error
        self._finished[step] = noted
        if hosts.is_first():
            self._remove_surplus()

    def poll(self) -> None:
        """Raises, as `wait` does, if the save under way has failed already; never waits."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Returns once the last save is on the disk.

        Raises InputError when there was no space or no permission, RuntimeError when the save failed otherwise. Either
        names the last good step; what the failed save left is removed, and saving may go on.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _settle(self) -> None:
        # Orbax tells one operation from another by their order, which must be the same on all hosts.
        self.wait()
        hosts.meet()  # the first writes the manifest after the others are done

    def _finish(self, response: Any, manifest: Manifest) -> None:
        """In a thread: waits for Orbax, hashes this host's share; the first then writes the manifest and tidies."""
        directory = self._directory(manifest.step)
        try:
            share = None
            try:
                response.result()
                hosts.wait_until(directory.exists)
                share = manifests.hash_share(directory, hosts.index(), hosts.count())
            finally:
                if not hosts.is_first() and directory.exists():
                    manifests.hand_over(directory, hosts.index(), share)
            if hosts.is_first():
                for other in self._others_shares(directory):
                    share |= other
                manifest = dataclasses.replace(manifest, files=share)
                manifests.write(directory, manifest)
            self._finished[manifest.step] = manifest
        except Exception as error:
            self._failure = self._explained(manifest.step, error)
            self._failure.__cause__ = error
            return
        if hosts.is_first():
            self._remove_surplus()

    def _others_shares(self, directory: AnyPath) -> list[manifests.FileHashes]:
        deadline = time.monotonic() + _SHARES_WITHIN
        while (shares := manifests.take_over(directory, hosts.count())) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the other hosts' hashes did not arrive within {_SHARES_WITHIN} s")
            time.sleep(0.1)
        if None in shares:
            raise RuntimeError(f"host {shares.index(None) + 1} could not read what was saved")
        return shares

    def _explained(self, step: int, error: Exception) -> Exception:
        """Removes what the failed save left, and says in one line what happened."""
        if hosts.is_first():
            directory = self._directory(step)
            for path in directory.parent.glob(f"{step}{storage.TEMPORARY}*"):
                remove_tree(path)
            if directory.exists() and not (directory / manifests.NAME).exists():
                remove_tree(directory)
        good = max(self._finished, default=None)
        left = f"the last good checkpoint is step {good}" if good is not None else "there is no good checkpoint yet"
        what = f"{type(error).__name__}: {error}".split("\n", 1)[0]
        number = error.errno if isinstance(error, OSError) else None
        if number in FULL or any(phrase in str(error).lower() for phrase in _NO_SPACE):
            return InputError(
                f"{self.run.path}: no space left on the disk while saving step {step}; {left}: free some space and run "
                "the same command again"
            )
        if number is not None:
            first = "make the directory writable and " if number in (errno.EACCES, errno.EPERM, errno.EROFS) else ""
            return InputError(
                f"{self.run.path}: step {step} cannot be saved ({what}); {left}: {first}run the same command again"
            )
        return RuntimeError(f"{self.run.path}: saving step {step} failed ({what}); {left}")

    def _read_finished(self) -> dict[int, Manifest]:
        """As the first host sees them, on each: a network disk may show others for a while what it has moved."""
        known = self._known().values() if hosts.is_first() else ()
        mine = [found for found in known if isinstance(found, Manifest)]
        agreed = hosts.agreed([dataclasses.asdict(found) for found in mine])
        return {fields["step"]: Manifest(**fields) for fields in agreed}

    def _unfinished(self) -> set[int]:
        """Steps without a manifest: being saved, or not saved to the end."""
        path = self.run.checkpoints_path
        return set(manifests.list_steps(path)) - self._known().keys() if path.exists() else set()

    def _put_away_unfinished(self, step: int) -> None:
        """On a disk, Orbax renames what is whole, and only the manifest may be lost; an object store has parts."""
        if isinstance(self.run.checkpoints_path, Path):
            self._move_aside(step)
        else:
            remove_tree(self._directory(step))

    def _move_aside(self, step: int) -> None:
        """So that this step can be saved again, and nothing is lost."""
        aside = self.run.checkpoints_path / _DAMAGED
        aside.mkdir(exist_ok=True)
        if not isinstance(aside, Path):
            # A folder of an object store is there once something is in it.
            (aside / "about.txt").write_text("Checkpoints that were found damaged; they may be deleted.\n")
        taken = {entry.name for entry in aside.iterdir()}
        name, number = str(step), 1
        while name in taken:
            number += 1
            name = f"{step}-{number}"
        self._directory(step).rename(aside / name)
        _log.warning("%s: moved to %s; it is not used, and may be deleted", self._directory(step), aside / name)

    def _remove_surplus(self) -> None:
        """Keeps the newest `keep_last` and the best `keep_best`; so the newest is never removed."""
        newest = sorted(self._finished, reverse=True)[: self.keep_last]
        for step in sorted(self._finished.keys() - set(newest) - set(ranked(self._finished)[: self.keep_best])):
            directory = self._directory(step)
            aside = directory.with_name(f"{_REMOVING}{step}")
            del self._finished[step]
            try:
                if isinstance(directory, Path):
                    directory.rename(aside)  # at once, so that a kill leaves no part that looks whole
                    remove_tree(aside)
                else:
                    (directory / manifests.NAME).unlink()  # an object store cannot rename at once
                    remove_tree(directory)
            except OSError as error:
                _log.warning("%s: an old checkpoint cannot be removed (%s)", directory, error)

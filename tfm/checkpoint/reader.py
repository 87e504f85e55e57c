"""Reads checkpoints, each only after every file of it was found to be as written, and changes nothing."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tfm import hosts
from tfm.checkpoint import manifest as manifests
from tfm.checkpoint import storage
from tfm.checkpoint.manifest import Damaged, Manifest, Unfinished
from tfm.checkpoint.run_directory import RunDirectory, refuse_link
from tfm.config import InputError
from tfm.config_checks import AVERAGE

if TYPE_CHECKING:
    from tfm.files import AnyPath

_log = logging.getLogger(__name__)

Known = Mapping[int, Manifest | Damaged]  # every step that has a manifest -> it, or what is wrong with it


@dataclasses.dataclass(frozen=True)
class Restored:
    """What was read: `state` is the state's dict, or the parameters alone. Several `steps` where they were averaged."""

    step: int
    state: Any
    metadata: dict[str, Any]
    metric: float | None
    steps: tuple[int, ...]


class CheckpointReader:
    """Reads the checkpoints of a run. All processes of a program call each method together."""

    def __init__(self, run: RunDirectory):
        refuse_link(run.checkpoints_path)
        self.run = run
        self._said: set[str] = set()

    def steps(self) -> list[int]:
        """The finished steps, oldest first. A directory without a manifest is passed over, and that is said once."""
        return sorted(step for step, found in self._known().items() if isinstance(found, Manifest))

    def restore(self, abstract_state: Mapping[str, Any], step: int | None = None) -> Restored | None:
        """The state of `step`, or of the newest step that is as it was written; None where nothing is finished.

        `abstract_state` is the state's structure with a jax.ShapeDtypeStruct that has a sharding (or a jax.Array) for
        each leaf; the arrays come back in these shardings, whichever they were saved from. A damaged step is named in
        a warning and the one before it is taken. Raises InputError when `step` is not there or damaged, when all are,
        when the state has other arrays than are stored, or when the run's tokenizer is not the one trained with.
        """
        restored, damaged = self._restore(abstract_state, step)
        if restored is None and damaged:
            raise self._none_usable(damaged)
        return restored

    def restore_parameters(self, abstract_parameters: Any, which: str | int | None = None) -> Restored:
        """Parameters alone, the moving average (EMA) where the run keeps one; nothing else of the state is read.

        `which`: a step; last or best; last:N or best:N for the mean, in float32, of N checkpoints; None for the best,
        or the newest where none was evaluated. Damaged checkpoints are replaced by the next ones, with a warning.
        Raises InputError as `restore` does, and where there is nothing to restore.
        """
        self._settle()
        known = self._known()
        kind, count = _parse(which)
        order = self._order(known, kind, count, asked=which is not None)
        if kind == "best" and count > max(1, kept := self.run.config.training.keep_best):
            _log.warning("%s: training.keep_best=%d: some of the best %d may be gone", self.run.path, kept, count)
        damaged: dict[int, str] = {}
        chosen: list[Manifest] = []
        mean, parameters = storage.Mean(), None
        for manifest in self._verified(order, damaged):
            entry = "ema" if any(name.startswith("ema/") for name in manifest.arrays) else "parameters"
            parameters = self._load(manifest, {entry: abstract_parameters})[entry]
            chosen.append(manifest)
            if count > 1:
                mean.add(parameters)
            if len(chosen) == count:
                break
        if not chosen:
            if damaged:
                raise self._none_usable(damaged)
            raise InputError(f"{self.run.checkpoints_path}: holds no finished checkpoint: train the run first")
        if len(chosen) < count:
            _log.warning("%s: averages %d checkpoints, not %d: no more are usable", self.run.path, len(chosen), count)
        if len(chosen) > 1:
            parameters = mean.result(abstract_parameters)
        first = chosen[0]
        return Restored(first.step, parameters, first.metadata, first.metric, tuple(m.step for m in chosen))

    def _order(self, known: Known, kind: str | int, count: int, asked: bool) -> list[int]:
        """The steps to try, the first choice first."""
        if isinstance(kind, int):
            self._refuse_unknown(kind, known)
            return [kind]
        newest_first, best_first = sorted(known, reverse=True), ranked(known)
        if kind == "last":
            return newest_first
        if not best_first and asked and known:
            _log.warning("%s: no checkpoint was evaluated; the newest is taken for the best", self.run.path)
        if best_first and count > 1:
            return best_first
        return best_first + [step for step in newest_first if step not in best_first]

    def _examined(self, step: int) -> Manifest | Damaged:
        """The manifest of a step, all of whose files and this host's share of whose bytes are as it says."""
        try:
            manifest = manifests.read(self._directory(step))
            manifests.verify(self._directory(step), manifest, hosts.index(), hosts.count())
        except Unfinished:
            return Damaged("this host does not see it")
        except Damaged as error:
            return error
        return manifest

    def _shown(self, step: int) -> Manifest | Damaged | None:
        """What `_examined` says once all files are there."""
        return None if type(found := self._examined(step)) is Damaged else found

    def _settle(self) -> None:
        """Called before anything is read; whoever also saves waits here."""

    def _directory(self, step: int) -> AnyPath:
        return self.run.checkpoints_path / str(step)

    def _known(self) -> dict[int, Manifest | Damaged]:
        found: dict[int, Manifest | Damaged] = {}
        try:
            there = manifests.list_steps(self.run.checkpoints_path)
        except OSError as error:
            raise InputError(f"{self.run.checkpoints_path}: cannot be read ({error.strerror})") from error
        for step in there:
            try:
                found[step] = manifests.read(self._directory(step))
            except Damaged as error:
                found[step] = error
                self._warn_once(f"{self._directory(step)}: damaged, not used: {error}")
            except Unfinished as error:
                self._warn_once(f"{self._directory(step)}: unfinished ({error}), passed over")
        return found

    def _verified(self, order: list[int], damaged: dict[int, str]) -> Iterator[Manifest]:
        """Of the steps in `order`, those that are as written; the others go to `damaged`, with what is wrong."""
        tokenizer = self.run.tokenizer_sha256()
        for step in hosts.agreed(order):
            manifest = self._examined(step)
            if hosts.agreed(isinstance(manifest, Manifest)) and type(manifest) is Damaged:
                # The first host sees all of it, and so will this one. Other bytes in it are no matter of time.
                manifest = hosts.wait_until(lambda step=step: self._shown(step)) or manifest
            if not hosts.all_agree(isinstance(manifest, Manifest)):
                other = isinstance(manifest, Manifest)
                damaged[step] = "another host found it damaged" if other else str(manifest)
                self._warn_once(f"{self._directory(step)}: damaged, not used: {damaged[step]}")
                continue
            if manifest.tokenizer_sha256 not in (None, tokenizer):
                raise InputError(
                    f"{self.run.tokenizer_path}: not the tokenizer that step {step} was trained with: put it back"
                )
            yield manifest

    def _restore(
        self, abstract_state: Mapping[str, Any], step: int | None = None
    ) -> tuple[Restored | None, dict[int, str]]:
        """What `restore` returns, and the damaged steps with what is wrong with each."""
        self._settle()
        known, damaged = self._known(), {}
        if step is not None:
            self._refuse_unknown(step, known)
        order = sorted(known, reverse=True) if step is None else [step]
        for manifest in self._verified(order, damaged):
            state = self._load(manifest, abstract_state, whole=True)
            return Restored(manifest.step, state, manifest.metadata, manifest.metric, (manifest.step,)), damaged
        return None, damaged

    def _load(self, manifest: Manifest, abstract_state: Mapping[str, Any], whole: bool = False) -> dict[str, Any]:
        """The named entries; `whole` if they must be all there are. Orbax itself would cast, and pass over the rest."""
        expected = storage.describe(abstract_state)
        stored = {n: kind for n, kind in manifest.arrays.items() if whole or n.split("/")[0] in abstract_state}
        if expected != stored:
            name = min(name for name in expected.keys() | stored.keys() if expected.get(name) != stored.get(name))
            raise InputError(
                f"{self._directory(manifest.step)}: {name} is {stored.get(name, 'not stored')} there and "
                f"{expected.get(name, 'nothing')} in this run: use the config that it was trained with"
            )
        directory = self._directory(manifest.step)
        try:
            return storage.load(directory, abstract_state)
        except Exception as error:
            if (directory / manifests.NAME).exists():
                raise
            raise InputError(
                f"{directory}: was removed while it was read, by a training that keeps newer ones: run the same "
                "command again, or raise training.keep_last there"
            ) from error

    def _refuse_unknown(self, step: int, known: Known) -> None:
        if step not in known:
            there = ", ".join(map(str, sorted(known))) or "none"
            raise InputError(f"{self.run.checkpoints_path}: has no finished step {step}; there are: {there}")

    def _none_usable(self, damaged: Mapping[int, str]) -> InputError:
        each = "; ".join(f"step {step}: {problem}" for step, problem in damaged.items())
        return InputError(
            f"{self.run.checkpoints_path}: no usable checkpoint: {each}: put back a good copy, or move the directory "
            "away to start anew"
        )

    def _warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            _log.warning("%s", message)


def ranked(known: Known) -> list[int]:
    """The evaluated steps, the best first; of equals, the earlier."""
    evaluated = [m for m in known.values() if isinstance(m, Manifest) and m.metric is not None]
    sign = {"higher": -1, "lower": 1}
    return [m.step for m in sorted(evaluated, key=lambda m: (sign[m.best] * m.metric, m.step))]


def _parse(which: str | int | None) -> tuple[str | int, int]:
    """(last, best or a step; how many)."""
    text = "best" if which is None else str(which)
    if re.fullmatch(r"[0-9]+", text):
        return int(text), 1
    match = AVERAGE.fullmatch(text)
    if match is None:
        raise InputError(f"checkpoint {which!r}: expected last:N or best:N with N at least 1, last, best, or a step")
    return match[1], int(match[2] or 1)

"""The training loop: resume, step, metrics, evaluate, save; and the same again until the run ends or is told to.

The step number is the whole position in the data, so that resuming is: restore the newest checkpoint, cut what the log
says of later steps, and go on with batch `step`.
"""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from typing import Any

import jax

from tfm import device_memory, hosts, sharding
from tfm.checkpoint import Checkpointer, CheckpointReader, RunDirectory, truncate_metrics
from tfm.checkpoint.run_directory import unwritable
from tfm.config import Config, InputError
from tfm.data.batches import Batch, TrainBatches, validation_batches
from tfm.data.store import TokenStore, open_store, prepare, store_directory
from tfm.decoding.bleu import corpus_scores
from tfm.decoding.decoder import check_beam
from tfm.decoding.translator import Translator
from tfm.model.transformer import count_parameters
from tfm.text import finite
from tfm.training.metrics import MetricsWriter, read_events
from tfm.training.progress import Progress, perplexity
from tfm.training.signals import Stopped, StopRequest, stop_signals
from tfm.training.step import TrainState, check_rows, trainer_of
from tfm.watchdog import Watchdog

_log = logging.getLogger(__name__)

Scores = dict[str, float]

_VALIDATING = (
    "a batch of validation pairs",
    "raise training.gradient_accumulation, or take the longest pairs out of data.validation_split and start in a new "
    "--workdir",
)


def train(config: Config, workdir: str | os.PathLike[str]) -> int:
    """Trains until `training.steps`, resuming what stands in `workdir`. Returns the exit status of the run.

    0 when the run reached its end (early stopping is one), 143 after SIGTERM and 130 after Ctrl-C, both once the state
    is saved.

    Raises:
      InputError: wrong input, or a disk that is full; the run directory stays usable.
      TrainingDiverged: as it says.
    """
    config = config.validate()
    with ExitStack() as stack:
        # The first host makes the directory; the others, which see the same disk, find it made.
        run = hosts.first_does(lambda: RunDirectory.create(workdir, config, lock=stack))
        run = run or RunDirectory.create(workdir, config, is_first=False)
        _refuse_unshared(run)
        return Run(config, run, stack).go()


def _refuse_unshared(run: RunDirectory) -> None:
    """Raises InputError on each host where one of them doesn't see what the first one made: no save would ever end.

    What it made is a file of a new name, so that a copy of the run on a host's own disk is told from the run.
    """
    if hosts.count() == 1:
        return
    first, name = hosts.agreed((str(run.path), f".seen-by-all-{uuid.uuid4().hex}"))
    is_named_alike, mark = str(run.path) == first, run.path / name
    try:
        hosts.first_does(lambda: mark.write_bytes(b""))
        is_seen = is_named_alike and hosts.wait_until(mark.exists)
        is_shared = hosts.all_agree(is_seen)
    except OSError as error:
        raise unwritable(run.path, error) from error
    finally:
        if hosts.is_first():
            with suppress(OSError):
                mark.unlink(missing_ok=True)
    if is_shared:
        return
    if is_seen:
        raise InputError(f"{run.path}: another host does not see it: give all of them one directory that they share")
    differs = "is another directory than host 0 has under that name" if is_named_alike else f"is {first} on host 0"
    raise InputError(f"--workdir={run.path}: {differs}: give all hosts one directory that they share")


class Run:
    """One run from its start or its resumption to its end."""

    def __init__(self, config: Config, run: RunDirectory, stack: ExitStack):
        """`stack` closes what the run opens: the log, and the checkpoint that is still being written."""
        self.config, self.run = config, run
        mesh = self.mesh = sharding.make_mesh(config.mesh)
        check_rows(config, mesh)  # before a corpus is prepared for hours
        initial = _run_to_start_from(config, run)
        store = _prepared(config, run)
        self.trainer = trainer_of(config, store.tokenizer.vocab_size, mesh)
        self.model = self.trainer.model
        self.batches = TrainBatches(store, config.data.train_split, config)
        shards = sharding.batch_shards(mesh)
        self.validation = validation_batches(store, config.data.validation_split, config, shards)
        self.validation_text = store.text(config.data.validation_split, config.training.evaluate_sentences)
        banned = store.tokenizer.banned_ids
        check_beam(config.training.evaluate_beam_size, self.model.vocab_size, banned, "training.evaluate_beam_size")
        self.translator = Translator([self.model], mesh, store.tokenizer, config.validation_decoding, scores=False)
        self.checkpointer = stack.enter_context(
            Checkpointer(
                run,
                keep_last=config.training.keep_last,
                keep_best=config.training.keep_best,
                best="lower" if config.training.best_metric == "loss" else "higher",
            )
        )
        self.evaluation_is_due = False
        hosts.meet()
        self.state = self._resumed() or self._started(initial)
        self.first_step = int(self.state.step)
        hosts.first_does(lambda: run.adopt(config))  # nothing refuses it any more
        self.writer: MetricsWriter | None = None
        if hosts.is_first():
            self.writer = stack.enter_context(
                MetricsWriter(run.path, total_steps=config.training.steps, first_step=self.first_step)
            )
        self.watchdog = stack.enter_context(Watchdog(config.hosts))
        _log.info(
            "%s parameters, vocabulary of %s, mesh %s, %s in %s, batches of %d rows: %s",
            f"{count_parameters(self.model):,}",
            f"{self.model.vocab_size:,}",
            dict(mesh.shape),
            self.model.dtype,
            run.path,
            self.batches.rows_per_batch,
            self.batches.describe(),
        )

    def go(self) -> int:
        """The steps from the current one on. Returns the exit status."""
        steps = self.config.training.steps
        with stop_signals() as stop, jax.set_mesh(self.mesh):
            if self.evaluation_is_due and not self._evaluate(self.first_step, stop):
                return stop.status
            if self.first_step >= steps:
                _log.info("%s: the run has all its %d steps; raise training.steps to go on", self.run.path, steps)
                return 0
            if self._should_stop_early():
                return 0
            with closing(
                self.batches.read_ahead(self.first_step, steps, sharding.batch_sharding(self.mesh))
            ) as batches:
                return self._steps(batches, stop)

    def _steps(self, batches: Iterator[tuple[int, Batch]], stop: StopRequest) -> int:
        steps = self.config.training.steps
        progress = Progress(self.writer, self.config, self._last_good_checkpoint)
        pending = None
        hosts.meet()
        self.watchdog.begins("compiling")
        for k, batch in batches:
            self.state, metrics = self.trainer.train_step(self.state, batch)
            # The order is important: step k is on its way before the numbers of step k - 1 are waited for.
            if pending is not None:
                progress.record(*pending)
            step, pending = k + 1, (k + 1, metrics)
            evaluate = self._is_evaluated(step)
            if stop.after_step(step) or evaluate or step % self.config.training.checkpoint_every == 0:
                progress.record(*pending)
                pending = None
                with progress.paused():
                    self.watchdog.begins("saving")
                    self._save(step)
                    is_evaluated = evaluate and self._evaluate(step, stop)
                if stop.requested and not (is_evaluated and step == steps):
                    self.checkpointer.wait()
                    _log.warning("%s: saved step %d; the same command goes on from there", stop.name, step)
                    return stop.status
                if evaluate and self._should_stop_early():
                    break
            self.checkpointer.poll()
            self.watchdog.begins("stepping")
        self.watchdog.begins("saving")
        self.checkpointer.wait()
        _log.info("%s: the run ended at step %d", self.run.path, int(self.state.step))
        return 0

    def _evaluate(self, step: int, stop: StopRequest) -> bool:
        """Evaluates a step that is being saved, for the log and its checkpoint; False where `stop` came before the end.

        Saved before, it is not lost with an evaluation that fails or that a machine has no time for: whoever resumes
        from it evaluates it first.
        """
        self.watchdog.begins("evaluating")
        try:
            with stop.at_once():
                scores = self._scores()
        except Stopped:
            _log.warning("step %d is evaluated when the run goes on", step)
            return False
        if self.writer is not None:
            self.writer.write({"step": step, "kind": "validation", **scores})
        self.watchdog.begins("saving")
        self._note(step, scores)
        return True

    def _is_evaluated(self, step: int) -> bool:
        return step % self.config.training.evaluate_every == 0 or step == self.config.training.steps

    def _scores(self) -> Scores:
        """Loss over the whole validation split, BLEU and chrF over some of it, of the averaged parameters."""
        parameters = self.state.averaged()
        rows = sharding.batch_sharding(self.mesh)
        with device_memory.explained(*_VALIDATING):
            sums = [
                self.trainer.evaluation_step(parameters, self.validation.global_batch(i, rows))
                for i in range(len(self.validation))
            ]
            loss, nll, tokens = (sum(float(part) for part in parts) for parts in zip(*sums, strict=True))
        scores = {"loss": loss / tokens, "nll": nll / tokens, "perplexity": perplexity(nll / tokens)}
        sources, references = zip(*self.validation_text, strict=True)
        with device_memory.explained(*device_memory.TRANSLATING), self.translator.with_parameters(parameters):
            hypotheses = [translation.text for translation in self.translator.translate(sources)]
        found = corpus_scores(hypotheses, references, self.config.data.target_language)
        return scores | {name: score.value for name, score in found.items()}

    def _save(self, step: int) -> None:
        metadata = {"plan": self.batches.plan_identity, "rows_of_windows": self.batches.plan.counts()}
        if self.writer is not None:
            self.writer.publish()  # before the checkpoint that a resumed run's log is cut to
        self.checkpointer.save(step, _to_dict(self.state), metadata)

    def _note(self, step: int, scores: Mapping[str, float | None]) -> None:
        metric = scores.get(self.config.training.best_metric)
        self.checkpointer.note(step, math.nan if metric is None else metric, {"scores": finite(scores)})

    def _last_good_checkpoint(self) -> str:
        self.checkpointer.wait()  # the newest may still be on its way
        steps = self.checkpointer.steps()
        return f"step {steps[-1]}" if steps else "none yet"

    def _resumed(self) -> TrainState | None:
        """The newest good checkpoint, if there is one; the log is cut to what was known there."""
        restored = self.checkpointer.resume(_to_dict(self.trainer.abstract_state))
        step = 0 if restored is None else restored.step
        hosts.first_does(lambda: truncate_metrics(self.run.metrics_path, step))
        if restored is None:
            return None
        _refuse_other_plan(self.run, restored.metadata.get("plan"), self.batches.plan_identity)
        self.batches.plan.recall(restored.metadata.get("rows_of_windows", []))
        if restored.metadata.get("scores") is None and self._is_evaluated(step):
            # The run ended before it was, or between the log's line and the checkpoint's.
            events = (event for event in self._logged() if event["kind"] == "validation" and event["step"] == step)
            scores = hosts.agreed(next(events, None))
            if scores is not None:
                self._note(step, {name: scores[name] for name in scores if name not in ("step", "kind")})
            self.evaluation_is_due = scores is None
        _log.info("%s: resumes after step %d", self.run.path, step)
        return _from_dict(restored.state)

    def _started(self, initial: RunDirectory | None) -> TrainState:
        state = self.trainer.init()
        if initial is None:
            return state
        restored = CheckpointReader(initial).restore_parameters(self.trainer.abstract_state.parameters)
        _log.info("%s: starts from the parameters of %s, step %d", self.run.path, initial.path, restored.step)
        ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, restored.state)
        return state._replace(parameters=restored.state, ema=ema)

    def _logged(self) -> list[dict[str, Any]]:
        """The events of the log so far, on the first host: the others may not see it yet."""
        if not hosts.is_first() or not self.run.metrics_path.exists():
            return []
        return list(read_events(self.run.metrics_path))

    def _should_stop_early(self) -> bool:
        """No better evaluation for `early_stopping` times? The log remembers, so that a resumed run agrees."""
        patience, name = self.config.training.early_stopping, self.config.training.best_metric
        if not patience:
            return False
        sign = -1.0 if name == "loss" else 1.0
        values = [  # a metric that was not finite is null there, and the worst
            -math.inf if event.get(name) is None else sign * event[name]
            for event in self._logged()
            if event["kind"] == "validation"
        ]
        since_best = hosts.agreed(len(values) - 1 - values.index(max(values)) if values else 0)
        if since_best >= patience:
            _log.info("%d evaluations without a better %s: the run ends early", since_best, name)
        return since_best >= patience


def _run_to_start_from(config: Config, run: RunDirectory) -> RunDirectory | None:
    """The run whose parameters and tokenizer this one takes over; none once it has checkpoints of its own."""
    path = config.training.initialize_from
    if path is None:
        return None
    if hosts.agreed(bool(CheckpointReader(run).steps())):
        return None
    initial = RunDirectory.open(path)
    if not CheckpointReader(initial).steps():  # said before a corpus is prepared for hours
        raise InputError(f"training.initialize_from={path}: holds no finished checkpoint: train that run first")
    if (there := initial.config.model.activation) != config.model.activation:  # of parameters alike in all else
        raise InputError(
            f"training.initialize_from={path}: was trained with model.activation={there}, and this run has "
            f"{config.model.activation}: set it to that"
        )
    return initial


def _prepared(config: Config, run: RunDirectory) -> TokenStore:
    """The token store, built if it is not there, and the run's own copy of its tokenizer."""
    directory = store_directory(config, run.path)

    def prepared() -> TokenStore:
        has_begun = run.has_begun()
        store = prepare(config, directory, run.brought_tokenizer(config), has_begun)
        if not has_begun:
            for line in str(store.report).split("\n"):
                _log.info("%s", line)
        run.install_tokenizer(store.tokenizer_path)
        return store

    # The others need neither the corpus nor its tokenizer, but the store: on a shared disk, or copied from gs://.
    return hosts.first_does(prepared) or open_store(directory, config.data.cache_dir)


def _refuse_other_plan(run: RunDirectory, there: Any, now: Mapping[str, Any]) -> None:
    """Batch k must be the batch that it was when the checkpoint was written."""
    there = there or {}
    differing = [name for name in now if there.get(name) != now[name]]
    if differing:
        parts = ", ".join(f"{name} was {there.get(name)!r} and is {now[name]!r}" for name in differing)
        raise InputError(
            f"{run.path}: the data is not what the checkpoint was trained on: {parts}: put the corpus back as it was, "
            "or use another --workdir"
        )


def _to_dict(state: TrainState) -> dict[str, Any]:
    """A train state under the names that checkpoints use; the moving average only where there is one."""
    return {name: value for name, value in state._asdict().items() if value is not None}


def _from_dict(values: Mapping[str, Any]) -> TrainState:
    return TrainState(**{"ema": None, **values})

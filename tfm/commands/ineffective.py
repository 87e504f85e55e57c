"""Options that a command would ignore, or that another one overrides: refused, so that none is believed to work."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from tfm.commands.typed import Given
from tfm.config import InputError, TrainingConfig

_OF_A_TRAINED_MODEL = ("translate", "score", "evaluate", "explain")
# Of a run, not of one update.
_OF_A_LOOP = tuple(
    f"training.{name}"
    for name in (
        "steps",
        "log_every",
        "checkpoint_every",
        "keep_",
        "evaluate_",
        "best_metric",
        "early_stopping",
        "max_skipped_steps",
        "initialize_from",
    )
)
# Of `training.*`, what a search with random parameters is made with.
_OF_A_SEARCH = ("seed", "deterministic")
# Commands, the beginnings of the options that they have no use for, and why.
_WITHOUT_USE = (
    (("demo", "explain", "plan", "prepare"), ("hosts.",), "which runs on one host"),
    (_OF_A_TRAINED_MODEL, ("training.", "optimizer.", "model.attention"), "which trains nothing"),
    (("translate", "score", "explain"), ("data.",), "which reads no corpus"),
    (
        ("score",),
        ("decoding.beam_size", "decoding.n_best", "decoding.min_length", "decoding.sampling"),
        "which searches for nothing",
    ),
    (
        ("explain",),
        ("decoding.n_best", "decoding.sentences_per_batch"),
        "which shows one translation",
    ),
    (("explain",), ("mesh.",), "which uses one device"),
    (("benchmark train",), ("decoding.",), "which translates nothing"),
    (("benchmark train",), _OF_A_LOOP, "which times --steps updates and nothing beside them"),
    (
        ("benchmark decode",),
        (
            "optimizer.",
            "model.attention",
            *(
                f"training.{field.name}"
                for field in dataclasses.fields(TrainingConfig)
                if field.name not in _OF_A_SEARCH
            ),
        ),
        "which trains nothing",
    ),
    (("benchmark decode",), ("decoding.average", "decoding.ensemble_mean"), "whose parameters are random"),
    (
        ("benchmark decode",),
        tuple(
            f"decoding.{name}"
            for name in (
                "min_length",
                "max_extra_tokens",
                "max_source_length",
                "sampling",
                "n_best",
                "sentences_per_batch",
            )
        ),
        "whose searches end where --length says",
    ),
)
# By command: an option, another one that overrides it, and why.
_SAMPLED = ("decoding.beam_size", "decoding.sampling", "which draws translations and has no beam")
_OF_SEARCH = ("beam_size", "length_penalty", "min_length")
_OF_SEARCH += ("sampling", "sampling_temperature", "sampling_top_k", "sampling_top_p", "sampling_seed")
_CHOSEN = ("decoding.average", "checkpoint", "which says whose parameters are taken")
_TAKEN_OVER = tuple(
    (f"data.{name}", "training.initialize_from", "whose tokenizer is taken")
    for name in ("tokenizer_model", "tokenizer_sample")
)
_OVERRIDDEN = {
    "train": _TAKEN_OVER,
    "prepare": _TAKEN_OVER,
    "translate": (_SAMPLED, _CHOSEN),
    "score": (_CHOSEN,),
    "evaluate": (_SAMPLED, _CHOSEN),
    "explain": (
        _SAMPLED,
        _CHOSEN,
        *((f"decoding.{name}", "target", "which is shown as it is") for name in _OF_SEARCH),
    ),
    "benchmark decode": (
        ("decoding.beam_size", "beams", "which says which beams are measured"),
        ("decoding.tokens_per_batch", "batches", "which says how many sentences are translated at once"),
    ),
    "plan": (
        ("training.target_tokens_per_batch", "rows_per_chip", "which says how large a batch is"),
        ("workdir", "config", "which says what is planned"),
    ),
}
# What says which pairs `evaluate` reads.
_OF_A_TEST = ("data.corpus", "data.test_split", "data.source_language", "data.target_language")
# What says how a corpus is read: the beginnings of options.
_OF_A_CORPUS = tuple(
    f"data.{name}"
    for name in (
        "corpus",
        "source_language",
        "target_language",
        "train_split",
        "validation_split",
        "test_split",
        "tokenizer",
        "segmentation",
        "max_length_ratio",
        "drop_duplicates",
        "store",
        "cache_dir",
    )
)
# By axis of a sweep: what it sets.
_SWEPT = {
    "batch": ("training.target_tokens_per_batch",),
    "length": ("data.source_row_length", "data.target_row_length"),
}
# Of which a device has nothing but rows, or a part of the heads.
_OVER_ALL_DEVICES = ("translate", "score", "evaluate", "benchmark decode")


def refuse_without_effect(command: str, given: Sequence[Given]) -> None:
    """Raises InputError at an option that the command would ignore, or that another one of those given overrides."""
    others = {option.name: option.values[-1] for option in given if option.values[-1] != "False"}
    for option in given:
        _refuse_without_use(command, option)
        _refuse_overridden(command, option, others)
        _refuse_of_a_benchmark(command, option, others)
        if command in _OVER_ALL_DEVICES:
            _refuse_of_a_mesh(command, option)


def _refuse_without_use(command: str, option: Given) -> None:
    for commands, beginnings, why in _WITHOUT_USE:
        if command in commands and option.name.startswith(beginnings):
            raise InputError(f"{option}: has no effect on tfm {command}, {why}: leave it out")


def _refuse_overridden(command: str, option: Given, others: Mapping[str, str]) -> None:
    for name, other, why in _OVERRIDDEN.get(command, ()):
        if option.name == name and other in others:
            raise InputError(f"{option}: has no effect with --{other}, {why}: leave one of them out")
    if option.name == "decoding.ensemble_mean" and command in _OF_A_TRAINED_MODEL and "ensemble" not in others:
        raise InputError(f"{option}: has no effect without --ensemble: leave it out")
    if command == "evaluate" and option.name.startswith("data.") and option.name != "data.target_language":
        if "source" in others:
            raise InputError(f"{option}: has no effect with --source, which is read in place of a corpus: leave it out")
        if option.name not in _OF_A_TEST:
            raise InputError(f"{option}: has no effect on tfm evaluate, which reads the test split alone: leave it out")
    if option.name in ("mesh.data", "mesh.fsdp", "mesh.tensor") and "meshes" in others:
        raise InputError(f"{option} and --meshes say both which mesh is planned: leave one of them out")


def _refuse_of_a_benchmark(command: str, option: Given, others: Mapping[str, str]) -> None:
    if command == "benchmark decode" and option.name.startswith("data.") and option.name != "data.vocab_size":
        raise InputError(f"{option}: has no effect on tfm {command}, whose sentences are random: leave it out")
    sweep = others.get("sweep", "")
    if command == "benchmark decode" and option.name == "decoding.tokens_per_batch" and sweep.startswith("batch="):
        raise InputError(f"{option} and --sweep={sweep} say both what is measured: leave one of them out")
    if command != "benchmark train":
        return
    if option.name == "data.read_ahead" and "pipeline" not in others:
        raise InputError(f"{option}: has no effect without --pipeline: batches are on the device")
    if option.name.startswith(_OF_A_CORPUS) and others.get("lengths") != "corpus":
        raise InputError(f"{option}: has no effect without --lengths=corpus: random sentences are measured")
    if option.name in _SWEPT.get(sweep.partition("=")[0], ()):
        raise InputError(f"{option} and --sweep={sweep} say both what is measured: leave one of them out")


def _refuse_of_a_mesh(command: str, option: Given) -> None:
    if option.name == "mesh.tensor" and option.values[-1] == "-1":
        raise InputError(f"{option}: expected the number of devices that share the heads of a layer")
    if option.name.startswith("mesh.") and option.name != "mesh.tensor":
        raise InputError(
            f"{option}: has no effect on tfm {command}, which splits sentences over all devices, and heads by "
            "mesh.tensor: leave it out"
        )

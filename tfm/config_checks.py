"""The checks that refuse a config: a value out of its range, or two that cannot stand together."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tfm.config import (
    Config,
    ConfigError,
    DataConfig,
    DecodingConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainingConfig,
)

AVERAGE = re.compile(r"(last|best)(?::([1-9][0-9]*))?")  # of checkpoints: the last N or the best N
_LARGEST = 3.4e38  # that float32 has, about
_LEAST_TEMPERATURE = 1e-6  # logits divided by less may no longer be float32 numbers
_LEAST_TOP_P = 1e-30  # what is less may be nothing in float32
_MOST_TOKENS = 2**30  # of a translation: a search counts on from its source's in int32


def check_types(config: Config) -> None:
    """Raises ConfigError at a value of another type than its field's: a config file in Python can hold anything."""
    for section, kind in get_type_hints(type(config)).items():
        values = getattr(config, section)
        if not isinstance(values, kind):
            raise ConfigError(f"{section} is a {type(values).__name__}: expected a tfm.config.{kind.__name__}")
        for name, hint in get_type_hints(kind).items():
            if not _fits(value := getattr(values, name), hint):
                raise ConfigError(f"{section}.{name}={value!r}: expected {expected(hint)}")


def check_ranges(config: Config) -> None:
    """Raises ConfigError at a value that no config may have."""
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        hints = get_type_hints(type(values))
        for field in dataclasses.fields(values):
            name, value = f"{section.name}.{field.name}", getattr(values, field.name)
            choices = [choice for choice in get_args(hints[field.name]) if isinstance(choice, str)]
            if choices and value not in choices:
                raise ConfigError(f"{name}={value!r}: must be one of {', '.join(choices)}")
            low, below = field.metadata.get("low"), field.metadata.get("below")
            if below is None and type(value) is int:
                below = 2**31  # what devices count with is int32
            # Written so that NaN, which is on neither side of anything, fails too.
            if value is not None and low is not None and not low <= value:
                raise ConfigError(f"{name}={value}: must be at least {low}")
            if value is not None and below is not None and not value < below:
                raise ConfigError(f"{name}={value}: must be below {below}")
            if isinstance(value, float) and not abs(value) <= _LARGEST:
                raise ConfigError(f"{name}={value}: must be a number that float32 can hold")


def expected(kind: Any) -> str:
    """What a value of a type looks like, in words."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join("None" if part is type(None) else expected(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "one or more values"
    words = {int: "one whole number", float: "one number", bool: "True or False", str: "one text", Path: "one path"}
    return words.get(kind, kind.__name__)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a field of that type may have the value."""
    if get_origin(kind) in (Union, types.UnionType):
        return any(_fits(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return True  # its choices are a range
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(part, get_args(kind)[0]) for part in value)
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def check_together(config: Config) -> None:
    """Raises ConfigError at values that contradict each other, naming the fields."""
    _check_model(config.model)
    _check_data(config.data)
    _check_optimizer(config.optimizer, config.training)
    _check_training(config.training, config.data)
    _check_decoding(config.decoding)
    _check_average(config.decoding, config.training)
    _check_mesh(config.mesh)


def _check_model(model: ModelConfig) -> None:
    for name in ("d_k", "d_v"):
        if getattr(model, name) is None and model.d_model % model.num_heads:
            raise ConfigError(
                f"model.d_model={model.d_model} is not a multiple of model.num_heads={model.num_heads}: "
                f"change one of them, or set model.{name}"
            )
    if model.d_model % 2:
        raise ConfigError(f"model.d_model={model.d_model}: must be even, since positions are pairs of sine and cosine")


def _check_data(data: DataConfig) -> None:
    if not data.corpus:
        raise ConfigError("data.corpus is empty: name at least one corpus, such as demo or text:DIR/{split}.{lang}")
    if data.source_language == data.target_language:
        raise ConfigError(
            f"data.source_language and data.target_language are both {data.source_language!r}: they must differ"
        )
    if data.train_split == data.validation_split:
        raise ConfigError(
            f"data.train_split and data.validation_split are both {data.train_split!r}: validation must be unseen"
        )
    if data.tokenizer is not None:
        for name in ("tokenizer_model", "tokenizer_sample"):
            if _changed(data, name):
                raise ConfigError(
                    f"data.{name}={getattr(data, name)} has no effect with data.tokenizer={data.tokenizer}, which is "
                    "not trained: leave one of them out"
                )
    if data.segmentations == 1 and _changed(data, "segmentation_alpha"):
        raise ConfigError(
            f"data.segmentation_alpha={data.segmentation_alpha} has no effect with data.segmentations=1: raise that"
        )
    if data.segmentations > 1 and data.tokenizer_model == "bpe" and data.segmentation_alpha > 1:
        raise ConfigError(
            f"data.segmentation_alpha={data.segmentation_alpha}: with data.tokenizer_model=bpe it is a share, at most 1"
        )


def _check_optimizer(optimizer: OptimizerConfig, training: TrainingConfig) -> None:
    if optimizer.schedule != "inverse_sqrt" and optimizer.warmup_steps >= training.steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} leaves nothing of training.steps={training.steps} for "
            f"the {optimizer.schedule} schedule: lower the first or raise the second"
        )
    if optimizer.schedule == "wsd" and optimizer.warmup_steps + (optimizer.decay_steps or 0) > training.steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} and optimizer.decay_steps={optimizer.decay_steps} are "
            f"together more than training.steps={training.steps}"
        )
    if optimizer.weight_decay and optimizer.name == "adam":
        raise ConfigError(
            f"optimizer.weight_decay={optimizer.weight_decay} has no effect with optimizer.name=adam: use adamw"
        )
    for name in ("beta1", "beta2", "epsilon"):
        if optimizer.name == "adafactor" and _changed(optimizer, name):
            raise ConfigError(
                f"optimizer.{name}={getattr(optimizer, name)} has no effect with optimizer.name=adafactor: use adam or "
                "adamw, or leave it out"
            )
    if optimizer.decay_steps is not None and optimizer.schedule != "wsd":
        raise ConfigError(
            f"optimizer.decay_steps={optimizer.decay_steps} has no effect with optimizer.schedule="
            f"{optimizer.schedule}: use wsd"
        )
    if optimizer.final_learning_rate and optimizer.schedule == "inverse_sqrt":
        raise ConfigError(
            f"optimizer.final_learning_rate={optimizer.final_learning_rate} has no effect with "
            "optimizer.schedule=inverse_sqrt: use cosine or wsd"
        )


def _check_training(training: TrainingConfig, data: DataConfig) -> None:
    if training.initialize_from is not None and data.tokenizer is not None:
        raise ConfigError(
            f"training.initialize_from={training.initialize_from} brings its own tokenizer, and data.tokenizer="
            f"{data.tokenizer} names another: leave one of them out"
        )
    rows = training.target_tokens_per_batch // data.target_row_length
    if rows < training.gradient_accumulation:
        raise ConfigError(
            f"training.target_tokens_per_batch={training.target_tokens_per_batch} has room for {rows} rows of "
            f"data.target_row_length={data.target_row_length}, and training.gradient_accumulation="
            f"{training.gradient_accumulation} needs at least as many rows: raise the first or lower the others"
        )


def _check_decoding(decoding: DecodingConfig) -> None:
    if decoding.tokens_per_batch < decoding.max_source_length:
        raise ConfigError(
            f"decoding.tokens_per_batch={decoding.tokens_per_batch} has no room for one sentence of "
            f"decoding.max_source_length={decoding.max_source_length}: raise the first or lower the second"
        )
    most = decoding.max_source_length - 1 + decoding.max_extra_tokens
    if most > _MOST_TOKENS:
        raise ConfigError(
            f"decoding.max_extra_tokens={decoding.max_extra_tokens}: with decoding.max_source_length="
            f"{decoding.max_source_length}, translations must have at most {_MOST_TOKENS:,} tokens"
        )
    if decoding.min_length > most:
        raise ConfigError(
            f"decoding.min_length={decoding.min_length} is more than any translation may have: {most} by "
            f"decoding.max_source_length={decoding.max_source_length} and decoding.max_extra_tokens="
            f"{decoding.max_extra_tokens}"
        )
    # As a logarithm, since the power itself may be too large for any float.
    if decoding.length_penalty * math.log((6 + most) / 6) > math.log(_LARGEST):
        raise ConfigError(
            f"decoding.length_penalty={decoding.length_penalty}: of a translation of {most} tokens it would be no "
            "number that float32 can hold; papers have 0.6 to 2"
        )
    if decoding.sampling_temperature < _LEAST_TEMPERATURE:
        raise ConfigError(
            f"decoding.sampling_temperature={decoding.sampling_temperature}: must be at least {_LEAST_TEMPERATURE}; "
            "greedy search is decoding.beam_size=1"
        )
    if not _LEAST_TOP_P <= decoding.sampling_top_p <= 1:
        raise ConfigError(
            f"decoding.sampling_top_p={decoding.sampling_top_p}: must be at least {_LEAST_TOP_P}, and at most 1"
        )
    if decoding.sampling:
        return
    if decoding.n_best > decoding.beam_size:
        raise ConfigError(
            f"decoding.n_best={decoding.n_best} is more than decoding.beam_size={decoding.beam_size} can find: "
            "raise the second, or draw them with decoding.sampling=True"
        )
    for name in ("sampling_temperature", "sampling_top_k", "sampling_top_p", "sampling_seed"):
        if _changed(decoding, name):
            value = getattr(decoding, name)
            raise ConfigError(f"decoding.{name}={value} has no effect without decoding.sampling=True: set both or none")


def _check_average(decoding: DecodingConfig, training: TrainingConfig) -> None:
    if decoding.average is None:
        return
    found = AVERAGE.fullmatch(decoding.average)
    if found is None:
        raise ConfigError(f"decoding.average={decoding.average!r}: must be last:N or best:N, N a number from 1")
    kept = getattr(training, f"keep_{found[1]}")
    if int(found[2] or 1) > max(kept, 1):
        raise ConfigError(
            f"decoding.average={decoding.average} is the mean of more checkpoints than "
            f"training.keep_{found[1]}={kept} keeps: raise the second or lower the first"
        )


def _check_mesh(mesh: MeshConfig) -> None:
    sizes = dataclasses.asdict(mesh)
    free = [f"mesh.{axis}" for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ConfigError(f"{' and '.join(free)} are both -1: at most one axis can take the rest of the devices")
    for axis, size in sizes.items():
        if size != -1 and size < 1:
            raise ConfigError(f"mesh.{axis}={size}: must be at least 1, or -1 for the rest of the devices")


def _changed(section: Any, name: str) -> bool:
    """Whether a field has another value than its default."""
    return getattr(section, name) != getattr(type(section)(), name)

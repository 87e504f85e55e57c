"""The one description of a run: frozen, nested dataclasses.

Every field is an option of every command (`--model.d_model=256`), and its docstring is its help text. Nothing here
imports JAX, so that `--help` answers at once and a bad value is refused before anything is compiled.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_type_hints

from tfm.text import near


class InputError(Exception):
    """Wrong input or arguments: what was given, where, what was expected, what to do. Commands end with status 2."""


class ConfigError(InputError):
    """A config that cannot describe a run; the message names the fields."""


def _at_least(low: float, default: Any) -> Any:
    """A field whose value, unless it is None, must be `low` or more."""
    return dataclasses.field(default=default, metadata={"low": low})


def _share(default: float) -> Any:
    """A field whose value is a part of a whole: from 0 to below 1."""
    return dataclasses.field(default=default, metadata={"low": 0, "below": 1})


def _seed() -> Any:
    """A field that counter-based hashes take, whose numbers are uint32."""
    return dataclasses.field(default=0, metadata={"low": 0, "below": 2**32})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoder-decoder Transformer; the defaults are the paper's base model (Vaswani et al., 2017, Table 3)."""

    d_model: int = _at_least(1, 512)
    """Width of the residual stream, in features."""
    d_ff: int = _at_least(1, 2048)
    """Inner width of the feed-forward block, in features."""
    num_heads: int = _at_least(1, 8)
    """Attention heads."""
    d_k: int | None = _at_least(1, None)
    """Width of a query or key head, in features; d_model / num_heads when unset."""
    d_v: int | None = _at_least(1, None)
    """Width of a value head, in features; d_model / num_heads when unset."""
    encoder_layers: int = _at_least(1, 6)
    """Layers of the encoder."""
    decoder_layers: int = _at_least(1, 6)
    """Layers of the decoder."""
    norm: Literal["post", "pre"] = "post"
    """Layer norm after each residual sum (the paper), or before each block and once at the end of each stack."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    """Non-linearity of the feed-forward block."""
    tie_embeddings: Literal["all", "target", "none"] = "all"
    """Which tables are one: source, target and output projection (the paper); target and output; or none."""
    dropout_rate: float = _share(0.1)
    """Share of features dropped from each block's output and from the embedded input, 0 to 1."""
    attention_dropout_rate: float = _share(0.0)
    """Share of attention weights dropped, 0 to 1."""
    activation_dropout_rate: float = _share(0.0)
    """Share of the feed-forward block's inner features dropped, 0 to 1."""
    token_dropout_rate: float = _share(0.0)
    """Share of input tokens, on both sides, whose vectors are left out whole, 0 to 1; their positions stay."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of matrix products; auto is bfloat16 on TPU and GPU, float32 on CPU. Parameters stay float32."""
    attention: Literal["auto", "plain"] = "auto"
    """How attention is computed in training; auto is one fused kernel where there is one that can take the sizes: on
    TPUs of tfm's own (bfloat16, rows of 128 to 512 tokens in steps of 128, d_k and d_v the same, a multiple of 128, or
    a divisor of it that the heads of a device fill multiples of 128 with, no attention dropout), on NVIDIA's GPUs from
    Ampere on cuDNN's (bfloat16, rows of an even length, d_k and d_v the same, up to 128 in steps of 8, no attention
    dropout, not with training.deterministic). Plain, and elsewhere, it is what XLA makes of the formula."""

    @property
    def key_width(self) -> int:
        return self.d_k if self.d_k is not None else self.d_model // self.num_heads

    @property
    def value_width(self) -> int:
        return self.d_v if self.d_v is not None else self.d_model // self.num_heads


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where sentence pairs come from, and how they become token ids and rows."""

    corpus: tuple[str, ...] = ("demo",)
    """One or more of: text:PATTERN with {split} and {lang}; tfds:NAME/CONFIG; demo. Each may end in ;weight=W (passes
    over it in an epoch) and ;tag=<TAG> (a token put before each source)."""
    source_language: str = "en"
    """Language code of the source side."""
    target_language: str = "de"
    """Language code of the target side."""
    train_split: str = "train"
    """Split to train on."""
    validation_split: str = "validation"
    """Split to validate on."""
    test_split: str = "test"
    """Split that `evaluate` scores when no files are given."""
    vocab_size: int = _at_least(1, 32000)
    """Pieces of the tokenizer, both languages together; lowered, with a warning, to what a small corpus can bear."""
    tokenizer: str | None = None
    """A SentencePiece model to use in place of training one."""
    tokenizer_sample: int = _at_least(1, 2_000_000)
    """Sentences, both sides together, that the tokenizer is trained on."""
    tokenizer_model: Literal["unigram", "bpe"] = "unigram"
    """Kind of SentencePiece model that is trained."""
    segmentations: int = _at_least(1, 1)
    """Ways in which each training pair is cut into pieces (subword regularisation, Kudo 2018): the store holds the pair
    that many times, once as the tokenizer does it best and the others drawn at random."""
    segmentation_alpha: float = _at_least(0, 0.2)
    """How those are drawn: by probability to this power (unigram; nearer 0 is wilder), or by merges dropped, as a share
    from 0 to 1 (bpe)."""
    source_row_length: int = _at_least(1, 256)
    """Source tokens in a training row; several pairs share a row."""
    target_row_length: int = _at_least(1, 256)
    """Target tokens in a training row; several pairs share a row."""
    max_length_ratio: float = _at_least(1, 9.0)
    """A training pair is dropped when one side has more than this many times the tokens of the other, both plus 5."""
    drop_duplicates: bool = False
    """Drop exact repetitions of a training pair within a corpus."""
    window_pairs: int = _at_least(1, 1_000_000)
    """Pairs that are packed together; an epoch is cut into windows of this many."""
    store: str | None = None
    """Directory of the token store; WORKDIR/store when unset. May be gs://."""
    cache_dir: str | None = None
    """Local directory into which each host copies the token store once; unset, the store is read where it is."""
    read_ahead: int = _at_least(1, 8)
    """Batches built ahead of the step."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its schedule; the defaults are the paper's (section 5.3)."""

    name: Literal["adam", "adamw", "adafactor", "muon"] = "adam"
    """Update rule. Muon's is for matrices of layers, and the rest has Adam's with Nesterov's momentum; rates and decay
    that suit adamw suit it."""
    schedule: Literal["inverse_sqrt", "cosine", "wsd"] = "inverse_sqrt"
    """Learning rate after warm-up: the paper's, a cosine to the end of the run, or constant with a linear decay."""
    learning_rate: float | None = _at_least(0, None)
    """Peak learning rate; the paper's (d_model * warmup_steps) ** -0.5 when unset."""
    warmup_steps: int = _at_least(1, 4000)
    """Steps of linear warm-up."""
    decay_steps: int | None = _at_least(1, None)
    """Last steps of a wsd schedule, over which the rate falls; a fifth of the run when unset."""
    final_learning_rate: float = _share(0.0)
    """Share of the peak that a cosine or wsd schedule ends at, 0 to 1."""
    beta1: float = _share(0.9)
    """Decay of Adam's first moment."""
    beta2: float = _share(0.98)
    """Decay of Adam's second moment."""
    epsilon: float = _at_least(1e-30, 1e-9)
    """Added to Adam's denominator."""
    weight_decay: float = _at_least(0, 0.0)
    """Decoupled weight decay of matrices (all but adam), per unit of learning rate."""
    clip_norm: float = _at_least(0, 0.0)
    """Global gradient norm above which gradients are scaled down; 0 is off."""
    ema_decay: float = _share(0.0)
    """Decay of the parameters' moving average, which evaluation and translation then use; 0 is off. After n updates it
    is at most (1 + n) / (10 + n), so that the average is over the last ninth of a short run."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The training loop."""

    steps: int = _at_least(1, 100_000)
    """Updates in the run."""
    target_tokens_per_batch: int = _at_least(1, 24_576)
    """Room for target tokens in one update's global batch, padding included."""
    gradient_accumulation: int = _at_least(1, 1)
    """Micro-batches that one update's batch is computed in."""
    label_smoothing: float = _share(0.1)
    """Probability spread evenly over the vocabulary, 0 to 1."""
    seed: int = _seed()
    """Seed of initial parameters, dropout and the order of the data."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again to save memory: nothing, all but matrix products, or whole layers."""
    unroll_layers: int | None = _at_least(1, None)
    """Layers that the compiled step has side by side; more are faster, and take longer to compile. Unset, all of them
    on a GPU, where a loop over layers takes half as long again, and 1 elsewhere."""
    log_every: int = _at_least(1, 10)
    """Steps between lines of metrics.jsonl."""
    checkpoint_every: int = _at_least(1, 1000)
    """Steps between checkpoints."""
    keep_last: int = _at_least(1, 3)
    """Newest checkpoints kept."""
    keep_best: int = _at_least(0, 1)
    """Best checkpoints kept, by `best_metric` on the validation split."""
    evaluate_every: int = _at_least(1, 1000)
    """Steps between evaluations on the validation split; an evaluated step also gets a checkpoint."""
    evaluate_sentences: int = _at_least(1, 2000)
    """Validation sentences that are translated for BLEU and chrF, of several corpora from each in turn; the loss is
    always taken over all of them."""
    evaluate_beam_size: int = _at_least(1, 1)
    """Beam with which they are translated; 1, greedy search, is the quickest."""
    best_metric: Literal["bleu", "chrf", "loss"] = "bleu"
    """What makes a checkpoint the best."""
    early_stopping: int = _at_least(0, 0)
    """Evaluations without a better `best_metric` after which the run ends; 0 is off."""
    max_skipped_steps: int = _at_least(1, 10)
    """Non-finite updates in a row, each skipped, after which the run ends."""
    initialize_from: str | None = None
    """Run directory whose parameters and tokenizer this run starts from, with a fresh optimizer."""
    deterministic: bool = False
    """On GPU, use only kernels that give the same bits every time."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each mesh axis takes; one of them may be -1, which takes the rest."""

    data: int = -1
    """Devices over which the batch alone is split."""
    fsdp: int = 1
    """Devices over which the batch, parameters and optimizer state are split."""
    tensor: int = 1
    """Devices over which heads, feed-forward features and the vocabulary are split."""
    slices: int = _at_least(1, 1)
    """Slices of TPUs joined by a data-centre network: `data` crosses them, of whose devices each has an equal share;
    `fsdp` and `tensor` stay within one."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Many hosts as one program. Nothing of this is part of a run: each start may have other hosts."""

    coordinator: str | None = None
    """HOST:PORT at which the first host listens; unset where JAX finds the hosts by itself (TPU pods, SLURM, Open MPI,
    Kubernetes), where JAX_COORDINATOR_ADDRESS says it, and for one host alone."""
    count: int | None = _at_least(1, None)
    """Hosts in all; else JAX_NUM_PROCESSES."""
    index: int | None = _at_least(0, None)
    """Number of this host, from 0; else JAX_PROCESS_ID."""
    start_timeout: int = _at_least(1, 300)
    """Seconds in which all hosts have to be there."""
    heartbeat_timeout: int = _at_least(1, 100)
    """Seconds without a sign of life after which a host counts as dead and the others end."""
    compile_timeout: int = _at_least(0, 7200)
    """Seconds for the first step, compiling included, after which a host that keeps others waiting prints the stacks of
    its threads and ends; 0 is no limit, here and below."""
    step_timeout: int = _at_least(0, 1800)
    """Seconds for each further step."""
    evaluation_timeout: int = _at_least(0, 7200)
    """Seconds for an evaluation."""
    save_timeout: int = _at_least(0, 3600)
    """Seconds for a checkpoint."""


@dataclasses.dataclass(frozen=True)
class DecodingConfig:
    """Translation."""

    beam_size: int = _at_least(1, 4)
    """Hypotheses that live on at each step of the search for a sentence; 1 is greedy search."""
    n_best: int = _at_least(1, 1)
    """Translations of each sentence, of which text output shows the first and JSON lines show all."""
    length_penalty: float = _at_least(0, 0.6)
    """Alpha of Wu et al. (2016), equation 14; no effect on greedy search."""
    min_length: int = _at_least(0, 0)
    """Tokens that a translation has at least."""
    max_extra_tokens: int = _at_least(0, 50)
    """A translation has at most this many tokens more than its source (section 6.1 of the paper)."""
    sampling: bool = False
    """Draw `n_best` translations from the model's distribution in place of searching for the likeliest."""
    sampling_temperature: float = _at_least(0, 1.0)
    """Logits are divided by this before a token is drawn: lower is more careful."""
    sampling_top_k: int = _at_least(0, 0)
    """Only so many of the likeliest tokens can be drawn; 0 is all."""
    sampling_top_p: float = _at_least(0, 1.0)
    """Only the likeliest tokens that have together at least this probability can be drawn; 1 is all."""
    sampling_seed: int = _seed()
    """Seed of what is drawn; it depends on this and on a line's number and text, and on nothing else."""
    ensemble_mean: Literal["log_probs", "probs"] = "log_probs"
    """What is averaged where several models translate together."""
    max_source_length: int = _at_least(2, 256)
    """Source tokens, end included, in one compiled program; a longer line is cut into pieces and joined again."""
    tokens_per_batch: int = _at_least(1, 8192)
    """Source tokens, padding included, in one decoded batch."""
    sentences_per_batch: int = _at_least(0, 0)
    """Sentences that a batch has at most, or one for each device; 0 is as many as `tokens_per_batch` has room for."""
    average: str | None = None
    """Checkpoints whose parameters are averaged: last:N or best:N; the best one alone when unset."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    decoding: DecodingConfig = DecodingConfig()
    hosts: HostsConfig = HostsConfig()

    @property
    def rows_per_batch(self) -> int:
        """Rows of the global batch: as many as the token budget has room for, a multiple of the micro-batches."""
        rows = self.training.target_tokens_per_batch // self.data.target_row_length
        return rows - rows % self.training.gradient_accumulation

    def with_rows(self, rows: int) -> Config:
        """The same with another number of rows a batch. Raises ConfigError where that describes no run."""
        tokens = rows * self.data.target_row_length
        training = dataclasses.replace(self.training, target_tokens_per_batch=tokens)
        return dataclasses.replace(self, training=training).validate()

    @property
    def validation_decoding(self) -> DecodingConfig:
        """How the validation split is translated while training."""
        return dataclasses.replace(self.decoding, beam_size=self.training.evaluate_beam_size, n_best=1, sampling=False)

    def validate(self) -> Config:
        """Returns the config itself. Raises ConfigError naming the fields that cannot stand together."""
        from tfm.config_checks import check_ranges, check_together, check_types

        check_types(self)
        check_ranges(self)
        check_together(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def from_dict(values: dict[str, Any]) -> Config:
    """Config out of `Config.to_dict`'s form. Raises ConfigError at an unknown name, with the nearest one."""
    hints = get_type_hints(Config)
    _refuse_unknown(values, hints, where="")
    sections = {}
    for name, fields in values.items():
        _refuse_unknown(fields, get_type_hints(hints[name]), where=f"{name}.")
        sections[name] = hints[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    return Config(**sections)


def from_json(path: Path) -> Config:
    """Config written by `Config.to_json`. Raises ConfigError naming the file."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(f"{path}: not a config of tfm: {error}") from error


def fields_of(config: Config) -> dict[str, Any]:
    """Every field by its dotted name: {"model.d_model": 512, …}."""
    return {
        f"{section}.{name}": value for section, fields in config.to_dict().items() for name, value in fields.items()
    }


def _refuse_unknown(values: dict[str, Any], known: dict[str, Any], where: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown field {where}{name}{near(name, known, prefix=where)}")

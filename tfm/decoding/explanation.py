"""Where a model looks while it translates a sentence: its attention as numbers, as a table and as a picture."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from tfm import sharding
from tfm.config import InputError
from tfm.data.tokenizer import BOS, EOS
from tfm.decoding.loading import Loaded
from tfm.decoding.translator import Translator
from tfm.model.attention import Tokens
from tfm.model.transformer import AttentionWeights, Transformer, all_attention_weights

_log = logging.getLogger(__name__)

Attention = Literal["cross", "encoder", "decoder"]
"""Cross-attention, or the self-attention of one of the stacks."""

_STRONGEST, _LEAST = 3, 0.005  # keys that the table names for each query, and the share that one has to have
_CELL, _MARGIN = 0.24, 1.1  # inches of a picture: for each token, and for the tokens' names
_LONGEST = 120  # inches of a side at 100 dots each; a longer one has fewer dots


@dataclass(frozen=True)
class Explanation:
    """A source, a translation of it, and the attention of every layer and head; tokens as the tokenizer spells them."""

    source_tokens: tuple[str, ...]  # S, the end symbol last
    target_tokens: tuple[str, ...]  # T, likewise
    translation: str
    token_log_probs: tuple[float, ...]  # T, in nats
    cross_NHTS: npt.NDArray[np.float32]  # for each token of the target, the row in which it was chosen
    encoder_NHSS: npt.NDArray[np.float32]
    decoder_NHTT: npt.NDArray[np.float32]  # its keys are what stands before: the start symbol, then the target

    def weights(self, attention: Attention) -> npt.NDArray[np.float32]:
        """[layers, heads, queries, keys]."""
        return {"cross": self.cross_NHTS, "encoder": self.encoder_NHSS, "decoder": self.decoder_NHTT}[attention]

    def labels(self, attention: Attention) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tokens that the queries and the keys of an attention stand for."""
        source, target = self.source_tokens, self.target_tokens
        return {"cross": (target, source), "encoder": (source, source), "decoder": (target, ("<s>", *target[:-1]))}[
            attention
        ]

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, with weights to six digits."""
        kinds: tuple[Attention, ...] = ("cross", "encoder", "decoder")
        return {
            "source_tokens": self.source_tokens,
            "target_tokens": self.target_tokens,
            "translation": self.translation,
            "token_log_probs": self.token_log_probs,
            "attention": {kind: np.round(self.weights(kind).astype(float), 6).tolist() for kind in kinds},
        }


def explain(loaded: Loaded, source: str, target: str | None = None) -> Explanation:
    """The attention of a model over a sentence and its translation, which is the model's own where none is given.

    Args:
      loaded: one model with its parameters; its mesh has to hold one device.
      source: a line of text.
      target: a line of text.

    Raises InputError at a blank source or one that is translated in pieces, and at a target longer than what is scored:
    more than `decoding.max_source_length` and `max_extra_tokens` together.
    """
    tokenizer, (model,), (parameters,) = loaded.tokenizer, loaded.models, loaded.parameters
    longest = loaded.config.decoding.max_source_length
    (source_ids,) = tokenizer.encode([source])
    if not source_ids:
        raise InputError("the source is blank: there is nothing to explain")
    if len(source_ids) >= longest:
        raise InputError(
            f"the source has {len(source_ids) + 1} tokens, end included, more than decoding.max_source_length={longest}"
            ": it is translated in pieces; explain one of them"
        )
    alone = dataclasses.replace(loaded.config.decoding, sentences_per_batch=1)
    translator = Translator(loaded.models, loaded.mesh, tokenizer, alone)
    translator.set_parameters(parameters)
    tokens = translator.translate([source])[0].hypotheses[0].tokens if target is None else target
    (scored,) = translator.score([source], [tokens])
    if not scored.token_log_probs:
        raise InputError("the target is longer than what is scored: raise decoding.max_source_length")
    # A given text may have signs that the tokenizer has no piece for.
    target_ids = tokenizer.ids(scored.tokens) if target is None else tokenizer.encode([target])[0]
    with jax.set_mesh(loaded.mesh):
        found = sharding.on_host(_weights(model, parameters, _row([*source_ids, EOS]), _row([BOS, *target_ids])))
    return Explanation(
        (*tokenizer.pieces(source_ids), "</s>"),
        (*scored.tokens, "</s>"),
        tokenizer.decode([target_ids])[0],
        scored.token_log_probs,
        encoder_NHSS=found.encoder_NBHSS[:, 0],
        decoder_NHTT=found.decoder_NBHTT[:, 0],
        cross_NHTS=found.cross_NBHTS[:, 0],
    )


def _row(ids: Sequence[int]) -> jax.Array:
    return jnp.asarray([ids], jnp.int32)


@partial(jax.jit, static_argnums=0)
def _weights(model: Transformer, parameters: Any, source_1S: jax.Array, inputs_1T: jax.Array) -> AttentionWeights:
    source, target = (Tokens(jnp.ones_like(row), jnp.arange(row.shape[1])[None]) for row in (source_1S, inputs_1T))
    return all_attention_weights(model, parameters, source_1S, source, inputs_1T, target)


def _of_layer(weights_NHQK: npt.NDArray[np.float32], layer: int | None) -> npt.NDArray[np.float32]:
    """The weights of one layer, from 1, or of all. Raises InputError where there is none of that number."""
    depth = len(weights_NHQK)
    if layer is not None and not 1 <= layer <= depth:
        raise InputError(f"layer {layer}: the stack has layers 1 to {depth}")
    return weights_NHQK if layer is None else weights_NHQK[layer - 1 : layer]


def table(explanation: Explanation, attention: Attention = "cross", layer: int | None = None) -> str:
    """A line for each query: its token, in cross- and the decoder's attention its log-probability, where it looks most.

    Weights are means over the heads, and over the layers unless one is chosen, from 1. Raises InputError at a layer
    that is none.
    """
    queries, keys = explanation.labels(attention)
    weights_NHQK = _of_layer(explanation.weights(attention), layer)
    weights_QK = weights_NHQK.mean(axis=(0, 1))
    log_probs = [f"{value:.2f}" for value in explanation.token_log_probs] if attention != "encoder" else []
    rows = [("", "token", *(["log prob"] if log_probs else []), "looks at")]
    for query, token in enumerate(queries):
        strongest = np.argsort(-weights_QK[query], kind="stable")[:_STRONGEST]
        shares = [(keys[key], weights_QK[query, key]) for key in strongest]
        looks_at = ", ".join(f"{key} {share:.0%}" for key, share in shares if share >= _LEAST)
        rows.append((str(query + 1), token, *log_probs[query : query + 1], looks_at))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "".join("  ".join([*map(str.ljust, row, widths), row[-1]]) + "\n" for row in rows)


def draw(explanation: Explanation, path: Path, attention: Attention = "cross", layer: int | None = None) -> None:
    """Draws an attention as a PNG: a panel for each layer, the mean of its heads; of one layer, a panel for each head.

    Raises InputError at a layer that is none, and where it cannot be written.
    """
    from matplotlib.figure import Figure

    weights_NHQK = _of_layer(explanation.weights(attention), layer)
    panels = weights_NHQK.mean(axis=1) if layer is None else weights_NHQK[0]
    queries, keys = explanation.labels(attention)
    columns = min(len(panels), 4 if len(keys) <= 16 else 2)
    rows = -(-len(panels) // columns)
    size = (columns * (_CELL * len(keys) + _MARGIN), rows * (_CELL * len(queries) + _MARGIN))
    figure = Figure(figsize=size, layout="constrained", dpi=100 * min(1.0, _LONGEST / max(size)))
    names = dict(fontsize=8, parse_math=False)  # a $ in a token begins no formula
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.imshow(panel, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.set_title(f"{'layer' if layer is None else f'layer {layer}, head'} {index + 1}", fontsize=9)
        axes.set_xticks(range(len(keys)), keys, rotation=90, **names)
        axes.set_yticks(range(len(queries)), queries, **names)
        axes.tick_params(length=0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            figure.savefig(path, format="png")
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    if any("missing from" in str(warning.message) for warning in caught):
        _log.warning("%s: the font has no signs for some of the tokens, which are boxes", path)

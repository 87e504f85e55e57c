"""Floating-point operations of the model by formula: two a multiplication of a matrix product, and nothing else.

Counted as the programs are laid out, padding included: attention over whole rows, the padded vocabulary. What is not a
matrix product (norms, softmax, dropout, the optimizer) is left out, as is usual for model FLOPs utilisation.
"""

from __future__ import annotations

from tfm.config import ModelConfig
from tfm.model.layers import padded_vocab_size


def train_step_flops(config: ModelConfig, vocab_size: int, rows: int, source_length: int, target_length: int) -> float:
    """Of one update over `rows` rows: the backward pass has two products for each one of the forward pass."""
    return 3.0 * forward_flops(config, vocab_size, rows, source_length, target_length)


def forward_flops(config: ModelConfig, vocab_size: int, rows: int, source_length: int, target_length: int) -> float:
    """Of the forward pass over `rows` rows of so many source and target tokens, logits included."""
    encoder = encode_flops(config, rows, source_length)
    layer = (
        _attention_projections(config, target_length, source_length)
        + _attention_projections(config, target_length, target_length)
        + _attended(config, target_length, source_length)
        + _attended(config, target_length, target_length)
        + _feed_forward(config, target_length)
    )
    logits = 2.0 * target_length * config.d_model * padded_vocab_size(vocab_size)
    return encoder + rows * (config.decoder_layers * layer + logits)


def encode_flops(config: ModelConfig, rows: int, source_length: int) -> float:
    """Of the encoder."""
    layer = (
        _attention_projections(config, source_length, source_length)
        + _attended(config, source_length, source_length)
        + _feed_forward(config, source_length)
    )
    return rows * config.encoder_layers * layer


def prefill_flops(config: ModelConfig, rows: int, source_length: int) -> float:
    """Of what decoding does once a batch of `rows` sentences: the encoder, and cross-attention's keys and values."""
    keys_and_values = 2.0 * source_length * config.d_model * config.num_heads * (config.key_width + config.value_width)
    return encode_flops(config, rows, source_length) + rows * config.decoder_layers * keys_and_values


def decode_step_flops(
    config: ModelConfig, vocab_size: int, rows: int, beams: int, source_length: int, room: int
) -> float:
    """Of one step of a search over `rows` sentences with `beams` hypotheses each.

    Each hypothesis attends to all `room` positions of all beams of its sentence, as the compiled step does.
    """
    heads = config.num_heads * (config.key_width + config.value_width)
    layer = (
        _attention_projections(config, 1, 1)  # self-attention
        + 2.0 * config.d_model * heads  # cross-attention: query and output
        + _attended(config, 1, room * beams)
        + _attended(config, 1, source_length)
        + _feed_forward(config, 1)
    )
    logits = 2.0 * config.d_model * padded_vocab_size(vocab_size)
    return rows * beams * (config.decoder_layers * layer + logits)


def _attention_projections(config: ModelConfig, queries: int, keys: int) -> float:
    """Of W_Q and W_O over the queries, and of W_K and W_V over the keys."""
    heads = config.num_heads * (config.key_width + config.value_width)
    return 2.0 * config.d_model * heads * (queries + keys)


def _attended(config: ModelConfig, queries: int, keys: int) -> float:
    """Of Q Kᵀ and of the weights times V."""
    return 2.0 * queries * keys * config.num_heads * (config.key_width + config.value_width)


def _feed_forward(config: ModelConfig, tokens: int) -> float:
    return 4.0 * tokens * config.d_model * config.d_ff

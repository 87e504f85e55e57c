"""Dropout's bits: uniform, independent of one another, and functions of what they are said to depend on alone."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.config import Config, DataConfig, ModelConfig, TrainingConfig
from tfm.data.batches import Batch
from tfm.model.attention import Sight, Tokens
from tfm.model.dropout import DropoutKey, dropout, dropout_key, keep_mask, mix
from tfm.model.layers import Embedding, EncoderLayer
from tfm.model.transformer import Transformer, init_parameters, unstack
from tfm.sharding import make_mesh
from tfm.training.step import Trainer

SHAPE = (16, 32, 64)
N = math.prod(SHAPE)


def key(seed: int = 0, step: int = 0, layer: int = 0, site: int = 0, rows=SHAPE[0]) -> DropoutKey:
    rows = jnp.arange(rows) if isinstance(rows, int) else jnp.asarray(rows)
    return dropout_key(seed, jnp.int32(step), rows).fold_in(layer).fold_in(site)


@jax.jit
def _half(key: DropoutKey) -> jax.Array:
    return keep_mask(key, SHAPE, 0.5)


def signs(**of) -> np.ndarray:
    """A mask of rate one half as -1 and 1: those of independent masks have correlation 0, give or take 1/sqrt(N)."""
    return 2.0 * np.asarray(_half(key(**of))) - 1


def chi_square(counts: np.ndarray) -> float:
    """How many standard deviations above its mean the chi-square statistic of these counts lies, were they uniform."""
    expected = counts.sum() / counts.size
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (counts.size - 1)) / math.sqrt(2 * (counts.size - 1))


def test_mixing_loses_nothing_and_avalanches():
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, 1 << 14, dtype=np.uint32))
    assert len(np.unique(np.asarray(mix(jnp.arange(1 << 16, dtype=jnp.uint32))))) == 1 << 16
    assert len(np.unique(np.asarray(mix(jnp.arange(1 << 16, dtype=jnp.uint32) << 16)))) == 1 << 16
    flipped = jnp.stack([mix(x ^ np.uint32(1 << bit)) for bit in range(32)]) ^ mix(x)[None]  # [bit in, x]
    flips = (np.asarray(flipped)[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    shares = flips.mean(axis=1)
    assert np.abs(shares - 0.5).max() < 5 * 0.5 / math.sqrt(len(x))


@pytest.mark.parametrize("of", [{}, {"step": 99_999, "layer": 5, "site": 6}, {"seed": 2**31 + 7}])
def test_bits_are_uniform(of):
    """Masks of rising rate are nested, and so many of them tell in which of 64 equal bins each element's bits fall."""
    rates = jnp.arange(64) / 64
    bins = sum(np.asarray(keep_mask(key(**of), SHAPE, float(rate))).astype(np.int32) for rate in rates)
    assert bins.min() == 1 and bins.max() == 64
    assert abs(chi_square(np.bincount(bins.ravel(), minlength=65)[1:])) < 5
    for axis in range(3):  # within each row, position and feature, too
        others = tuple(i for i in range(3) if i != axis)
        size = N / SHAPE[axis]
        deviations = (bins.mean(axis=others) - 32.5) / (math.sqrt((64**2 - 1) / 12) / math.sqrt(size))
        assert np.abs(deviations).max() < 5


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.9])
def test_the_rate_is_kept_to(rate):
    mask = np.asarray(keep_mask(key(step=3), SHAPE, rate))
    deviation = math.sqrt(rate * (1 - rate))
    assert abs(mask.mean() - (1 - rate)) < 4 * deviation / math.sqrt(N)
    assert np.abs(mask.mean(axis=(1, 2)) - (1 - rate)).max() < 5 * deviation / math.sqrt(N / SHAPE[0])


def test_masks_of_different_seeds_steps_layers_and_sites_are_independent():
    masks = [
        signs(**of)
        for of in (
            *({"seed": seed} for seed in (0, 1, 2, 2**31)),
            *({"step": step} for step in (1, 2, 3, 1 << 20)),
            *({"layer": layer} for layer in (1, 2, 5)),
            *({"site": site} for site in (1, 2, 3, 4, 5, 6)),
            {"layer": 1, "site": 1},
            {"layer": 2, "site": 1},
            {"layer": 1, "site": 2},
            {"step": 1, "seed": 1},
        )
    ]
    flat = np.stack(masks).reshape(len(masks), -1)
    correlations = flat @ flat.T / N
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / math.sqrt(N)


def test_rows_positions_and_features_are_independent():
    """Correlations of a mask with itself shifted along any of its dimensions, and along several at once."""
    x = signs(step=7)
    worst = 0.0
    for shift in np.ndindex(5, 9, 17):
        if any(shift):
            a = x[shift[0] :, shift[1] :, shift[2] :]
            b = x[: SHAPE[0] - shift[0], : SHAPE[1] - shift[1], : SHAPE[2] - shift[2]]
            worst = max(worst, abs((a * b).mean()) * math.sqrt(a.size))
    assert worst < 5
    pairs = np.einsum("blf,blg->fg", x, x) / (N / SHAPE[2])  # every two features over all rows and positions
    np.fill_diagonal(pairs, 0)
    assert np.abs(pairs).max() < 5.5 / math.sqrt(N / SHAPE[2])


def test_elements_do_not_depend_on_one_another_in_fours():
    """Were the bits a xor of one word a row and one a column, the four corners of a rectangle would always agree."""
    x = signs(step=8)
    corners = x[:, :-1, :-1] * x[:, 1:, :-1] * x[:, :-1, 1:] * x[:, 1:, 1:]
    assert abs(corners.mean()) < 5 / math.sqrt(corners.size)
    across_rows = x[:-1, :, :-1] * x[1:, :, :-1] * x[:-1, :, 1:] * x[1:, :, 1:]
    assert abs(across_rows.mean()) < 5 / math.sqrt(across_rows.size)


def test_a_row_has_its_mask_wherever_it_is_computed():
    whole = np.asarray(keep_mask(key(), SHAPE, 0.3))
    rows = [11, 0, 7]
    np.testing.assert_array_equal(keep_mask(key(rows=rows), (3, *SHAPE[1:]), 0.3), whole[rows])
    shorter = keep_mask(key(rows=rows), (3, 5, SHAPE[2]), 0.3)  # a position's mask does not depend on the row's length
    np.testing.assert_array_equal(shorter, whole[rows][:, :5])


def test_the_shape_behind_the_position_is_only_a_shape():
    flat = keep_mask(key(), SHAPE, 0.3)
    np.testing.assert_array_equal(keep_mask(key(), (16, 32, 4, 16), 0.3), np.asarray(flat).reshape(16, 32, 4, 16))


def test_under_jit_and_scan_the_mask_is_the_same():
    step = dropout_key(0, jnp.int32(4), jnp.arange(2))

    def mask(_, layer):
        return None, keep_mask(step.fold_in(layer), (2, 3, 8), 0.5)

    _, masks = jax.lax.scan(mask, None, jnp.arange(3))
    for layer in range(3):
        np.testing.assert_array_equal(masks[layer], mask(None, layer)[1])


def test_scaling_keeps_the_mean_and_the_gradient_follows_the_mask():
    x = jnp.full(SHAPE, 3.0)
    y, pull = jax.vjp(lambda x: dropout(x, 0.2, key(), 1), x)
    assert set(np.unique(y)) == {np.float32(0), np.float32(3 / 0.8)}
    assert float(jnp.mean(y)) == pytest.approx(3, abs=5 * 3 * math.sqrt(0.2 / 0.8 / N))
    np.testing.assert_allclose(pull(jnp.ones(SHAPE))[0], y / 3, rtol=1e-6)


def test_the_site_is_folded_in():
    x = jnp.ones(SHAPE)
    assert np.any(dropout(x, 0.5, key(), 1) != dropout(x, 0.5, key(), 2))


def test_each_layer_of_a_stack_drops_by_its_own_number():
    """As layers that are called one by one with the keys of their numbers, and not with that of the first."""
    config = ModelConfig(d_model=16, d_ff=32, num_heads=2, encoder_layers=3, decoder_layers=1, dropout_rate=0.5)
    model = Transformer(config, 50)
    parameters = init_parameters(model, 0)
    tokens, of_step = jnp.full((2, 6), 7), key(step=3, rows=2)
    source = Tokens(jnp.ones_like(tokens), jnp.arange(6)[None])
    found = model.apply({"params": parameters}, tokens, source, of_step, method="encode")

    def one_by_one(numbers):
        of_encoder = of_step.fold_in(0)
        table = {"params": parameters["target_embedding"]}
        x = Embedding(config, 50, model.dtype).apply(table, tokens, source.positions_BL, of_encoder)
        sight = Sight.of(source, source, causal=False)
        for layer, number in zip(unstack(parameters)["encoder"]["layers"], numbers, strict=True):
            x = EncoderLayer(config, model.dtype).apply({"params": layer}, x, sight, of_encoder.fold_in(number))
        return x

    np.testing.assert_allclose(found, one_by_one([0, 1, 2]), atol=1e-5)
    assert np.abs(found - one_by_one([0, 0, 0])).max() > 0.1


def test_without_a_key_or_a_rate_nothing_happens():
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    assert dropout(x, 0.5, None, 0) is x
    assert dropout(x, 0.0, key(rows=2), 0) is x
    assert dropout(x, 0.5, key(rows=2), 0).dtype == jnp.bfloat16


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_train_step_has_no_generator(remat):
    """XLA's own would have each device draw the mask of the whole global batch."""
    config = Config(
        model=ModelConfig(
            d_model=16,
            d_ff=32,
            num_heads=2,
            encoder_layers=1,
            decoder_layers=1,
            attention_dropout_rate=0.1,
            activation_dropout_rate=0.1,
            token_dropout_rate=0.1,
        ),
        data=DataConfig(source_row_length=8, target_row_length=8),
        training=TrainingConfig(target_tokens_per_batch=64, remat=remat),
    )
    mesh = make_mesh(config.mesh)
    trainer = Trainer(config, Transformer(config.model, 100, remat=remat), mesh)
    rows = jax.ShapeDtypeStruct((8, 8), jnp.int32)
    batch = Batch(*[rows] * 7, jax.ShapeDtypeStruct((8,), jnp.int32))

    def lowered(trainer: Trainer) -> str:
        with jax.set_mesh(mesh):
            return trainer.train_step.lower(trainer.abstract_state, batch).as_text()

    text = lowered(trainer)
    assert "rng" not in text and "threefry" not in text
    rates = ("dropout_rate", "attention_dropout_rate", "activation_dropout_rate", "token_dropout_rate")
    without = dataclasses.replace(config.model, **dict.fromkeys(rates, 0.0))
    plain = lowered(Trainer(dataclasses.replace(config, model=without), Transformer(without, 100, remat=remat), mesh))
    assert text.count("shift_right_logical") > plain.count("shift_right_logical")  # that is: dropout was in it


def test_a_rate_next_to_one_keeps_nothing():
    key = dropout_key(0, jnp.int32(1), jnp.arange(2))
    assert not np.any(keep_mask(key, (2, 8, 4), 1 - 2**-40))

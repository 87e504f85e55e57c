"""The whole model: what may influence what, two ways through it that must agree, and its size."""

import dataclasses
import functools
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm.config import ModelConfig
from tfm.model.attention import Tokens
from tfm.model.dropout import dropout_key
from tfm.model.transformer import (
    Transformer,
    abstract_parameters,
    attention_kernel,
    compute_dtype,
    count_parameters,
    decode_step,
    init_parameters,
    output_table,
    reorder_beams,
    start_decoding,
    unstack,
)
from tfm.sharding import logical_axes, unboxed
from tfm.training.loss import cross_entropy

VOCAB = 60
SMALL = ModelConfig(
    d_model=16, d_ff=24, num_heads=2, d_k=6, d_v=4, encoder_layers=2, decoder_layers=3, tie_embeddings="none"
)
NORMS = ["post", "pre"]


@functools.cache
def model_and_parameters(norm: str = "post", tie: str = "none"):
    model = Transformer(dataclasses.replace(SMALL, norm=norm, tie_embeddings=tie), VOCAB)
    return model, jax.jit(init_parameters, static_argnums=(0, 1))(model, 0)


def tokens(segments) -> Tokens:
    """One row; positions restart with each segment."""
    positions = [segments[:i].count(segment) for i, segment in enumerate(segments)]
    return Tokens(jnp.array([segments]), jnp.array([positions]))


@pytest.mark.parametrize("norm", NORMS)
def test_what_an_output_depends_on_by_gradient(norm):
    """Two pairs and padding in one row, every token another, so that a table's row stands for a place.

    The output at t has a gradient in the source tokens of its own pair and in the target tokens of its own pair up to
    t, and one of exactly 0 in all else: later tokens, the other pair, padding.
    """
    model, parameters = model_and_parameters(norm)
    source_segments, target_segments = [1, 1, 1, 2, 2, 0, 0], [1, 1, 2, 2, 2, 0]
    source, target = tokens(source_segments), tokens(target_segments)
    source_tokens, target_tokens = jnp.arange(10, 17)[None], jnp.arange(10, 16)[None]

    def outputs(tables):
        changed = {**parameters, "source_embedding": {"table": tables[0]}, "target_embedding": {"table": tables[1]}}
        x_BTD = model.apply({"params": changed}, source_tokens, source, target_tokens, target)
        return x_BTD[0] @ jnp.sin(jnp.arange(16.0))  # no plain sum, which is constant behind a norm

    tables = (parameters["source_embedding"]["table"], parameters["target_embedding"]["table"])
    by_source, by_target = (np.abs(np.asarray(j)).sum(-1) > 0 for j in jax.jit(jax.jacrev(outputs))(tables))
    for t, segment in enumerate(target_segments[:5]):
        expected_source = {10 + s for s, other in enumerate(source_segments) if other == segment}
        expected_target = {10 + u for u, other in enumerate(target_segments) if other == segment and u <= t}
        assert set(np.flatnonzero(by_source[t])) == expected_source
        assert set(np.flatnonzero(by_target[t])) == expected_target


PAIRS = [([11, 12, 13, 1], [21, 22, 1]), ([14, 1], [23, 24, 25, 26, 1]), ([15, 16, 17, 18, 19, 1], [27, 1])]


def rows_of(assignment, source_length: int, target_length: int):
    """Arrays of rows, each of which holds the pairs of these numbers."""
    shape = (len(assignment), source_length), (len(assignment), target_length)
    source, source_segments, source_positions = (np.zeros(shape[0], np.int32) for _ in range(3))
    inputs, outputs, target_segments, target_positions = (np.zeros(shape[1], np.int32) for _ in range(4))
    for row, numbers in enumerate(assignment):
        s = t = 0
        for segment, number in enumerate(numbers, start=1):
            x, y = PAIRS[number]
            source[row, s : s + len(x)], source_segments[row, s : s + len(x)] = x, segment
            source_positions[row, s : s + len(x)] = range(len(x))
            inputs[row, t : t + len(y)], outputs[row, t : t + len(y)] = [2, *y[:-1]], y
            target_segments[row, t : t + len(y)], target_positions[row, t : t + len(y)] = segment, range(len(y))
            s, t = s + len(x), t + len(y)
    arrays = (source, Tokens(source_segments, source_positions), inputs, Tokens(target_segments, target_positions))
    return jax.tree.map(jnp.asarray, arrays), jnp.asarray(outputs)


@pytest.mark.parametrize("norm", NORMS)
def test_a_packed_row_has_the_loss_and_gradient_of_its_pairs_alone(norm):
    model, parameters = model_and_parameters(norm)

    def loss(parameters, arrays, outputs):
        x_BTD = model.apply({"params": parameters}, *arrays)
        sums = cross_entropy(x_BTD, output_table(model, parameters), outputs, outputs > 0, 0.1, VOCAB, 1)
        return sums.loss, sums

    gradient = jax.jit(jax.grad(loss, has_aux=True))
    results = []
    for assignment in ([[0, 1, 2], [], []], [[0], [1], [2]], [[2, 0], [], [1]]):
        arrays, outputs = rows_of(assignment, 13, 12)
        gradients, sums = gradient(parameters, arrays, outputs)
        results.append((sums, gradients))
    (sums, gradients), *others = results
    assert float(sums.tokens) == 10
    for other_sums, other_gradients in others:
        np.testing.assert_allclose(other_sums, sums, rtol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), other_gradients, gradients)


@pytest.mark.parametrize(("norm", "tie"), [("post", "all"), ("pre", "target"), ("post", "none")])
def test_cached_decoding_equals_uncached(norm, tie):
    """Three beams of each of two sentences, one padded, step by step against the model over whole rows."""
    model, parameters = model_and_parameters(norm, tie)
    batch, beams, length = 2, 3, 6
    generator = np.random.default_rng(0)
    source = generator.integers(4, VOCAB, (batch, 5), dtype=np.int32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    targets = generator.integers(4, VOCAB, (batch, beams, length), dtype=np.int32)

    @jax.jit
    def uncached(parameters, source, mask, targets):
        def place(segments):
            return Tokens(segments, jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape))

        repeated, segments = jnp.repeat(source, beams, axis=0), jnp.repeat(mask.astype(jnp.int32), beams, axis=0)
        rows = targets.reshape(batch * beams, length)
        x = model.apply({"params": parameters}, repeated, place(segments), rows, place(jnp.ones_like(rows)))
        return model.apply({"params": parameters}, x, method="logits").reshape(batch, beams, length, -1)

    expected = uncached(parameters, source, mask, targets)
    unstacked = unstack(parameters)
    start = jax.jit(functools.partial(start_decoding, model, beams=beams, length=length + 2))
    step = jax.jit(functools.partial(decode_step, model))
    cache = start(unstacked, source, mask)
    for t in range(length):
        assert int(cache.position) == t
        logits, cache = step(unstacked, targets[:, :, t], cache)
        assert logits.shape == (batch, beams, 128) and logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, expected[:, :, t], atol=2e-5)


def test_the_first_step_of_a_single_beam_is_that_of_all_beams_and_any_of_them_goes_on_from_it():
    model, parameters = model_and_parameters()
    unstacked = unstack(parameters)
    mask = jnp.ones((2, 4), bool)
    step = jax.jit(functools.partial(decode_step, model))

    def two_steps(first: int):
        cache = start_decoding(model, unstacked, jnp.full((2, 4), 5), mask, beams=3, length=4)
        logits, cache = step(unstacked, jnp.full((2, first), 2), cache)
        cache = reorder_beams(cache, jnp.zeros((2, 3), jnp.int32))
        return logits, step(unstacked, jnp.array([[7, 8, 9], [4, 4, 6]]), cache)[0]

    (of_one, after_one), (of_all, after_all) = two_steps(1), two_steps(3)
    assert of_one.shape == (2, 1, 128)
    np.testing.assert_allclose(of_all, jnp.broadcast_to(of_one, of_all.shape), atol=2e-5)
    np.testing.assert_allclose(after_one, after_all, atol=2e-5)


def test_what_pads_a_source_does_not_change_its_decoding():
    model, parameters = model_and_parameters()
    unstacked = unstack(parameters)
    mask = jnp.array([[1, 1, 1, 0, 0]], bool)

    @jax.jit
    def logits(source):
        cache = start_decoding(model, unstacked, source, mask, beams=1, length=2)
        return decode_step(model, unstacked, jnp.array([[2]]), cache)[0]

    results = [logits(jnp.where(mask, jnp.array([[5, 6, 7, 0, 0]]), padding)) for padding in (0, 9)]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize(
    ("tie", "tables"),
    [
        ("all", {"target_embedding"}),
        ("target", {"target_embedding", "source_embedding"}),
        ("none", {"target_embedding", "source_embedding", "output_embedding"}),
    ],
)
@pytest.mark.parametrize("norm", NORMS)
def test_tying_and_closing_norms_make_these_parameters(tie, tables, norm):
    model = Transformer(dataclasses.replace(SMALL, norm=norm, tie_embeddings=tie), VOCAB)
    abstract = unboxed(abstract_parameters(model))
    assert set(abstract) == tables | {"encoder", "decoder"}
    for stack, depth in (("encoder", 2), ("decoder", 3)):
        assert set(abstract[stack]) == ({"layers", "final_norm"} if norm == "pre" else {"layers"})
        assert {leaf.shape[0] for leaf in jax.tree.leaves(abstract[stack]["layers"])} == {depth}
    used = "output_embedding" if tie == "none" else "target_embedding"
    assert output_table(model, abstract) is abstract[used]["table"]
    assert count_parameters(model) == sum(x.size for x in jax.tree.leaves(abstract)) - len(tables) * (128 - VOCAB) * 16


def test_parameters_are_boxed_with_a_name_for_each_dimension():
    abstract = abstract_parameters(Transformer(dataclasses.replace(SMALL, norm="pre"), VOCAB))
    axes, shapes = logical_axes(abstract), unboxed(abstract)
    names = jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for leaf, name in zip(jax.tree.leaves(shapes), names, strict=True):
        assert len(name) == leaf.ndim and leaf.dtype == jnp.float32
    stacked = jax.tree.leaves(axes["decoder"]["layers"], is_leaf=lambda x: isinstance(x, tuple))
    assert {name[0] for name in stacked} == {"layers"}
    assert axes["decoder"]["layers"]["cross_attention"]["output"]["kernel"] == ("layers", "heads", "kv", "embed")


def test_initial_values_follow_the_seed_and_differ_between_layers():
    model, parameters = model_and_parameters()
    jax.tree.map(np.testing.assert_array_equal, parameters, init_parameters(model, 0))
    kernel = parameters["encoder"]["layers"]["self_attention"]["query"]["kernel"]
    assert not np.any(kernel[0] == kernel[1])
    for i, part in enumerate(unstack(parameters)["encoder"]["layers"]):
        np.testing.assert_array_equal(part["self_attention"]["query"]["kernel"], kernel[i])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_remat_and_unrolling_change_neither_parameters_nor_results(dtype, tolerance):
    """Dropout on: what is computed again must draw the same bits again. In bfloat16, norms and masks always are."""
    config = dataclasses.replace(SMALL, encoder_layers=1, decoder_layers=2)
    parameters = jax.jit(lambda: init_parameters(Transformer(config, VOCAB), 0))()
    arrays, _ = rows_of([[0, 1, 2]], 13, 12)
    results = []
    for kind, remat, unroll in (("float32", "none", 1), (dtype, "none", 1), (dtype, "dots", 1), (dtype, "full", 2)):
        model = Transformer(config, VOCAB, jnp.dtype(kind), remat=remat, unroll=unroll)
        assert jax.tree.structure(unboxed(abstract_parameters(model))) == jax.tree.structure(parameters)

        def loss(parameters, arrays, key, model=model):
            return jnp.sum(jnp.sin(model.apply({"params": parameters}, *arrays, key)))

        key = dropout_key(0, jnp.int32(5), jnp.arange(1))
        results.append(jax.jit(jax.value_and_grad(loss))(parameters, arrays, key))
    for other in results[1:]:
        difference = optax.tree.norm(jax.tree.map(jnp.subtract, other, results[0]))
        assert difference < tolerance * optax.tree.norm(results[0])


@pytest.mark.parametrize(("unroll", "guarded"), [(1, False), (2, False), (3, True), (4, True)])
def test_what_is_computed_again_is_guarded_where_no_loop_guards_it(unroll, guarded):
    """Of 4 layers, 3 leave one over behind a loop that turns once."""
    config = dataclasses.replace(SMALL, encoder_layers=4, decoder_layers=4)
    model = Transformer(config, VOCAB, remat="full", unroll=unroll)
    arrays, _ = rows_of([[0]], 4, 3)
    program = str(jax.make_jaxpr(lambda p: model.apply({"params": p}, *arrays))(unboxed(abstract_parameters(model))))
    assert ("prevent_cse=True" in program) is guarded and ("prevent_cse=False" in program) is not guarded


def test_encoder_and_decoder_draw_different_bits(monkeypatch):
    """Keys of the embedding's dropout, the one site that both have outside of their layers."""
    keys = []

    def record(x, rate, key, site):
        keys.append(int(key.key))
        return x

    monkeypatch.setattr("tfm.model.layers._Layer.residual", lambda self, x, *_: x)
    monkeypatch.setattr("tfm.model.layers.dropout", record)
    model, parameters = model_and_parameters()
    arrays, _ = rows_of([[0]], 4, 3)
    model.apply({"params": parameters}, *arrays, dropout_key(0, jnp.int32(0), jnp.arange(1)))
    assert len(keys) == 2 and keys[0] != keys[1]


def test_the_program_does_not_grow_with_depth():
    sizes = []
    for depth in (2, 6):
        model = Transformer(dataclasses.replace(SMALL, encoder_layers=depth, decoder_layers=depth), VOCAB)
        arrays, _ = rows_of([[0]], 4, 3)

        def loss(parameters, model=model, arrays=arrays):
            return jnp.sum(model.apply({"params": parameters}, *arrays))

        sizes.append(len(jax.jit(jax.grad(loss)).lower(unboxed(abstract_parameters(model))).as_text()))
    assert sizes[1] < 1.02 * sizes[0]


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("float32", "tpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_compute_dtype(dtype, platform, expected):
    assert compute_dtype(ModelConfig(dtype=dtype), platform) == jnp.dtype(expected)


def test_in_bfloat16_parameters_stay_float32_and_outputs_near():
    _, parameters = model_and_parameters()
    arrays, _ = rows_of([[0, 1, 2]], 13, 12)
    outputs = {}
    for dtype in ("float32", "bfloat16"):
        model = Transformer(SMALL, VOCAB, jnp.dtype(dtype))
        assert {leaf.dtype for leaf in jax.tree.leaves(unboxed(abstract_parameters(model)))} == {jnp.dtype("float32")}
        outputs[dtype] = jax.jit(model.apply)({"params": parameters}, *arrays)
        assert outputs[dtype].dtype == dtype
    difference = np.asarray(outputs["bfloat16"], np.float32) - np.asarray(outputs["float32"])
    assert 0 < math.sqrt((difference**2).mean()) < 0.03


# Table 3 of the paper: what a row changes of the base model, and its parameters in millions, as printed there. Heads of
# row A keep the sum of their widths; row B changes d_k alone.
TABLE_3 = {
    "base": ({}, 65),
    "A 1": ({"num_heads": 1, "d_k": 512, "d_v": 512}, 65),
    "A 4": ({"num_heads": 4, "d_k": 128, "d_v": 128}, 65),
    "A 16": ({"num_heads": 16, "d_k": 32, "d_v": 32}, 65),
    "A 32": ({"num_heads": 32, "d_k": 16, "d_v": 16}, 65),
    "B 16": ({"d_k": 16}, 58),
    "B 32": ({"d_k": 32}, 60),
    "C N=2": ({"encoder_layers": 2, "decoder_layers": 2}, 36),
    "C N=4": ({"encoder_layers": 4, "decoder_layers": 4}, 50),
    "C N=8": ({"encoder_layers": 8, "decoder_layers": 8}, 80),
    "C d_model=256": ({"d_model": 256, "d_k": 32, "d_v": 32}, 28),
    "C d_model=1024": ({"d_model": 1024, "d_k": 128, "d_v": 128}, 168),
    "C d_ff=1024": ({"d_ff": 1024}, 53),
    "C d_ff=4096": ({"d_ff": 4096}, 90),
    "big": ({"d_model": 1024, "d_ff": 4096, "num_heads": 16}, 213),
}
# Of a base model of 65 million, 44 are in the layers, and so 21 in the table, which is 41,000 tokens of width 512 and
# not the 37,000 that section 5.1 speaks of: the authors' first published code has a table of 40,960. At 37,000 the
# three smallest rows miss the bound of 4 %, whatever the layers are like.
MISSED_AT_37_000 = {"C N=2", "C d_model=256", "C d_ff=1024"}


@pytest.mark.parametrize("row", TABLE_3)
def test_table_3_is_reached_by_overrides(row):
    fields, printed = TABLE_3[row]
    config = ModelConfig(**fields)
    count = count_parameters(Transformer(config, 37_000)) / 1e6
    assert (abs(count / printed - 1) <= 0.04) == (row not in MISSED_AT_37_000)
    # With the table of that code every row but the last, which is of another set of runs, is the printed number.
    count += (40_960 - 37_000) * config.d_model / 1e6
    assert count == pytest.approx(printed, abs=0.03 * printed if row == "big" else 0.55)


@pytest.mark.parametrize(
    ("platform", "attention", "deterministic", "expected"),
    [
        ("tpu", "auto", False, "pallas"),
        ("tpu", "plain", False, "plain"),
        ("cpu", "auto", False, "plain"),
        ("gpu", "auto", False, "cudnn"),
        ("gpu", "auto", True, "plain"),
        ("gpu", "plain", False, "plain"),
    ],
)
def test_what_computes_attention_goes_by_the_device(monkeypatch, platform, attention, deterministic, expected):
    config = dataclasses.replace(SMALL, attention=attention)
    ampere = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [ampere])
    assert attention_kernel(config, platform, deterministic=deterministic) == expected


@pytest.mark.parametrize("capability", ["7.5", "gfx942", None])
def test_other_gpus_have_no_cudnn_kernel(monkeypatch, capability):
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert attention_kernel(SMALL, "gpu", deterministic=False) == "plain"

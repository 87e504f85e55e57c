"""The compiled step: the same numbers however a batch is split, a non-finite batch, one compilation."""

import dataclasses
import functools
import re
import types

import jax
import numpy as np
import pytest

from tfm import sharding
from tfm.config import Config, ConfigError, DataConfig, MeshConfig, ModelConfig, OptimizerConfig, TrainingConfig
from tfm.data.batches import Batch
from tfm.data.tokenizer import BOS, EOS
from tfm.hlo.collectives import collectives_of
from tfm.hlo.program import Program
from tfm.model.dropout import dropout_key
from tfm.model.transformer import Transformer
from tfm.training import step
from tfm.training.step import Trainer, TrainState, check_rows

ROWS, LENGTH, VOCAB = 16, 16, 100
POISONED = 90  # a source token that only some batches have
MODEL = ModelConfig(
    d_model=16,
    d_ff=32,
    num_heads=2,
    encoder_layers=2,
    decoder_layers=2,
    tie_embeddings="none",
    dropout_rate=0.2,
    attention_dropout_rate=0.2,
    activation_dropout_rate=0.2,
    token_dropout_rate=0.2,
)
# Adam's update with a small epsilon is a sign: the rounding of a gradient that is nearly nothing would decide it.
SMOOTH = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, epsilon=1e-3)


def trainer_of(
    mesh: MeshConfig, model: ModelConfig = MODEL, optimizer: OptimizerConfig = SMOOTH, **training
) -> Trainer:
    config = Config(
        model,
        DataConfig(source_row_length=LENGTH, target_row_length=LENGTH),
        optimizer,
        TrainingConfig(target_tokens_per_batch=ROWS * LENGTH, **training),
        mesh,
    ).validate()
    devices = jax.devices() if -1 in dataclasses.astuple(mesh) else jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor]
    return Trainer(config, Transformer(model, VOCAB), sharding.make_mesh(mesh, devices))


def packed(seed: int, highest: int = POISONED) -> Batch:
    """Rows of two pairs each and some padding, with ids below `highest`."""
    rng = np.random.default_rng(seed)

    def side():
        tokens, segments, positions = np.zeros((3, ROWS, LENGTH), np.int32)
        for row in range(ROWS):
            at = 0
            for segment in (1, 2):
                size = rng.integers(2, LENGTH // 2)
                tokens[row, at : at + size] = [*rng.integers(4, highest, size - 1), EOS]
                segments[row, at : at + size] = segment
                positions[row, at : at + size] = np.arange(size)
                at += size
        return tokens, segments, positions

    source, (outputs, segments, positions) = side(), side()
    inputs = np.where(positions == 0, BOS, np.roll(outputs, 1, axis=1)) * (segments > 0)
    return Batch(*source, inputs.astype(np.int32), outputs, segments, positions, np.arange(ROWS, dtype=np.int32))


def initial(trainer: Trainer) -> TrainState:
    """A state like `trainer.init`'s, the same for every trainer of a model, without compiling anything."""
    rng = np.random.default_rng(0)

    def values(path, leaf):
        if path[-1].key == "scale":
            return np.ones(leaf.shape, leaf.dtype)
        return rng.normal(0, 0.25, leaf.shape).astype(leaf.dtype) * (path[-1].key != "bias")

    abstract = trainer.abstract_state
    parameters = jax.tree_util.tree_map_with_path(values, abstract.parameters)
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), abstract)._replace(parameters=parameters)
    if abstract.ema is not None:
        state = state._replace(ema=copied(parameters))
    return jax.device_put(state, trainer.state_shardings)


def steps(trainer: Trainer, batches, state=None):
    """The state after the batches, and the metrics of each as NumPy arrays."""
    state = initial(trainer) if state is None else state
    metrics = []
    with jax.set_mesh(trainer.mesh):
        for batch in batches:
            state, numbers = trainer.train_step(state, jax.device_put(batch, sharding.batch_sharding(trainer.mesh)))
            metrics.append(jax.device_get(numbers))
    return state, metrics


def copied(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes(), jax.tree_util.keystr(path)


def optimised(step):
    """The step with XLA's sums in vectors, not one by one: the squares of gradients of about nothing need that."""

    def run(state, batch):
        return step.lower(state, batch).compile(compiler_options={"xla_backend_optimization_level": 1})(state, batch)

    return run


@functools.cache
def averaging() -> Trainer:
    """On one device, with every part of the state there is."""
    return trainer_of(MeshConfig(data=1), optimizer=dataclasses.replace(SMOOTH, ema_decay=0.25, clip_norm=1.0))


@functools.cache
def whole() -> Trainer:
    """One device, one micro-batch: the plain case."""
    return trainer_of(MeshConfig(data=1))


def assert_close(trainer: Trainer, reference: Trainer):
    batches = [packed(1), packed(2)]
    (mine, my_metrics), (theirs, their_metrics) = steps(trainer, batches), steps(reference, batches)
    for one, other in zip(my_metrics, their_metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
    leaves = zip(jax.tree.leaves(mine.parameters), jax.tree_util.tree_leaves_with_path(theirs.parameters), strict=True)
    for one, (path, other) in leaves:
        scale = float(np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))
    return my_metrics


def test_accumulation_of_four_equals_one_batch_with_dropout_on():
    metrics = assert_close(trainer_of(MeshConfig(data=1), gradient_accumulation=4), whole())
    # Dropout is on: without it the loss is another.
    trainer = whole()
    sums = trainer.sums(initial(trainer).parameters, packed(1), None, trainer.config.training.label_smoothing)
    assert abs(float(sums.loss / sums.tokens) - metrics[0]["loss"]) > 1e-3


def test_accumulation_over_split_devices_equals_one_device():
    assert_close(trainer_of(MeshConfig(data=2, fsdp=2, tensor=2), gradient_accumulation=4), whole())


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_rules_for_matrices_over_split_devices_equal_one_device(name):
    optimizer = OptimizerConfig(name=name, learning_rate=1e-3, warmup_steps=2, weight_decay=0.01)
    # Wide enough for factored statistics, whose shardings lack an axis.
    model = dataclasses.replace(MODEL, d_model=128, d_ff=128, num_heads=2, encoder_layers=1, decoder_layers=2)
    split, reference = (
        trainer_of(mesh, model, optimizer) for mesh in (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1))
    )
    for trainer in (split, reference):
        trainer.train_step = optimised(trainer.train_step)
    (mine, _), (theirs, _) = (steps(trainer, [packed(1)]) for trainer in (split, reference))
    for entry in ("parameters", "optimizer"):
        leaves = jax.tree.leaves(getattr(mine, entry)), jax.tree_util.tree_leaves_with_path(getattr(theirs, entry))
        for one, (path, other) in zip(*leaves, strict=True):
            # An update is a sign nearly everywhere; a gradient of about nothing has none to speak of.
            close = np.isclose(one, other, rtol=1e-3, atol=1e-5)
            assert np.mean(close) > 0.999, jax.tree_util.keystr(path)


def test_each_step_and_each_seed_drops_others():
    trainer, losses = whole(), []
    for number in (3, 4, 3):
        state = initial(trainer)
        state = state._replace(step=jax.device_put(np.int32(number), state.step.sharding))
        losses.append(float(steps(trainer, [packed(1)], state)[1][0]["loss"]))
    assert losses[0] == losses[2] and abs(losses[0] - losses[1]) > 1e-4

    def program(seed: int) -> str:
        other = trainer_of(MeshConfig(data=1), seed=seed)
        with jax.set_mesh(other.mesh):
            return other.train_step.lower(other.abstract_state, other.abstract_batch()).as_text()

    assert program(0) == program(0) != program(1)


def test_a_batch_that_is_not_finite_touches_nothing_but_the_counters():
    trainer = averaging()
    state, _ = steps(trainer, [packed(1)])
    before = copied(state)
    for values in (before.parameters, before.ema):
        values["source_embedding"]["table"][POISONED] = np.inf
    state = jax.device_put(copied(before), trainer.state_shardings)
    bad = packed(2)
    bad.source_tokens[3, 0] = POISONED
    state, [metrics] = steps(trainer, [bad], state)
    assert not np.isfinite(metrics["loss"])
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (1, 1)
    expected = before._replace(step=np.int32(2), skipped_steps=np.int32(1), skipped_in_a_row=np.int32(1))
    assert_same_bits(state, expected)
    state, metrics = steps(trainer, [bad, packed(3)], state)
    assert [m["skipped_in_a_row"] for m in metrics] == [2, 0]
    assert [m["skipped_steps"] for m in metrics] == [2, 2]
    assert np.isfinite(metrics[1]["loss"]) and int(state.step) == 4
    kernels = [s.parameters["decoder"]["layers"]["self_attention"]["query"]["kernel"] for s in (state, before)]
    assert not np.array_equal(*kernels)


def test_moving_average():
    trainer = averaging()
    state = trainer.init()
    assert_same_bits(state.ema, state.parameters)
    for done, decay in enumerate((1 / 10, 2 / 11, 0.25, 0.25)):  # (1 + done) / (10 + done) until ema_decay is reached
        average = copied(state.ema)
        state, _ = steps(trainer, [packed(done)], state)
        expected = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), average, state.parameters)
        jax.tree.map(lambda e, x: np.testing.assert_allclose(e, x, rtol=1e-6, atol=1e-7), state.ema, expected)
    assert state.averaged() is state.ema
    without = initial(whole())
    assert without.ema is None and without.averaged() is without.parameters


@pytest.mark.parametrize("trainer", [averaging, whole])
def test_every_buffer_of_the_state_is_donated_and_the_step_compiled_once(trainer):
    trainer = trainer()
    state = initial(trainer)
    given = jax.tree.leaves(state)
    state, _ = steps(trainer, [packed(1)], state)
    assert all(leaf.is_deleted() for leaf in given)
    steps(trainer, [packed(2), packed(3)], state)
    assert trainer.train_step._cache_size() == 1
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), packed(1))
    program = trainer.train_step.lower(trainer.abstract_state, batch).as_text()
    assert program.count("tf.aliasing_output") + program.count("jax.buffer_donor") == len(given)
    assert "rng_bit_generator" not in program  # on TPUs and GPUs, it would draw the mask of the whole batch everywhere


@pytest.mark.parametrize("logits_per_chunk", [2**22, 1])
def test_what_devices_of_a_split_batch_wait_for_comes_in_one_order(logits_per_chunk):
    """Of two sums without an order, devices of a CPU may wait for one each, and then compute one after the other."""
    trainer = trainer_of(MeshConfig(data=2))
    trainer.logits_per_chunk = logits_per_chunk
    with jax.set_mesh(trainer.mesh):
        program = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).compile().as_text()
    found = sorted((one.count, one.kind) for one in collectives_of(Program(program), 2))
    layers = [(MODEL.decoder_layers, "all-reduce"), (MODEL.encoder_layers, "all-reduce")]
    assert found == [(1, "all-reduce"), *layers]  # in the loops over layers, and at the end for all the rest


def test_metrics_tell_what_the_batch_holds():
    trainer, batch = whole(), packed(5)
    _, [numbers, second] = steps(trainer, [batch, packed(6)])
    assert numbers["source_tokens"] == np.sum(batch.source_segments > 0)
    assert numbers["target_tokens"] == np.sum(batch.target_segments > 0)
    assert numbers["source_padding"] == pytest.approx(np.mean(batch.source_segments == 0))
    assert numbers["target_padding"] == pytest.approx(np.mean(batch.target_segments == 0))
    assert [m["learning_rate"] for m in (numbers, second)] == pytest.approx([0.5e-2, 1e-2])
    assert numbers["nll"] > 1 and numbers["skipped_steps"] == 0


def test_the_program_does_not_grow_with_depth():
    def program(depth):
        model = dataclasses.replace(MODEL, encoder_layers=depth, decoder_layers=depth)
        trainer = trainer_of(MeshConfig(data=1), model)
        batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), packed(1))
        return trainer.train_step.lower(trainer.abstract_state, batch).as_text()

    shallow, deep = program(2), program(12)
    assert deep.count("\n") == shallow.count("\n")
    assert f"tensor<12x{MODEL.d_model}x{MODEL.d_ff}xf32>" in deep


def test_rows_that_do_not_divide_are_refused_with_numbers_that_do():
    with pytest.raises(ConfigError, match=r"makes 16 rows .* 8 shards and .*gradient_accumulation=4: use 512 or 1024"):
        trainer_of(MeshConfig(data=-1), gradient_accumulation=4)


@pytest.mark.parametrize(
    ("rows", "parts", "expected"),
    [
        (96, 8, "use 1024 or 2048 tokens, or training.gradient_accumulation=1 or 2 or 3 or 4 or 6 or 12"),
        (50, 4, "use 512 or 1024 tokens, or training.gradient_accumulation=3 or 6"),
        (50, 7, "use 896 or 1792 tokens"),
    ],
)
def test_rows_that_do_not_divide_are_told_with_what_does(rows, parts, expected):
    """Another batch is another run; other parts of it go on with this one."""
    training = TrainingConfig(target_tokens_per_batch=rows * 16, gradient_accumulation=parts)
    config = Config(data=DataConfig(source_row_length=16, target_row_length=16), training=training)
    with pytest.raises(ConfigError, match=f"{re.escape(expected)}$"):
        check_rows(config, sharding.make_mesh(MeshConfig()))


def test_training_smooths_labels_and_evaluation_does_not():
    trainer, batch = whole(), packed(1)
    state = initial(trainer)
    key = dropout_key(trainer.config.training.seed, state.step, batch.rows)
    smoothed, plain = (jax.jit(trainer.sums, static_argnums=3)(state.parameters, batch, key, rate) for rate in (0.1, 0))
    assert abs(smoothed.loss - smoothed.nll) > 0.05 and plain.loss == plain.nll
    found = trainer.evaluation_step(state.parameters, batch)
    assert found.loss == found.nll
    _, metrics = trainer.train_step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(float(smoothed.loss / smoothed.tokens), rel=1e-5)
    assert float(metrics["nll"]) == pytest.approx(float(smoothed.nll / smoothed.tokens), rel=1e-5)


def test_the_loss_is_cut_by_what_one_device_has(monkeypatch):
    asked = []
    monkeypatch.setattr(step, "chunks_for", lambda *sizes: asked.append(sizes) or 1)
    trainer = trainer_of(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(trainer.mesh):
        jax.eval_shape(lambda p: trainer.sums(p, packed(1), None, 0.0), trainer.abstract_state.parameters)
    assert asked == [(ROWS // 4, LENGTH, 128 // 2, step.LOGITS_PER_CHUNK["cpu"])]


def test_products_of_the_update_are_as_exact_as_the_model_s():
    trainer = trainer_of(MeshConfig(data=1), optimizer=dataclasses.replace(SMOOTH, name="muon"))
    text = trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).as_text()
    products = [line for line in text.split("\n") if "dot_general" in line]
    assert len(products) > 20 and all("HIGHEST" in line for line in products)


def test_compiler_options_of_the_platform_reach_the_compiler(monkeypatch):
    monkeypatch.setitem(step._COMPILER_OPTIONS, "cpu", {"xla_no_such_option": True})
    trainer = trainer_of(MeshConfig(data=1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        trainer.train_step.lower(trainer.abstract_state, trainer.abstract_batch()).compile()


@pytest.mark.parametrize(("deterministic", "attention"), [(False, "cudnn"), (True, "plain")])
def test_the_model_of_a_gpu_is_unrolled_and_has_a_kernel_where_order_does_not_matter(
    monkeypatch, deterministic, attention
):
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    config = Config(training=TrainingConfig(deterministic=deterministic, remat="dots"))
    model = step.training_model(config, 100, "gpu")
    assert (model.attention, model.remat, model.unroll, model.dtype.name) == (attention, "dots", 6, "bfloat16")
    assert step.training_model(config, 100, "tpu").unroll == 1

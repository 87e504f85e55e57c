"""Schedules against the paper's formula, update rules against NumPy, and what `layers` means to them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tfm import sharding
from tfm.config import Config, ModelConfig, OptimizerConfig, TrainingConfig
from tfm.model.transformer import Transformer, abstract_parameters
from tfm.training.optimizer import make_optimizer, make_schedule


def rate(config, step):
    return float(make_schedule(config)(jnp.int32(step)))


@pytest.mark.parametrize("step", [1, 2000, 4000, 16_000, 100_000])
def test_inverse_sqrt_is_equation_3(step):
    expected = 512**-0.5 * min(step**-0.5, step * 4000**-1.5)
    assert rate(Config(), step) == pytest.approx(expected, rel=1e-6)


def test_inverse_sqrt_reaches_a_peak_that_is_set():
    config = Config(optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=100))
    assert rate(config, 100) == pytest.approx(2e-3)
    assert rate(config, 400) == pytest.approx(1e-3)


def test_cosine():
    optimizer = OptimizerConfig(schedule="cosine", learning_rate=1e-2, warmup_steps=100, final_learning_rate=0.1)
    config = Config(optimizer=optimizer, training=TrainingConfig(steps=1100))
    rates = {step: rate(config, step) for step in (1, 50, 100, 350, 600, 1100, 1200)}
    quarter = 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2
    expected = {1: 1e-4, 50: 5e-3, 100: 1e-2, 350: quarter * 1e-2, 600: 5.5e-3, 1100: 1e-3, 1200: 1e-3}
    assert rates == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("decay_steps", "begins"), [(300, 700), (None, 800)])
def test_warmup_stable_decay(decay_steps, begins):
    optimizer = OptimizerConfig(schedule="wsd", learning_rate=1e-2, warmup_steps=100, decay_steps=decay_steps)
    config = Config(optimizer=optimizer, training=TrainingConfig(steps=1000))
    rates = {step: rate(config, step) for step in (10, 100, begins - 1, begins, (begins + 1000) // 2, 1000)}
    expected = dict(zip(rates, (1e-3, 1e-2, 1e-2, 1e-2, 5e-3, 0), strict=True))
    assert rates == pytest.approx(expected, rel=1e-5, abs=1e-9)


AXES = {
    "stack": ("layers", "embed", "mlp"),
    "bias": ("layers", "mlp"),
    "table": ("vocab", "embed"),
    "scale": ("embed",),
}
SHAPES = {"stack": (3, 128, 160), "bias": (3, 160), "table": (256, 128), "scale": (128,)}


def tree(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def updates(rule, parameters, gradients):
    """The updates of each step, all from the same parameters, and the last state."""
    state = rule.init(parameters)
    found = []
    for gradient in gradients:
        update, state = jax.jit(rule.update)(gradient, state, parameters)
        found.append(update)
    return found, state


def test_adam_is_adam():
    gradients = [tree(seed) for seed in range(1, 4)]
    found, _ = updates(make_optimizer(OptimizerConfig(beta1=0.9, beta2=0.98, epsilon=1e-3), AXES), tree(0), gradients)
    for name in SHAPES:
        first = second = 0.0
        for step, (gradient, update) in enumerate(zip(gradients, found, strict=True), start=1):
            g = gradient[name].astype(np.float64)
            first, second = 0.9 * first + 0.1 * g, 0.98 * second + 0.02 * g**2
            expected = first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.98**step)) + 1e-3)
            np.testing.assert_allclose(update[name], expected, rtol=1e-4, atol=1e-6)


def test_adafactor_takes_each_layer_by_itself():
    scale = np.array([1e-3, 1, 1e3], np.float32)  # statistics over the whole stack would see the last layer alone
    gradients = [tree(seed) for seed in range(1, 4)]
    for gradient in gradients:
        gradient["stack"] *= scale[:, None, None]
        gradient["bias"] *= scale[:, None]
    found, state = updates(make_optimizer(OptimizerConfig(name="adafactor"), AXES), tree(0), gradients)
    alone = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    parts = [lambda g, i=i: {name: g[name][i] for name in ("stack", "bias")} for i in range(3)]
    for part in [*parts, lambda g: {name: g[name] for name in ("table", "scale")}]:
        expected, _ = updates(alone, part(tree(0)), [part(g) for g in gradients])
        for mine, theirs in zip(found, expected, strict=True):
            for name, value in theirs.items():
                np.testing.assert_allclose(part(mine)[name], value, rtol=1e-4, atol=1e-6)
    kept = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert {(3, 128), (3, 160)} <= kept and SHAPES["stack"] not in kept and SHAPES["table"] not in kept


def orthogonalised(matrix):
    """Five steps of Newton and Schulz towards the nearest matrix with orthonormal rows or columns, in float64."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_makes_one_matrix_of_each_layer_s_kernel():
    axes = {"query": ("layers", "embed", "heads", "kv"), "out": ("layers", "heads", "kv", "embed"), **AXES}
    shapes = {"query": (3, 32, 4, 6), "out": (3, 4, 6, 32), **SHAPES}
    matrices = {"query": (32, 24), "out": (24, 32), "stack": (128, 160)}  # heads and their width are one side
    gradients = [tree(seed, shapes) for seed in range(1, 4)]
    for gradient in gradients:
        gradient["stack"] *= np.array([1e-3, 1, 1e3], np.float32)[:, None, None]
    parameters = tree(0, shapes)
    found, state = updates(make_optimizer(OptimizerConfig(name="muon"), axes), parameters, gradients)
    for name, shape in matrices.items():
        momentum = 0.0
        for step, (gradient, update) in enumerate(zip(gradients, found, strict=True), start=1):
            g = gradient[name].astype(np.float64)
            momentum = 0.95 * momentum + 0.05 * g
            ahead = 0.95 * momentum / (1 - 0.95 ** (step + 1)) + 0.05 * g / (1 - 0.95**step)
            for layer in range(3):
                expected = 0.2 * max(shape) ** 0.5 * orthogonalised(ahead[layer].reshape(shape))
                np.testing.assert_allclose(update[name][layer].reshape(shape), expected, rtol=1e-3, atol=1e-3)

    def rest(tree):
        return {name: tree[name] for name in ("bias", "table", "scale")}

    adam = optax.scale_by_adam(0.9, 0.98, 1e-9, nesterov=True)
    expected, _ = updates(adam, rest(parameters), [rest(gradient) for gradient in gradients])
    for mine, theirs in zip(found, expected, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), rest(mine), theirs)
    # One moment for kernels, two for the rest.
    assert [leaf.shape for leaf in jax.tree.leaves(state)].count(SHAPES["stack"]) == 1


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_weight_decay_is_for_matrices(name):
    model = ModelConfig(d_model=8, d_ff=16, num_heads=2, encoder_layers=2, decoder_layers=2, norm="pre")
    boxed = abstract_parameters(Transformer(model, 20))
    parameters = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), sharding.unboxed(boxed))
    nothing = jax.tree.map(jnp.zeros_like, parameters)
    config = OptimizerConfig(name=name, weight_decay=0.1)
    (update,), _ = updates(make_optimizer(config, sharding.logical_axes(boxed)), parameters, [nothing])
    decayed = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(update):
        decayed.setdefault(path[-1].key, set()).update(np.unique(np.asarray(leaf)).tolist())
    tenth = float(np.float32(0.1))
    assert decayed == {"kernel": {tenth}, "table": {tenth}, "bias": {0.0}, "scale": {0.0}}


def test_clipping_is_by_the_norm_of_all_gradients_together():
    gradients = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    gradients["stack"][0, 0, 0], gradients["scale"][0] = 30, 40
    # With a huge epsilon Adam's first update is the gradient it is given, over that epsilon.
    rule = make_optimizer(OptimizerConfig(epsilon=1e8, clip_norm=5), AXES)
    (update,), _ = updates(rule, tree(0), [gradients])
    assert update["stack"][0, 0, 0] * 1e8 == pytest.approx(3) and update["scale"][0] * 1e8 == pytest.approx(4)
    assert optax.tree.norm(update) * 1e8 == pytest.approx(5)
    small = jax.tree.map(lambda g: g / 100, gradients)
    (update,), _ = updates(rule, tree(0), [small])
    assert update["scale"][0] * 1e8 == pytest.approx(0.4)

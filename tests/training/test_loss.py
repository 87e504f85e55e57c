"""The loss against numbers worked out by hand and in float64, its gradient against a plain implementation's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm import sharding
from tfm.benchmarking import programs
from tfm.config import MeshConfig
from tfm.training.loss import LossSums, chunks_for, cross_entropy

B, T, D, VOCAB, PADDED = 3, 8, 5, 11, 16


@pytest.fixture(scope="module")
def case():
    """x, table with padded rows that would win every softmax, targets, and weights with padding at the rows' ends."""
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(B, T, D)).astype(np.float32)
    table_VD = rng.normal(size=(PADDED, D)).astype(np.float32)
    table_VD[VOCAB:] *= 100
    targets_BT = rng.integers(0, VOCAB, (B, T)).astype(np.int32)
    weights_BT = np.arange(T)[None] < np.array([8, 5, 0])[:, None]
    return x_BTD, table_VD, targets_BT, weights_BT


def reference(x_BTD, table_VD, targets_BT, weights_BT, smoothing, vocab):
    """The definition, in float64: (1 - ε) on the target plus ε spread over the vocabulary, against the log softmax."""
    logits_BTV = x_BTD.astype(np.float64) @ table_VD[:vocab].astype(np.float64).T
    log_probs_BTV = logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))
    wanted_BTV = (1 - smoothing) * np.eye(vocab)[targets_BT] + smoothing / vocab
    loss_BT = -(wanted_BTV * log_probs_BTV).sum(-1)
    nll_BT = -np.take_along_axis(log_probs_BTV, targets_BT[..., None], -1)[..., 0]
    return (loss_BT * weights_BT).sum(), (nll_BT * weights_BT).sum(), weights_BT.sum()


def plain(x_BTD, table_VD, targets_BT, weights_BT, smoothing, vocab):
    """The loss as JAX's own log softmax has it, for its automatic gradient."""
    log_probs_BTV = jax.nn.log_softmax(x_BTD @ table_VD[:vocab].T)
    wanted_BTV = (1 - smoothing) * jax.nn.one_hot(targets_BT, vocab) + smoothing / vocab
    return -jnp.sum(wanted_BTV * log_probs_BTV * weights_BT[..., None])


def gradients(case, chunks, of=lambda sums: sums.loss, smoothing=0.1):
    x_BTD, table_VD, targets_BT, weights_BT = case

    def loss(x_BTD, table_VD):
        return of(cross_entropy(x_BTD, table_VD, targets_BT, weights_BT, smoothing, VOCAB, chunks))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x_BTD, table_VD)


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_gradient_of_bfloat16_is_the_same_to_its_digits(case, chunks):
    x_BTD, *rest = case
    expected = gradients(case, chunks)
    found = gradients((jnp.asarray(x_BTD, jnp.bfloat16), *rest), chunks)
    assert [a.dtype for a in found] == [jnp.bfloat16, jnp.float32]
    for mine, exact in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(mine, np.float32), exact, atol=0.02)


def test_a_case_worked_out_by_hand():
    # Probabilities 1/2, 1/4, 1/4, and a padded row that is not among them. The target is the first:
    # nll = ln 2; over the vocabulary (ln 2 + 2 ln 4) / 3 = 5/3 ln 2; with ε = 0.3: (0.7 + 0.3 * 5/3) ln 2 = 1.2 ln 2.
    table_VD = np.array([[math.log(2)], [0], [0], [50]], np.float32)
    sums = cross_entropy(np.ones((1, 1, 1), np.float32), table_VD, np.array([[0]]), np.array([[True]]), 0.3, 3)
    np.testing.assert_allclose(sums, (1.2 * math.log(2), math.log(2), 1), rtol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunks", [1, 4])
def test_sums_are_those_of_the_definition(case, smoothing, chunks):
    sums = cross_entropy(*case, smoothing, VOCAB, chunks)
    assert [part.dtype for part in sums] == [jnp.float32] * 3
    np.testing.assert_allclose(sums, reference(*case, smoothing, VOCAB), rtol=2e-6)
    assert (sums.loss == sums.nll) == (smoothing == 0)


@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_gradient_is_that_of_a_plain_implementation_in_float64(case, chunks):
    with jax.enable_x64(True):
        x_BTD, table_VD, *rest = case
        in_double = [jnp.asarray(part, jnp.float64) for part in (x_BTD, table_VD)]
        expected = jax.grad(plain, argnums=(0, 1))(*in_double, *rest, 0.1, VOCAB)
        assert expected[0].dtype == jnp.float64
    for mine, theirs in zip(gradients(case, chunks), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=2e-6)


def test_gradient_follows_the_loss_alone_and_its_factor(case):
    once = gradients(case, 2)
    for mine, expected in zip(gradients(case, 2, of=lambda s: 3 * s.loss + s.nll + s.tokens), once, strict=True):
        np.testing.assert_allclose(mine, 3 * expected, rtol=1e-6)


def test_padding_has_no_part(case):
    x_BTD, table_VD, targets_BT, weights_BT = case
    x_gradient, table_gradient = gradients(case, 4)
    assert not np.any(np.asarray(x_gradient)[~weights_BT])
    assert np.all(np.any(np.asarray(x_gradient)[weights_BT], axis=-1))
    assert not np.any(np.asarray(table_gradient)[VOCAB:])
    other = (np.where(weights_BT[..., None], x_BTD, 7), table_VD, np.where(weights_BT, targets_BT, 1), weights_BT)
    assert np.array_equal(gradients(other, 4)[1], table_gradient)
    empty = cross_entropy(x_BTD, table_VD, targets_BT, np.zeros_like(weights_BT), 0.1, VOCAB)
    assert empty == LossSums(0, 0, 0)


def test_bfloat16_keeps_float32_sums(case):
    x_BTD, *rest = case
    sums = cross_entropy(jnp.asarray(x_BTD, jnp.bfloat16), *rest, 0.1, VOCAB, 2)
    assert sums.loss.dtype == jnp.float32
    np.testing.assert_allclose(sums, reference(*case, 0.1, VOCAB), rtol=2e-2)
    x_gradient, table_gradient = gradients((jnp.asarray(x_BTD, jnp.bfloat16), *rest), 2)
    assert (x_gradient.dtype, table_gradient.dtype) == (jnp.bfloat16, jnp.float32)


def test_the_logits_of_a_whole_batch_never_stand_in_memory(case):
    def program(chunks):
        x_BTD, table_VD, targets_BT, weights_BT = case

        def loss(x_BTD):
            return cross_entropy(x_BTD, table_VD, targets_BT, weights_BT, 0.1, VOCAB, chunks).loss

        return jax.jit(jax.value_and_grad(loss)).lower(x_BTD).as_text()

    whole = f"tensor<{B}x{T}x{PADDED}xf32>"
    assert whole in program(1)
    assert whole not in program(4) and f"tensor<{B}x{T // 4}x{PADDED}xf32>" in program(4)


def test_devices_add_up_the_gradient_of_the_table_once(case):
    """However many pieces the logits are made in; and the figures are those of one device."""
    x_BTD, table_VD, targets_BT, weights_BT = case
    x_BTD, targets_BT, weights_BT = (np.concatenate([a] * 8) for a in (x_BTD, targets_BT, weights_BT))
    mesh = sharding.make_mesh(MeshConfig(data=8))
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def compiled(chunks):
        def loss(x_BTD, table_VD, targets_BT, weights_BT):
            return cross_entropy(x_BTD, table_VD, targets_BT, weights_BT, 0.1, VOCAB, chunks, shards=8).loss

        value_and_gradient = jax.value_and_grad(loss, argnums=(0, 1))
        step = jax.jit(value_and_gradient, in_shardings=(rows, whole, rows, rows), out_shardings=(whole, (rows, whole)))
        return step.lower(x_BTD, table_VD, targets_BT, weights_BT).compile()

    with jax.set_mesh(mesh):
        at_once, in_pieces = compiled(1), compiled(4)
        found = in_pieces(*jax.device_put((x_BTD, table_VD, targets_BT, weights_BT), (rows, whole, rows, rows)))
    assert programs.collectives(in_pieces, 8) == programs.collectives(at_once, 8) != {}
    for mine, expected in zip(found[1], gradients((x_BTD, table_VD, targets_BT, weights_BT), 4), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "length", "vocab", "limit", "chunks"),
    [
        (8, 64, 1024, 2**21, 1),  # all of them fit
        (4, 6, 10, 80, 3),  # two positions at a time
        (4, 6, 10, 79, 6),  # one
        (4, 6, 10, 39, 6),  # not even one fits: one at a time it is
        (1, 7, 10, 60, 7),  # a prime length has no other divisor
        (100, 256, 37_120, 2**28, 4),
    ],
)
def test_chunks_are_as_few_as_fit(rows, length, vocab, limit, chunks):
    assert chunks_for(rows, length, vocab, limit) == chunks


def test_sums_over_a_gradient_s_bfloat16_logits_are_float32():
    x_BTD, targets_BT = jnp.ones((1, 4, 8), jnp.bfloat16), jnp.zeros((1, 4), jnp.int32)

    def loss(x_BTD, table_VD):
        return cross_entropy(x_BTD, table_VD, targets_BT, targets_BT == 0, 0.1, 100, 2).loss

    lines = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(x_BTD, jnp.ones((128, 8))).as_text().split("\n")
    exponentials = [line for line in lines if "stablehlo.exponential" in line]
    assert exponentials and not any("bf16" in line for line in exponentials)
    # The logits and the gradient of x are bfloat16; the mean of the logits and the gradient of the table are not.
    results = [line.split("->")[-1] for line in lines if "dot_general" in line]
    assert sorted("bf16" in result for result in results) == [False, False, True, True]

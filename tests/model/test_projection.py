"""Products with parameters: their gradients against NumPy in float64, and how a CPU's compiler is given them."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tfm.model.projection import Projection, matmul, matmul_precision

TALL, WIDE, SQUARE = (24, 5), (5, 24), (8, 8)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def gradients(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(matmul, x, kernel)[1](cotangent)


@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
@pytest.mark.parametrize("rows", [(7,), (2, 3), (2, 3, 4)])
def test_a_product_and_its_gradients_against_numpy(rows, shape):
    x, kernel, cotangent = random(*rows, shape[0]), random(*shape, seed=1), random(*rows, shape[1], seed=2)
    np.testing.assert_allclose(matmul(x, kernel), x.astype(np.float64) @ kernel, atol=1e-5)
    to_x, to_kernel = jax.jit(gradients)(x, kernel, cotangent)
    flat, flat_cotangent = (a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (x, cotangent))
    np.testing.assert_allclose(to_x, cotangent.astype(np.float64) @ kernel.T, atol=1e-5)
    np.testing.assert_allclose(to_kernel, flat.T @ flat_cotangent, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_have_the_type_and_precision_of_the_product(dtype):
    x, kernel, cotangent = (jnp.asarray(a, dtype) for a in (random(6, 24), random(*TALL), random(6, 5)))
    assert [g.dtype for g in gradients(x, kernel, cotangent)] == [dtype, dtype]
    assert matmul_precision(jnp.dtype("float32")) == jax.lax.Precision.HIGHEST
    assert matmul_precision(jnp.dtype("bfloat16")) is None
    text = jax.jit(gradients).lower(x, kernel, cotangent).as_text()
    products = [line for line in text.split("\n") if "dot_general" in line]
    assert products and all(("HIGHEST" in line) == (dtype == jnp.float32) for line in products)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_a_kernel_gradient_lies_on_its_side_on_a_cpu(shape):
    """A tall one takes the compiler's products there up to twice as long."""
    rows = 6
    compiled = jax.jit(gradients).lower(random(rows, shape[0]), random(*shape), random(rows, shape[1])).compile()
    text = compiled.as_text()
    # Logical sizes, and which dimension is the minor one in memory.
    products = [tuple(map(int, found)) for found in re.findall(r"= f32\[(\d+),(\d+)\]\{(\d),\d\} dot\(", text)]
    minor = [sizes[minor] for *sizes, minor in products if sorted(sizes) == sorted(shape)]
    assert minor == [max(shape)]
    assert "conditional" not in text


def test_a_remat_policy_that_saves_products_saves_these():
    """Counted in the gradient of two in a row: two forward and three backward, and two more if computed again."""

    def products(policy) -> int:
        def loss(kernels, x):
            return jnp.sum(jnp.sin(matmul(jnp.sin(matmul(x, kernels[0])), kernels[1])))

        remat = loss if policy is None else jax.checkpoint(loss, policy=policy)
        kernels = [random(*WIDE), random(*TALL)]
        return str(jax.make_jaxpr(jax.grad(remat))(kernels, random(6, WIDE[0]))).count("dot_general[")

    saved, again = jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.nothing_saveable
    assert products(saved) == products(None) < products(again)


@pytest.mark.parametrize(("in_shape", "out_shape"), [((64,), (8, 16)), ((8, 16), (64,))])
def test_projections_start_glorot_uniform(in_shape, out_shape):
    module = Projection(in_shape, out_shape, ("embed", "heads", "kv"), jnp.dtype("float32"), use_bias=True)
    parameters = module.init(jax.random.key(0), jnp.zeros((1, *in_shape)))["params"]
    kernel, bias = np.asarray(parameters["kernel"].value), np.asarray(parameters["bias"].value)
    limit = math.sqrt(6 / (math.prod(in_shape) + math.prod(out_shape)))
    assert 0.98 * limit < np.abs(kernel).max() <= limit
    assert kernel.std() == pytest.approx(limit / math.sqrt(3), rel=0.03)
    assert bias.shape == out_shape and not bias.any()


def test_the_gradient_of_a_bias_is_summed_in_float32():
    """In bfloat16, a sum stops growing at 256 where it is of ones."""
    module = Projection((3,), (2,), ("embed", "mlp"), jnp.dtype("bfloat16"), use_bias=True)
    parameters = {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}

    def total(parameters):
        return jnp.sum(module.apply({"params": parameters}, jnp.ones((40, 100, 3))).astype(jnp.float32))

    gradient = jax.grad(total)(parameters)["bias"]
    assert gradient.dtype == jnp.float32
    np.testing.assert_array_equal(gradient, 4000)


def test_a_projection_adds_its_bias_and_computes_in_its_type():
    module = Projection((3,), (2, 2), ("embed", "heads", "kv"), jnp.dtype("bfloat16"), use_bias=True)
    parameters = {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    y = module.apply({"params": parameters}, jnp.ones((1, 5, 3)))
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32)[0, 4], [[4.0, 5.0], [6.0, 7.0]])

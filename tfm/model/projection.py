"""Matrix products with parameters: how exact they are, how their gradients are computed, and the layer made of one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from tfm.sharding import LogicalAxes


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """float32 means float32 on every device: without this, accelerators would round the operands."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def matmul(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """`x` [..., I] times a kernel, [..., O], both of one dtype."""
    # On accelerators, a gradient of its own would keep the operand of each product anew for the backward pass.
    return _cpu_matmul(x, kernel_IO) if x.dtype == jnp.float32 else _product(x, kernel_IO)


@jax.custom_vjp
def _cpu_matmul(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    """The same with the usual gradients, computed faster on CPUs."""
    return _product(x, kernel_IO)


def _product(x: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel_IO, precision=matmul_precision(x.dtype))


def _matmul_forward(x: jax.Array, kernel_IO: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # Not `matmul` again: a remat policy that saves products would not see one in it.
    return _product(x, kernel_IO), (x, kernel_IO)


def _matmul_backward(saved: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel_IO = saved
    precision = matmul_precision(x.dtype)

    def over_rows(a: jax.Array, b: jax.Array) -> jax.Array:
        rows = tuple(range(a.ndim - 1))
        return jnp.tensordot(a, b, axes=(rows, rows), precision=precision)

    def transposed(x: jax.Array, gradient: jax.Array) -> jax.Array:
        # The barrier keeps the compiler from taking the transposition into the product again.
        return jax.lax.optimization_barrier(over_rows(gradient, x)).T

    # XLA's products on CPUs take up to twice as long for a tall result as for the same one lying on its side.
    tall = x.shape[-1] > gradient.shape[-1]
    kernel_gradient_IO = jax.lax.platform_dependent(
        x, gradient, cpu=transposed if tall else over_rows, default=over_rows
    )
    return jnp.matmul(gradient, kernel_IO.T, precision=precision), kernel_gradient_IO


_cpu_matmul.defvjp(_matmul_forward, _matmul_backward)


class Projection(nn.Module):
    """A matrix product over the last `len(in_shape)` dimensions, with or without a bias.

    The kernel has shape in_shape + out_shape and Glorot-uniform initial values, the bias out_shape and zeros.
    """

    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    axes: LogicalAxes  # logical names of the kernel's dimensions
    dtype: jnp.dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = tuple(range(len(self.in_shape)))
        outer = tuple(range(len(self.in_shape), len(self.axes)))
        initializer = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", in_axis=inner, out_axis=outer)
        shape = self.in_shape + self.out_shape
        kernel = self.param("kernel", nn.with_logical_partitioning(initializer, self.axes), shape, jnp.float32)
        # As one plain matrix product: of several dimensions, compilers make layouts that have to be copied again. For
        # the same reason the barrier keeps them from taking the kernel's own dimensions through the product.
        kernel_IO = kernel.astype(self.dtype).reshape(math.prod(self.in_shape), math.prod(self.out_shape))
        if kernel.ndim > 2 and self.dtype != jnp.float32:
            kernel_IO = jax.lax.optimization_barrier(kernel_IO)
        rows = x.shape[: x.ndim - len(self.in_shape)]
        y = matmul(x.astype(self.dtype).reshape(*rows, -1), kernel_IO).reshape(*rows, *self.out_shape)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[len(self.in_shape) :])
            bias = self.param("bias", zeros, self.out_shape, jnp.float32)
            y = _with_bias(y, bias)
        return y


@jax.custom_vjp
def _with_bias(y: jax.Array, bias: jax.Array) -> jax.Array:
    """y [..., out] plus a float32 bias [out], whose gradient is summed in float32, whatever the type of y."""
    return y + bias.astype(y.dtype).reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def _with_bias_forward(y: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _with_bias(y, bias), bias


def _with_bias_backward(bias: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.sum(gradient, axis=tuple(range(gradient.ndim - bias.ndim)), dtype=jnp.float32)


_with_bias.defvjp(_with_bias_forward, _with_bias_backward)

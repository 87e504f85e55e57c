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
    inner, outer = kernel_IO.shape
    kernel_OI = _transposed(kernel_IO) if inner > outer else kernel_IO.T
    return jnp.einsum("...I,OI->...O", x, kernel_OI, precision=matmul_precision(x.dtype))


@jax.custom_vjp
def _transposed(kernel_IO: jax.Array) -> jax.Array:
    """A tall kernel on its side, [O, I]: so its gradient comes out of a product that XLA computes faster on CPUs.

    There, a product takes up to twice as long for a tall result as for the same one lying on its side. To the product
    itself it makes no difference, and nothing more is kept for the backward pass.
    """
    return kernel_IO.T


def _transposed_backward(_: None, gradient_OI: jax.Array) -> tuple[jax.Array]:
    def apart(gradient_OI: jax.Array) -> jax.Array:
        # The barrier keeps the compiler from taking the transposition into the product again.
        return jax.lax.optimization_barrier(gradient_OI).T

    return (jax.lax.platform_dependent(gradient_OI, cpu=apart, default=jnp.transpose),)


_transposed.defvjp(lambda kernel_IO: (kernel_IO.T, None), _transposed_backward)


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
        if kernel.ndim > 2:
            kernel_IO = jax.lax.optimization_barrier(kernel_IO)
        rows = x.shape[: x.ndim - len(self.in_shape)]
        y = matmul(x.astype(self.dtype).reshape(*rows, -1), kernel_IO).reshape(*rows, *self.out_shape)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[len(self.in_shape) :])
            bias = self.param("bias", zeros, self.out_shape, jnp.float32)
            y += bias.astype(self.dtype).reshape((1,) * (y.ndim - bias.ndim) + self.out_shape)
        return y

"""Ways to compute a training step, against the one that tfm has: each in turn, in one process, as ratios.

    python benchmarks/candidates.py --json=candidates.json
    python benchmarks/candidates.py --only fused_qkv scan --devices 1 --shape 32x128

A candidate changes one thing of the shipped step while it is traced or compiled, or where it runs. All take the same
batch, of rows that hold one pair each; sizes are those of `benchmarks/train_step.py`. The shipped step runs before each
candidate in every round, so that a shared machine slows both; a ratio above 1 says that the candidate is faster.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from results import add_json, write_results
from train_step import LAYERS, devices_for, tfm_trainer

Change = contextlib.AbstractContextManager


# --- what is changed while a step is traced ---


@contextlib.contextmanager
def plain_loss() -> Iterator[None]:
    """All logits at once, one-hot targets, and autodiff's gradient."""
    import jax
    import jax.numpy as jnp

    from tfm.training import step
    from tfm.training.loss import LossSums

    def cross_entropy(x, table, targets, weights, label_smoothing, vocab_size, chunks, shards):
        logits = jnp.einsum("BTD,VD->BTV", x, table, precision="highest")
        logits = jnp.where(jnp.arange(table.shape[0]) < vocab_size, logits, -1e9)
        log_probabilities = jax.nn.log_softmax(logits)
        one_hot = jax.nn.one_hot(targets, table.shape[0])
        smoothed = one_hot * (1 - label_smoothing) + (jnp.arange(table.shape[0]) < vocab_size) * (
            label_smoothing / vocab_size
        )
        loss = -jnp.sum(jnp.sum(smoothed * log_probabilities, -1) * weights)
        nll = -jnp.sum(jnp.sum(one_hot * log_probabilities, -1) * weights)
        return LossSums(loss, jax.lax.stop_gradient(nll), jnp.sum(weights))

    with mock.patch.object(step, "cross_entropy", cross_entropy):
        yield


@contextlib.contextmanager
def autodiff_products() -> Iterator[None]:
    """Gradients of the projections as JAX writes them, tall or not."""
    import jax.numpy as jnp

    from tfm.model import projection

    def matmul(x, kernel):
        return jnp.matmul(x, kernel, precision=projection.matmul_precision(x.dtype))

    with mock.patch.object(projection, "matmul", matmul):
        yield


def logits_per_chunk(power: int) -> Change:
    from tfm.training import step

    return mock.patch.dict(step.LOGITS_PER_CHUNK, {"cpu": 2**power})


@contextlib.contextmanager
def fused_qkv() -> Iterator[None]:
    """One product for queries, keys and values where all three are of the same input."""
    import jax
    import jax.numpy as jnp

    from tfm.model import attention

    plain = attention.MultiHeadAttention.__call__

    def call(self, x, memory, sight, key, site):
        if x is not memory or self.is_initializing():
            return plain(self, x, memory, sight, key, site)
        kernels = [part.variables["params"]["kernel"] for part in (self.query, self.key, self.value)]
        qkv = jnp.einsum("BTD,DHK->BTHK", x, jnp.concatenate(kernels, axis=-1), precision="highest")
        q, k, v = jnp.split(qkv, 3, axis=-1)
        out = attention.dot_product_attention(q, k, v, sight.mask_BTS, site=site)
        return self.output(jax.lax.optimization_barrier(out))

    with mock.patch.object(attention.MultiHeadAttention, "__call__", call):
        yield


@contextlib.contextmanager
def library_attention() -> Iterator[None]:
    """`jax.nn.dot_product_attention`."""
    import jax

    from tfm.model import attention

    def attend(q, k, v, mask, *, dropout_rate=0.0, dropout_key=None, site=0):
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])

    with mock.patch.object(attention, "dot_product_attention", attend):
        yield


@contextlib.contextmanager
def heads_first() -> Iterator[None]:
    """Queries, keys and values laid out by head before they are multiplied."""
    import jax
    import jax.numpy as jnp

    from tfm.model import attention

    def attend(q, k, v, mask, *, dropout_rate=0.0, dropout_key=None, site=0):
        q, k, v = (jax.lax.optimization_barrier(x.swapaxes(1, 2)) for x in (q / q.shape[-1] ** 0.5, k, v))
        scores = jnp.einsum("BHTK,BHSK->BHTS", q, k, precision="highest")
        weights = jax.nn.softmax(jnp.where(mask[:, None], scores, attention.MASKED), axis=-1)
        out = jnp.einsum("BHTS,BHSK->BHTK", weights, v, precision="highest")
        return jax.lax.optimization_barrier(out).swapaxes(1, 2)

    with mock.patch.object(attention, "dot_product_attention", attend):
        yield


@contextlib.contextmanager
def random_bits(implementation: str) -> Iterator[None]:
    """Dropout by `jax.random.bernoulli`."""
    import jax

    from tfm.model import layers

    def dropout(x, rate, key, site):
        if key is None or rate == 0.0:
            return x
        seed = jax.random.key(key.fold_in(site).key.astype("int32"), impl=implementation)
        return jax.numpy.where(jax.random.bernoulli(seed, 1 - rate, x.shape), x / (1 - rate), 0.0)

    with mock.patch.object(layers, "dropout", dropout):
        yield


@contextlib.contextmanager
def no_dropout() -> Iterator[None]:
    """What dropout costs; no candidate."""
    from tfm.model import layers

    with mock.patch.object(layers, "dropout", lambda x, rate, key, site: x):
        yield


@contextlib.contextmanager
def two_pass_norm() -> Iterator[None]:
    """Layer norm whose variance is taken of the differences from the mean, a pass more."""
    import functools

    from flax import linen as nn

    with mock.patch.object(nn, "LayerNorm", functools.partial(nn.LayerNorm, use_fast_variance=False)):
        yield


# Name -> a change while tracing, the layers unrolled, options of the compiler, whether one device does it all.
CANDIDATES: dict[str, dict[str, Any]] = {
    "again": {},  # the shipped step once more: what noise is
    "plain_loss": {"change": plain_loss},
    "autodiff_products": {"change": autodiff_products},
    "logits_2^19": {"change": lambda: logits_per_chunk(19)},
    "logits_2^20": {"change": lambda: logits_per_chunk(20)},
    "logits_2^21": {"change": lambda: logits_per_chunk(21)},
    "logits_2^23": {"change": lambda: logits_per_chunk(23)},
    "scan": {"unroll": 1},
    "fused_qkv": {"change": fused_qkv},
    "library_attention": {"change": library_attention},
    "heads_first": {"change": heads_first},
    "threefry": {"change": lambda: random_bits("threefry2x32")},
    "rbg": {"change": lambda: random_bits("rbg")},
    "no_dropout": {"change": no_dropout},
    "two_pass_norm": {"change": two_pass_norm},
    "plain_schedule": {"options": {"xla_cpu_enable_concurrency_optimized_scheduler": False}},
    "one_device": {"devices": 1},
}


def make_step(
    rows: int,
    length: int,
    devices: int,
    change: Callable[[], Change] = contextlib.nullcontext,
    unroll: int = LAYERS,
    options: dict[str, Any] | None = None,
) -> Callable[[], None]:
    """A compiled step, ready to be called again and again."""
    import jax

    with change():
        trainer, batch = tfm_trainer(rows, length, unroll, devices)
        with jax.set_mesh(trainer.mesh):
            state = trainer.init()
            compiled = trainer.train_step.lower(state, batch).compile(compiler_options=options)

    def step() -> None:
        nonlocal state
        state, _ = compiled(state, batch)
        jax.block_until_ready(state)

    return step


def timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="128x32", help="ROWSxLENGTH, of source and target")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--devices", type=int, help="of the CPU; one a core if unset, where the rows divide")
    parser.add_argument("--rounds", type=int, default=9)
    add_json(parser)
    arguments = parser.parse_args()

    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows, length = map(int, arguments.shape.split("x"))
    arguments.devices = arguments.devices or devices_for(rows, cores)
    import jax

    from tfm import backend

    backend.first_devices(arguments.devices)  # as many of the CPU, and what is freed kept
    shipped = make_step(rows, length, arguments.devices)
    results = {}
    for name in arguments.only:
        candidate = make_step(rows, length, **{"devices": arguments.devices} | CANDIDATES[name])
        shipped(), candidate()
        times = [(timed(shipped), timed(candidate)) for _ in range(arguments.rounds)]
        ratios = sorted(a / b for a, b in times)
        results[name] = {
            "times_as_fast_median": statistics.median(ratios),
            "times_as_fast": ratios,
            "step_seconds_median": statistics.median(b for _, b in times),
            "shipped_step_seconds_median": statistics.median(a for a, _ in times),
        }
        spread = f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}"
        print(f"{name:<18} {results[name]['times_as_fast_median']:5.2f} times as fast ({spread})", file=sys.stderr)
        report = {"what": vars(arguments), "jax": jax.__version__, "command": sys.argv, "candidates": results}
        write_results(arguments.json, report)  # so far: a later one may fail


if __name__ == "__main__":
    main()

"""Learning-rate schedules and the Optax chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from tfm.config import Config, OptimizerConfig
from tfm.sharding import LogicalAxes, is_axes

Schedule = Callable[[jax.Array], jax.Array]

# Root mean square of Muon's updates: what Adam's have, so that rates and weight decay carry over (Liu et al., 2025).
_ADAM_RMS = 0.2


def make_schedule(config: Config) -> Schedule:
    """Learning rate of update `step` (int32 scalar, the first is 1).

    `inverse_sqrt` is equation 3 of the paper: d_model^-0.5 · min(step^-0.5, step · warmup^-1.5), written as a peak that
    is reached at `warmup_steps`, so that the peak can also be set.
    """
    o, steps = config.optimizer, config.training.steps
    peak = o.learning_rate if o.learning_rate is not None else (config.model.d_model * o.warmup_steps) ** -0.5
    decay_steps = o.decay_steps if o.decay_steps is not None else max(1, min(steps // 5, steps - o.warmup_steps))

    def schedule(step: jax.Array) -> jax.Array:
        step = jnp.asarray(step).astype(jnp.float32)
        warmup = jnp.minimum(1.0, step / o.warmup_steps)
        if o.schedule == "inverse_sqrt":
            after = jnp.sqrt(o.warmup_steps / jnp.maximum(step, o.warmup_steps))
        else:
            start = o.warmup_steps if o.schedule == "cosine" else steps - decay_steps
            done = jnp.clip((step - start) / (steps - start), 0.0, 1.0)
            left = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if o.schedule == "cosine" else 1.0 - done
            after = o.final_learning_rate + (1.0 - o.final_learning_rate) * left
        return peak * warmup * after

    return schedule


def make_optimizer(config: OptimizerConfig, axes: Any) -> optax.GradientTransformation:
    """The update rule up to the learning rate, which the train step multiplies in from its own step number.

    Args:
      config: the update rule.
      axes: logical axes of each parameter; `layers` is a batch axis here: it makes no bias a matrix, and statistics
        that go over a whole array go over one layer at a time.
    """
    matrices = jax.tree.map(lambda names: len([n for n in names if n != "layers"]) > 1, axes, is_leaf=is_axes)
    chain = []
    if config.clip_norm:
        chain.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adafactor":
        factored = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
        chain.append(_by_layer(factored, axes))
    elif config.name == "muon":
        dimensions = jax.tree.map(_muon_dimensions, axes, is_leaf=is_axes)
        chain.append(
            optax.contrib.muon(
                -1.0,  # the step subtracts, and multiplies the rate in
                eps=config.epsilon,
                adam_b1=config.beta1,
                adam_b2=config.beta2,
                muon_weight_dimension_numbers=dimensions,
                consistent_rms=_ADAM_RMS,
            )
        )
    else:
        chain.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    if config.weight_decay:
        chain.append(optax.add_decayed_weights(config.weight_decay, mask=matrices))
    return optax.chain(*chain)


def _muon_dimensions(names: LogicalAxes) -> optax.contrib.MuonDimensionNumbers | None:
    """Which axes of a kernel are one side of a matrix and which the other, `layers` being neither.

    None for what Muon is not for: vectors, and the tables of the vocabulary, where a row is a token's own.
    """
    embed = [axis for axis, name in enumerate(names) if name == "embed"]
    others = [axis for axis, name in enumerate(names) if name not in ("embed", "layers")]
    if not embed or not others or "vocab" in names:
        return None
    return optax.contrib.MuonDimensionNumbers(embed, others)


def _by_layer(rule: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """`rule` with its statistics taken over each layer of a stack by itself."""
    stacked = jax.tree.map(lambda names: names[0] == "layers", axes, is_leaf=is_axes)
    single = jax.tree.map(lambda is_stacked: not is_stacked, stacked)

    def init(parameters: optax.Params) -> optax.OptState:
        return jax.vmap(rule.init)(parameters)

    def update(
        updates: optax.Updates, state: optax.OptState, parameters: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return jax.vmap(rule.update)(updates, state, parameters)

    over_layers = optax.GradientTransformation(init, update)
    # Encoder and decoder each by themselves: they may differ in depth.
    stacks = [name for name, flags in stacked.items() if any(jax.tree.leaves(flags))]
    masks = [
        {name: jax.tree.map(lambda flag, on=name == stack: flag and on, flags) for name, flags in stacked.items()}
        for stack in stacks
    ]
    return optax.chain(*(optax.masked(over_layers, mask) for mask in masks), optax.masked(rule, single))

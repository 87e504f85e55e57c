"""TrainState, and the compiled train and evaluation steps."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tfm import sharding
from tfm.config import Config, ConfigError
from tfm.data.batches import Batch
from tfm.model.attention import Tokens
from tfm.model.dropout import DropoutKey, dropout_key
from tfm.model.transformer import (
    Transformer,
    abstract_parameters,
    attention_kernel,
    compute_dtype,
    init_parameters,
    output_table,
)
from tfm.training.loss import LossSums, chunks_for, cross_entropy
from tfm.training.optimizer import make_optimizer, make_schedule

Metrics = dict[str, jax.Array]

_COMPILER_OPTIONS = {
    # XLA's own products against cuBLAS's, in the step of the big model on an H100: 1.035 times the time, and 1.7 times
    # as long to compile, since many tilings of each are tried.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
    # With fsdp, a product with a gathered weight would be cut into as many small ones as there are chips, each of which
    # waits for its piece: for base on 16 chips 1,300 messages, and 2.3 times the bytes accessed of gathering first.
    "tpu": {
        "xla_tpu_enable_windowed_einsum_for_all_gather": False,
        "xla_tpu_enable_windowed_einsum_for_reduce_scatter": False,
        # Copied onto the chip is only what is read there twice over. Else the optimizer's arrays are, each for one use:
        # 5.00 in place of 3.26 MB accessed a target token for base on 16 chips, 1.95 in place of 1.70 in main memory.
        "xla_tpu_msa_inefficient_use_to_copy_ratio": 2.0,
    },
}

# Logits that one device holds at a time: what a CPU's cache keeps; on accelerators, a small share of their memory.
LOGITS_PER_CHUNK = {"cpu": 2**22, "accelerator": 2**28}


class TrainState(NamedTuple):
    """Everything a run is, but for its config and its data. `step` is also the whole position in the data."""

    step: jax.Array  # int32; updates done, skipped ones too
    parameters: Any  # plain nested dict of float32 arrays
    optimizer: optax.OptState
    ema: Any  # moving average of the parameters, or None
    skipped_steps: jax.Array  # int32; non-finite updates so far
    skipped_in_a_row: jax.Array  # int32

    def averaged(self) -> Any:
        """The parameters that evaluation and translation use."""
        return self.parameters if self.ema is None else self.ema


def training_model(config: Config, vocab_size: int, platform: str) -> Transformer:
    """The model as a run trains it on devices of a platform ("cpu", "gpu", "tpu")."""
    training = config.training
    depth = max(config.model.encoder_layers, config.model.decoder_layers)
    return Transformer(
        config.model,
        vocab_size,
        compute_dtype(config.model, platform),
        training.remat,
        training.unroll_layers or (depth if platform == "gpu" else 1),
        attention_kernel(config.model, platform, deterministic=training.deterministic),
    )


def trainer_of(config: Config, vocab_size: int, mesh: Mesh) -> Trainer:
    """The trainer of a run with this config. Raises ConfigError as `Trainer` does."""
    return Trainer(config, training_model(config, vocab_size, mesh.devices.flat[0].platform), mesh)


class Trainer:
    """The compiled functions of a run on a mesh, and the shardings of what goes in and out.

    Raises:
      ConfigError: rows that don't divide over the mesh and the micro-batches, or parameters that don't divide.
    """

    def __init__(self, config: Config, model: Transformer, mesh: Mesh):
        self.config, self.model, self.mesh = config, model, mesh
        check_rows(config, mesh)
        platform = mesh.devices.flat[0].platform
        self.logits_per_chunk = LOGITS_PER_CHUNK.get(platform, LOGITS_PER_CHUNK["accelerator"])
        boxed = abstract_parameters(model)
        self.axes = sharding.logical_axes(boxed)
        self.optimizer = make_optimizer(config.optimizer, self.axes)
        self.schedule = make_schedule(config)
        shapes = jax.eval_shape(self._init)
        self.state_shardings = self._shardings_of(shapes)
        self.abstract_state = sharding.placed(shapes, self.state_shardings)
        batch, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self.init = jax.jit(self._init, out_shardings=self.state_shardings)
        self.train_step = jax.jit(
            self._train_step,
            in_shardings=(self.state_shardings, batch),
            out_shardings=(self.state_shardings, whole),
            donate_argnums=0,
            compiler_options=_COMPILER_OPTIONS.get(platform),
        )
        self.evaluation_step = jax.jit(
            self._evaluation_step, in_shardings=(self.state_shardings.parameters, batch), out_shardings=whole
        )

    def _init(self) -> TrainState:
        parameters = init_parameters(self.model, self.config.training.seed)
        zero = jnp.zeros((), jnp.int32)
        # A copy, since the step donates its state and one buffer cannot be given away twice.
        ema = jax.tree.map(jnp.copy, parameters) if self.config.optimizer.ema_decay else None
        return TrainState(zero, parameters, self.optimizer.init(parameters), ema, zero, zero)

    def _shardings_of(self, shapes: TrainState) -> TrainState:
        whole = sharding.replicated(self.mesh)
        parameters = sharding.parameter_shardings(self.mesh, shapes.parameters, self.axes)
        optimizer = sharding.optimizer_shardings(self.mesh, shapes.optimizer, shapes.parameters, self.axes)
        ema = None if shapes.ema is None else parameters
        return TrainState(whole, parameters, optimizer, ema, whole, whole)

    def abstract_batch(self) -> Batch:
        """Shapes of a global batch, placed."""
        data, rows = self.config.data, self.config.rows_per_batch
        source, target = (rows, data.source_row_length), (rows, data.target_row_length)
        shapes = Batch(source, source, source, target, target, target, target, (rows,))
        where = sharding.batch_sharding(self.mesh)
        return Batch(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=where) for shape in shapes))

    def sums(self, parameters: Any, batch: Batch, key: DropoutKey | None, label_smoothing: float) -> LossSums:
        """Loss sums of a batch of packed rows."""
        x_BTD = self.model.apply(
            {"params": parameters},
            batch.source_tokens,
            Tokens(batch.source_segments, batch.source_positions),
            batch.target_inputs,
            Tokens(batch.target_segments, batch.target_positions),
            key,
        )
        table_VD = output_table(self.model, parameters)
        rows, length = batch.target_outputs.shape
        shards = sharding.batch_shards(self.mesh)
        vocabulary = table_VD.shape[0] // sharding.vocabulary_shards(self.mesh)
        chunks = chunks_for(rows // shards, length, vocabulary, self.logits_per_chunk)
        return cross_entropy(
            x_BTD,
            table_VD,
            batch.target_outputs,
            batch.target_segments > 0,
            label_smoothing,
            self.model.vocab_size,
            chunks,
            shards,
        )

    def _evaluation_step(self, parameters: Any, batch: Batch) -> LossSums:
        return self.sums(parameters, batch, None, 0.0)

    def gradients(self, parameters: Any, batch: Batch, step: jax.Array) -> tuple[Any, LossSums]:
        """Gradient of the mean loss over the whole batch's target tokens, and the sums behind it."""

        def micro(parameters: Any, batch: Batch) -> tuple[jax.Array, LossSums]:
            key = dropout_key(self.config.training.seed, step, batch.rows)
            sums = self.sums(parameters, batch, key, self.config.training.label_smoothing)
            return sums.loss, sums

        gradient = jax.grad(micro, has_aux=True)
        parts = self.config.training.gradient_accumulation
        if parts == 1:
            gradients, sums = gradient(parameters, batch)
        else:
            # Every parts-th row: a micro-batch then takes an equal share of each device's rows, and none of them move.
            micro_batches = jax.tree.map(
                lambda x: jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1), batch
            )

            def add(total: Any, micro_batch: Batch) -> tuple[Any, None]:
                micro_batch = jax.tree.map(
                    lambda x: sharding.constrain(x, "activation_batch", *[None] * (x.ndim - 1)), micro_batch
                )
                return jax.tree.map(jnp.add, total, gradient(parameters, micro_batch)), None

            zero = jnp.zeros((), jnp.float32)
            start = (jax.tree.map(jnp.zeros_like, parameters), LossSums(zero, zero, zero))
            (gradients, sums), _ = jax.lax.scan(add, start, micro_batches)
        tokens = jnp.maximum(sums.tokens, 1.0)
        return jax.tree.map(lambda g: g / tokens, gradients), sums

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        gradients, sums = self.gradients(state.parameters, batch, state.step)
        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(gradient_norm) & jnp.isfinite(sums.loss)
        learning_rate = self.schedule(state.step + 1)

        # Muon multiplies matrices, too: where the model's products are float32, so are these.
        with jax.default_matmul_precision("highest" if self.model.dtype == jnp.float32 else None):
            updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = jax.tree.map(lambda p, u: p - learning_rate * u, state.parameters, updates)
        ema = state.ema
        if ema is not None:
            # A short memory at first, or the initial values would weigh on the average for thousands of steps.
            done = state.step.astype(jnp.float32)
            decay = jnp.minimum(self.config.optimizer.ema_decay, (1.0 + done) / (10.0 + done))
            ema = jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, parameters)

        # A non-finite update touches nothing but the counters; the loop ends the run when there are too many in a row.
        parameters, optimizer, ema = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (parameters, optimizer, ema),
            (state.parameters, state.optimizer, state.ema),
        )
        skipped = jnp.where(finite, 0, 1)
        new_state = TrainState(
            state.step + 1,
            parameters,
            optimizer,
            ema,
            state.skipped_steps + skipped,
            jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        tokens = jnp.maximum(sums.tokens, 1.0)
        # Counts are float32, to be added up over devices together with the gradients: integers would be apart, in no
        # order with the rest, and devices of a CPU that wait for different sums compute one after the other.
        metrics = {
            "loss": sums.loss / tokens,
            "nll": sums.nll / tokens,
            "gradient_norm": gradient_norm,
            "learning_rate": learning_rate,
            "source_tokens": jnp.sum(batch.source_segments > 0, dtype=jnp.float32),
            "target_tokens": sums.tokens,
            "source_padding": jnp.mean((batch.source_segments == 0).astype(jnp.float32)),
            "target_padding": jnp.mean((batch.target_segments == 0).astype(jnp.float32)),
            "skipped_steps": new_state.skipped_steps,
            "skipped_in_a_row": new_state.skipped_in_a_row,
        }
        return new_state, metrics


def check_rows(config: Config, mesh: Mesh) -> None:
    """Raises ConfigError where the rows of a batch don't divide over a mesh and the parts of a step."""
    rows, parts, length = config.rows_per_batch, config.training.gradient_accumulation, config.data.target_row_length
    shards = sharding.batch_shards(mesh)
    if rows % (shards * parts):
        fits = max(rows // (shards * parts), 1) * shards * parts * length
        room = config.training.target_tokens_per_batch // length
        others = [str(n) for n in range(1, rows // shards + 1) if rows == room - room % n and rows % (shards * n) == 0]
        fewer = f", or training.gradient_accumulation={' or '.join(others)}" if others else ""
        raise ConfigError(
            f"training.target_tokens_per_batch={config.training.target_tokens_per_batch} makes {rows} rows of "
            f"data.target_row_length={length}, which do not divide over mesh.data x mesh.fsdp = {shards} shards and "
            f"training.gradient_accumulation={parts}: use {fits} or {fits + shards * parts * length} tokens{fewer}"
        )

"""Training steps a second: tfm and PyTorch's `nn.Transformer`, side by side on one machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/train_step.py --json=train_step.json

    python benchmarks/train_step.py --sizes=big --shapes 128x128 256x64 --json=train_step_gpu.json   # on a GPU

Both have 3 + 3 layers of width 256, feed-forward width 1024, 4 heads, post-norm, ReLU, a vocabulary of 8,000 and one
table for both embeddings and the output, float32; both take the same tokens, drop 0.1, smooth labels by 0.1 and update
with Adam (betas 0.9 and 0.98). PyTorch may have the better of eager execution and `torch.compile`, and of several
numbers of threads, found in rounds that are not counted. Then the two run in turn, round by round, so that a shared
machine slows both. Medians over rounds, and of their ratios.

With `--sizes=big` both are the paper's big model with a vocabulary of 32,000 on a GPU, matrix products in bfloat16
(PyTorch's by autocast), parameters in float32; several updates are sent off one after the other, as a run sends them.

Where the two are not the same:

- Dropout sites are those of the paper for both: the embedded input of either stack and each block's output.
  `nn.Transformer` also drops attention weights and the feed-forward block's inner features at its one rate; these two
  are switched off, so that it has less to do. `--all-dropout` leaves them on, and switches tfm's on as well.
- tfm keeps packed pairs apart by segment ids and builds its masks of them in every step; rows hold one pair each here,
  so that PyTorch needs a causal mask alone, and no padding mask. It is told so (`is_causal`).
- PyTorch's attention projections have biases, and tfm's have none. tfm pads its vocabulary to 8,064, follows a learning
  rate schedule, counts tokens, checks that the update is finite, and measures the norm of its gradients for the log.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from results import add_json, surroundings, write_results

from tfm.allocator import keep_freed_memory

if TYPE_CHECKING:  # nothing may import JAX before its threads are limited
    from tfm.data.batches import Batch
    from tfm.training.step import Trainer

DROPOUT, SMOOTHING = 0.1, 0.1
_REST = 0.5  # seconds; threads of the one keep spinning for a while, on the cores that the other is to have
Step = Callable[[], float]  # one update, or several; its loss, waited for


class Sizes(NamedTuple):
    """Of the model, and how it is run."""

    vocab: int
    width: int
    inner: int
    heads: int
    layers: int  # of either stack
    platform: str = "cpu"
    dtype: str = "float32"
    updates: int = 1  # in one call of a step


SIZES = {
    "small": Sizes(8_000, 256, 1024, 4, 3),
    "big": Sizes(32_000, 1024, 4096, 16, 6, "gpu", "bfloat16", updates=10),
    "big-on-cpu": Sizes(32_000, 1024, 4096, 16, 6),  # to try the script where there is no GPU
}
LAYERS = SIZES["small"].layers


def batch_of(rows: int, length: int, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and target tokens [rows, length]."""
    source, target = np.random.default_rng(0).integers(4, vocab, (2, rows, length), np.int32)
    return source, target


def tfm_trainer(
    rows: int, length: int, unroll: int, devices: int | None, inner_rate: float = 0.0, sizes: Sizes = SIZES["small"]
) -> tuple[Trainer, Batch]:
    """tfm's trainer on that many devices, and a batch that lies on them."""
    import jax

    from tfm import backend, sharding
    from tfm.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingConfig
    from tfm.data.batches import Batch
    from tfm.data.tokenizer import BOS
    from tfm.training.step import trainer_of

    config = Config(
        ModelConfig(
            d_model=sizes.width,
            d_ff=sizes.inner,
            num_heads=sizes.heads,
            encoder_layers=sizes.layers,
            decoder_layers=sizes.layers,
            dropout_rate=DROPOUT,
            attention_dropout_rate=inner_rate,
            activation_dropout_rate=inner_rate,
        ),
        DataConfig(vocab_size=sizes.vocab, source_row_length=length, target_row_length=length),
        OptimizerConfig(),
        TrainingConfig(target_tokens_per_batch=rows * length, label_smoothing=SMOOTHING, unroll_layers=unroll),
    ).validate()
    mesh = sharding.make_mesh(config.mesh, backend.first_devices(devices))
    source, target = batch_of(rows, length, sizes.vocab)
    ones = np.ones_like(source)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), source.shape)
    inputs = np.concatenate([np.full((rows, 1), BOS, np.int32), target[:, :-1]], axis=1)
    batch = Batch(source, ones, positions, inputs, target, ones, positions, np.arange(rows, dtype=np.int32))
    trainer = trainer_of(config, sizes.vocab, mesh)
    return trainer, jax.device_put(batch, sharding.batch_sharding(mesh))


def devices_for(rows: int, cores: int) -> int:
    """Devices that a CPU is made into: one a core, or as many as the rows of a batch divide over."""
    return next(count for count in range(cores, 0, -1) if rows % count == 0)


def tfm_step(rows: int, length: int, arguments: argparse.Namespace, sizes: Sizes) -> Step:
    import jax

    devices = (arguments.devices or devices_for(rows, arguments.cores)) if sizes.platform == "cpu" else 1  # as PyTorch
    inner_rate = DROPOUT if arguments.all_dropout else 0.0
    trainer, batch = tfm_trainer(rows, length, arguments.unroll_layers or sizes.layers, devices, inner_rate, sizes)
    with jax.set_mesh(trainer.mesh):
        state = trainer.init()

    def step() -> float:
        nonlocal state
        with jax.set_mesh(trainer.mesh):
            for _ in range(sizes.updates):
                state, metrics = trainer.train_step(state, batch)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def torch_step(rows: int, length: int, all_dropout: bool, compiled: bool, sizes: Sizes) -> Step:
    import torch
    from torch import nn

    torch.manual_seed(0)
    vocab, width = sizes.vocab, sizes.width

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(vocab, width) * width**-0.5)
            depth = (sizes.layers, sizes.layers)
            self.stacks = nn.Transformer(width, sizes.heads, *depth, sizes.inner, DROPOUT, "relu", batch_first=True)
            self.stacks.encoder.norm = self.stacks.decoder.norm = None  # post-norm needs no closing norm
            if not all_dropout:
                for module in self.stacks.modules():
                    if isinstance(module, nn.MultiheadAttention):
                        module.dropout = 0.0
                    elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
                        module.dropout.p = 0.0
            self.dropout = nn.Dropout(DROPOUT)
            angle = torch.arange(length)[:, None] * torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
            self.register_buffer("positions", torch.stack([angle.sin(), angle.cos()], -1).reshape(length, width))
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

        def embed(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.dropout(nn.functional.embedding(tokens, self.table) * width**0.5 + self.positions)

        def forward(self, source: torch.Tensor, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            x = self.stacks(self.embed(source), self.embed(inputs), tgt_mask=self.mask, tgt_is_causal=True)
            logits = x @ self.table.T
            return nn.functional.cross_entropy(logits.reshape(-1, vocab), target.reshape(-1), label_smoothing=SMOOTHING)

    where = "cuda" if sizes.platform == "gpu" else "cpu"
    source, target = (torch.tensor(tokens, dtype=torch.int64, device=where) for tokens in batch_of(rows, length, vocab))
    inputs = torch.cat([torch.full((rows, 1), 2, device=where), target[:, :-1]], dim=1)
    model = Model().train().to(where)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, betas=(0.9, 0.98), eps=1e-9, fused=True)
    loss_of = torch.compile(model) if compiled else model

    def step() -> float:
        for _ in range(sizes.updates):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(where, getattr(torch, sizes.dtype), enabled=sizes.dtype != "float32"):
                loss = loss_of(source, inputs, target)
            loss.backward()
            optimizer.step()
        return loss.item()

    return step


def best_torch_step(
    rows: int, length: int, all_dropout: bool, threads: list[int], tries: int, sizes: Sizes
) -> tuple[Step, dict]:
    """The fastest kind of PyTorch's step with the fastest number of threads, and what was tried."""
    import torch

    measured = []
    for kind in ("eager", "compile"):
        try:
            step = torch_step(rows, length, all_dropout, kind == "compile", sizes)
            step()
        except Exception as error:  # such as no C++ compiler, which torch.compile needs
            print(f"PyTorch, {kind}: {str(error).strip().partition(chr(10))[0]}", file=sys.stderr)
            measured.append({"kind": kind, "error": type(error).__name__})
            continue
        for count in threads:
            torch.set_num_threads(count)
            step()
            seconds = statistics.median(timed(step) for _ in range(tries))
            measured.append({"kind": kind, "threads": count, "seconds": seconds, "step": step})
            print(f"PyTorch, {kind}, {count} threads: {seconds * 1e3:.1f} ms", file=sys.stderr)
    best = min((one for one in measured if "step" in one), key=lambda one: one["seconds"], default=None)
    if best is None:
        raise RuntimeError("no kind of PyTorch's step could be run")
    tried = [{name: value for name, value in one.items() if name != "step"} for one in measured]

    def step() -> float:
        torch.set_num_threads(best["threads"])
        return best["step"]()

    return step, {"best": {"kind": best["kind"], "threads": best["threads"]}, "tried": tried}


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def model_flops_utilisation(rows: int, length: int, sizes: Sizes, seconds: dict[str, float]) -> dict:
    """Of each, against the best matrix product of this process."""
    import jax
    import jax.numpy as jnp

    from tfm.benchmarking.peak import MatmulPeak
    from tfm.config import ModelConfig
    from tfm.model.flops import train_step_flops

    depth = {"encoder_layers": sizes.layers, "decoder_layers": sizes.layers}
    config = ModelConfig(d_model=sizes.width, d_ff=sizes.inner, num_heads=sizes.heads, **depth)
    peak = MatmulPeak(jax.devices()[:1], jnp.dtype(sizes.dtype))
    flops = train_step_flops(config, sizes.vocab, rows, length, length)
    share = {name: flops / each / peak.flops for name, each in seconds.items()}
    for name, each in share.items():
        print(f"{rows} x {length}: {name:<6} {each:8.3f} of {peak.flops / 1e12:.0f} TFLOP/s", file=sys.stderr)
    return {"model_flops": flops, "matmul_peak_flops": peak.flops, "matmul_measured": peak.measured, "mfu": share}


def main() -> None:
    keep_freed_memory()  # before any toolkit starts threads
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["128x32", "32x128", "512x32"], help="ROWSxLENGTH, of source and target"
    )
    parser.add_argument("--sizes", choices=SIZES, default="small", help="of the model; big is for a GPU")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tries", type=int, default=3, help="steps by which PyTorch's settings are chosen")
    parser.add_argument("--threads", type=int, nargs="+", help="PyTorch's; half and all of the processors if unset")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="processors that all of it may use")
    parser.add_argument("--unroll-layers", type=int, help="tfm's training.unroll_layers; all if unset")
    parser.add_argument(
        "--devices", type=int, help="that tfm makes of a CPU; one a core if unset, where the rows divide"
    )
    parser.add_argument("--all-dropout", action="store_true", help="also of attention weights and inner features")
    parser.add_argument("--without-torch", action="store_true")
    add_json(parser)
    arguments = parser.parse_args()

    # XLA takes as many threads as the process may use processors; nothing has imported JAX yet.
    sizes = SIZES[arguments.sizes]
    if sizes.platform == "cpu":
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        arguments.threads = arguments.threads or sorted({max(1, arguments.cores // 2), arguments.cores})
    else:  # both are on the device at the same time
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ["JAX_PLATFORMS"] = "cuda"
        arguments.threads = arguments.threads or [1]
    results = []
    for shape in arguments.shapes:
        rows, length = map(int, shape.split("x"))
        results.append(compare(rows, length, arguments))
        # So far, since a later shape may fail; and late, since to look at devices settles how many there are.
        write_results(arguments.json, {"what": vars(arguments), **surroundings(), "results": results})


def compare(rows: int, length: int, arguments: argparse.Namespace) -> dict:
    result = {"rows": rows, "length": length}
    sizes = SIZES[arguments.sizes]
    # tfm comes first: it has the C library keep freed memory, from which PyTorch profits, too.
    steps = {"tfm": tfm_step(rows, length, arguments, sizes)}
    if not arguments.without_torch:
        try:
            steps["torch"], result["torch"] = best_torch_step(
                rows, length, arguments.all_dropout, arguments.threads, arguments.tries, sizes
            )
        except (ImportError, RuntimeError) as error:  # tfm's own time can be had all the same
            print(f"PyTorch: {error}", file=sys.stderr)
            result["torch"] = {"error": str(error)}
    losses = {name: step() for name, step in steps.items()}
    for name, loss in losses.items():
        assert abs(loss - math.log(sizes.vocab)) < 2, f"{name}: a loss of {loss} is not that of a fresh model"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(arguments.rounds):
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            time.sleep(_REST)
            seconds[name].append(timed(steps[name]) / sizes.updates)
    result |= {"first_loss": losses, "step_seconds": seconds, "step_seconds_median": {}, "target_tokens_per_second": {}}
    for name, times in seconds.items():
        median = statistics.median(times)
        result["step_seconds_median"][name] = median
        result["target_tokens_per_second"][name] = rows * length / median
        print(f"{rows} x {length}: {name:<6} {median * 1e3:8.1f} ms a step", file=sys.stderr)
    if sizes.platform == "gpu":
        result |= model_flops_utilisation(rows, length, sizes, result["step_seconds_median"])
    if "torch" in steps:
        ratio = statistics.median(b / a for a, b in zip(seconds["tfm"], seconds["torch"], strict=True))
        result["tfm_times_as_fast"] = ratio
        kind = result["torch"]["best"]["kind"]
        print(f"         tfm is {ratio:.2f} times as fast as PyTorch ({kind})", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()

"""Lines a second of greedy and beam search: tfm, CTranslate2 and Hugging Face Marian, side by side on one machine.

    pip install -r benchmarks/requirements.txt
    python benchmarks/decoding.py --json=decoding.json

    python benchmarks/decoding.py --config=base --device=gpu --without ctranslate2 --json=decoding_gpu.json

All have the same architecture (that of configs/multi30k.py, or of `--config`) with random weights, the same number of
threads, float32 (on a GPU bfloat16), and sentences of one length, which each is made to translate into as many tokens:
what is compared is the speed of a search, not where it ends. They run in turn, round by round, so that a shared machine
slows all of them. Each may choose the best of a few batch sizes, and CTranslate2 whether all threads work on one batch
or each on one of its own (tfm has a device for each core), in rounds that are not counted. By default these sizes
divide the lines, and fill what tfm compiles on 2 cores. Medians over rounds, and of their ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from results import add_json, surroundings, write_results

from tfm.allocator import keep_freed_memory

VOCAB, BOS, EOS = 10_000, 2, 1


class Search(NamedTuple):
    """A toolkit's search."""

    run: Callable[[int, int], None]  # translates all sentences, in batches of so many, by so many workers
    workers: tuple[int, ...] = (1,)  # that share the threads


def tfm_search(sentences: np.ndarray, beam: int, config: str) -> Search:
    import jax

    from tfm import backend, sharding
    from tfm.commands.config_files import load_config
    from tfm.config import DecodingConfig
    from tfm.decoding.decoder import Decoder
    from tfm.model.transformer import Transformer, compute_dtype, init_parameters

    count, length = sentences.shape
    backend.decode_on_every_core()
    mesh = sharding.decoding_mesh(tensor=1)
    shards = sharding.batch_shards(mesh)
    shape = load_config(config).model
    model = Transformer(shape, VOCAB, compute_dtype(shape, jax.default_backend()))
    parameters = jax.jit(lambda: init_parameters(model, 0))()
    decoders = {}

    def run(rows: int, workers: int) -> None:
        if rows not in decoders:
            config = DecodingConfig(
                beam_size=beam,
                min_length=length,
                max_extra_tokens=0,
                max_source_length=length + 1,
                tokens_per_batch=-(-rows // shards) * shards * (length + 1),  # a bucket divides over the devices
            )
            decoders[rows] = Decoder([model], mesh, config, banned=(0, BOS), scores=False)
            decoders[rows].set_parameters(parameters)
        decoder = decoders[rows]
        batches = [[[*ids, EOS] for ids in sentences[at : at + rows].tolist()] for at in range(0, count, rows)]
        found = [decoder.decode(decoder.buckets[-1], batch) for batch in batches]
        for batch, hypotheses in zip(batches, found, strict=True):
            assert np.all(np.asarray(hypotheses.lengths_BW)[: len(batch), 0] == length)

    return Search(run)


def ctranslate2_search(sentences: np.ndarray, beam: int, arguments: argparse.Namespace, folder: Path) -> Search:
    import ctranslate2
    from ctranslate2.specs import transformer_spec

    from tfm.commands.config_files import load_config

    shape = load_config(arguments.config).model
    generator = np.random.default_rng(0)

    def fill(linear: object, *size: int, bias: bool = False) -> None:
        linear.weight = generator.normal(size=size).astype(np.float32) * size[-1] ** -0.5
        if bias:
            linear.bias = np.zeros(size[0], np.float32)

    def norm(layer: object) -> None:
        layer.gamma, layer.beta = np.ones(shape.d_model, np.float32), np.zeros(shape.d_model, np.float32)

    spec = transformer_spec.TransformerSpec.from_config(
        (shape.encoder_layers, shape.decoder_layers), shape.num_heads, pre_norm=shape.norm == "pre"
    )
    width = shape.d_model
    for stack in (spec.encoder, spec.decoder):
        embeddings = stack.embeddings[0] if isinstance(stack.embeddings, list) else stack.embeddings
        fill(embeddings, VOCAB, width)
        stack.scale_embeddings = True
        if shape.norm == "pre":
            norm(stack.layer_norm)
        for layer in stack.layer:
            norm(layer.self_attention.layer_norm)
            fill(layer.self_attention.linear[0], 3 * width, width)
            fill(layer.self_attention.linear[1], width, width)
            if stack is spec.decoder:
                norm(layer.attention.layer_norm)
                for linear, size in zip(layer.attention.linear, (width, 2 * width, width), strict=True):
                    fill(linear, size, width)
            norm(layer.ffn.layer_norm)
            fill(layer.ffn.linear_0, shape.d_ff, width, bias=True)
            fill(layer.ffn.linear_1, width, shape.d_ff, bias=True)
    fill(spec.decoder.projection, VOCAB, width)
    words = ["<blank>", "</s>", "<s>", "<unk>", *(f"w{number}" for number in range(4, VOCAB))]
    spec.register_source_vocabulary(words)
    spec.register_target_vocabulary(words)
    spec.config.add_source_eos = True
    spec.config.decoder_start_token = "<s>"
    spec.validate()
    spec.optimize()
    folder.mkdir()
    spec.save(str(folder))
    translators = {
        workers: ctranslate2.Translator(
            str(folder),
            device="cpu" if arguments.device == "cpu" else "cuda",
            compute_type="float32" if arguments.device == "cpu" else "bfloat16",
            inter_threads=workers,
            intra_threads=max(1, arguments.threads // workers),
        )
        for workers in sorted({1, arguments.threads if arguments.device == "cpu" else 1})
    }
    source = [[words[token] for token in ids] for ids in sentences.tolist()]
    length = sentences.shape[1]

    def run(rows: int, workers: int) -> None:
        found = translators[workers].translate_batch(
            source,
            beam_size=beam,
            max_batch_size=rows,
            min_decoding_length=length,
            max_decoding_length=length,
            length_penalty=0.6,
        )
        assert all(len(result.hypotheses[0]) == length for result in found)

    return Search(run, tuple(translators))


def marian_search(sentences: np.ndarray, beam: int, arguments: argparse.Namespace) -> Search:
    import torch
    from transformers import MarianConfig, MarianMTModel

    from tfm.commands.config_files import load_config

    shape = load_config(arguments.config).model
    torch.set_num_threads(arguments.threads)
    config = MarianConfig(
        vocab_size=VOCAB,
        d_model=shape.d_model,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.num_heads,
        decoder_attention_heads=shape.num_heads,
        encoder_ffn_dim=shape.d_ff,
        decoder_ffn_dim=shape.d_ff,
        pad_token_id=0,
        eos_token_id=EOS,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        activation_function=shape.activation,
        scale_embedding=True,
    )
    model = MarianMTModel(config).eval()
    ids = torch.tensor(np.pad(sentences, ((0, 0), (0, 1)), constant_values=EOS))
    if arguments.device == "gpu":
        model, ids = model.to("cuda", torch.bfloat16), ids.to("cuda")
    length = sentences.shape[1]

    def run(rows: int, workers: int) -> None:
        with torch.inference_mode():
            for at in range(0, len(ids), rows):
                found = model.generate(
                    input_ids=ids[at : at + rows],
                    num_beams=beam,
                    do_sample=False,
                    min_new_tokens=length,
                    max_new_tokens=length,
                )
                assert found.shape[1] == length + 1
                found.cpu()  # waited for

    return Search(run)


def main() -> None:
    keep_freed_memory()  # before any toolkit starts threads
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--length", type=int, default=17, help="tokens of each sentence and each translation")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--config", default="multi30k", help="shipped config whose architecture all have")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--without", nargs="*", default=[], choices=["tfm", "ctranslate2", "marian"])
    add_json(parser)
    arguments = parser.parse_args()

    # XLA takes as many threads as the process may use processors; nothing has imported JAX yet.
    if arguments.device == "cpu":
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:  # all of them are on the device at the same time
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        os.environ["JAX_PLATFORMS"] = "cuda"
    sentences = np.random.default_rng(0).integers(4, VOCAB, (arguments.lines, arguments.length))
    results: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        for beam in arguments.beams:
            makers = {
                "tfm": lambda beam=beam: tfm_search(sentences, beam, arguments.config),
                "ctranslate2": lambda beam=beam: ctranslate2_search(
                    sentences, beam, arguments, Path(folder) / str(beam)
                ),
                "marian": lambda beam=beam: marian_search(sentences, beam, arguments),
            }
            searches = {name: make() for name, make in makers.items() if name not in arguments.without}
            results.append(compare(searches, beam, len(sentences), arguments.rows, arguments.rounds))
            # So far, since another beam may fail; and late, since to look at devices settles how many there are.
            report = {"what": vars(arguments), **surroundings("ctranslate2", "transformers"), "results": results}
            write_results(arguments.json, report)


def compare(searches: dict[str, Search], beam: int, lines: int, rows: list[int], rounds: int) -> dict:
    def rate(search: Search, setting: tuple[int, int]) -> float:
        start = time.perf_counter()
        search.run(*setting)
        return lines / (time.perf_counter() - start)

    best, tried = {}, {}
    for name, search in searches.items():
        settings = [(size, workers) for workers in search.workers for size in rows]
        for setting in settings:
            search.run(*setting)  # compiles, where that is the way
        rates = {setting: max(rate(search, setting) for _ in range(2)) for setting in settings}
        best[name] = max(settings, key=rates.__getitem__)
        tried[name] = [{"rows": size, "workers": n, "lines_per_second": r} for (size, n), r in rates.items()]
    measured: dict[str, list[float]] = {name: [] for name in searches}
    for _ in range(rounds):
        for name, search in searches.items():
            measured[name].append(rate(search, best[name]))
    result = {
        "beam": beam,
        "rows": {name: size for name, (size, _) in best.items()},
        "workers": {name: workers for name, (_, workers) in best.items()},
        "tried": tried,
        "lines_per_second": measured,
        "ratio_of_tfm": {},
    }
    for name, rates in measured.items():
        size, workers = best[name]
        by = f" by each of {workers} workers" if workers > 1 else ""
        print(f"beam {beam}: {name:<12} {statistics.median(rates):8.1f} lines/s, {size} at once{by}", file=sys.stderr)
        if "tfm" in measured and name != "tfm":
            ratio = statistics.median(a / b for a, b in zip(measured["tfm"], rates, strict=True))
            result["ratio_of_tfm"][name] = ratio
            print(f"        tfm is {ratio:.2f} times as fast as {name}", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()

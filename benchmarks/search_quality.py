"""What a search finds and what it depends on, measured on a trained model and real lines.

    python benchmarks/search_quality.py --workdir=RUN --source=FILE --json=search_quality.json

First, errors: how often the translation of the beam has a worse objective than that of greedy search, or than that of a
much wider beam. Then independence: the same lines in another order, in batches of other sizes, and on eight devices
instead of one, in float32 and in bfloat16; each line that differs in float32 is printed with both of its scores.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import random
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType
from results import add_json, write_results

from tfm import backend, sharding
from tfm.checkpoint import RunDirectory
from tfm.config import Config
from tfm.data.corpus import to_text
from tfm.decoding.translation import Translation
from tfm.decoding.translator import Translator

DEVICES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a run directory")
    parser.add_argument("--source", type=Path, required=True, help="lines to translate; .gz too")
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--beam", type=int, default=4)
    parser.add_argument("--length_penalty", type=float, help="alpha; the run's own if unset")
    parser.add_argument("--max_extra_tokens", type=int, help="beyond those of the source; the run's own if unset")
    parser.add_argument("--wide", type=int, default=64, help="beam that search errors are counted against; 0 is none")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    add_json(parser)
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    backend.use_compilation_cache()
    content = arguments.source.read_bytes()
    content = gzip.decompress(content) if arguments.source.suffix == ".gz" else content
    lines = [to_text(line) for line in content.split(b"\n")[: arguments.lines]]
    config = RunDirectory.open(arguments.workdir).config
    given = {name: getattr(arguments, name) for name in ("length_penalty", "max_extra_tokens")}
    given = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, decoding=dataclasses.replace(config.decoding, **given))
    report = {
        "command": " ".join(sys.argv),
        "length_penalty": config.decoding.length_penalty,
        "max_extra_tokens": config.decoding.max_extra_tokens,
        "lines": len(lines),
        "jax": jax.__version__,
        "beam": arguments.beam,
    }
    report["errors"] = errors(arguments.workdir, config, lines, arguments.beam, arguments.wide)
    report["independence"] = {}
    write_results(arguments.json, report)  # so far, and again after each part: they take long
    for dtype in arguments.dtypes:
        report["independence"][dtype] = independence(arguments.workdir, config, lines, arguments.beam, dtype)
        write_results(arguments.json, report)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def translate(
    workdir: Path, config: Config, lines: list[str], devices: int = 1, **decoding: object
) -> list[Translation]:
    mesh = jax.make_mesh((devices, 1, 1), sharding.AXES, (AxisType.Auto,) * 3, devices=jax.devices()[:devices])
    settings = dataclasses.replace(config.decoding, **decoding)
    start = time.perf_counter()
    found = Translator.load(workdir, dataclasses.replace(config, decoding=settings), mesh=mesh).translate(lines)
    say(f"  {devices} devices, {decoding}: {time.perf_counter() - start:.0f} s")
    return found


def errors(workdir: Path, config: Config, lines: list[str], beam: int, wide: int) -> dict:
    """Shares of lines whose objective is worse than another search's."""
    least, budget = config.decoding.max_source_length, config.decoding.tokens_per_batch
    found = {
        # As many hypotheses a batch, however many a sentence has.
        size: translate(
            workdir,
            config,
            lines,
            beam_size=size,
            n_best=1,
            tokens_per_batch=max(least, min(budget, budget * beam // size)),
        )
        for size in (1, beam, wide)
        if size
    }
    scores = {size: np.array([its.score for its in translations]) for size, translations in found.items()}
    result = {"no_worse_than_greedy": float(np.mean(scores[beam] >= scores[1] - 1e-5))}
    say(f"beam {beam} is no worse than greedy search for {result['no_worse_than_greedy']:.2%} of the lines")
    if wide:
        for size in (1, beam):
            share = float(np.mean(scores[size] < scores[wide] - 1e-5))
            result[f"search_errors_of_beam_{size}_against_{wide}"] = share
            say(f"beam {size} misses what beam {wide} finds in {share:.2%} of the lines")
        result[f"worse_than_beam_{beam}_at_{wide}"] = float(np.mean(scores[wide] < scores[beam] - 1e-5))
    return result


def independence(workdir: Path, config: Config, lines: list[str], beam: int, dtype: str) -> dict:
    """Lines that differ from those of the default, a change at a time."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))
    order = list(range(len(lines)))
    random.Random(0).shuffle(order)
    shuffled = [lines[i] for i in order]
    mates = [line for pair in zip(lines, shuffled, strict=True) for line in pair]
    say(f"{dtype}:")
    settings = {"beam_size": beam, "n_best": 1}
    base = translate(workdir, config, lines, **settings)
    back = translate(workdir, config, shuffled, **settings)
    many = f"on {DEVICES} devices"
    on_many = translate(workdir, config, lines, DEVICES, **settings)
    back_on_many = translate(workdir, config, shuffled, DEVICES, **settings)
    bases = {many: base, f"in another order {many}": on_many, f"among other lines {many}": on_many}
    runs = {
        "in another order": [back[order.index(i)] for i in range(len(lines))],
        "among other lines": translate(workdir, config, mates, **settings)[::2],
        many: on_many,
        f"in another order {many}": [back_on_many[order.index(i)] for i in range(len(lines))],
        f"among other lines {many}": translate(workdir, config, mates, DEVICES, **settings)[::2],
    }
    for sentences in (1, 7, 64):
        runs[f"with a budget of {sentences} sentences"] = translate(
            workdir, config, lines, **settings, sentences_per_batch=sentences
        )
    result = {}
    for name, found in runs.items():
        both = zip(bases.get(name, base), found, strict=True)
        pairs = [(i, a, b) for i, (a, b) in enumerate(both, 1) if a.text != b.text]
        result[name] = len(pairs)
        say(f"  {name}: {len(pairs)} of {len(lines)} lines differ")
        if dtype == "float32":
            for line, a, b in pairs:
                say(f"    line {line}: {a.score:.7f} {a.text}\n    {' ' * len(f'line {line}:')} {b.score:.7f} {b.text}")
    return result


if __name__ == "__main__":
    main()

"""Time training steps or translations as compiled, sweep a setting, profile, or compare two reports."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, Literal

from tfm.commands.lines import STANDARD_STREAM, check_outputs, is_same_file, write_text
from tfm.commands.options import parse
from tfm.commands.train import deterministic_where_asked
from tfm.config import Config, InputError
from tfm.files import at_home
from tfm.text import near

_KINDS = ("train", "decode", "compare")
_COMPARE_USAGE = "tfm benchmark compare FIRST.json SECOND.json [--json=F]"
_USAGE = f"""usage: tfm benchmark train  --config=NAME [OPTIONS]
       tfm benchmark decode --config=NAME [OPTIONS]
       {_COMPARE_USAGE}
"""


@dataclasses.dataclass(frozen=True)
class _Both:
    """Options of `benchmark train` and `benchmark decode`."""

    config: str | None = None
    """Name of a shipped config, or the path of a .py file with get_config()."""
    json: Path | None = None
    """File for the report as JSON; - is standard output."""
    sweep: str | None = None
    """Several points along batch, length or devices, such as batch=32,64,128."""
    picture: Path | None = None
    """File for the picture of a sweep, a PNG; beside the JSON file if unset."""
    profile: Path | None = None
    """Directory for a trace of a few runs, of which a table shows where the time goes."""
    devices: int | None = None
    """Devices to use, simulated ones on a CPU; all of them if unset."""


@dataclasses.dataclass(frozen=True)
class TrainArguments(_Both):
    """Time the compiled training step over packed batches, and say how much of the devices it uses."""

    lengths: Literal["full", "natural", "corpus"] = "natural"
    """Sentence pairs: each fills a row; random ones of lengths like those of news; or those of the config's corpus,
    read from data.store or prepared anew."""
    pipeline: bool = False
    """Read batches ahead beside the steps, as training does, in place of going round over a few of them."""
    steps: int = 20
    """Steps that are timed."""
    warmup: int = 3
    """Steps before them."""


@dataclasses.dataclass(frozen=True)
class DecodeArguments(_Both):
    """Time compiled searches, first token and further steps apart: latency of one sentence, throughput of many."""

    length: int = 32
    """Tokens of each source sentence and of each translation."""
    beams: tuple[int, ...] | None = None
    """Beam sizes; greedy search and decoding.beam_size if unset."""
    batches: tuple[int, ...] | None = None
    """Sentences translated at once; 1 and as many as decoding.tokens_per_batch has room for, if unset."""
    steps: int = 10
    """Searches that are timed."""
    warmup: int = 2
    """Searches before them."""


def main(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        print(_USAGE)
        parse("benchmark train", ["--help"], TrainArguments)
    if not argv or argv[0] not in _KINDS:
        expected = f"; expected one of {', '.join(_KINDS)}, before all options"
        hint = near(argv[0], _KINDS, otherwise=expected) if argv else expected
        raise InputError(f"{argv[0] if argv else 'tfm benchmark'}: says nothing to benchmark{hint}")
    if argv[0] == "compare":
        return _compare(argv[1:])
    kind = TrainArguments if argv[0] == "train" else DecodeArguments
    arguments, config = parse(f"benchmark {argv[0]}", argv[1:], kind)
    deterministic_where_asked(config)
    from tfm import backend, hosts
    from tfm.benchmarking.sweep import Sweep, devices_for

    sweep = None if arguments.sweep is None else Sweep.parse(arguments.sweep)
    if sweep is not None:
        _refuse_overridden(arguments, sweep.axis)
    picture = _picture(arguments)
    if isinstance(arguments, DecodeArguments) and arguments.devices is None and not (sweep and sweep.axis == "devices"):
        backend.decode_on_every_core()  # as `tfm translate` does
    with hosts.together(config):
        devices = devices_for(arguments.devices, sweep)
        hosts.first_does(lambda: _check_outputs(arguments, picture))
        report = _measured(arguments, config, sweep, argv, devices)
        if hosts.is_first():
            _show(arguments, report, picture)
    return 0


def _check_outputs(arguments: _Both, picture: Path | None) -> None:
    """Raises InputError where something could not be written at the end."""
    from tfm.benchmarking.profile import check_profile

    check_outputs(arguments.json, picture, "the picture of the sweep")
    if arguments.profile is not None:
        check_profile(arguments.profile)


def _keep(arguments: _Both, report: dict[str, Any]) -> None:
    """Writes the points so far to the JSON file, since what comes later may fail."""
    from tfm import hosts
    from tfm.benchmarking.report import as_json

    if hosts.is_first() and arguments.json not in (None, STANDARD_STREAM):
        write_text(arguments.json, as_json(report))


def _show(arguments: _Both, report: dict[str, Any], picture: Path | None) -> None:
    """Tables or JSON on standard output, and the picture that was asked for; the JSON file has been kept."""
    from tfm.benchmarking.report import as_json, profile_table, table

    if arguments.json == STANDARD_STREAM:
        write_text(STANDARD_STREAM, as_json(report))
    else:
        print(table(report["points"]))
        for point in report["points"]:
            if "profile" in point:
                print(f"\nWhere the time of one run goes\n{table([point])}\n\n{profile_table(point['profile'])}")
    if picture is not None:
        from tfm.benchmarking.picture import draw

        draw(report, picture)


def _refuse_overridden(arguments: _Both, axis: str) -> None:
    """Raises InputError at an option that the sweep would set in its place."""
    name = "batches" if axis == "batch" else axis
    default = {field.name: field.default for field in dataclasses.fields(arguments)}
    if name in default and getattr(arguments, name) != default[name]:
        raise InputError(f"--{name} and --sweep={arguments.sweep} say both what is measured: leave one of them out")
    if len(getattr(arguments, "batches", None) or ()) > 1:
        raise InputError(f"--batches: a sweep along {axis} has one number of sentences: name one")


def _measured(arguments: Any, config: Config, sweep: Any, argv: list[str], devices: list[Any]) -> dict[str, Any]:
    from tfm.benchmarking.decode import DecodeTiming
    from tfm.benchmarking.sweep import benchmark_decoding, benchmark_training
    from tfm.benchmarking.train import TrainTiming

    keep = functools.partial(_keep, arguments)
    if isinstance(arguments, TrainArguments):
        timing = TrainTiming(
            arguments.lengths, arguments.pipeline, arguments.steps, arguments.warmup, arguments.profile
        )
        return benchmark_training(config, timing, argv, devices, sweep=sweep, keep=keep)
    timing = DecodeTiming(arguments.length, arguments.steps, arguments.warmup, arguments.profile)
    return benchmark_decoding(
        config,
        timing,
        argv,
        devices,
        beams=arguments.beams,
        batches=arguments.batches,
        sweep=sweep,
        keep=keep,
    )


def _picture(arguments: _Both) -> Path | None:
    """Where the picture goes. Raises InputError where there is no sweep to draw."""
    if arguments.sweep is None:
        if arguments.picture is not None:
            raise InputError("--picture: only a sweep is drawn; add --sweep, such as --sweep=batch=32,64,128")
        return None
    if arguments.picture is None and arguments.json not in (None, STANDARD_STREAM):
        return arguments.json.parent / f"{arguments.json.stem}.png"
    return arguments.picture


def _compare(argv: list[str]) -> int:
    files, where, rest = [], None, iter(argv)
    for token in rest:
        name, _, value = token.partition("=")
        if token in ("-h", "--help"):
            print(f"usage: {_COMPARE_USAGE}")
            return 0
        if not token.startswith("-"):
            files.append(Path(token))
        elif name == "--json" and (value := value or next(rest, "")):
            where = at_home(Path(value))
        else:
            raise InputError(f"{token}: unknown option; usage: {_COMPARE_USAGE}")
    if len(files) != 2:
        raise InputError(f"{len(files)} reports are given, and two are compared; usage: {_COMPARE_USAGE}")
    if any(is_same_file(where, file) for file in files):
        raise InputError(f"--json={where}: would overwrite a report that is compared: name another")
    from tfm.benchmarking.compare import compare, comparison_table, read_report
    from tfm.benchmarking.report import as_json

    comparison = compare(*map(read_report, files))
    if where != STANDARD_STREAM:
        print(comparison_table(comparison))
    if where is not None:
        write_text(where, as_json(comparison))
    return 0

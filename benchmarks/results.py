"""The file that a benchmark leaves its results in."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfm.commands.lines import check_writable, write_text
from tfm.config import InputError


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds --json, which is refused before anything is measured where it cannot be written."""
    parser.add_argument("--json", type=_writable, metavar="FILE", help="file for the results; - is standard output")


def write_results(path: Path | None, results: Mapping[str, Any]) -> None:
    if path is not None:
        from tfm.benchmarking.report import as_json

        write_text(path, as_json(results))


def surroundings(*packages: str) -> dict[str, Any]:
    """When, by which command, with which versions and on which device of JAX, which this begins to use.

    Args:
      packages: further ones whose versions matter, where they are installed.
    """
    import jax

    from tfm.benchmarking.report import device, versions

    more = {name: importlib.metadata.version(name) for name in packages if importlib.util.find_spec(name)}
    return {
        "command": shlex.join(["python", *sys.argv]),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": versions() | more,
        "device": device(jax.devices()[0]),
    }


def _writable(name: str) -> Path:
    path = Path(name)
    try:
        check_writable(path)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path

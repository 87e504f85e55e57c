"""The file that a benchmark leaves its results in."""

from __future__ import annotations

import argparse
import json
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
        write_text(path, json.dumps(results, indent=2, default=str) + "\n")


def _writable(name: str) -> Path:
    path = Path(name)
    try:
        check_writable(path)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return path

"""The embedded corpus, which needs no download: a TFDS set of the project's own, prepared when first asked for.

English sentences with a number, an ordinal, a date, a time or an amount of money in words, and their German. No whole
value of the test or validation split occurs in training; a number below 100 does as a part of others, such as a day or
cents. `DemoTranslation` is the builder; TensorFlow is needed neither to write the set nor to read it, and TFDS itself
is imported when the set is.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

from tfm.config import InputError
from tfm.data.demo_grammar import CATEGORIES as CATEGORIES
from tfm.data.demo_values import SPLITS

FULL, SMALL = "full", "small"  # configs of the builder

_log = logging.getLogger(__name__)


def __getattr__(name: str) -> Any:
    if name == "DemoTranslation":
        from tfm.data.demo_builder import DemoTranslation

        return DemoTranslation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class DemoPairs(Sequence[dict[str, str]]):
    """One split: `{"en": …, "de": …, "category": …}` by index, decoded as it is asked for."""

    def __init__(self, records: Sequence[dict[str, bytes]]) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: SupportsIndex) -> dict[str, str]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, str]]: ...

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.__getitems__(range(len(self))[index])
        row = index.__index__()
        if not -len(self) <= row < len(self):
            raise IndexError(f"pair {row} of {len(self)}")
        return _text(self._records[row % len(self)])

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, str]]:
        """Many pairs in one reading, as Grain and PyTorch ask for them."""
        return [_text(record) for record in self._records.__getitems__(list(indices))] if len(indices) else []


def _text(record: dict[str, bytes]) -> dict[str, str]:
    return {name: value.decode("utf-8") for name, value in record.items()}


def default_directory() -> Path:
    """TFDS_DATA_DIR when set, or else the user's cache."""
    if given := os.environ.get("TFDS_DATA_DIR"):
        return Path(given).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "tfm"


def build(data_dir: Path | None = None, config: str = FULL) -> Any:
    """The prepared builder; the set is written first where it is not there yet. Deterministic, by the config's seed.

    Raises InputError when the directory can't be written.
    """
    directory = default_directory() if data_dir is None else Path(data_dir)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _quiet():
            from tfm.data.demo_builder import DemoTranslation

            builder = DemoTranslation(data_dir=directory, config=config, file_format="array_record")
            if not builder.is_prepared():
                _log.info("writing the demo corpus to %s", builder.data_dir)
                try:
                    builder.download_and_prepare()
                except FileExistsError:  # another process was writing the same set, and was done first
                    builder = DemoTranslation(data_dir=directory, config=config, file_format="array_record")
                    if not builder.is_prepared():
                        raise
    except OSError as error:
        raise InputError(
            f"the demo corpus can't be written to {directory} ({error.strerror or error}): "
            "set TFDS_DATA_DIR to a directory that can be written"
        ) from error
    return builder


def data_source(split: str, data_dir: Path | None = None, config: str = FULL) -> DemoPairs:
    """A split of the set, by index. Raises InputError at an unknown split."""
    if split not in SPLITS:
        raise InputError(f"the demo corpus has no split {split!r}: its splits are {', '.join(SPLITS)}")
    return DemoPairs(build(data_dir, config).as_data_source(split=split))


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """While it lasts, a set that turns out damaged raises InputError, which says what to delete."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # of a damaged file, the reader and the decoder of its records raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"the demo corpus in {default_directory()} cannot be read ({reason}): a file of it is damaged or missing; "
            "delete its directory there and run the same command again"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS draws a progress bar for each split, and prints to stdout, which is for results."""
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        absl.setLevel(level)

"""Sentence pairs out of TFDS sets, read through `as_data_source` without TensorFlow; the demo corpus is one of them.

Only array_record (or another format with random access) can be read so. A set that isn't there is prepared in that
format; one that was prepared as TFRecord is refused, since it may be the only copy of a long download.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from tfm.config import InputError
from tfm.data.corpus import Corpus, CorpusSpec, RawPair

_READ = 4096  # records read at once

_log = logging.getLogger(__name__)


def data_dir() -> str:
    """Where TFDS keeps its sets: TFDS_DATA_DIR as it is now, or the default below the home directory."""
    return os.environ.get("TFDS_DATA_DIR") or os.path.join(os.path.expanduser("~"), "tensorflow_datasets")


class TfdsCorpus(Corpus):
    """A TFDS translation set, `tfds:NAME/CONFIG`, in either direction."""

    def __init__(self, spec: CorpusSpec, source_language: str, target_language: str):
        super().__init__(spec, source_language, target_language)
        self._data_dir = data_dir()
        self._builder: Any = None

    @property
    def builder(self) -> Any:
        """The set's builder, prepared. Raises InputError where there is no such set, or it cannot be prepared."""
        if self._builder is None:
            builder = self._find()
            self._check_languages(builder)
            if not _is_prepared(builder):
                self._prepare(builder)
                builder = self._find()
            self._check_format(builder)
            self._builder = builder
        return self._builder

    def _find(self) -> Any:
        importlib.import_module("tensorflow_datasets.translate")  # registers the wmt builders
        name, _, config = self.spec.location.partition("/")
        try:
            return tfds.builder(self.spec.location, data_dir=self._data_dir)
        except tfds.core.DatasetNotFoundError as error:
            raise InputError(
                f"data.corpus={self.spec.text!r}: TFDS has no set {name!r}, and {self._data_dir} holds none; correct "
                "the name, or point TFDS_DATA_DIR at the directory that holds it"
            ) from error
        except (ValueError, AssertionError) as error:  # the latter of a version that the set has not
            configs = _configs(name)
            if not configs or config.partition(":")[0] in configs:
                raise InputError(f"data.corpus={self.spec.text!r}: {_first_line(error)}") from error
            raise InputError(
                f"data.corpus={self.spec.text!r}: the TFDS set {name} has no {config!r}; it has {', '.join(configs)} "
                "(either language of a pair can be the source)"
            ) from error

    def _check_languages(self, builder: Any) -> None:
        languages = _languages(builder.info.features)
        if not languages:
            raise InputError(
                f"data.corpus={self.spec.text!r}: is no translation set; its features are "
                f"{', '.join(builder.info.features)}"
            )
        for field in ("source_language", "target_language"):
            if getattr(self, field) not in languages:
                configs = _configs(builder.name)
                raise InputError(
                    f"data.corpus={self.spec.text!r} has the languages {', '.join(languages)}, and data.{field} is "
                    f"{getattr(self, field)!r}; change that field"
                    + (f", or take another of {builder.name}'s configs: {', '.join(configs)}" if configs else "")
                )

    def _command(self) -> str:
        """The shell command that prepares the set as array_record; downloads that are there already are reused."""
        code = (
            "import tensorflow_datasets as tfds, tensorflow_datasets.translate; "
            f"tfds.builder({self.spec.location!r}, data_dir={self._data_dir!r})"
            ".download_and_prepare(file_format='array_record')"
        )
        return f'python -c "{code}"'

    def _prepare(self, builder: Any) -> None:
        _log.info("%s is not in %s: downloading and preparing it as array_record", self.name, self._data_dir)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # where TFDS tells of its progress
                builder.download_and_prepare(file_format="array_record")
        except Exception as error:  # of a download anything may be raised: network, disk, checksum, a missing package
            if isinstance(error, FileExistsError) and _is_prepared(builder):  # another process was done first
                return
            raise InputError(
                f"data.corpus={self.spec.text!r}: is not prepared in {self._data_dir}, and preparing it failed "
                f"({type(error).__name__}: {_first_line(error)}); set TFDS_DATA_DIR to where it is, or prepare it "
                f"where there is a network: {self._command()}"
            ) from error

    def _check_format(self, builder: Any) -> None:
        readable = {form for form in builder.info.available_file_formats() if form.value in ("array_record", "parquet")}
        if not readable:
            old = shlex.quote(str(builder.data_dir))
            raise InputError(
                f"data.corpus={self.spec.text!r}: {builder.data_dir} was prepared as "
                f"{builder.info.file_format.value}, which cannot be read without TensorFlow; set it aside and prepare "
                f"it anew: mv {old} {old}.{builder.info.file_format.value} && {self._command()}"
            )

    def where(self, split: str) -> str:
        return f"tfds:{self.spec.location} split {split} in {self._data_dir}"

    def has_split(self, split: str) -> bool:
        return _base(split) in self.builder.info.splits

    def check(self, split: str) -> None:
        if not self.has_split(split):
            raise InputError(
                f"data.corpus={self.spec.text!r} has no split {split!r}; it has "
                f"{', '.join(self.builder.info.splits)}: set data.train_split or data.validation_split to one of them"
            )
        self._check_slice(split)

    def pairs(self, split: str) -> Iterator[RawPair]:
        self.check(split)
        try:
            records = self.builder.as_data_source(split=split)
            yield from read_records(records, self.source_language, self.target_language)
        except Exception as error:  # of a damaged file, the reader and the decoder of its records raise anything
            raise InputError(
                f"{self.where(split)}: cannot be read ({type(error).__name__}: {_first_line(error)}): a file of it is "
                f"damaged or missing; delete {self.builder.data_dir} and prepare it anew: {self._command()}"
            ) from error

    def _check_slice(self, split: str) -> None:
        """Raises InputError where there is no such part of a split, or nothing in it: `train[:90`, `train[200%:]`."""
        try:
            count = self.builder.info.splits[split].num_examples
        except (ValueError, AssertionError, KeyError) as error:
            raise InputError(f"{self.where(split)}: is no part of that split: {_first_line(error)}") from error
        if not count:
            raise InputError(f"{self.where(split)}: holds no pair")

    def paths(self, split: str) -> list[epath.Path]:
        return [epath.Path(path) for path in self.builder.info.splits[_base(split)].filepaths]


class DemoCorpus(Corpus):
    """The project's own corpus, English and German."""

    def check(self, split: str) -> None:
        if {self.source_language, self.target_language} != {"en", "de"}:
            raise InputError(
                f"data.corpus='demo' has the languages en and de; data.source_language={self.source_language!r} and "
                f"data.target_language={self.target_language!r} must be these"
            )
        if not self.has_split(split):
            raise InputError(f"data.corpus='demo' has no split {split!r}; it has train, validation and test")

    def where(self, split: str) -> str:
        return f"demo split {split}"

    def has_split(self, split: str) -> bool:
        return split in ("train", "validation", "test")

    def pairs(self, split: str) -> Iterator[RawPair]:
        self.check(split)
        from tfm.data import demo_corpus  # it needs num2words and Babel, which nothing else does

        with demo_corpus.explained():
            yield from read_records(demo_corpus.data_source(split), self.source_language, self.target_language)

    def paths(self, split: str) -> list[epath.Path]:
        return []  # generated from the package's own code, from fixed seeds


def read_records(records: Sequence[Any], source_language: str, target_language: str) -> Iterator[RawPair]:
    """Streams (source, target) out of a data source's records; those that lack one of the languages are passed over."""
    for start in range(0, len(records), _READ):
        stop = min(start + _READ, len(records))
        batch = (
            records.__getitems__(range(start, stop))
            if hasattr(records, "__getitems__")
            else [records[index] for index in range(start, stop)]
        )
        for record in batch:
            sides = _sides(record)
            if source_language in sides and target_language in sides:
                yield _to_bytes(sides[source_language]), _to_bytes(sides[target_language])


def _sides(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """One record as {language: text}, out of whichever feature holds that.

    A set of many languages has two parallel lists, `language` and `translation`, in its place.
    """
    nested = [value for value in record.values() if isinstance(value, Mapping)]
    sides = nested[0] if nested else record
    if "language" in sides and "translation" in sides:
        languages = (_to_bytes(language).decode() for language in sides["language"])
        return dict(zip(languages, sides["translation"], strict=True))
    return sides


def _to_bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)


def _languages(features: Any) -> list[str]:
    """The languages of a set's features, whether they stand at the top or one below; none if it has no translations."""
    kinds = (tfds.features.Translation, tfds.features.TranslationVariableLanguages)
    for feature in [features, *(features[name] for name in features)]:
        if isinstance(feature, kinds):
            return sorted(feature.languages)
    return []


def _configs(name: str) -> list[str]:
    try:
        return sorted(tfds.builder_cls(name).builder_configs)
    except (tfds.core.DatasetNotFoundError, ValueError):
        return []


def _is_prepared(builder: Any) -> bool:
    return (epath.Path(builder.data_dir) / "dataset_info.json").exists()


def _base(split: str) -> str:
    return split.partition("[")[0]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

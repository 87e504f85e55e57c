"""The TFDS builder of the embedded corpus. Importing it imports TFDS, which takes a second: see demo_corpus."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import tensorflow_datasets as tfds

from tfm.data.demo_grammar import sentences
from tfm.data.demo_values import SPLITS, Split


@dataclasses.dataclass(kw_only=True)
class DemoConfig(tfds.core.BuilderConfig):
    """How many pairs each split has, and the seed that they are drawn with."""

    train: int
    validation: int
    test: int
    seed: int = 0


class DemoTranslation(tfds.core.GeneratorBasedBuilder):
    """Numbers, ordinals, dates, times and amounts of money in English sentences, and their German."""

    # A change of any sentence needs a new version, or a set prepared earlier would be used on; a test watches it.
    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar[dict[str, str]] = {"1.1.0": "First release."}
    BUILDER_CONFIGS: ClassVar[list[DemoConfig]] = [
        DemoConfig(name="full", description="What `make demo` trains on.", train=60_000, validation=500, test=500),
        DemoConfig(name="small", description="For tests.", train=1_000, validation=100, test=100),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        text = {name: tfds.features.Text() for name in ("en", "de", "category")}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(text), supervised_keys=("en", "de"), description=self.__doc__
        )

    def _split_generators(self, dl_manager: object) -> dict[Split, Iterator[tuple[int, dict[str, str]]]]:
        del dl_manager  # nothing is downloaded
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, str]]]:
        config = self.builder_config
        for index, pair in enumerate(sentences(split, getattr(config, split), config.seed)):
            yield index, {"en": pair.en, "de": pair.de, "category": pair.category}

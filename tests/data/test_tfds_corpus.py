"""TFDS sets, in the shape of wmt14_translate: both directions, both formats, and what is missing; no TensorFlow."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from tfm import Translator
from tfm.config import Config, DataConfig, InputError
from tfm.data import store_builder, tfds_corpus
from tfm.data.corpus import open_corpora
from tfm.data.store import prepare
from tfm.training.loop import train

NUMBERS = {"train": range(40), "validation": range(40, 52)}


class Wmt14Translate(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A small set with the name, configs, languages and features of the real one."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="de-en"), tfds.core.BuilderConfig(name="fr-en")]  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        languages = tuple(self.builder_config.name.split("-"))
        features = tfds.features.Translation(languages=languages)
        return tfds.core.DatasetInfo(builder=self, features=features, supervised_keys=languages)

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        return {split: self._generate_examples(numbers) for split, numbers in NUMBERS.items()}

    def _generate_examples(self, numbers) -> Iterator[tuple[int, dict[str, str]]]:
        first, second = self.builder_config.name.split("-")
        return ((n, {first: f"{first} Satz größer {n}", second: f"{second} sentence {n}"}) for n in numbers)


class ManyLanguages(Wmt14Translate, skip_registration=True):
    """A set of more than two languages, not all of them in every record (as ted_multi_translate is)."""

    BUILDER_CONFIGS = []  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        many = tfds.features.TranslationVariableLanguages(languages=("de", "en", "fr"))
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"translations": many}))

    def _generate_examples(self, numbers) -> Iterator[tuple[int, dict[str, dict[str, str]]]]:
        for n in numbers:
            record = {"de": f"Satz {n}", "en": f"sentence {n}", "fr": f"phrase {n}"}
            yield n, {"translations": {k: v for k, v in record.items() if k != "fr" or n % 2}}


def write_set(builder: tfds.core.DatasetBuilder, shards: int = 2) -> Path:
    config = tfds.download.DownloadConfig(num_shards=shards)
    builder.download_and_prepare(file_format="array_record", download_config=config)
    return Path(builder.data_dir)


@pytest.fixture(scope="module")
def wmt14(tmp_path_factory) -> Path:
    """A TFDS directory that holds wmt14_translate/de-en as array_record, in two shards a split."""
    root = tmp_path_factory.mktemp("tfds")
    directory = write_set(Wmt14Translate(config="de-en", data_dir=root))
    assert len(list(directory.glob("*train.array_record-*-of-00002"))) == 2
    return root


def read(spec: str, split: str = "train", source: str = "en", target: str = "de") -> list[tuple[str, str]]:
    data = DataConfig(corpus=(spec,), source_language=source, target_language=target)
    return [(s.decode(), t.decode()) for s, t in open_corpora(data)[0].pairs(split)]


@pytest.mark.parametrize("turned", [False, True])
def test_both_directions_in_full(wmt14, monkeypatch, turned):
    monkeypatch.setenv("TFDS_DATA_DIR", str(wmt14))
    for split, numbers in NUMBERS.items():
        expected = {(f"en sentence {n}", f"de Satz größer {n}") for n in numbers}
        languages = {"source": "de", "target": "en"} if turned else {}
        pairs = read("tfds:wmt14_translate/de-en", split, **languages)
        assert len(pairs) == len(numbers)
        assert {pair[::-1] if turned else pair for pair in pairs} == expected
    assert "tensorflow" not in sys.modules


def test_tfds_set_becomes_a_store(wmt14, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(wmt14))
    data = DataConfig(corpus=("tfds:wmt14_translate/de-en",), source_language="de", target_language="en",
                      vocab_size=330, train_split="train[:50%]")  # fmt: skip
    store = prepare(Config(data=data), tmp_path / "store")
    store.verify()
    rows = store.tables("train[:50%]")[0]
    assert len(rows) == 20 and len(store.tables("validation")[0]) == 12
    decoded = store.tokenizer.decode([ids[:-1] for ids in rows.pair(3)])
    assert tuple(decoded) == read("tfds:wmt14_translate/de-en", source="de", target="en")[3]
    assert len(store.manifest["sources"]) == 4
    assert prepare(Config(data=data), tmp_path / "store").corpus_hash == store.corpus_hash


@pytest.mark.usefixtures("one_device")
@pytest.mark.parametrize(("source", "target"), [("en", "de"), ("de", "en")])
def test_both_directions_train(wmt14, tiny_config, tmp_path, monkeypatch, source, target):
    monkeypatch.setenv("TFDS_DATA_DIR", str(wmt14))
    config = tiny_config(
        {
            **{"data.corpus": ("tfds:wmt14_translate/de-en",), "data.vocab_size": 330, "training.steps": 8},
            **{"data.source_language": source, "data.target_language": target},
        }
    )
    assert train(config, tmp_path / "run") == 0
    events = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[:-1])
    losses = [event["loss"] for event in events if event["kind"] == "train"]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    assert len(Translator.load(tmp_path / "run").translate([f"{source} sentence 41"])) == 1


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_set_is_named_with_the_command_that_mends_it(wmt14, tmp_path, monkeypatch, damage):
    root = Path(shutil.copytree(wmt14, tmp_path / "tfds"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    shard = next(root.rglob("*train.array_record-00001*"))
    content = shard.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    shard.write_bytes({"flipped": flipped, "cut": content[:middle], "missing": b""}[damage])
    if damage == "missing":
        shard.unlink()
    with pytest.raises(InputError, match=r"split train in .*: cannot be read .* prepare it anew: python -c"):
        read("tfds:wmt14_translate/de-en")


def test_split_that_the_set_lacks_names_those_it_has(wmt14, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(wmt14))
    with pytest.raises(InputError, match="has no split 'dev'; it has train, validation"):
        read("tfds:wmt14_translate/de-en", "dev")
    monkeypatch.setattr(store_builder, "_scan", None)  # and that before anything is read
    for corpus in ("tfds:wmt14_translate/de-en", "demo"):
        data = DataConfig(corpus=(corpus,), source_language="en", target_language="de", train_split="trian")
        with pytest.raises(InputError, match="has no split 'trian'; it has train"):
            prepare(Config(data=data), tmp_path / "store")


def test_a_set_that_another_process_prepared_meanwhile_is_read(wmt14, monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))

    def too_late(builder, **_):
        shutil.copytree(wmt14, tmp_path, dirs_exist_ok=True)
        raise FileExistsError(builder.data_dir)

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", too_late)
    assert read("tfds:wmt14_translate/de-en")


@pytest.mark.parametrize("part", ["train[:90", "train[:foo%]", "train[0:5000]"])
def test_a_mistyped_part_of_a_split_is_not_taken_for_damage(wmt14, monkeypatch, part):
    monkeypatch.setenv("TFDS_DATA_DIR", str(wmt14))
    with pytest.raises(InputError, match=r"is no part of that split: (?!.*damaged)"):
        read("tfds:wmt14_translate/de-en", part)
    with pytest.raises(InputError, match="holds no pair"):
        read("tfds:wmt14_translate/de-en", "train[:0%]")


@pytest.mark.parametrize(
    ("spec", "source", "message"),
    [
        ("tfds:wmt14_translate/de-en:9.9.9", "en", r"9\.9\.9"),
        ("tfds:wmt14_translate/de-en", "fr", r"has the languages de, en, and data\.source_language is 'fr'.*fr-en"),
        ("tfds:wmt14_translate/en-de", "en", r"has no 'en-de'; it has cs-en, de-en, fr-en, hi-en, ru-en"),
        ("tfds:mnist", "en", r"is no translation set; its features are image, label"),
        ("tfds:wmt99_nowhere/de-en", "en", r"TFDS has no set 'wmt99_nowhere', and .* holds none"),
    ],
)
def test_set_or_pair_that_is_not_there(wmt14, monkeypatch, spec, source, message):
    monkeypatch.setenv("TFDS_DATA_DIR", str(wmt14))
    with pytest.raises(InputError, match=message):
        read(spec, source=source)


def make_tfrecord(directory: Path) -> None:
    """Turns a set into what TFDS leaves by default: files of framed records, and the format's name in the facts."""
    for path in directory.glob("*.array_record-*"):
        path.rename(path.with_name(path.name.replace("array_record", "tfrecord")))
    facts = json.loads((directory / "dataset_info.json").read_text())
    facts["fileFormat"] = "tfrecord"
    (directory / "dataset_info.json").write_text(json.dumps(facts))


def test_tfrecord_copy_is_refused_with_a_command_that_works(tmp_path, monkeypatch):
    root = tmp_path / "with space"
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    directory = write_set(Wmt14Translate(config="de-en", data_dir=root))
    make_tfrecord(directory)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(InputError, match="was prepared as tfrecord, which cannot be read without TensorFlow") as error:
        read("tfds:wmt14_translate/de-en")
    assert before == {path: path.read_bytes() for path in directory.iterdir()}
    message = str(error.value)
    assert "\n" not in message
    move, command = re.search(r"anew: (mv .*) && (python .*)", message).groups()
    subprocess.run(shlex.split(move), check=True)
    program, option, code = shlex.split(command)
    assert (program, option) == ("python", "-c")
    # Run here, with the small set in the place of the real one, which would be downloaded.
    make = {"wmt14_translate/de-en": lambda data_dir: Wmt14Translate(config="de-en", data_dir=data_dir)}
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: make[name](data_dir))
    exec(code, {})
    monkeypatch.undo()
    monkeypatch.setenv("TFDS_DATA_DIR", str(root))
    assert len(read("tfds:wmt14_translate/de-en")) == 40
    assert len(list(directory.with_name("1.0.0.tfrecord").iterdir())) == len(before)


def test_set_that_is_not_prepared_is_prepared(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(
        tfds, "builder", lambda name, data_dir: Wmt14Translate(config=name.partition("/")[2], data_dir=data_dir)
    )
    assert len(read("tfds:wmt14_translate/de-en")) == 40
    assert (tmp_path / "wmt14_translate" / "de-en" / "1.0.0" / "dataset_info.json").exists()
    assert capsys.readouterr().out == ""


def test_set_that_cannot_be_prepared_names_the_command(tmp_path, monkeypatch):
    class Offline(Wmt14Translate, skip_registration=True):
        def _split_generators(self, dl_manager):
            raise ConnectionError("no route to host\nand more lines")

    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Offline(config="de-en", data_dir=data_dir))
    with pytest.raises(InputError, match=r"failed \(ConnectionError: no route to host\).*python -c") as error:
        read("tfds:wmt14_translate/de-en")
    assert "\n" not in str(error.value)


def test_prepared_set_is_read_without_its_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    write_set(ManyLanguages(data_dir=tmp_path), shards=1)
    assert len(read("tfds:many_languages")) == 40
    assert sorted(read("tfds:many_languages", source="fr"))[0] == ("phrase 1", "Satz 1")
    assert len(read("tfds:many_languages", source="fr")) == 20


def test_demo_corpus_has_its_own_languages():
    with pytest.raises(InputError, match="has the languages en and de"):
        read("demo", source="fr")


def test_records_are_read_in_parts_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(tfds_corpus, "_READ", 7)
    records = [{"en": f"e{n}", "de": f"d{n}"} for n in range(20)]
    expected = [(f"e{n}".encode(), f"d{n}".encode()) for n in range(20)]
    assert list(tfds_corpus.read_records(records, "en", "de")) == expected

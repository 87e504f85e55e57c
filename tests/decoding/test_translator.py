"""Lines in, lines out: what the translator itself does, with an echo for a model, and both together."""

import itertools
import logging
import operator
import random

import jax
import numpy as np
import pytest

from tfm.checkpoint import Checkpointer, RunDirectory
from tfm.config import Config, DecodingConfig, InputError, MeshConfig, ModelConfig
from tfm.data.tokenizer import EOS, Tokenizer, train_tokenizer
from tfm.decoding import translator as module
from tfm.decoding.decoder import Bucket, bucket_of
from tfm.decoding.search import Hypotheses
from tfm.decoding.translator import Hypothesis, Translation, Translator
from tfm.model.transformer import Transformer, init_parameters
from tfm.sharding import make_mesh

WORDS = ["haus", "tür", "baum", "weg", "see", "alt", "groß", "läuft", "steht", "und"]
MODEL_CONFIG = ModelConfig(d_model=16, d_ff=32, num_heads=4, encoder_layers=1, decoder_layers=1, norm="pre")
CONFIG = DecodingConfig(beam_size=1, max_source_length=24, tokens_per_batch=128, max_extra_tokens=4)
EMPTY = Translation((Hypothesis("", (), 0.0, 0.0),))
ODD_LINES = [
    "haus tür",
    "",
    "   ",
    "\t",
    "baum",
    "weg\u2028see\x85alt\x0bund",  # each of them is a line's end for str.splitlines
    "\u00a0",
    "a\rb",
    "🙂",
    "<2de> haus",
    "haus tür",
    "\ufffd\x00\x01",
]


def sentences(count: int, most: int = 7, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, most))) + "." for _ in range(count)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer(sentences(400), tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", 320)


class Echo:
    """A decoder that says what it is given, with 1 nat lost a token, and keeps what it was given."""

    def __init__(self, source_lengths=(8, 24), rows: int = 3):
        self.buckets = [Bucket(rows, length) for length in source_lengths]
        self.batches: list[tuple[Bucket, list[list[int]]]] = []

    def decode(self, bucket: Bucket, given, prefixes, numbers) -> Hypotheses:
        self.batches.append((bucket, list(given)))
        assert len(given) <= bucket.rows
        tokens = np.full((bucket.rows, 1, bucket.length), EOS)
        lengths = np.zeros((bucket.rows, 1), np.int32)
        for row, sentence in enumerate(given):
            assert sentence[-1] == EOS and EOS not in sentence[:-1]
            tokens[row, 0, : len(sentence)] = sentence
            lengths[row] = len(sentence) - 1
        return Hypotheses(tokens, lengths, -lengths.astype(np.float32))


@pytest.fixture
def echo(tokenizer) -> Translator:
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    translator = Translator([model], make_mesh(MeshConfig(), jax.devices()[:1]), tokenizer, CONFIG)
    translator.decoder = Echo()
    return translator


def single_spaced(text: str) -> str:
    return " ".join(text.split())


def test_each_line_gets_its_own_translation_in_order(echo):
    lines = sentences(40) + ODD_LINES[:5] + sentences(40, seed=1)
    found = echo.translate(lines)
    assert [t.text for t in found] == [single_spaced(line) for line in lines]
    expected = [-float(len(ids)) for ids in echo.tokenizer.encode(lines)]
    assert [t.log_prob for t in found] == expected


def test_one_line_out_for_each_line_in_whatever_it_holds(echo):
    found = echo.translate(ODD_LINES)
    assert len(found) == len(ODD_LINES)
    assert all(len(t.text.splitlines()) <= 1 for t in found)
    for line, translation in zip(ODD_LINES, found, strict=True):
        if not line.strip():
            assert translation == EMPTY
    assert found[0] == found[10]
    assert found[5].text == "weg see alt und"


def test_nothing_is_decoded_for_empty_lines(echo):
    assert echo.translate(["", " ", "\n"]) == [EMPTY] * 3
    assert echo.translate([]) == []
    assert echo.decoder.batches == []


def test_a_bucket_holds_a_line_by_its_own_length_alone(echo):
    echo.translate(sentences(50))
    lengths = {bucket: {len(s) for _, batch in group for s in batch} for bucket, group in grouped(echo.decoder.batches)}
    assert len(lengths) == 2
    for bucket, found in lengths.items():
        assert found == {n for n in found if bucket == bucket_of(echo.decoder.buckets, n)}
    for bucket, group in grouped(echo.decoder.batches):  # all but the last batch of a bucket are full
        assert all(len(batch) == bucket.rows for _, batch in list(group)[:-1])


def grouped(batches):
    bucket = operator.itemgetter(0)
    return [(key, list(group)) for key, group in itertools.groupby(sorted(batches, key=bucket), key=bucket)]


def test_a_long_line_is_cut_between_sentences_and_joined_again(echo, caplog):
    long = " ".join(sentences(12))
    with caplog.at_level(logging.WARNING):
        found = echo.translate(["haus", long, "tür", long])
    assert [t.text for t in found] == ["haus", long, "tür", long]
    ids = echo.tokenizer.encode([long])[0]
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith(f"line 2 has {len(ids)} tokens, more than decoding.max_source_length=24")
    assert caplog.messages[1].startswith("line 4 has")
    pieces = [echo.tokenizer.decode([s[:-1]])[0] for _, batch in echo.decoder.batches for s in batch]
    assert all(piece.endswith(".") for piece in pieces if piece not in ("haus", "tür"))
    assert found[1].log_prob == -float(len(ids))  # of all pieces together


@pytest.mark.parametrize(
    "long",
    [
        " ".join(WORDS * 8),  # one sentence: cut between words
        "haus. " + " ".join(WORDS * 5) + ". tür. " + "Haus! " * 30 + "Baum? weg…",
        "haus " + "x" * 150 + " tür. " + "🙂" * 40,  # a word that does not fit: cut anywhere
        "  haus.   " * 30,
        "。".join(["haus"] * 30),
    ],
)
def test_no_character_of_a_long_line_is_lost(echo, long):
    (found,) = echo.translate([long])
    assert found.text.replace(" ", "") == long.replace(" ", "")
    assert "\ufffd" not in found.text  # that is: no character was cut in two
    if "x" not in long and "。" not in long:
        assert found.text == single_spaced(long)
    lengths = [len(s) for _, batch in echo.decoder.batches for s in batch]
    assert max(lengths) <= CONFIG.max_source_length
    assert len(lengths) > 1 and sum(lengths) / len(lengths) > CONFIG.max_source_length / 3  # no needless cuts


def test_the_longest_line_that_fits_is_left_whole(echo, caplog):
    fits = next(
        text
        for text in (" ".join((WORDS * 3)[:n]) + "x" * m for n in range(1, 31) for m in range(3))
        if len(echo.tokenizer.encode([text])[0]) == CONFIG.max_source_length - 1
    )
    with caplog.at_level(logging.WARNING):
        assert echo.translate([fits])[0].text == fits
        assert not caplog.messages
        echo.translate([fits + " haus"])
        assert len(caplog.messages) == 1


def test_a_stream_is_read_a_window_at_a_time_and_lines_are_counted_on(echo, monkeypatch, caplog):
    monkeypatch.setattr(module, "WINDOW_LINES", 4)
    long = " ".join(WORDS * 4)
    taken = []

    def endless():
        for number in itertools.count(1):
            taken.append(number)
            yield long if number == 6 else f"haus {'tür ' * (number % 3)}"

    stream = echo.stream(endless())
    with caplog.at_level(logging.WARNING):
        first = [next(stream) for _ in range(4)]
        assert len(taken) == 4
        first += [next(stream) for _ in range(2)]
    assert len(taken) == 8
    assert first[5].text == long and first[0].text == "haus tür"
    assert [m.split(" has")[0] for m in caplog.messages] == ["line 6"]


# With a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parameters(tokenizer):
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    return jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, jax.jit(lambda: init_parameters(model, 2))())


@pytest.fixture(scope="module")
def translator(tokenizer, parameters) -> Translator:
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    translator = Translator([model], make_mesh(MeshConfig(), jax.devices()[:1]), tokenizer, CONFIG)
    translator.set_parameters(parameters)
    return translator


LINES = [*sentences(10), *ODD_LINES, *sentences(6, 3, seed=2), " ".join(sentences(5, seed=3))]


@pytest.fixture(scope="module")
def translated(translator) -> list[Translation]:
    return translator.translate(LINES)


def test_translations_of_a_model_are_lines_of_text(translator, translated):
    assert len(translated) == len(LINES)
    for line, translation in zip(LINES, translated, strict=True):
        assert len(translation.text.splitlines()) <= 1
        assert np.isfinite(translation.log_prob)
        assert (translation.log_prob == 0.0) == (not line.strip())
    assert len({t.text for t in translated}) > 10  # the source matters


def test_a_translation_depends_neither_on_its_company_nor_on_order(translator, translated):
    order = list(range(len(LINES)))
    random.Random(0).shuffle(order)
    assert translator.translate([LINES[i] for i in order]) == [translated[i] for i in order]
    for i in (0, 5, 10, 14, len(LINES) - 1):
        assert translator.translate([LINES[i]]) == [translated[i]]
    assert translator.translate([LINES[3]] * 9) == [translated[3]] * 9


def test_no_more_shapes_are_compiled_than_there_are_buckets(translator, translated):
    assert translated
    assert set(translator.decoder.compile_seconds) == set(translator.decoder.buckets)
    assert len(translator.decoder.buckets) == 2


def test_eight_devices_translate_as_one(tokenizer, parameters, translated):
    """Parameters and heads split in two, the batch in four."""
    model = Transformer(MODEL_CONFIG, tokenizer.vocab_size)
    sharded = Translator([model], make_mesh(MeshConfig(2, 2, 2)), tokenizer, CONFIG)
    sharded.set_parameters(parameters)
    found = sharded.translate(LINES)
    assert [t.text for t in found] == [t.text for t in translated]
    np.testing.assert_allclose([t.log_prob for t in found], [t.log_prob for t in translated], rtol=1e-4, atol=1e-4)


def test_a_broken_model_still_gives_a_line_for_each_line(translator, parameters):
    translator.set_parameters(jax.tree.map(lambda p: p * np.nan, parameters))
    try:
        found = translator.translate(["haus", "", "tür und"])
    finally:
        translator.set_parameters(parameters)
    assert [t.text for t in found] == ["", "", ""]


@pytest.fixture(scope="module")
def run(tokenizer, parameters, tmp_path_factory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("run")
    (folder / "given.model").write_bytes(tokenizer.model)
    run = RunDirectory.create(folder / "run", Config(model=MODEL_CONFIG, decoding=CONFIG))
    run.install_tokenizer(folder / "given.model")
    with Checkpointer(run) as checkpointer:
        for step, factor in ((1, 1.0), (2, 0.0)):
            checkpointer.save(step, {"parameters": jax.tree.map(lambda p, f=factor: p * f, parameters)}, metric=-step)
    return run


def test_the_translator_of_a_run_directory(run, translated):
    """The best checkpoint is the first; its short lines alone, for the sake of one compilation less."""
    short = [i for i, line in enumerate(LINES) if 0 < len(line) < 12]
    loaded = Translator.load(run.path)
    assert [t.text for t in loaded.translate([LINES[i] for i in short])] == [translated[i].text for i in short]
    assert loaded.config == CONFIG


def test_what_a_run_directory_lacks_is_named(run, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: holds no run \(no config.json\)"):
        Translator.load(tmp_path / "nowhere")
    other = RunDirectory.create(tmp_path / "other", Config(model=MODEL_CONFIG))
    with pytest.raises(InputError, match=r"tokenizer.model: is missing"):
        Translator.load(other.path)
    other.install_tokenizer(run.tokenizer_path)
    with pytest.raises(InputError, match="no finished checkpoint"):
        Translator.load(other.path)

"""The sentences of the embedded corpus: hand-written pairs, held-out values, distinctness."""

import collections
import hashlib
import itertools
import re

import pytest

from tfm.data import demo_corpus, demo_grammar
from tfm.data import demo_lexicon as words
from tfm.data.demo_grammar import CATEGORIES, FRAMES, KINDS, count_sentences, sentences
from tfm.data.demo_values import CURRENCIES, SPLITS, Amount, Date, Number, Ordinal, Time

EUR, USD, CHF, GBP = CURRENCIES


def fill(start: str, value, **chosen: str) -> tuple[str, str]:
    """The pair that the one frame with these words in it makes; words are given in English."""
    (frame,) = (frame for frame in FRAMES if start in frame.en and frame.slots.keys() == chosen.keys())
    slots = {}
    for name, english in chosen.items():
        (slots[name],) = (
            word
            for word in frame.slots[name]
            if english in (getattr(word, field) for field in ("en", "past", "base") if hasattr(word, field))
        )
    return frame.fill(value, slots)[:2]


@pytest.mark.parametrize(
    ("pair", "en", "de"),
    [
        (
            fill(
                "{things.en} {when.en}", Number(312), who="Anna", verb="bought", things="apples", when="at the market"
            ),
            "Anna bought three hundred and twelve apples at the market.",
            "Anna kaufte auf dem Markt dreihundertzwölf Äpfel.",
        ),
        (
            fill("Did", Number(40), who="my sister", verb="sell", things="plates"),
            "Did my sister really sell forty plates?",
            "Hat meine Schwester wirklich vierzig Teller verkauft?",
        ),
        (
            fill("came back with", Number(2), who="the boy", things="books"),
            "The boy came back with two books.",
            "Der Junge kam mit zwei Büchern zurück.",
        ),
        (
            fill("There are", Number(99), things="flowers", where="on the island"),
            "There are ninety-nine flowers on the island.",
            "Auf der Insel gibt es neunundneunzig Blumen.",
        ),
        (fill("is {v.en}", Number(1), label="the result"), "The result is one.", "Das Ergebnis lautet eins."),
        (
            fill("wins", Ordinal(103), winner="customer", object="clock"),
            "The one hundred and third customer wins a clock.",
            "Der einhundertdritte Kunde gewinnt eine Uhr.",
        ),
        (
            fill("{who.en} {deed.past} the", Ordinal(7), who="Felix", deed="found", object="letter"),
            "Felix found the seventh letter.",
            "Felix fand den siebten Brief.",
        ),
        (
            fill("{who.en} {deed.past} the", Ordinal(58), who="Felix", deed="saw", object="picture"),
            "Felix saw the fifty-eighth picture.",
            "Felix sah das achtundfünfzigste Bild.",
        ),
        (
            fill("After", Ordinal(3), trial="lap", who="the girl", end="gave up"),
            "After the third lap the girl gave up.",
            "Nach der dritten Runde gab das Mädchen auf.",
        ),
        (
            fill("owner", Ordinal(1), object="boat", fortune="rich"),
            "The owner of the first boat is rich.",
            "Der Besitzer des ersten Bootes ist reich.",
        ),
        (
            fill("takes place", Date(3, 3, numeric=True, weekday=1), event="concert", city="Cologne"),
            "The concert takes place on Tuesday, March 3, in Cologne.",
            "Das Konzert findet am Dienstag, dem 3. März, in Köln statt.",
        ),
        (
            fill("flying", Date(5, 21), who="the farmer", country="Spain"),
            "The farmer is flying to Spain on the twenty-first of May.",
            "Der Bauer fliegt am einundzwanzigsten Mai nach Spanien.",
        ),
        (
            fill("On {v.en}", Date(3, 3, numeric=True, year=1987), who="my brother", deed="lost", object="table"),
            "On March 3, 1987, my brother lost a table.",
            "Am 3. März 1987 verlor mein Bruder einen Tisch.",
        ),
        (
            fill("since", Date(11, 12), who="Emma", city="Vienna"),
            "Emma has been living in Vienna since the twelfth of November.",
            "Emma wohnt seit dem zwölften November in Wien.",
        ),
        (
            fill("Does", Time(3, 30), vehicle="train", city="Munich"),
            "Does the train to Munich leave at half past three?",
            "Fährt der Zug nach München um halb vier ab?",
        ),
        (
            fill("{routine.en}", Time(8, 45), who="Julia", routine="goes home", habit="on Sundays"),
            "Julia goes home at quarter to nine on Sundays.",
            "Julia geht sonntags um Viertel vor neun nach Hause.",
        ),
        (
            fill("already", Time(1, 0), who="the baker", interruption="woke up"),
            "It was already one o'clock when the baker woke up.",
            "Es war schon ein Uhr, als der Bäcker aufwachte.",
        ),
        (
            fill("costs", Amount(1, 20, EUR), object="key"),
            "The key costs one euro and twenty cents.",
            "Der Schlüssel kostet einen Euro und zwanzig Cent.",
        ),
        (
            fill("{gift.en}", Amount(90, 0, GBP), who="Anna", gift="owed", whom="the farmer"),
            "Anna owed the farmer ninety pounds.",
            "Anna schuldete dem Bauern neunzig Pfund.",
        ),
        (
            fill("{payment.en}", Amount(5, 0, CHF), who="the girl", payment="spent", past="last Monday"),
            "The girl spent five Swiss francs last Monday.",
            "Das Mädchen gab letzten Montag fünf Schweizer Franken aus.",
        ),
        (
            fill("came back with {v.en}.", Amount(1, 0, USD), who="Lukas"),
            "Lukas came back with one US dollar.",
            "Lukas kam mit einem US-Dollar zurück.",
        ),
    ],
)
def test_hand_written_pairs(pair, en, de):
    assert pair == (en, de)


def test_every_word_has_one_translation_in_either_direction():
    for frame in FRAMES:
        for options in frame.slots.values():
            for side in ("en", "de", "past", "participle", "base", "de_past", "de_participle"):
                texts = [getattr(word, side) + getattr(word, "rest", "") for word in options if hasattr(word, side)]
                assert len(set(texts)) == len(texts)
    for nouns in (words.OBJECTS, words.TRIALS, words.EVENTS, words.VEHICLES):
        assert {noun.gender for noun in nouns} == set("mfn")


def test_english_articles_need_no_an():
    assert not [noun.en for noun in words.OBJECTS if noun.en[0] in "aeiou"]


@pytest.fixture(scope="module")
def drawn():
    sizes = {"train": 20_000, "validation": 1_000, "test": 1_000}
    return {split: list(sentences(split, sizes[split], seed=0)) for split in SPLITS}


def test_translation_is_a_function_both_ways(drawn):
    everything = [pair for pairs in drawn.values() for pair in pairs]
    assert len({pair.en for pair in everything}) == len({pair.de for pair in everything}) == len(everything)


def test_values_are_held_out_by_value(drawn):
    keys = {split: {key for pair in pairs for key in pair.keys} for split, pairs in drawn.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not keys[one] & keys[other]
    assert (
        {key[0] for key in keys["test"]} == {key[0] for key in keys["train"]} == {"integer", "date", "time", "amount"}
    )


_NUMBER = re.findall(
    r"\w+",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand",
)
_WORDS = rf"(?:\b(?:{'|'.join(_NUMBER)}|and (?={'|'.join(_NUMBER)}))\b[ -]?)+"
_MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
_VALUES = {  # the side to look at, and all of the value
    "number": ("en", rf"{_WORDS}"),
    "ordinal": ("de", r"\b(?:[Dd](?:er|ie|as)|den|dem|des) ([a-zäöüß]+t)en? "),
    "date": ("en", rf"(?:{_MONTHS}) \d+|the \w+(?:-\w+)? of (?:{_MONTHS})"),
    "time": ("en", r"\w+ o'clock|[\w-]+(?: minutes?)? (?:past|to) [a-z]+"),
    "money": ("en", rf"({_WORDS})(?:euros?|US dollars?|Swiss francs?|pounds?)((?: and {_WORDS}(?=cent|rap|pen))?)"),
}


def values_read(pairs) -> dict[str, set[str | tuple[str, ...]]]:
    """The values that stand in the sentences, as text, found without what the generator says of them."""
    found = collections.defaultdict(set)
    for pair in pairs:
        side, pattern = _VALUES[pair.category]
        values = re.findall(pattern, getattr(pair, side))
        assert len(values) == 1, pair
        found[pair.category].add(values[0])
    return found


def test_values_read_from_test_sentences_never_stand_in_training_sentences(drawn):
    train, test = values_read(drawn["train"]), values_read(drawn["test"])
    for category in CATEGORIES:
        assert len(test[category]) >= 25
        assert not train[category] & test[category]


def test_all_regular_forms_of_time_are_tested(drawn):
    times = collections.Counter(
        word
        for pair in drawn["test"]
        if pair.category == "time"
        for word in ("Viertel", "Minuten nach", "Minuten vor")
        if word in pair.de
    )
    assert len(times) == 3
    hours = {key[1] for split in SPLITS for pair in drawn[split] for key in pair.keys if key[0] == "time"}
    assert hours == set(range(1, 13))


def test_categories_are_balanced_and_sentences_short(drawn):
    assert collections.Counter(pair.category for pair in drawn["test"]) == dict.fromkeys(CATEGORIES, 200)
    assert max(len(pair.en.split()) for pair in drawn["train"]) <= 25


def test_every_word_of_the_test_split_is_in_training_but_for_values(drawn):
    def vocabulary(split, language):
        return {word for pair in drawn[split] for word in re.findall(r"[^\W\d_]+", getattr(pair, language))}

    assert vocabulary("test", "en") <= vocabulary("train", "en")
    unseen = vocabulary("test", "de") - vocabulary("train", "de")
    assert unseen  # compounds such as viertausendsiebenhundertelf
    assert all(re.search("hundert|tausend|und|t(e|en)$", word) for word in unseen)


def test_every_frame_and_word_occurs_in_training(drawn):
    text = "\n".join(pair.en.lower() for pair in drawn["train"])
    for frame in FRAMES:
        for name, options in frame.slots.items():
            field = re.search(rf"{{{name}\.(\w+)}}", frame.en)[1]
            assert all(getattr(word, field).lower() in text for word in options)
        pattern = "".join(
            re.escape(part) if i % 2 == 0 else ".+" for i, part in enumerate(re.split("({.*?})", frame.en))
        )
        assert re.search(f"^{pattern.lower()}$", text, re.MULTILINE), frame.en


def test_at_least_ten_million_distinct_sentences():
    assert count_sentences() == sum(frame.count for frame in FRAMES) >= 10**7


def test_the_count_is_of_distinct_sentences():
    kinds = {
        "number": {Number(n).en for n in range(1, 10000)},
        "counted": {Number(n).en for n in range(2, 10000) if n % 100 != 1},
        "ordinal": {Ordinal(n).en for n in range(1, 1000)},
        "time": {Time(hour, minute).en for hour in range(1, 13) for minute in range(60)},
        "day": {
            Date(*day, numeric, weekday=weekday).en
            for day in demo_grammar._DAYS
            for numeric in (False, True)
            for weekday in (None, *range(7))
        },
    }
    for kind, texts in kinds.items():
        assert KINDS[kind].count == len(texts)
    divided = {(units, cents) for units in range(1, 1000) for cents in range(100) if units == 1 or units % 100 != 1}
    whole = {(units, 0) for units in range(1, 10000) if units == 1 or units % 100 != 1}
    assert KINDS["amount"].count == 4 * len(divided | whole)
    assert KINDS["past date"].count == 365 * 320 * 2
    for frame in FRAMES:  # all that one value gives
        filled = [dict(zip(frame.slots, choice, strict=True)) for choice in itertools.product(*frame.slots.values())]
        filled = [slots for slots in filled if "whom" not in slots or slots["who"] is not slots["whom"]]
        value = {"ordinal": Ordinal(5), "time": Time(5, 5), "amount": Amount(5, 5, EUR)}.get(frame.kind, Number(5))
        value = Date(5, 5) if frame.category == "date" else value
        assert len({frame.fill(value, slots).en for slots in filled}) * KINDS[frame.kind].count == frame.count


def test_draws_depend_on_the_seed_alone():
    assert list(sentences("test", 50, seed=3)) == list(sentences("test", 50, seed=3))
    assert list(sentences("test", 50, seed=3)) != list(sentences("test", 50, seed=4))


def test_the_version_stands_for_these_sentences():
    text = "".join(f"{pair.en}\t{pair.de}\n" for split in SPLITS for pair in sentences(split, 1000, seed=0))
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    assert (str(demo_corpus.DemoTranslation.VERSION), digest) == ("1.1.0", "3f7c75d244be8f02"), (
        "the corpus has changed: raise DemoTranslation.VERSION, so that no set prepared earlier is used on, and "
        f"write {digest} here"
    )

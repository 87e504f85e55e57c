"""The values of the embedded corpus in words: read back, and against hand-written forms."""

import collections
import re

import pytest

from tfm.data import demo_values
from tfm.data.demo_values import CURRENCIES, Amount, Date, Number, Time

EUR, USD, CHF, GBP = CURRENCIES

# An independent reading of number words: what stands in a sentence must be the number that was meant.

ENGLISH_UNITS, ENGLISH_TENS, GERMAN_UNITS, GERMAN_TENS = (
    line.split()
    for line in (
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen",
        "zero ten twenty thirty forty fifty sixty seventy eighty ninety",
        "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn "
        "siebzehn achtzehn neunzehn",
        "null zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig",
    )
)


def read_english(text: str) -> int:
    total = group = 0
    for word in text.replace("-", " ").split():
        if word == "hundred":
            group *= 100
        elif word == "thousand":
            total, group = total + group * 1000, 0
        elif word != "and":
            group += ENGLISH_UNITS.index(word) if word in ENGLISH_UNITS else 10 * ENGLISH_TENS.index(word)
    return total + group


def read_german(word: str) -> int:
    total = 0
    for name, size in (("tausend", 1000), ("hundert", 100)):
        if name in word:
            before, word = word.split(name)
            total += GERMAN_UNITS.index(before) * size
    if "und" in word:
        unit, tens = word.split("und")
        return total + GERMAN_UNITS.index(unit) + 10 * GERMAN_TENS.index(tens)
    word = {"": "null", "eins": "ein"}.get(word, word)
    return total + (GERMAN_UNITS.index(word) if word in GERMAN_UNITS else 10 * GERMAN_TENS.index(word))


def test_every_cardinal_reads_back_in_both_languages():
    for n in range(1, 10000):
        assert read_english(demo_values.english_cardinal(n)) == n
        assert read_german(demo_values.german_cardinal(n)) == n


def test_every_german_ordinal_is_its_cardinal_with_the_right_ending():
    irregular = {1: "erst", 3: "dritt", 7: "siebt", 8: "acht"}
    for n in range(1, 1000):
        last = n % 100
        if last in irregular:
            expected = re.sub(r"(eins|drei|sieben|acht)$", "", demo_values.german_cardinal(n)) + irregular[last]
        else:
            expected = demo_values.german_cardinal(n) + ("t" if 1 <= last < 20 else "st")
        assert demo_values.german_ordinal_stem(n) == expected


def test_every_english_ordinal_is_its_cardinal_with_the_right_ending():
    irregular = dict(one="first", two="second", three="third", five="fifth", eight="eighth", nine="ninth")
    irregular["twelve"] = "twelfth"
    for n in range(1, 1000):
        *start, last = re.split(r"([ -])", demo_values.english_cardinal(n))
        ending = irregular.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th")
        assert demo_values.english_ordinal(n) == "".join(start) + ending


@pytest.mark.parametrize(
    ("n", "en", "de"),
    [
        (1, "one", "eins"),
        (16, "sixteen", "sechzehn"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (100, "one hundred", "einhundert"),
        (101, "one hundred and one", "einhunderteins"),
        (1100, "one thousand one hundred", "eintausendeinhundert"),
        (4711, "four thousand seven hundred and eleven", "viertausendsiebenhundertelf"),
    ],
)
def test_a_number_by_itself(n, en, de):
    assert (Number(n).en, Number(n).de) == (en, de)


def test_one_agrees_with_its_noun():
    table = [[demo_values.german_count(1, gender, case) for gender in "mfn"] for case in demo_values._EIN]
    assert table == [["ein", "eine", "ein"], ["einen", "eine", "ein"], ["einem", "einer", "einem"]]
    assert demo_values.german_count(21, "m", "accusative") == "einundzwanzig"
    with pytest.raises(ValueError, match="101"):
        demo_values.german_count(101, "m", "accusative")


@pytest.mark.parametrize(
    ("amount", "en", "accusative", "dative"),
    [
        (
            Amount(3, 20, EUR),
            "three euros and twenty cents",
            "drei Euro und zwanzig Cent",
            "drei Euro und zwanzig Cent",
        ),
        (Amount(1, 1, EUR), "one euro and one cent", "einen Euro und einen Cent", "einem Euro und einem Cent"),
        (Amount(1, 1, GBP), "one pound and one penny", "ein Pfund und einen Penny", "einem Pfund und einem Penny"),
        (Amount(5, 3, GBP), "five pounds and three pence", "fünf Pfund und drei Pence", "fünf Pfund und drei Pence"),
        (Amount(1, 0, USD), "one US dollar", "einen US-Dollar", "einem US-Dollar"),
        (Amount(240, 0, USD), "two hundred and forty US dollars", "zweihundertvierzig US-Dollar", None),
        (Amount(1, 5, CHF), "one Swiss franc and five rappen", "einen Schweizer Franken und fünf Rappen", None),
        (Amount(12, 1, CHF), "twelve Swiss francs and one rappen", "zwölf Schweizer Franken und einen Rappen", None),
    ],
)
def test_amounts(amount, en, accusative, dative):
    assert (amount.en, amount.accusative) == (en, accusative)
    assert dative is None or amount.dative == dative


@pytest.mark.parametrize(
    ("hour", "minute", "en", "de"),
    [
        (1, 0, "one o'clock", "ein Uhr"),
        (12, 0, "twelve o'clock", "zwölf Uhr"),
        (9, 15, "quarter past nine", "Viertel nach neun"),
        (1, 15, "quarter past one", "Viertel nach eins"),
        (3, 30, "half past three", "halb vier"),
        (12, 30, "half past twelve", "halb eins"),
        (3, 25, "twenty-five past three", "fünf vor halb vier"),
        (3, 35, "twenty-five to four", "fünf nach halb vier"),
        (8, 45, "quarter to nine", "Viertel vor neun"),
        (12, 45, "quarter to one", "Viertel vor eins"),
        (4, 1, "one minute past four", "eine Minute nach vier"),
        (4, 59, "one minute to five", "eine Minute vor fünf"),
        (11, 20, "twenty minutes past eleven", "zwanzig Minuten nach elf"),
        (12, 48, "twelve minutes to one", "zwölf Minuten vor eins"),
    ],
)
def test_times(hour, minute, en, de):
    assert (Time(hour, minute).en, Time(hour, minute).de) == (en, de)


@pytest.mark.parametrize(
    ("date", "en", "de"),
    [
        (Date(3, 3), "the third of March", "dritten März"),
        (Date(5, 21), "the twenty-first of May", "einundzwanzigsten Mai"),
        (Date(3, 3, numeric=True), "March 3", "3. März"),
        (Date(3, 3, weekday=1), "Tuesday, the third of March", "Dienstag, dem dritten März"),
        (Date(3, 3, numeric=True, weekday=1), "Tuesday, March 3", "Dienstag, dem 3. März"),
        (Date(12, 7, numeric=True, year=1987), "December 7, 1987", "7. Dezember 1987"),
        (Date(1, 1, year=1905), "the first of January, nineteen oh-five", "ersten Januar neunzehnhundertfünf"),
        (Date(2, 29, numeric=True), "February 29", "29. Februar"),
        (Date(7, 30, year=2017), "the thirtieth of July, twenty seventeen", "dreißigsten Juli zweitausendsiebzehn"),
        (Date(8, 8, year=1800), "the eighth of August, eighteen hundred", "achten August achtzehnhundert"),
    ],
)
def test_dates(date, en, de):
    assert (date.en, date.de) == (en, de)


def test_times_that_german_names_in_a_way_of_their_own_are_in_training():
    exceptions = [("time", hour, minute) for hour in range(1, 13) for minute in (25, 30, 35)] + [("time", 1, 0)]
    assert {demo_values.split_of(key) for key in exceptions} == {"train"}
    others = [demo_values.split_of(("time", hour, minute)) for hour in range(1, 13) for minute in range(60)]
    assert others.count("test") >= 30 and others.count("validation") >= 30


def test_words_that_values_are_made_of_are_in_training():
    for n in [*range(1, 21), *range(30, 100, 10)]:
        assert demo_values.split_of(("integer", n)) == "train"


def test_each_split_has_a_share_of_the_values():
    shares = collections.Counter(demo_values.split_of(("integer", n)) for n in range(100, 10000))
    assert all(700 < shares[split] < 900 for split in ("validation", "test"))

"""The sentences of the embedded corpus: frames in both languages, drawn so that each split keeps to its own values.

A frame is a sentence in English and in German with the same slots; `{noun.weak}` and the like take a form of the word
that fills the slot, and `v` is the value: a number, an ordinal, a date, a time or an amount of money.
"""

from __future__ import annotations

import calendar
import dataclasses
import math
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from tfm.data import demo_lexicon as words
from tfm.data.demo_values import (
    CURRENCIES,
    WEEKDAYS,
    Amount,
    Date,
    Key,
    Number,
    Ordinal,
    Split,
    Time,
    Value,
    split_of,
)

CATEGORIES = ("number", "ordinal", "date", "time", "money")

_LARGEST = 9999
_LARGEST_ORDINAL = 999
_LARGEST_WITH_CENTS = 999
_YEARS = range(1700, 2020)
_DAYS = tuple((month, day) for month in range(1, 13) for day in range(1, calendar.monthrange(2000, month)[1] + 1))
_YEARLY_DAYS = tuple(day for day in _DAYS if day != (2, 29))


class Sentence(NamedTuple):
    """A pair, its category, and the values in it."""

    en: str
    de: str
    category: str
    keys: tuple[Key, ...]


def _countable(n: int) -> bool:
    """Whether n may stand before a noun: not 101, 201, …, whose German has no one form there."""
    return n == 1 or n % 100 != 1


def _magnitude(rng: random.Random, largest: int, shares: Sequence[float]) -> int:
    """1 to `largest`, below 100, 1000 or 10000 with these shares."""
    (digits,) = rng.choices(range(2, 2 + len(shares)), shares)
    return rng.randint(1 if digits == 2 else 10 ** (digits - 1), min(largest, 10**digits - 1))


def _number(rng: random.Random) -> Number:
    return Number(_magnitude(rng, _LARGEST, (0.3, 0.4, 0.3)))


def _counted(rng: random.Random) -> Number | None:
    number = _number(rng)
    return number if number.n > 1 and _countable(number.n) else None


def _ordinal(rng: random.Random) -> Ordinal:
    return Ordinal(_magnitude(rng, _LARGEST_ORDINAL, (0.5, 0.5)))


def _time(rng: random.Random) -> Time:
    (minutes,) = rng.choices(((0,), (15, 45), (25, 30, 35), range(1, 60)), (0.1, 0.2, 0.3, 0.4))
    return Time(rng.randint(1, 12), rng.choice(minutes))


def _amount(rng: random.Random) -> Amount | None:
    units = _magnitude(rng, _LARGEST, (0.6, 0.3, 0.1))
    cents = rng.randint(1, 99) if units <= _LARGEST_WITH_CENTS and rng.random() < 0.6 else 0
    return Amount(units, cents, rng.choice(CURRENCIES)) if _countable(units) else None


def _date_without_year(numeric: bool, weekday: bool) -> Callable[[random.Random], Date]:
    return lambda rng: Date(*rng.choice(_DAYS), numeric, weekday=rng.randrange(7) if weekday else None)


def _date_with_year(numeric: bool) -> Callable[[random.Random], Date]:
    return lambda rng: Date(*rng.choice(_YEARLY_DAYS), numeric, year=rng.choice(_YEARS))


class _Kind(NamedTuple):
    """What a frame can hold: ways to draw a value (None is a miss), taken with equal chance, and how many there are.

    Splits thin a way's values out without changing how often the way is taken."""

    ways: tuple[Callable[[random.Random], Value | None], ...]
    count: int


_WHOLE = sum(_countable(n) for n in range(1, _LARGEST + 1))
_DIVIDED = sum(_countable(n) for n in range(1, _LARGEST_WITH_CENTS + 1)) * 99
_PLAIN_DAYS, _DATED = 2 * len(_DAYS), 2 * len(_YEARLY_DAYS) * len(_YEARS)
_BARE_DAY = (_date_without_year(False, False), _date_without_year(True, False))
_WEEKDAY = (_date_without_year(False, True), _date_without_year(True, True))
_WITH_YEAR = (_date_with_year(False), _date_with_year(True))
KINDS: Mapping[str, _Kind] = {
    "number": _Kind((_number,), _LARGEST),
    "counted": _Kind((_counted,), _WHOLE - 1),
    "ordinal": _Kind((_ordinal,), _LARGEST_ORDINAL),
    "time": _Kind((_time,), 12 * 60),
    "amount": _Kind((_amount,), len(CURRENCIES) * (_WHOLE + _DIVIDED)),
    "day": _Kind(_BARE_DAY + _WEEKDAY, _PLAIN_DAYS * (1 + len(WEEKDAYS))),
    "bare day": _Kind(_BARE_DAY, _PLAIN_DAYS),
    "past date": _Kind(_WITH_YEAR, _DATED),
    "past day": _Kind(_BARE_DAY + _WEEKDAY + _WITH_YEAR, _PLAIN_DAYS * (1 + len(WEEKDAYS)) + _DATED),
}


@dataclasses.dataclass(frozen=True)
class Frame:
    """A sentence with slots. Slots `who` and `whom` are never the same person."""

    category: str
    kind: str
    en: str
    de: str
    slots: Mapping[str, Sequence[Any]]

    @property
    def count(self) -> int:
        """How many sentences the frame can make."""
        choices = math.prod(len(options) for options in self.slots.values()) * KINDS[self.kind].count
        return choices * (len(words.PEOPLE) - 1) // len(words.PEOPLE) if "whom" in self.slots else choices

    def fill(self, value: Value, words_by_slot: Mapping[str, Any]) -> Sentence:
        en, de = (text.format(v=value, **words_by_slot) for text in (self.en, self.de))
        return Sentence(en[0].upper() + en[1:], de[0].upper() + de[1:], self.category, value.keys)

    def draw(self, rng: random.Random, split: Split) -> Sentence:
        chosen = {name: rng.choice(options) for name, options in self.slots.items()}
        while "whom" in chosen and chosen["whom"] is chosen["who"]:
            chosen["whom"] = rng.choice(self.slots["whom"])
        return self.fill(draw_value(rng, self.kind, split), chosen)


def draw_value(rng: random.Random, kind: str, split: Split) -> Value:
    """A value of this kind that may occur in this split."""
    way = rng.choice(KINDS[kind].ways)
    while True:
        value = way(rng)
        if value is not None and all(split_of(key) == split for key in value.keys):
            return value


_SLOTS: Mapping[str, Sequence[Any]] = {
    "bound": words.BOUNDS,
    "building": words.BUILDINGS,
    "city": words.CITIES,
    "colour": words.COLOURS,
    "country": words.COUNTRIES,
    "deed": words.VERBS[:6],
    "end": words.ENDINGS,
    "event": words.EVENTS,
    "fortune": words.FORTUNES,
    "gift": words.GIFTS,
    "habit": words.HABITS,
    "hours": words.HOURS,
    "interruption": words.INTERRUPTIONS,
    "label": words.LABELS,
    "language": words.LANGUAGES,
    "object": words.OBJECTS,
    "past": words.PAST_TIMES,
    "payment": words.PAYMENTS,
    "routine": words.ROUTINES,
    "things": words.THINGS,
    "trade": words.VERBS[:2],
    "trial": words.TRIALS,
    "vehicle": words.VEHICLES,
    "verb": words.VERBS,
    "when": words.PLACES + words.PAST_TIMES,
    "where": words.PLACES,
    "who": words.PEOPLE,
    "whom": words.PEOPLE,
    "winner": words.WINNERS,
}

_FRAMES = """\
number: counted
  {who.en} {verb.past} {v.en} {things.en} {when.en}.
    {who.de} {verb.de_past} {when.de} {v.de} {things.de}.
  {who.en} has {verb.participle} {v.en} {things.en}.
    {who.de} hat {v.de} {things.de} {verb.de_participle}.
  Did {who.en} really {verb.base} {v.en} {things.en}?
    Hat {who.de} wirklich {v.de} {things.de} {verb.de_participle}?
  {who.en} has learned {v.en} {language.en} words.
    {who.de} hat {v.de} {language.de} Wörter gelernt.
  {who.en} came back with {v.en} {things.en}.
    {who.de} kam mit {v.de} {things.dative} zurück.
  There are {v.en} {things.en} {where.en}.
    {where.de} gibt es {v.de} {things.de}.
number: number
  {label.en} is {v.en}.
    {label.de} lautet {v.de}.
  {who.en} is waiting in room {v.en}.
    {who.de} wartet in Zimmer {v.de}.
  {who.en} wrote down the number {v.en}.
    {who.de} schrieb die Zahl {v.de} auf.
ordinal: ordinal
  The {v.en} {winner.en} wins a {object.en}.
    {winner.the} {v.de}e {winner.de} gewinnt {object.a_accusative} {object.oblique}.
  The {v.en} {object.en} is {colour.en}.
    {object.the} {v.de}e {object.de} ist {colour.de}.
  {who.en} {deed.past} the {v.en} {object.en}.
    {who.de} {deed.de_past} {object.the_accusative} {v.de}{object.weak} {object.oblique}.
  Did {who.en} really {deed.base} the {v.en} {object.en}?
    Hat {who.de} wirklich {object.the_accusative} {v.de}{object.weak} {object.oblique} {deed.de_participle}?
  After the {v.en} {trial.en} {who.en} {end.en}.
    Nach {trial.the_dative} {v.de}en {trial.oblique} {end.de} {who.de}{end.rest}.
  The owner of the {v.en} {object.en} is {fortune.en}.
    Der Besitzer {object.the_genitive} {v.de}en {object.genitive} ist {fortune.de}.
date: day
  The {event.en} {bound.en} on {v.en}.
    {event.the} {event.de} {bound.de} am {v.de}.
  The {event.en} takes place on {v.en}{v.pause_en} in {city.en}.
    {event.the} {event.de} findet am {v.de}{v.pause_de} in {city.de} statt.
  {who.en} is flying to {country.en} on {v.en}.
    {who.de} fliegt am {v.de}{v.pause_de} nach {country.de}.
date: bare day
  {who.en} has been living in {city.en} since {v.en}.
    {who.de} wohnt seit dem {v.de} in {city.de}.
date: past day
  On {v.en}{v.pause_en} {who.en} {deed.past} a {object.en}.
    Am {v.de}{v.pause_de} {deed.de_past} {who.de} {object.a_accusative} {object.oblique}.
date: past date
  {who.en} was born in {city.en} on {v.en}.
    {who.de} wurde am {v.de} in {city.de} geboren.
  The {building.en} was opened on {v.en}.
    {building.the} {building.de} wurde am {v.de} eröffnet.
time: time
  The {vehicle.en} to {city.en} leaves at {v.en}.
    {vehicle.the} {vehicle.de} nach {city.de} fährt um {v.de} ab.
  Does the {vehicle.en} to {city.en} leave at {v.en}?
    Fährt {vehicle.the} {vehicle.de} nach {city.de} um {v.de} ab?
  The {vehicle.en} from {city.en} arrives at {v.en} {habit.en}.
    {vehicle.the} {vehicle.de} aus {city.de} kommt {habit.de} um {v.de} an.
  {who.en} {routine.en} at {v.en} {habit.en}.
    {who.de} {routine.de} {habit.de} um {v.de}{routine.rest}.
  It was already {v.en} when {who.en} {interruption.en}.
    Es war schon {v.de}, als {who.de} {interruption.de}.
  The {building.en} {hours.en} at {v.en} {habit.en}.
    {building.the} {building.de} {hours.de} {habit.de} um {v.de}.
  At {v.en} {who.en} {end.en}.
    Um {v.de} {end.de} {who.de}{end.rest}.
money: amount
  The {object.en} costs {v.en}.
    {object.the} {object.de} kostet {v.accusative}.
  {who.en} paid {v.en} for the {object.en}.
    {who.de} zahlte {v.accusative} für {object.the_accusative} {object.oblique}.
  Did {who.en} really pay {v.en} for the {object.en}?
    Hat {who.de} wirklich {v.accusative} für {object.the_accusative} {object.oblique} gezahlt?
  {who.en} {trade.past} the {object.en} for {v.en}.
    {who.de} {trade.de_past} {object.the_accusative} {object.oblique} für {v.accusative}.
  {who.en} {gift.en} {whom.en} {v.en}.
    {who.de} {gift.de} {whom.dative} {v.accusative}.
  {who.en} {payment.en} {v.en} {past.en}.
    {who.de} {payment.de} {past.de} {v.accusative}{payment.rest}.
  For {v.en} you get a {object.en}.
    Für {v.accusative} bekommt man {object.a_accusative} {object.oblique}.
  {who.en} came back with {v.en}.
    {who.de} kam mit {v.dative} zurück.
"""


def _read_frames(table: str) -> Iterator[Frame]:
    """A heading `CATEGORY: KIND`, and below it the frames of both, English above German."""
    lines = iter(table.rstrip("\n").split("\n"))
    for line in lines:
        if not line.startswith(" "):
            category, kind = line.split(": ")
            continue
        names = {name.partition(".")[0] for _, name, _, _ in string.Formatter().parse(line) if name} - {"v"}
        yield Frame(category, kind, line.strip(), next(lines).strip(), {name: _SLOTS[name] for name in sorted(names)})


FRAMES = tuple(_read_frames(_FRAMES))


def count_sentences() -> int:
    """How many distinct sentences there are, all splits together."""
    return sum(frame.count for frame in FRAMES)


def sentences(split: Split, count: int, seed: int) -> Iterator[Sentence]:
    """`count` distinct sentences of a split, the categories in turn; the same for the same seed on every machine."""
    rng = random.Random(f"{seed} {split}")
    frames = [[frame for frame in FRAMES if frame.category == category] for category in CATEGORIES]
    seen: set[str] = set()
    while len(seen) < count:
        sentence = rng.choice(frames[len(seen) % len(CATEGORIES)]).draw(rng, split)
        if sentence.en not in seen:
            seen.add(sentence.en)
            yield sentence

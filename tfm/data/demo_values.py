"""The values that the embedded corpus speaks of, in English and in German words, and the split that each belongs to.

num2words gives the number words and Babel the names of months, weekdays and currencies. What num2words leaves to its
caller is done here: English thousands without their comma, "ein" and its endings before a noun, "einhundertste" beside
"einhunderterste" (it says "hundertste"), and clock times.

A value belongs to one split by a hash of the value itself, whatever sentence it stands in: an integer wherever it is
counted, ordered by, or paid without cents; an amount by its units, and below 100 of them by both its parts; a date by
its day and month, and by its year; a time by its hour and minute. So a number below 100 that is held out may well be
the day, the cents or the minutes of training. The words that all values are made of (integers below 21, round tens) are
in the training split, and so are the clock times that German names in a way of its own.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import hashlib
from typing import Literal

from babel import Locale
from babel.dates import format_date, get_day_names, get_month_names
from babel.numbers import get_currency_name
from num2words import num2words

Split = Literal["train", "validation", "test"]
Key = tuple[str | int, ...]

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
_HELD_OUT_PER_MILLE = 80  # of each of validation and test
_HALF_HOUR_MINUTES = (25, 30, 35)  # German names these by the hour to come

_ENGLISH, _GERMAN = Locale("en"), Locale("de")
WEEKDAYS = tuple((get_day_names(locale=_ENGLISH)[i], get_day_names(locale=_GERMAN)[i]) for i in range(7))
_MONTHS = tuple((get_month_names(locale=_ENGLISH)[i], get_month_names(locale=_GERMAN)[i]) for i in range(1, 13))


def _hash(key: Key) -> int:
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


@functools.cache
def split_of(key: Key) -> Split:
    """The one split in which the value `key` may occur; the same on every machine and in every version of Python."""
    if key[0] == "integer" and (key[1] < 21 or (key[1] < 100 and key[1] % 10 == 0)):
        return "train"
    if key[0] == "time" and (key[2] in _HALF_HOUR_MINUTES or key[1:] == (1, 0)):
        # Exceptions have to be seen to be known: "half past three" is "halb vier", and "one o'clock" not "eins Uhr".
        return "train"
    bucket = _hash(key) % 1000
    return "test" if bucket < _HELD_OUT_PER_MILLE else "validation" if bucket < 2 * _HELD_OUT_PER_MILLE else "train"


@functools.cache
def english_cardinal(n: int) -> str:
    """4711: four thousand seven hundred and eleven."""
    return num2words(n, lang="en").replace(",", "")


@functools.cache
def german_cardinal(n: int) -> str:
    """4711: viertausendsiebenhundertelf; 1 is "eins", and 100 "einhundert", as "one hundred" has its "one"."""
    return num2words(n, lang="de")


@functools.cache
def english_ordinal(n: int) -> str:
    """312: three hundred and twelfth."""
    return num2words(n, lang="en", to="ordinal").replace(",", "")


@functools.cache
def german_ordinal_stem(n: int) -> str:
    """312: dreihundertzwölft, to which the case adds -e or -en."""
    if n in (100, 1000):  # num2words: hundertste, tausendste
        return german_cardinal(n) + "st"
    return num2words(n, lang="de", to="ordinal").removesuffix("e")


_EIN = {
    "nominative": {"m": "ein", "f": "eine", "n": "ein"},
    "accusative": {"m": "einen", "f": "eine", "n": "ein"},
    "dative": {"m": "einem", "f": "einer", "n": "einem"},
}


def german_count(n: int, gender: str, case: str) -> str:
    """The cardinal before a noun: 1 takes the noun's gender and case. Raises ValueError at 101, 201, …, whose form
    before a noun is a matter of taste ("hundertein", "hundertundein", "hunderteins")."""
    if n == 1:
        return _EIN[case][gender]
    if n % 100 == 1:
        raise ValueError(f"{n}: no settled form before a noun")
    return german_cardinal(n)


@dataclasses.dataclass(frozen=True)
class Number:
    """A number by itself ("eins"), or before a plural noun."""

    n: int

    @property
    def keys(self) -> tuple[Key, ...]:
        return (("integer", self.n),)

    @property
    def en(self) -> str:
        return english_cardinal(self.n)

    @property
    def de(self) -> str:
        return german_cardinal(self.n)


@dataclasses.dataclass(frozen=True)
class Ordinal:
    """A rank: the English word, and the German stem that waits for its ending."""

    n: int

    @property
    def keys(self) -> tuple[Key, ...]:
        return (("integer", self.n),)

    @property
    def en(self) -> str:
        return english_ordinal(self.n)

    @property
    def de(self) -> str:
        return german_ordinal_stem(self.n)


@dataclasses.dataclass(frozen=True)
class Date:
    """A day of the year, written in one of five forms; `year` or `weekday` (0 is Monday) belong to some of them."""

    month: int
    day: int
    numeric: bool = False
    weekday: int | None = None
    year: int | None = None

    @property
    def keys(self) -> tuple[Key, ...]:
        year = () if self.year is None else (("integer", self.year),)
        return (("date", self.month, self.day), *year)

    @property
    def en(self) -> str:
        """Tuesday, the third of March; Tuesday, March 3; March 3, 1987; the third of March, nineteen eighty-seven."""
        weekday = "" if self.weekday is None else f"{WEEKDAYS[self.weekday][0]}, "
        if self.numeric:
            return weekday + format_date(self._day(), "MMMM d" + (", y" if self.year else ""), _ENGLISH)
        year = f", {num2words(self.year, lang='en', to='year')}" if self.year else ""
        return f"{weekday}the {english_ordinal(self.day)} of {_MONTHS[self.month - 1][0]}{year}"

    @property
    def de(self) -> str:
        """In the dative, to follow "am": Dienstag, dem dritten März; 3. März 1987."""
        weekday = "" if self.weekday is None else f"{WEEKDAYS[self.weekday][1]}, dem "
        if self.numeric:
            return weekday + format_date(self._day(), "d. MMMM" + (" y" if self.year else ""), _GERMAN)
        year = f" {num2words(self.year, lang='de', to='year')}" if self.year else ""
        return f"{weekday}{german_ordinal_stem(self.day)}en {_MONTHS[self.month - 1][1]}{year}"

    @property
    def pause_en(self) -> str:
        """The comma that closes a date which holds one, where the sentence goes on."""
        return "," if "," in self.en else ""

    @property
    def pause_de(self) -> str:
        return "," if "," in self.de else ""

    def _day(self) -> datetime.date:
        return datetime.date(self.year or 2000, self.month, self.day)  # 2000 has a February 29


@dataclasses.dataclass(frozen=True)
class Time:
    """A time on a twelve-hour clock, hour 1 to 12."""

    hour: int
    minute: int

    @property
    def keys(self) -> tuple[Key, ...]:
        return (("time", self.hour, self.minute),)

    @property
    def en(self) -> str:
        hour, next_hour = english_cardinal(self.hour), english_cardinal(self.hour % 12 + 1)
        named = {
            0: f"{hour} o'clock",
            15: f"quarter past {hour}",
            25: f"twenty-five past {hour}",
            30: f"half past {hour}",
            35: f"twenty-five to {next_hour}",
            45: f"quarter to {next_hour}",
        }
        if self.minute in named:
            return named[self.minute]
        minutes = self.minute if self.minute < 30 else 60 - self.minute
        unit = "minute" if minutes == 1 else "minutes"
        return f"{english_cardinal(minutes)} {unit} " + (f"past {hour}" if self.minute < 30 else f"to {next_hour}")

    @property
    def de(self) -> str:
        hour, next_hour = german_cardinal(self.hour), german_cardinal(self.hour % 12 + 1)
        named = {
            0: f"{german_count(self.hour, 'n', 'nominative')} Uhr",
            15: f"Viertel nach {hour}",
            25: f"fünf vor halb {next_hour}",
            30: f"halb {next_hour}",
            35: f"fünf nach halb {next_hour}",
            45: f"Viertel vor {next_hour}",
        }
        if self.minute in named:
            return named[self.minute]
        minutes = self.minute if self.minute < 30 else 60 - self.minute
        unit = "Minute" if minutes == 1 else "Minuten"
        past = f"nach {hour}" if self.minute < 30 else f"vor {next_hour}"
        return f"{german_count(minutes, 'f', 'nominative')} {unit} {past}"


@dataclasses.dataclass(frozen=True)
class Currency:
    """Names of a currency's unit and of its hundredth: English one and many, German (alike in both), its gender."""

    unit_en: str
    units_en: str
    unit_de: str
    gender: str
    cent_en: str
    cents_en: str
    cent_de: str
    cents_de: str


def _of_babel(code: str, cent_en: str, cents_en: str, cent_de: str) -> Currency:
    one, many = (get_currency_name(code, count, _ENGLISH) for count in (1, 2))
    return Currency(one, many, get_currency_name(code, 1, _GERMAN), "m", cent_en, cents_en, cent_de, cent_de)


CURRENCIES = (
    _of_babel("EUR", "cent", "cents", "Cent"),
    _of_babel("USD", "cent", "cents", "Cent"),
    _of_babel("CHF", "rappen", "rappen", "Rappen"),
    Currency("pound", "pounds", "Pfund", "n", "penny", "pence", "Penny", "Pence"),  # Babel's is "Britisches Pfund"
)


@dataclasses.dataclass(frozen=True)
class Amount:
    """An amount of money; the currency is no part of the value."""

    units: int
    cents: int
    currency: Currency

    @property
    def keys(self) -> tuple[Key, ...]:
        return (("integer", self.units) if not self.cents or self.units >= 100 else ("amount", self.units, self.cents),)

    @property
    def en(self) -> str:
        money = self.currency
        text = f"{english_cardinal(self.units)} {money.unit_en if self.units == 1 else money.units_en}"
        if not self.cents:
            return text
        return f"{text} and {english_cardinal(self.cents)} {money.cent_en if self.cents == 1 else money.cents_en}"

    @property
    def accusative(self) -> str:
        return self._german("accusative")

    @property
    def dative(self) -> str:
        return self._german("dative")

    def _german(self, case: str) -> str:
        money = self.currency
        text = f"{german_count(self.units, money.gender, case)} {money.unit_de}"
        if not self.cents:
            return text
        cent = money.cent_de if self.cents == 1 else money.cents_de
        return f"{text} und {german_count(self.cents, 'm', case)} {cent}"


Value = Number | Ordinal | Date | Time | Amount

"""The words of the embedded corpus with their German forms: gender, cases, plurals, separable verbs.

Every English entry has one German entry and the other way round, so that each sentence has exactly one translation in
either direction. Names of countries, languages and weekdays are Babel's.
"""

from __future__ import annotations

import dataclasses

from babel import Locale

from tfm.data.demo_values import WEEKDAYS


@dataclasses.dataclass(frozen=True)
class Phrase:
    """Words that never change."""

    en: str
    de: str


@dataclasses.dataclass(frozen=True)
class Person:
    """Somebody, article included: nominative and dative."""

    en: str
    de: str
    dative: str


@dataclasses.dataclass(frozen=True)
class Things:
    """A plural without an article: nominative and accusative alike, and dative."""

    en: str
    de: str
    dative: str


@dataclasses.dataclass(frozen=True)
class Noun:
    """A singular noun: nominative and genitive, and `oblique`, the accusative and dative of a weak noun."""

    en: str
    gender: str
    de: str
    genitive: str
    oblique: str

    @property
    def the(self) -> str:
        return {"m": "der", "f": "die", "n": "das"}[self.gender]

    @property
    def the_accusative(self) -> str:
        return {"m": "den", "f": "die", "n": "das"}[self.gender]

    @property
    def the_dative(self) -> str:
        return {"m": "dem", "f": "der", "n": "dem"}[self.gender]

    @property
    def the_genitive(self) -> str:
        return {"m": "des", "f": "der", "n": "des"}[self.gender]

    @property
    def a_accusative(self) -> str:
        return {"m": "einen", "f": "eine", "n": "ein"}[self.gender]

    @property
    def weak(self) -> str:
        """Ending of an ordinal between the definite article and the noun, in the accusative."""
        return "en" if self.gender == "m" else "e"


@dataclasses.dataclass(frozen=True)
class Verb:
    """past, participle and base form; past and participle (with "haben"). Takes an accusative."""

    past: str
    participle: str
    base: str
    de_past: str
    de_participle: str


@dataclasses.dataclass(frozen=True)
class Separable:
    """A verb in one tense, and the part that German puts at the end of the clause, led by its space."""

    en: str
    de: str
    rest: str = ""


def _phrases(text: str) -> tuple[Phrase, ...]:
    return tuple(Phrase(*entry.strip().split("/")) for entry in text.split(";"))


def _nouns(text: str) -> tuple[Noun, ...]:
    fields = (entry.strip().split("/") for entry in text.split(";"))
    return tuple(Noun(*f[:4], oblique=f[4] if len(f) > 4 else f[2]) for f in fields)


def _names(kind: str, codes: str) -> tuple[Phrase, ...]:
    english, german = (getattr(Locale(language), kind) for language in ("en", "de"))
    return tuple(Phrase(english[code], german[code]) for code in codes.split())


PEOPLE = (
    *(Person(name, name, name) for name in ("Anna", "David", "Emma", "Felix", "Julia", "Lukas")),
    Person("my sister", "meine Schwester", "meiner Schwester"),
    Person("my brother", "mein Bruder", "meinem Bruder"),
    Person("the baker", "der Bäcker", "dem Bäcker"),
    Person("the farmer", "der Bauer", "dem Bauern"),
    Person("the boy", "der Junge", "dem Jungen"),
    Person("the girl", "das Mädchen", "dem Mädchen"),
)
THINGS = (
    Things("apples", "Äpfel", "Äpfeln"),
    Things("books", "Bücher", "Büchern"),
    Things("bottles", "Flaschen", "Flaschen"),
    Things("letters", "Briefe", "Briefen"),
    Things("stamps", "Briefmarken", "Briefmarken"),
    Things("chairs", "Stühle", "Stühlen"),
    Things("eggs", "Eier", "Eiern"),
    Things("flowers", "Blumen", "Blumen"),
    Things("pictures", "Bilder", "Bildern"),
    Things("keys", "Schlüssel", "Schlüsseln"),
    Things("plates", "Teller", "Tellern"),
    Things("candles", "Kerzen", "Kerzen"),
)
OBJECTS = _nouns(
    "letter/m/Brief/Briefes; chair/m/Stuhl/Stuhls; table/m/Tisch/Tisches; key/m/Schlüssel/Schlüssels; "
    "lamp/f/Lampe/Lampe; clock/f/Uhr/Uhr; bag/f/Tasche/Tasche; bottle/f/Flasche/Flasche; "
    "book/n/Buch/Buches; picture/n/Bild/Bildes; bicycle/n/Fahrrad/Fahrrads; boat/n/Boot/Bootes"
)
WINNERS = _nouns(
    "visitor/m/Besucher/Besuchers; customer/m/Kunde/Kunden/Kunden; guest/m/Gast/Gastes; reader/m/Leser/Lesers; "
    "passenger/m/Fahrgast/Fahrgastes; child/n/Kind/Kindes"
)
TRIALS = _nouns(
    "attempt/m/Versuch/Versuchs; day/m/Tag/Tages; question/f/Frage/Frage; lap/f/Runde/Runde; "
    "game/n/Spiel/Spiels; week/f/Woche/Woche; year/n/Jahr/Jahres; song/n/Lied/Liedes"
)
EVENTS = _nouns(
    "course/m/Kurs/Kurses; trial/m/Prozess/Prozesses; exhibition/f/Ausstellung/Ausstellung; "
    "meeting/f/Sitzung/Sitzung; conference/f/Tagung/Tagung; concert/n/Konzert/Konzerts; "
    "tournament/n/Turnier/Turniers; festival/n/Fest/Festes"
)
BUILDINGS = _nouns(
    "shop/m/Laden/Ladens; palace/m/Palast/Palastes; library/f/Bibliothek/Bibliothek; school/f/Schule/Schule; "
    "museum/n/Museum/Museums; theatre/n/Theater/Theaters"
)
VEHICLES = _nouns("train/m/Zug/Zuges; bus/m/Bus/Busses; regional train/f/Regionalbahn/Regionalbahn; taxi/n/Taxi/Taxis")
COLOURS = _phrases("red/rot; green/grün; blue/blau; yellow/gelb; white/weiß; black/schwarz; grey/grau; brown/braun")
FORTUNES = _phrases(
    "rich/reich; poor/arm; sick/krank; tired/müde; happy/glücklich; famous/berühmt; young/jung; old/alt"
)
CITIES = _phrases(
    "Munich/München; Vienna/Wien; Cologne/Köln; Rome/Rom; Prague/Prag; Geneva/Genf; Berlin/Berlin; Warsaw/Warschau"
)
COUNTRIES = _names("territories", "ES IT FR NO PL GR AT SE")
LANGUAGES = tuple(  # before a plural noun: Spanish words, spanische Wörter
    Phrase(name.en, name.de.lower() + "e") for name in _names("languages", "es it fr no pl el ru ja")
)
PLACES = _phrases(
    "at the market/auf dem Markt; in the cellar/im Keller; in the village/im Dorf; in the city/in der Stadt; "
    "on the island/auf der Insel; in the garden/im Garten"
)
PAST_TIMES = _phrases("yesterday/gestern; last week/letzte Woche; this morning/heute Morgen") + tuple(
    Phrase(f"last {en}", f"letzten {de}") for en, de in WEEKDAYS
)
HABITS = _phrases("every day/jeden Tag; in summer/im Sommer; in winter/im Winter") + tuple(
    Phrase(f"on {en}s", f"{de.lower()}s") for en, de in WEEKDAYS
)
LABELS = _phrases(
    "the answer/die Antwort; the code/der Code; the result/das Ergebnis; the house number/die Hausnummer; "
    "the password/das Passwort; the secret number/die geheime Zahl"
)
VERBS = (
    Verb("bought", "bought", "buy", "kaufte", "gekauft"),
    Verb("sold", "sold", "sell", "verkaufte", "verkauft"),
    Verb("found", "found", "find", "fand", "gefunden"),
    Verb("lost", "lost", "lose", "verlor", "verloren"),
    Verb("ordered", "ordered", "order", "bestellte", "bestellt"),
    Verb("saw", "seen", "see", "sah", "gesehen"),
    Verb("counted", "counted", "count", "zählte", "gezählt"),
    Verb("forgot", "forgotten", "forget", "vergaß", "vergessen"),
)
ENDINGS = (  # what people do in the end
    Separable("gave up", "gab", " auf"),
    Separable("fell asleep", "schlief", " ein"),
    Separable("came back", "kam", " zurück"),
    Separable("went home", "ging", " nach Hause"),
    Separable("laughed", "lachte"),
    Separable("drank a coffee", "trank", " einen Kaffee"),
)
INTERRUPTIONS = _phrases(  # the verb as it ends a subordinate clause
    "called/anrief; woke up/aufwachte; fell asleep/einschlief; came back/zurückkam; arrived/ankam; "
    "went home/nach Hause ging"
)
ROUTINES = (
    Separable("gets up", "steht", " auf"),
    Separable("wakes up", "wacht", " auf"),
    Separable("falls asleep", "schläft", " ein"),
    Separable("comes back", "kommt", " zurück"),
    Separable("goes home", "geht", " nach Hause"),
    Separable("has breakfast", "frühstückt"),
)
PAYMENTS = (
    Separable("earned", "verdiente"),
    Separable("lost", "verlor"),
    Separable("found", "fand"),
    Separable("saved", "sparte"),
    Separable("spent", "gab", " aus"),
    Separable("borrowed", "lieh sich"),
)
GIFTS = _phrases("gave/gab; owed/schuldete; lent/lieh; sent/schickte")
BOUNDS = _phrases("begins/beginnt; ends/endet")
HOURS = _phrases("opens/öffnet; closes/schließt")

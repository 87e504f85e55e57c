"""What was typed after a command's name, option by option, before anything is made of the values."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from tfm.config import InputError
from tfm.config_checks import expected
from tfm.text import near


@dataclasses.dataclass(frozen=True)
class Given:
    """One option as it was typed: `--data.corpus A B` is name `data.corpus`, values ("A", "B")."""

    name: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"--{self.name}={self.values[0]}"
        return " ".join([f"--{self.name}", *self.values])


def read(command: str, argv: Sequence[str], kinds: dict[str, Any]) -> tuple[list[Given], bool]:
    """What was typed, option by option, and whether help was asked for. Raises InputError at a name unknown."""
    given: list[Given] = []
    wants_help = False
    for token in argv:
        if token in ("-h", "--help"):
            wants_help = True
        elif token.startswith("--"):
            typed, equals, value = token.removeprefix("--").partition("=")
            name = typed.replace("-", "_")
            if name not in kinds:
                hint = near(name, kinds, prefix="--", otherwise=f"; see tfm {command} --help")
                raise InputError(f"--{typed}: unknown option{hint}")
            given.append(Given(name, (value,) if equals else ()))
        elif given:
            given[-1] = dataclasses.replace(given[-1], values=(*given[-1].values, token))
        else:
            raise InputError(f"{token}: unexpected argument; options are --NAME=VALUE, see tfm {command} --help")
    return [_checked(option, kinds[option.name]) for option in given], wants_help


def _checked(option: Given, kind: Any) -> Given:
    """The option with its switch spelt out: `--json-lines` alone is True. Raises InputError at an empty value."""
    if "" in option.values:
        raise InputError(f"--{option.name} is empty: expected {expected(kind)}")
    if kind is bool:
        values = option.values or ("True",)
        return dataclasses.replace(option, values=tuple({"true": "True", "false": "False"}.get(v, v) for v in values))
    if not option.values:
        raise InputError(f"--{option.name} has no value: expected {expected(kind)}")
    if float in (kind, *get_args(kind)) and any(_is_not_finite(value) for value in option.values):
        raise InputError(f"{option}: expected {expected(kind)}, and a finite one")
    return option


def together(given: Sequence[Given], kinds: dict[str, Any]) -> list[Given]:
    """Each option that takes several values once, with all that it was given: `--a=1 --a=2` is `--a 1 2`."""
    several = {name for name, kind in kinds.items() if get_origin(kind) is tuple}
    joined: dict[str, Given] = {}
    rest = []
    for option in given:
        if option.name not in several:
            rest.append(option)
        elif option.name in joined:
            first = joined[option.name]
            joined[option.name] = dataclasses.replace(first, values=(*first.values, *option.values))
        else:
            joined[option.name] = option
    return [*rest, *joined.values()]


def _is_not_finite(value: str) -> bool:
    try:
        return not math.isfinite(float(value))
    except ValueError:
        return False


def tokens(option: Given) -> Iterator[str]:
    yield f"--{option.name}={option.values[0]}"
    yield from option.values[1:]

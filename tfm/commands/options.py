"""A command's options: its own, and every field of the config by its dotted name, typed, with the run's own defaults.

Two passes. The first finds `--config` or `--workdir`, which say where the config comes from; the second hands both to
tyro, with that config as the defaults, so that `--help` shows what this very run would do. Names and values are checked
here, so that a mistake is answered by one line rather than by a box.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from tfm.commands.config_files import load_config, shipped_configs
from tfm.commands.ineffective import refuse_without_effect
from tfm.commands.typed import Given, read, together, tokens
from tfm.config import Config, InputError, from_json
from tfm.config_checks import expected
from tfm.files import as_path, at_home

Arguments = TypeVar("Arguments")


def parse(command: str, argv: Sequence[str], arguments: type[Arguments]) -> tuple[Arguments, Config]:
    """The command's own arguments, and the validated config with its overrides.

    Args:
      command: name of the command, for `--help`.
      argv: what was typed after the name.
      arguments: frozen dataclass of the command's own options; a field without a default is required, and its docstring
        opens `--help`. With a field `config`, the config is the one that `--config` names (or, where that is not given,
        the one in WORKDIR/config.json if there is one); otherwise it is the one in WORKDIR/config.json.

    Raises InputError at an unknown option, a value of the wrong type or a config that cannot be found, ConfigError at
    fields that contradict each other, and SystemExit(0) after printing help.
    """
    import tyro

    types_by_name = _option_types(arguments)
    given, wants_help = read(command, argv, types_by_name)
    given = together(given, types_by_name)
    refuse_without_effect(command, given)
    base = _base_config(command, arguments, {option.name: option.values for option in given}, wants_help)
    if not wants_help:
        _refuse_missing(command, arguments, given)
    combined = dataclasses.make_dataclass(
        "Options",
        [
            ("own", Annotated[arguments, tyro.conf.arg(name="")]),
            ("run", Annotated[Config, tyro.conf.arg(name="")], dataclasses.field(default=base)),
        ],
        frozen=True,
    )
    try:
        options = _parsed(
            combined,
            prog=f"tfm {command}",
            description=inspect.getdoc(arguments),
            args=["--help"] if wants_help else [token for option in given for token in tokens(option)],
            console_outputs=wants_help,
        )
    except SystemExit as stop:
        if wants_help:
            raise
        raise InputError(_explain(command, given, types_by_name)) from stop
    # A shell expands ~ at the beginning of a word alone, and not in --workdir=~/runs/mine.
    paths = {name: at_home(value) for name, value in vars(options.own).items() if isinstance(value, Path)}
    return dataclasses.replace(options.own, **paths), options.run.validate()


def _parsed(form: type, *, console_outputs: bool, **settings: Any) -> Any:
    """What tyro makes of a command line. It has boxes for some mistakes even when told to print nothing."""
    import tyro

    with contextlib.ExitStack() as silence:
        if not console_outputs:
            silence.enter_context(contextlib.redirect_stderr(io.StringIO()))
            silence.enter_context(contextlib.redirect_stdout(io.StringIO()))
        conversion = (tyro.conf.FlagConversionOff,)
        return tyro.cli(form, use_underscores=True, console_outputs=console_outputs, config=conversion, **settings)


def _base_config(command: str, arguments: type, given: dict[str, tuple[str, ...]], wants_help: bool) -> Config:
    """The config whose values are the defaults of the options."""
    own = {field.name: field for field in dataclasses.fields(arguments)}

    def value_of(name: str) -> str | None:
        if given.get(name):
            return given[name][-1]
        default = own[name].default if name in own else None
        return None if default is None or default is dataclasses.MISSING else str(default)

    name, workdir = value_of("config"), value_of("workdir")
    if name is not None:
        return load_config(name)
    if workdir is not None:
        path = as_path(workdir) / "config.json"
        try:
            if path.exists():
                return from_json(path)
        except (OSError, ImportError) as error:  # without the package that an address such as gs:// takes
            raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if wants_help:
        return Config()
    if "config" in own:
        nothing = "" if workdir is None else f", and --workdir={workdir} holds no config.json"
        raise InputError(
            f"--config is missing{nothing}: name a shipped config ({', '.join(shipped_configs())}) or the path of a "
            ".py file"
        )
    if workdir is None:
        raise InputError(f"--workdir is missing: name the directory of a run; see tfm {command} --help")
    raise InputError(f"--workdir={workdir}: not the directory of a run, since it holds no config.json")


def _option_types(arguments: type) -> dict[str, Any]:
    """The type of every option by its name: the command's own, then the config's, dotted."""
    kinds = dict(get_type_hints(arguments))
    for section, hint in get_type_hints(Config).items():
        kinds |= {f"{section}.{name}": kind for name, kind in get_type_hints(hint).items()}
    return kinds


def _refuse_missing(command: str, arguments: type, given: Sequence[Given]) -> None:
    names = {option.name for option in given}
    for field in dataclasses.fields(arguments):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in names:
            kind = get_type_hints(arguments)[field.name]
            raise InputError(f"--{field.name} is missing: expected {expected(kind)}; see tfm {command} --help")


def _explain(command: str, given: Sequence[Given], kinds: dict[str, Any]) -> str:
    """One line for what tyro refused: the first option that it refuses by itself."""
    for option in given:
        alone = dataclasses.make_dataclass("Alone", [("value", kinds[option.name])])
        try:
            _parsed(alone, args=list(tokens(dataclasses.replace(option, name="value"))), console_outputs=False)
        except SystemExit:
            return f"{option}: expected {expected(kinds[option.name])}"
    return f"{' '.join(map(str, given))}: these options cannot stand together; see tfm {command} --help"

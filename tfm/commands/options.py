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
import math
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from tfm import config as tfm_config
from tfm.config import Config, ConfigError, InputError
from tfm.config_checks import check_types, expected
from tfm.files import as_path, at_home
from tfm.text import near

Arguments = TypeVar("Arguments")


@dataclasses.dataclass(frozen=True)
class _Given:
    """One option as it was typed: `--data.corpus A B` is name `data.corpus`, values ("A", "B")."""

    name: str
    values: tuple[str, ...]

    def __str__(self) -> str:
        if len(self.values) == 1:
            return f"--{self.name}={self.values[0]}"
        return " ".join([f"--{self.name}", *self.values])


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
    given, wants_help = _read(command, argv, types_by_name)
    given = _together(given, types_by_name)
    for option in given:
        _refuse_without_effect(command, option, given)
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
            args=["--help"] if wants_help else [token for option in given for token in _tokens(option)],
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


def load_config(name: str) -> Config:
    """The config of a shipped name (`big`) or of a path to a Python file with `get_config()`; not yet validated.

    Raises InputError naming the file and the line where it cannot be found, read or run.
    """
    path = _config_path(name)
    try:
        code = compile(path.read_bytes(), str(path), "exec")
        namespace: dict[str, Any] = {"__name__": f"config {path.stem}", "__file__": str(path)}
        exec(code, namespace)
        if "get_config" not in namespace:
            raise InputError(f"{path}: defines no get_config(), which has to return a tfm.config.Config")
        config = namespace["get_config"]()
        if not isinstance(config, Config):
            raise InputError(f"{path}: get_config() returned {type(config).__name__}, not a tfm.config.Config")
        check_types(config := _with_tuples(config))
        return config
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except SyntaxError as error:
        raise InputError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except ConfigError as error:
        raise InputError(f"{_place(error, path)}: {error}") from error
    except InputError:
        raise
    except Exception as error:
        message = " ".join(str(error).split())
        raise InputError(f"{_place(error, path)}: {type(error).__name__}: {message}") from error


def _with_tuples(config: Config) -> Config:
    """The config with tuples for lists, as the run's own config.json is read."""

    def changed(values: Any) -> Any:
        if not dataclasses.is_dataclass(values) or isinstance(values, type):
            return values
        lists = {name: tuple(value) for name, value in vars(values).items() if isinstance(value, list)}
        return dataclasses.replace(values, **lists)

    return dataclasses.replace(config, **{section: changed(values) for section, values in vars(config).items()})


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package, by name: inside it when installed, beside it in a checkout."""
    package = Path(tfm_config.__file__).parent
    folder = next((f for f in (package / "configs", package.parent / "configs") if f.is_dir()), None)
    if folder is None:
        return {}
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def _config_path(name: str) -> Path:
    shipped = shipped_configs()
    if not (name.endswith(".py") or "/" in name):
        if name in shipped:
            return shipped[name]
        raise InputError(
            f"--config={name}: no shipped config of that name{near(name, shipped)}; there are {', '.join(shipped)}, "
            "or give the path of a .py file"
        )
    path = at_home(Path(name))
    if not path.is_file():
        hint = f"; the shipped one is --config={path.stem}" if path.stem in shipped else ""
        raise InputError(f"--config={name}: no such file{hint}")
    return path


def _place(error: BaseException, path: Path) -> str:
    """Where in the config file the error came up: `FILE:LINE`."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}:{lines[-1]}" if lines else str(path)


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
                return tfm_config.from_json(path)
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


def _read(command: str, argv: Sequence[str], kinds: dict[str, Any]) -> tuple[list[_Given], bool]:
    """What was typed, option by option, and whether help was asked for. Raises InputError at a name unknown."""
    given: list[_Given] = []
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
            given.append(_Given(name, (value,) if equals else ()))
        elif given:
            given[-1] = dataclasses.replace(given[-1], values=(*given[-1].values, token))
        else:
            raise InputError(f"{token}: unexpected argument; options are --NAME=VALUE, see tfm {command} --help")
    return [_checked(option, kinds[option.name]) for option in given], wants_help


def _checked(option: _Given, kind: Any) -> _Given:
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


def _together(given: Sequence[_Given], kinds: dict[str, Any]) -> list[_Given]:
    """Each option that takes several values once, with all that it was given: `--a=1 --a=2` is `--a 1 2`."""
    several = {name for name, kind in kinds.items() if get_origin(kind) is tuple}
    joined: dict[str, _Given] = {}
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


def _tokens(option: _Given) -> Iterator[str]:
    yield f"--{option.name}={option.values[0]}"
    yield from option.values[1:]


_ON_ONE_HOST = ("demo", "explain", "plan", "prepare")
_OF_A_TRAINED_MODEL = ("translate", "score", "evaluate", "explain")
_OF_LINES = ("translate", "score", "explain")
# By command: an option, another one that overrides it, and why.
_SAMPLED = ("decoding.beam_size", "decoding.sampling", "which draws translations and has no beam")
_TAKEN_OVER = tuple(
    (f"data.{name}", "training.initialize_from", "whose tokenizer is taken")
    for name in ("tokenizer_model", "tokenizer_sample")
)
_OVERRIDDEN = {
    "train": _TAKEN_OVER,
    "prepare": _TAKEN_OVER,
    "translate": (_SAMPLED,),
    "evaluate": (_SAMPLED,),
    "plan": (
        ("training.target_tokens_per_batch", "rows_per_chip", "which says how large a batch is"),
        ("workdir", "config", "which says what is planned"),
    ),
}
_SET_BY_THE_BENCHMARK = {f"decoding.{name}" for name in ("min_length", "max_extra_tokens", "max_source_length")}
_SET_BY_THE_BENCHMARK |= {f"decoding.{name}" for name in ("sampling", "n_best", "sentences_per_batch")}
# Of which a device has nothing but rows, or a part of the heads.
_OVER_ALL_DEVICES = ("translate", "score", "evaluate", "benchmark decode")


def _refuse_without_effect(command: str, option: _Given, given: Sequence[_Given]) -> None:
    """Raises InputError at an option that the command would ignore, or that another one of those given overrides."""
    if option.name.startswith("hosts.") and command.split()[0] in _ON_ONE_HOST:
        raise InputError(f"{option}: has no effect on tfm {command}, which runs on one host: leave it out")
    if option.name.startswith(("training.", "optimizer.")) and command in _OF_A_TRAINED_MODEL:
        raise InputError(f"{option}: has no effect on tfm {command}, which trains nothing: leave it out")
    if option.name.startswith("data.") and command in _OF_LINES:
        raise InputError(f"{option}: has no effect on tfm {command}, which reads no corpus: leave it out")
    if command == "benchmark decode" and option.name in _SET_BY_THE_BENCHMARK:
        raise InputError(
            f"{option}: has no effect on tfm {command}, whose searches end where --length says: leave it out"
        )
    for name, other, why in _OVERRIDDEN.get(command.split()[0], ()):
        if option.name == name and any(one.name == other and one.values[-1] != "False" for one in given):
            raise InputError(f"{option}: has no effect with --{other}, {why}: leave one of them out")
    names = {one.name for one in given}
    if option.name == "decoding.ensemble_mean" and command in _OF_A_TRAINED_MODEL and "ensemble" not in names:
        raise InputError(f"{option}: has no effect without --ensemble: leave it out")
    is_of_a_corpus = option.name.startswith("data.") and option.name != "data.target_language"
    if command == "evaluate" and is_of_a_corpus and "source" in names:
        raise InputError(f"{option}: has no effect with --source, which is read in place of a corpus: leave it out")
    if command == "explain" and option.name == "decoding.n_best":
        raise InputError(f"{option}: has no effect on tfm explain, which shows one translation: leave it out")
    if option.name in ("mesh.data", "mesh.fsdp", "mesh.tensor") and "meshes" in names:
        raise InputError(f"{option} and --meshes say both which mesh is planned: leave one of them out")
    if option.name.startswith("mesh."):
        if command == "explain":
            raise InputError(f"{option}: has no effect on tfm explain, which uses one device: leave it out")
        if command in _OVER_ALL_DEVICES and option.name == "mesh.tensor" and option.values[-1] == "-1":
            raise InputError(f"{option}: expected the number of devices that share the heads of a layer")
        if command in _OVER_ALL_DEVICES and option.name != "mesh.tensor":
            raise InputError(
                f"{option}: has no effect on tfm {command}, which splits sentences over all devices, and heads by "
                "mesh.tensor: leave it out"
            )


def _refuse_missing(command: str, arguments: type, given: Sequence[_Given]) -> None:
    names = {option.name for option in given}
    for field in dataclasses.fields(arguments):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in names:
            kind = get_type_hints(arguments)[field.name]
            raise InputError(f"--{field.name} is missing: expected {expected(kind)}; see tfm {command} --help")


def _explain(command: str, given: Sequence[_Given], kinds: dict[str, Any]) -> str:
    """One line for what tyro refused: the first option that it refuses by itself."""
    for option in given:
        alone = dataclasses.make_dataclass("Alone", [("value", kinds[option.name])])
        try:
            _parsed(alone, args=list(_tokens(dataclasses.replace(option, name="value"))), console_outputs=False)
        except SystemExit:
            return f"{option}: expected {expected(kinds[option.name])}"
    return f"{' '.join(map(str, given))}: these options cannot stand together; see tfm {command} --help"

"""The configs that a user names: those that come with the package, and Python files of one's own."""

from __future__ import annotations

import dataclasses
import traceback
from pathlib import Path
from typing import Any

from tfm import config as tfm_config
from tfm.config import Config, ConfigError, InputError
from tfm.config_checks import check_types
from tfm.files import at_home
from tfm.text import near


def load_config(name: str) -> Config:
    """The config of a shipped name (`big`) or of a path to a Python file with `get_config()`; not yet validated.

    Raises InputError naming the file and the line where it cannot be found, read or run.
    """
    path = _config_path(name)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        code = compile(source, str(path), "exec")
        namespace: dict[str, Any] = {"__name__": f"config {path.stem}", "__file__": str(path)}
        exec(code, namespace)
        if "get_config" not in namespace:
            raise InputError(f"{path}: defines no get_config(), which has to return a tfm.config.Config")
        config = namespace["get_config"]()
        if not isinstance(config, Config):
            raise InputError(f"{path}: get_config() returned {type(config).__name__}, not a tfm.config.Config")
        check_types(config := _with_tuples(config))
        return config
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

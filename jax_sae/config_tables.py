"""Tables of settings -> `Config`: TOML in, validated, JSON out; settings by their names. Standard library only."""

import dataclasses
import difflib
import os
import sys
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Literal

from jax_sae.config import Config, validate, without_none
from jax_sae.errors import BadInput


def config_names() -> dict[str, Path]:
    """The files that come with the package, by name: `configs/` of the repository, which an installed package holds."""
    package = Path(__file__).parent
    folders = (package / "configs", package.parent / "configs")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def find_config(name: Path) -> Path:
    """The file of that name or, where there is none, the one that comes with the package under it."""
    name = Path(os.path.expanduser(name))
    return name if name.is_file() else config_names().get(str(name), name)


def load_config(path: Path) -> Config:
    """Read a TOML file whose tables are the fields of `Config`; or one that comes with the package, by its name.

    Raises:
        BadInput: if the file is missing or is no TOML, or a key or value is not one of `Config`'s.
    """
    return config_with(load_settings(path))


def load_settings(path: Path) -> dict[str, Any]:
    """What a TOML file says, by dotted names such as `train.steps`; errors as for `load_config`."""
    path = find_config(path)
    try:
        with open(path, "rb") as file:
            table = tomllib.loads(file.read().decode("utf-8-sig"))  # some editors begin with a byte order mark
    except OSError as error:
        raise BadInput(
            f"cannot read the config {path}: {error.strerror}; give a TOML file, or the name of one that comes with "
            f"the package: {', '.join(config_names())}"
        ) from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, thousands of digits or brackets
        raise BadInput(f"{path} is not valid TOML in UTF-8: {error}") from error
    config_from_dict(table, str(path))
    return settings_in(table, str(path))


def settings_in(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What nested tables say, by dotted names such as `train.steps`; types are checked, and not whether values fit.

    Arrays of NumPy serve as lists and numbers, and paths as strings.

    Raises:
        BadInput: at the first key or type that does not fit; `where` names the tables.
    """
    table = _plain(table)
    settings = flatten(_build(Config, table, where, ""))
    return {f"{group}.{name}": settings[f"{group}.{name}"] for group, part in table.items() for name in part}


def _plain(value: Any) -> Any:
    """The same in types that TOML has."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return str(value)
    return value.tolist() if hasattr(value, "tolist") else value


def full_name(name: str) -> str:
    """The dotted name of a setting that is called by its last part, or by its table's name and that: `model_path`.

    Where the last part stands in several tables, it is the sweep's.

    Raises:
        BadInput: if there is none, or several and none of the sweep.
    """
    names = option_names()
    fitting = [full for full in names if name in (full, full.replace(".", "_"), full.partition(".")[2])]
    of_sweep = [full for full in fitting if full.startswith("sweep.")]
    if len(fitting) == 1 or of_sweep:
        return (of_sweep or fitting)[0]
    if fitting:
        either = " or ".join(full.replace(".", "_") for full in fitting)
        raise BadInput(f"the call: {name} may be one of several settings; write {either}")
    short = {full.partition(".")[2]: full for full in names} | {full.replace(".", "_"): full for full in names}
    nearest = difflib.get_close_matches(name, short, n=1)
    raise BadInput(
        f"the call: unknown setting {name[:80]!r}; "
        + (f"did you mean {nearest[0]!r}?" if nearest else "jax-sae train --help names them all")
    )


def flatten(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {
        f"{group.name}.{setting.name}": getattr(getattr(config, group.name), setting.name)
        for group in dataclasses.fields(config)
        for setting in dataclasses.fields(getattr(config, group.name))
    }


def config_with(settings: Mapping[str, Any], config: Config | None = None) -> Config:
    """The settings, by dotted names, over those of a `Config`; without one, over the defaults."""
    tables: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        group, _, setting = name.partition(".")
        tables.setdefault(group, {})[setting] = value
    config = config or Config()
    return dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **table) for group, table in tables.items()}
    )


def config_from_dict(table: dict[str, Any], where: str) -> Config:
    """Build and validate a `Config` from nested dictionaries, as TOML and JSON give them; `where` names them in errors.

    Raises:
        BadInput: at the first key or value that does not fit.
    """
    config = _build(Config, table, where, "")
    validate(config)
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """Nested dictionaries and lists, ready for JSON; `config_from_dict` takes them back."""
    return dataclasses.asdict(config)


def _build(cls: type, table: Any, where: str, prefix: str) -> Any:
    if not isinstance(table, dict):
        keys = ", ".join(typing.get_type_hints(cls))
        raise BadInput(
            f"{where}: {prefix.rstrip('.')} is {shortened(table)}; a table with the keys {keys} was expected"
        )
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in hints:
            raise BadInput(f"{where}: unknown key {(prefix + key)[:80]!r}{_nearest(prefix + key)}")
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    for key in sorted(required - set(table)):
        raise BadInput(f"{where}: '{prefix}{key}' is missing")
    return cls(**{key: _convert(hints[key], value, where, prefix + key) for key, value in table.items()})


def _convert(hint: Any, value: Any, where: str, name: str) -> Any:
    """`value` as the type `hint`; whole numbers serve as floats, nothing else is cast."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where, name + ".")
    if origin is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(arguments[0], item, where, name) for item in values)
    if hint != (something := without_none(hint)):
        return None if value is None else _convert(something, value, where, name)
    if hint is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if value in arguments if origin is Literal else type(value) is hint:
        return value
    raise BadInput(f"{where}: {name} is {shortened(value)}; {expected(hint)} was expected")


def expected(hint: Any) -> str:
    """What a value of a setting's type is called in messages."""
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return {int: "a whole number", float: "a number", str: "a string"}.get(hint, "a list")


def _nearest(name: str) -> str:
    matches = difflib.get_close_matches(name, option_names(), n=1)
    return f"; did you mean '{matches[0]}'?" if matches else f"; known are {', '.join(option_names())}"


def option_types(cls: type = Config, prefix: str = "") -> dict[str, Any]:
    """The type of every setting, by its dotted name such as `train.batch_tokens`."""
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(cls).items():
        if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and dataclasses.is_dataclass(hint):
            found |= option_types(hint, f"{prefix}{name}.")
        else:
            found[prefix + name] = hint
    return found


def option_names() -> list[str]:
    """Every setting by its dotted name."""
    return list(option_types())

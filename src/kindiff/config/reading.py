"""The strict reader of configs: plain values (TOML, JSON) in, a typed config out, every unknown key an error."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from kindiff.classes import nearest
from kindiff.errors import UsageError

T = TypeVar("T")


def from_dict(cls: type[T], values: Any, *, where: str = "") -> T:
    """A config from plain values (parsed TOML or JSON); raises UsageError that names the key.

    Unknown keys, wrong types and missing required fields are errors; fields' own checks run too.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where or cls.__name__} must be a table of keys, not {values!r}.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UsageError(
                f"unknown key {f'{where}.{key}' if where else key!r}{nearest(key, known)}; "
                f"{cls.__name__} has: {', '.join(known)}."
            )
    built = {
        key: _convert(hints[key], value, f"{where}.{key}" if where else key) for key, value in values.items()
    }
    required = (
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    )
    missing = [name for name in required if name not in built]
    if missing:
        raise UsageError(f"{where or cls.__name__} lacks the required key {missing[0]!r}.")
    return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where=where)
    if origin in (types.UnionType, typing.Union):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        return _convert(next(o for o in options if o is not type(None)), value, where)
    if origin is Literal:
        allowed = typing.get_args(hint)
        if value not in allowed:
            raise UsageError(f"{where} is {value!r}{nearest(str(value), allowed)}; it is one of {allowed}.")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{where} is {value!r}; it must be a list.")
        element = typing.get_args(hint)[0]
        return tuple(_convert(element, v, f"{where}[{i}]") for i, v in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UsageError(f"{where} is {value!r}; it must be of type {hint.__name__}.")
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain values, ready for JSON; `from_dict` is its inverse."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def with_defaults(values: Any, cls: type) -> Any:
    """A config's plain values from an earlier version, with the defaults of settings that it did not know.

    As they are where they cannot be read as such a config.
    """
    try:
        return to_dict(from_dict(cls, values))
    except (UsageError, TypeError):
        return values


def load_recipe(path: Path, cls: type[T]) -> T:
    """A recipe (TOML) as a config of type cls; UsageError names the file and the key."""
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"recipe {path} does not exist.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"recipe {path} is not valid TOML: {error}.") from None
    try:
        return from_dict(cls, values)
    except UsageError as error:
        raise UsageError(f"recipe {path}: {error}") from None

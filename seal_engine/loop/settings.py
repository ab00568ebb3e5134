"""Configurations on the command line and in TOML files: a flag and a key for every field of a frozen dataclass."""

import argparse
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from seal_engine.errors import did_you_mean
from seal_engine.files import read_text, show
from seal_engine.types import InputError

Config = TypeVar("Config")
# Former name of a setting -> its name. Flags, TOML files and runs may still have the former one.
OLD_NAMES = {
    "together": "continued_pretraining",
    "trials_a_unit": "trials_per_step",
    "writer": "self_edit_source",
    "most_tasks": "max_tasks",
    "most_steps": "max_steps",
    "most_sequence_tokens": "max_sequence_tokens",
}


def rename_old(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings under their present names."""
    return {OLD_NAMES.get(name, name): value for name, value in values.items()}


def add_flags(parser: argparse.ArgumentParser, kind: type, title: str, defaults: Mapping[str, Any]) -> None:
    """A flag for every field of dataclass `kind` that has a help text. Flags that are not given stay out of the result.

    defaults: shown in place of the fields' own.
    """
    group, hints = parser.add_argument_group(title), get_type_hints(kind)
    for field in _settings(kind):
        default, hint = defaults.get(field.name, field.default), hints[field.name]
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        text = field.metadata["help"] + (f" (default: {shown})" if shown else "")
        options: dict[str, Any] = {"help": text.replace("%", "%%"), "default": argparse.SUPPRESS}
        if hint is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(hint) is tuple:
            item = get_args(hint)[0]
            options |= {"type": lambda value, item=item: _items(value, item), "metavar": "A,B,..."}
        else:
            options |= {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}
            if field.metadata["choices"]:
                options |= {"choices": field.metadata["choices"], "metavar": None}
        flag = "--" + field.name.replace("_", "-")
        group.add_argument(flag, **options)
        for old in [old for old, name in OLD_NAMES.items() if name == field.name]:
            hidden: dict[str, Any] = {**options, "help": argparse.SUPPRESS, "dest": field.name}
            group.add_argument("--" + old.replace("_", "-"), **hidden)


def _settings(kind: type) -> list[Field]:
    return [field for field in fields(kind) if "help" in field.metadata]


def _items(value: str, kind: type) -> tuple[Any, ...]:
    try:
        return tuple(kind(part.strip()) for part in value.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {value!r}; accepted: {kind.__name__}s separated by commas") from None


def read_toml(path: str | Path, kinds: Sequence[type]) -> dict[str, Any]:
    """The keys of a TOML file, each the name of a field of one of `kinds`. InputError naming the file and the key."""
    text = read_text(Path(path))
    if text is None:
        raise InputError(f"{path}: missing")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not TOML: {error}") from None
    hints = {field.name: get_type_hints(kind)[field.name] for kind in kinds for field in _settings(kind)}
    named = rename_old({key.replace("-", "_"): value for key, value in values.items()})
    return {key: _typed(value, hints.get(key), f"{path}: {key}", key, list(hints)) for key, value in named.items()}


def _typed(value: Any, hint: Any, place: str, name: str, known: Sequence[str]) -> Any:
    if hint is None:
        raise InputError(f"{place}: not a setting{did_you_mean(name, known)}; accepted: {', '.join(known)}")
    item = get_args(hint)[0] if get_origin(hint) is tuple else hint
    kinds = (int, float) if item is float else (item,)
    many = value if get_origin(hint) is tuple and isinstance(value, list) else [value]
    right = all(isinstance(one, kinds) and (item is bool or not isinstance(one, bool)) for one in many)
    if not right or (item is hint and isinstance(value, list)):
        accepted = f"a list of {item.__name__}" if item is not hint else item.__name__
        raise InputError(f"{place}: found {show(value)}; accepted: {accepted}")
    return tuple(many) if item is not hint else value


def make(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The dataclass from those of `values` that are its fields; lists become tuples, as JSON knows none."""
    names = {field.name for field in _settings(kind)}
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in names})


def defaults_of(kind: type) -> dict[str, Any]:
    """The default of every field."""
    return {field.name: field.default for field in _settings(kind) if field.default is not MISSING}

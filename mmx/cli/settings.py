"""Settings of a verb: a frozen dataclass; its fields are its flags, gin names and rules."""

import dataclasses
import re
import types
import typing
from typing import Any

from mmx.errors import UserError, nearest

KIND = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
          "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def setting(default: Any, help: str, *, group: str = "Run", low: float | None = None,
            high: float | None = None, choices: tuple | None = None, size: bool = False,
            value: str = ""):
    """Declares one setting of a verb, for the command line and gin alike.

    Args:
      default: value when neither a flag nor gin gives one; None makes the setting optional.
      help: what it does, in a line or two.
      group: heading in `--help`.
      low, high: inclusive bounds of a number.
      choices: allowed values of a string.
      size: an int of bytes that is also written `2GiB`, `500MB`.
      value: what stands for the value in `--help`, for example FILE.
    """
    return dataclasses.field(default=default, metadata=dict(
        help=help, group=group, low=low, high=high, choices=choices, size=size, value=value))


@dataclasses.dataclass(frozen=True)
class FieldType:
    """What a field's annotation allows: a kind (bool, int, float, str), repeated, optional."""

    kind: type
    many: bool
    optional: bool


def field_type(cls: type, name: str) -> FieldType | None:
    """Reads the annotation of a field; None when it is not one that a flag can carry."""
    hint = typing.get_type_hints(cls)[name]
    optional = many = False
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [part for part in typing.get_args(hint) if part is not types.NoneType]
        optional = len(inner) < len(typing.get_args(hint))
        hint = inner[0] if len(inner) == 1 else None
    if typing.get_origin(hint) is tuple:
        many, hint = True, typing.get_args(hint)[0]
    return FieldType(hint, many, optional) if hint in (bool, int, float, str) else None


def parse_size(text: str) -> int:
    """Reads bytes from "2GiB", "500MB", "1e9" or plain digits; ValueError otherwise."""
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise ValueError(text)
    return int(float(match[1]) * _UNITS[match[2]])


def size_text(size: int) -> str:
    """Writes bytes as `parse_size` reads them, in the largest whole unit."""
    for unit in ("TiB", "GiB", "MiB", "KiB", "TB", "GB", "MB", "KB"):
        if size and size % parse_size(f"1{unit}") == 0:
            return f"{size // parse_size(f'1{unit}')}{unit}"
    return str(size)


def check(settings: Any, label: str = "--{}") -> None:
    """Raises UserError for the first field of a settings dataclass with a wrong type or range."""
    for field in dataclasses.fields(settings):
        kind = field_type(type(settings), field.name)
        if kind is None:
            continue
        value = getattr(settings, field.name)
        if value is None and (kind.optional or field.default is None):
            continue
        values = value if kind.many and isinstance(value, (tuple, list)) else (value,)
        for one in values:
            _check_one(label.format(field.name), kind.kind, field.metadata, one)


def _check_one(label: str, kind: type, rule: Any, value: Any) -> None:
    what = f"{label}={value!r} is out of range."
    if not _is_a(value, kind):
        raise UserError(f"{label}={value!r} has the wrong type.", f"It takes {KIND[kind]}.",
                        f"Write for example {label}={_sample(kind, rule)}.")
    low, high, choices = rule.get("low"), rule.get("high"), rule.get("choices")
    if choices and value not in choices:
        raise UserError(f"{label}={value!r} is not a choice.",
                        f"It is one of {', '.join(choices)}.", nearest(str(value), choices))
    if kind in (int, float) and (value != value or low is not None and value < low
                                 or high is not None and value > high):
        raise UserError(what, f"It must be {_bounds(rule)}.",
                        f"Write for example {label}={_sample(kind, rule)}.")


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _bounds(rule: Any) -> str:
    low, high = (_number(rule.get(end), rule) for end in ("low", "high"))
    if low and high:
        return f"between {low} and {high}"
    return f"{low} or more" if low else f"at most {high}"


def _number(value: float | None, rule: Any) -> str:
    """A bound as its flag reads it; "" for none."""
    if value is None:
        return ""
    if rule.get("size"):
        return size_text(value)
    return str(value) if isinstance(value, int) else f"{value:g}"


def _sample(kind: type, rule: Any) -> str:
    if kind is bool:
        return "true"
    if kind is str:
        return "text"
    return _number(rule.get("low"), rule) or _number(rule.get("high"), rule) or "1"

"""Command-line arguments: absl flags made from the fields of a verb's settings dataclass."""

import dataclasses
import re
import shlex
from typing import Any

from absl import flags

from mmx.cli import settings as rules
from mmx.errors import UserError, nearest

GIN_FLAGS = {
    "gin_file": "Read settings from this gin file; may be repeated, later ones win.",
    "gin_param": "Bind one setting, as 'name.parameter=value'; may be repeated.",
}
_DEFINE = {
    (bool, False): flags.DEFINE_boolean,
    (int, False): flags.DEFINE_integer,
    (float, False): flags.DEFINE_float,
    (str, False): flags.DEFINE_string,
    (int, True): flags.DEFINE_multi_integer,
    (float, True): flags.DEFINE_multi_float,
    (str, True): flags.DEFINE_multi_string,
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A parsed command line: the settings it names, and its gin files and bindings."""

    given: dict[str, Any]
    gin_files: list[str]
    gin_params: list[str]


def define(settings_cls: type) -> flags.FlagValues:
    """Returns flags for every field of a settings dataclass, None where none is given."""
    values = flags.FlagValues()
    for field in dataclasses.fields(settings_cls):
        kind = rules.field_type(settings_cls, field.name)
        if kind is None:
            continue
        key = (str, False) if field.metadata.get("size") else (kind.kind, kind.many)
        _DEFINE[key](field.name, None, field.metadata.get("help", ""), flag_values=values)
    for name, text in GIN_FLAGS.items():
        flags.DEFINE_multi_string(name, None, text, flag_values=values)
    return values


def parse(verb: str, settings_cls: type, argv: list[str], word: str | None = None) -> Arguments:
    """Reads a verb's arguments; `word` names the text that one without a flag gives.

    Raises UserError for an unknown flag or an unreadable value.
    """
    values = define(settings_cls)
    names = [name for name in values]
    see = f"'mmx {verb} --help' lists the flags."
    try:
        rest = values([verb, *argv])[1:]
    except flags.UnrecognizedFlagError as error:
        raise UserError(f"mmx {verb} has no flag '--{error.flagname}'.",
                        nearest(error.flagname, names, "--"), see) from None
    except flags.Error as error:
        raise UserError(_sentence(settings_cls, str(error)), "", see) from None
    given = {}
    if word and rest and not values[word].present:
        given[word] = rest.pop(0)
    if rest:
        raise UserError(f"mmx {verb} does not take the argument {shlex.quote(rest[0])}.",
                        "A text of several words stands in quotes." if word else
                        "Every value is written --flag=value.", see)
    for field in dataclasses.fields(settings_cls):
        if field.name in values and values[field.name].present:
            value = values[field.name].value
            value = tuple(value) if isinstance(value, list) else value
            given[field.name] = _bytes(field, value) if field.metadata.get("size") else value
    return Arguments(given, values.gin_file or [], values.gin_param or [])


def _bytes(field: dataclasses.Field, text: str) -> int:
    try:
        return rules.parse_size(text)
    except ValueError:
        raise UserError(f"--{field.name}={text!r} is not a size.",
                        "It is a number of bytes, with a unit if you like.",
                        f"Write for example --{field.name}=2GiB.") from None


def _sentence(settings_cls: type, message: str) -> str:
    """absl's message as a sentence: `flag --x=hot: could not …` names its flag and value."""
    match = re.match(r"flag --(\w+)=(.*?): ", message, re.S)
    if match and any(field.name == match[1] for field in dataclasses.fields(settings_cls)):
        kind = rules.field_type(settings_cls, match[1])
        return f"--{match[1]}={match[2]} has the wrong type: it takes {rules.KIND[kind.kind]}."
    return message.rstrip(".") + "."

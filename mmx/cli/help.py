"""Help pages: the list of verbs, and each verb's flags under their headings."""

import dataclasses
import shutil
import textwrap
from collections.abc import Mapping
from types import ModuleType

from mmx.cli import settings as rules

_FRONT = """\
mmx runs MiniMax-Text-01 and small models of its kind.

usage: mmx VERB --flag=value … [--gin_file=FILE]… [--gin_param='name.parameter=value']…

verbs:
{verbs}

example:
  mmx generate --model=nano --prompt="To install the program, you"

'mmx VERB --help' tells a verb's flags. 'mmx --version' tells the version."""


def front_page(verbs: Mapping[str, str]) -> str:
    width = max(map(len, verbs))
    return _FRONT.format(verbs="\n".join(f"  {name:<{width}}  {text}"
                                         for name, text in verbs.items()))


def verb_page(verb: str, module: ModuleType) -> str:
    """Lays out the help of one verb for the width of the terminal (80 without one)."""
    from mmx.cli.arguments import GIN_FLAGS

    columns = min(shutil.get_terminal_size((80, 24)).columns, 110)
    lines = textwrap.wrap(module.__doc__.split("\n\n")[0].replace("\n", " "), columns)
    lines += ["", "example:", *(f"  {line}" for line in module.EXAMPLE.strip().splitlines())]
    groups: dict[str, list[tuple[str, str]]] = {}
    for field in dataclasses.fields(module.Settings):
        entry = _entry(module.Settings, field)
        if entry:
            groups.setdefault(field.metadata.get("group", "Run"), []).append(entry)
    # What a verb is given and gives comes first; what it shares with others after.
    groups = {title: groups[title] for title in sorted(groups, key=_rank)}
    groups["Configuration"] = [
        (f"--{name}={'FILE' if name == 'gin_file' else 'BINDING'}", text)
        for name, text in GIN_FLAGS.items()]
    for title, entries in groups.items():
        lines += ["", f"{title}:"]
        for flag, text in entries:
            lines += _aligned(flag, text, columns)
    return "\n".join(lines)


def _rank(title: str) -> int:
    return {"Input": 0, "Output": 1, "Run": 2}.get(title, 3)


def _entry(cls: type, field: dataclasses.Field) -> tuple[str, str] | None:
    kind = rules.field_type(cls, field.name)
    if kind is None:
        return None
    choices = field.metadata.get("choices")
    value = field.metadata.get("value") or {int: "N", float: "X", str: "TEXT"}.get(kind.kind, "")
    if field.metadata.get("size"):
        value = "BYTES"
    if choices:
        value = "|".join(choices)
    flag = f"--[no]{field.name}" if kind.kind is bool else f"--{field.name}={value}"
    text = field.metadata.get("help", "")
    if kind.many:
        text += " May be repeated."
    if kind.kind is not bool and field.default not in (None, (), ""):
        size = field.metadata.get("size")
        text += f" [{rules.size_text(field.default) if size else field.default}]"
    return flag, text


def _aligned(flag: str, text: str, columns: int, indent: int = 30) -> list[str]:
    head = f"  {flag}"
    body = textwrap.wrap(text, max(columns - indent, 30)) or [""]
    pad = " " * indent
    if len(head) + 1 < indent:
        return [f"{head:<{indent}}{body[0]}", *(pad + line for line in body[1:])]
    return [head, *(pad + line for line in body)]

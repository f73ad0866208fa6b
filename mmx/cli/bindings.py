"""Text configuration: gin files and bindings, and a gin mistake as one clear sentence."""

import contextlib
import dataclasses
import os
import re
import tokenize
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import gin

import mmx
from mmx.errors import UserError, nearest

PACKAGE_DIR = Path(mmx.__file__).parent
CONFIG_DIR = PACKAGE_DIR / "configs"

# `model/nano.gin` and `configs/model/nano.gin` both resolve, from any directory.
SEARCH = (Path(), CONFIG_DIR, PACKAGE_DIR)
for _root in SEARCH[1:]:
    gin.add_config_file_search_path(str(_root))
_reading: list[str] = []  # files being read, the innermost last


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[str]]:
    _reading.append(path)
    with open(path, encoding="utf-8") as file:
        yield file
    _reading.pop()  # after an error it stays: the error lies in it


# Files alone: gin's second reader takes paths for packages, and logs or fails at each that is none.
gin.config._FILE_READERS[:] = [(_open, os.path.isfile)]

_made: dict[str, Any] = {}
_classes: dict[str, type] = {}


def register(classes: Mapping[str, type]) -> None:
    """Makes each dataclass bindable in gin under its name; a name keeps its first class."""
    for name, cls in classes.items():
        if name not in _made:
            _made[name] = gin.external_configurable(cls, name=name, module="mmx")
            _classes[name] = cls


def configure(name: str, files: list[str], params: list[str], given: Mapping[str, Any],
              parts: Collection[str] = ()) -> Any:
    """Builds the registered class `name`: defaults, then gin files, then bindings, then `given`.

    `parts` are the registered classes that only `name` refers to. Raises UserError for a missing
    file, a syntax error, an unknown name, a refused value, or a part that is bound and not used.
    """
    gin.clear_config()
    macros: set[str] = set()  # that something refers to, also where a later binding replaces it
    for path in files:
        if not any((root / path).is_file() for root in SEARCH):
            raise UserError(f"There is no gin file '{path}'.",
                            "It is looked for as given and among the configs that mmx ships.",
                            f"Those are {', '.join(shipped())}.")
        _guarded(gin.parse_config_file, path)
        macros |= _macros()
    for param in params:
        _guarded(gin.parse_config, param, binding=param)
        macros |= _macros()
    for field, value in given.items():
        gin.bind_parameter(f"{name}.{field}", value)
    made = _guarded(_made[name])
    _refuse_idle(name, parts)
    _refuse_idle_macros(name, params, macros)
    return made


def _macros() -> set[str]:
    """The macros that bound values refer to."""
    found, values = set(), [one for each in gin.config._CONFIG.values() for one in each.values()]
    while values:
        value = values.pop()
        if isinstance(value, gin.config.ConfigurableReference):
            scope, _, selector = value.scoped_selector.rpartition("/")
            found |= {scope} if selector.rpartition(".")[2] == "macro" else set()
        elif isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            values += value
    return found


def _refuse_idle_macros(name: str, params: list[str], used: set[str]) -> None:
    """`max_tokens=2` makes a macro, which nothing uses, where `generate.max_tokens=2` is meant."""
    fields = {field.name for field in dataclasses.fields(_classes[name])}
    typed = {found[1] for param in params if (found := re.match(r"\s*(\w+)\s*=", param))}
    for scope, selector in gin.config._CONFIG:
        if selector == "gin.macro" and scope not in used and scope in fields | typed:
            raise UserError(f"gin binds the macro '{scope}', which nothing uses.",
                            "A parameter is bound as name.parameter = value.",
                            f"Write {name}.{scope} = …." if scope in fields else
                            nearest(scope, fields) or f"Use it as %{scope}, or leave it out.")


def _refuse_idle(name: str, parts: Collection[str]) -> None:
    used = [(selector, scope) for scope, selector in gin.config._OPERATIVE_CONFIG]
    for scope, selector in gin.config._CONFIG:
        part = selector.rpartition(".")[2]
        if part in parts and not any(
                selector == other and (not scope or scope in where.split("/"))
                for other, where in used):
            label = f"{scope}/{part}" if scope else part
            raise UserError(f"gin binds parameters of '{label}', which nothing refers to.",
                            "They would have no effect.",
                            f"Write {name}.FIELD = @{label}() for the field that takes it.")


def operative() -> str:
    """Returns the configuration in use as gin text that replays it."""
    return gin.operative_config_str()


def shipped() -> list[str]:
    return sorted(path.relative_to(CONFIG_DIR).as_posix() for path in CONFIG_DIR.rglob("*.gin"))


def _guarded(call, *args, binding: str | None = None):
    _reading.clear()
    try:
        return call(*args)
    except UserError as error:
        # gin appends notes on its own call; the sentence stands in the attributes.
        raise UserError(error.what, error.rule, error.fix) from None
    except (OSError, SyntaxError, ValueError, TypeError, ImportError, RuntimeError,
            AttributeError, tokenize.TokenError) as error:
        raise _sentence(error, binding) from None


def _where(error: Exception, binding: str | None) -> str:
    """The place of a mistake, for its sentence: a file's line, or the binding of the command."""
    file, line = _reading[-1] if _reading else None, None
    if isinstance(error, tokenize.TokenError):
        line = _unclosed(file) if file else None
    elif isinstance(error, SyntaxError):
        line = error.lineno
    elif place := re.search(r'In (?:file "(.*?)",|bindings string) line (\d+)', str(error)):
        file, line = place.groups()
    if file and line:
        return f" ({file}, line {line})"
    return f" (--gin_param={' '.join(binding.split())})" if binding is not None else ""


def _unclosed(path: str) -> int:
    """The line of the bracket, or else the quote, that the end of the file leaves open."""
    opened = []
    try:
        with open(path, encoding="utf-8") as file:
            for token in tokenize.generate_tokens(file.readline):
                if token.string in ("(", "[", "{"):
                    opened.append(token.start[0])
                elif token.string in (")", "]", "}") and opened:
                    opened.pop()
    except tokenize.TokenError as error:
        opened = opened or [error.args[1][0]]
    return opened[-1]


def _sentence(error: Exception, binding: str | None) -> UserError:
    message, where = str(error), _where(error, binding)
    if isinstance(error, tokenize.TokenError):
        message = "a bracket or a quote is not closed"
    elif isinstance(error, SyntaxError):
        message = error.msg
    lines = [line.strip() for line in message.splitlines() if line.strip()] or ["no reason given"]
    if found := re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", message):
        return UserError(f"gin knows no name '{found[1]}'{where}.", "",
                         nearest(found[1], _classes)
                         or f"Names are {', '.join(sorted(_classes))}.")
    if found := re.search(r"Configurable '([\w./]+)' doesn't have a parameter named '(\w+)'",
                          message):
        cls = _classes.get(found[1].rpartition(".")[2])
        names = [field.name for field in dataclasses.fields(cls)] if cls else []
        return UserError(f"gin name '{found[1]}' has no parameter '{found[2]}'{where}.", "",
                         nearest(found[2], names) or f"It has {', '.join(names)}.")
    if "macro() missing" in message:
        scope = re.search(r"in scope '(\w+)'", message)
        return UserError(f"The gin macro %{scope[1] if scope else '?'} has no value.",
                         "A macro needs a value before the run starts.",
                         "Write NAME = value, or give the gin file that does.")
    if found := re.search(r"Failed to parse token '(.*?)'", message):
        return UserError(f"gin cannot read the value {found[1]}{where}.",
                         "A value is a Python literal, so text stands in quotes.",
                         f"""Write "{found[1]}" for text.""")
    if found := re.search(r"Unable to open file: (.*?)\. Searched", message):
        return UserError(f"There is no gin file '{found[1]}'{where}.",
                         "An include is looked for as given and among the configs that mmx ships.",
                         f"Those are {', '.join(shipped())}.")
    return UserError(f"gin cannot read the configuration: {lines[0].rstrip('.')}{where}.",
                     "A binding is written name.parameter = value.",
                     "For example --gin_param='generate.temperature=0.7'.")

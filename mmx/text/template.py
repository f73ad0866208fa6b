"""A checkpoint's own jinja chat template, run in jinja2's sandbox as transformers does."""

import datetime
import functools
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mmx.errors import UserError
from mmx.text.functions import M1, TEXT01, FunctionCall, call_text
from mmx.text.messages import IMAGE, Message, Part

_PROBE = "mmxprobe"
_FIX = "Correct chat_template in the checkpoint, or choose a built-in protocol."


def render_template(template: str, messages: tuple[Message, ...], tools: list[dict],
                    add_generation_prompt: bool) -> str:
    """Returns the text that `template` makes of a chat.

    Content is passed as typed items or as a string, function results under the role "tool" or
    "function", and calls as objects or as text: whichever the template shows when it is tried.
    Raises UserError for a template that fails or that leaves a message out.
    """
    form = _form(template)
    values = [_plain(message, form) for message in messages]
    text = _run(template, values, tools, add_generation_prompt)
    for index, message in enumerate(messages):
        if message.role == "function":  # its text may be quoted
            shown = form.result_role is not None
        else:  # old replies may lose their thoughts
            shown = message.role == "assistant" or all(
                part.text.strip() in text for part in message.parts)
        if not shown:
            raise UserError(f"The chat template leaves out messages[{index}], "
                            f"of role {message.role!r}.", "Every message must reach the model.",
                            _FIX)
    return text


def render_segments(template: str, messages: tuple[Message, ...], tools: list[dict],
                    add_generation_prompt: bool, markers: Iterable[str]
                    ) -> list[tuple[str, bool]]:
    """Returns `render_template` as (text, trusted) segments; markers in messages are not trusted.

    Each marker that a message spells is hidden behind a private-use character while the template
    runs, so that what the template itself writes can be told apart.
    """
    ordered = sorted(filter(None, markers), key=len, reverse=True)
    base = 0xF0000
    used = {ord(char) for text in _strings(messages, tools) for char in text if ord(char) >= base}
    while overlap := [point for point in used if base <= point < base + len(ordered)]:
        base = max(overlap) + 1
        if base + len(ordered) > 0x110000:
            raise UserError("The messages fill the private-use planes of Unicode.",
                            "Some of it must be free to keep markers apart.", "Shorten them.")
    hidden = {marker: chr(base + n) for n, marker in enumerate(ordered)}

    def hide(text: str) -> str:
        for marker, char in hidden.items():
            text = text.replace(marker, char)
        return text

    text = render_template(template, tuple(_map_message(m, hide) for m in messages),
                           _map_strings(tools, hide), add_generation_prompt)
    shown = {char: marker for marker, char in hidden.items()}
    segments, start = [], 0
    for at, char in enumerate(text):
        if char in shown:
            segments += [(text[start:at], True), (shown[char], False)]
            start = at + 1
    return [*segments, (text[start:], True)]


def _plain(message: Message, form: "_Form") -> dict[str, Any]:
    """Returns a message as the template expects it."""
    role, parts = message.role, message.parts
    value: dict[str, Any] = {"role": role}
    if role == "function":
        value = {"role": form.result_role, "name": message.name}
        if message.call_id:
            value["tool_call_id"] = message.call_id
    if message.calls and form.calls:
        value["tool_calls"] = [{"type": "function", "function": {
            "name": call.name, "arguments": call.decoded}} for call in message.calls]
    elif message.calls:
        parts = (*parts, Part(call_text(message.calls, form.protocol)))
    if form.typed:
        value["content"] = [
            {"type": "image"} if part.image else {"type": "text", "text": part.text}
            | ({"name": part.name or message.name} if role == "function" else {})
            for part in parts]
    else:
        value["content"] = "".join(IMAGE if part.image else part.text for part in parts)
    return value


class _Form:
    """What a template reads, found by trying it on short chats."""

    def __init__(self, template: str):
        self.protocol = M1 if "tool_calls>" in template else TEXT01
        self.result_role, self.calls, self.typed = "tool", True, True
        ask = Message("user", (Part(_PROBE),))
        if not self._shows(template, ask):
            self.typed = False
            if not self._shows(template, ask):
                _run(template, [_plain(ask, self)], [], True)
                raise UserError("The chat template does not show a user's message.",
                                "Every message must reach the model.", _FIX)
        user = Message("user", (Part("?"),))
        call = Message("assistant", (Part(""),), calls=(FunctionCall(_PROBE),))
        self.calls = self._shows(template, user, call)
        call = Message("assistant", (Part(""),), calls=(FunctionCall("f"),))
        result = Message("function", (Part(_PROBE),), name="f")
        for self.result_role in ("tool", "function", None):
            if self.result_role is None or self._shows(template, user, call, result):
                break

    def _shows(self, template: str, *messages: Message) -> bool:
        try:
            text = _run(template, [_plain(m, self) for m in messages], [], False)
        except UserError:
            return False
        return _PROBE in text and "'text':" not in text


@functools.lru_cache(maxsize=8)
def _form(template: str) -> _Form:
    return _Form(template)


def _run(template: str, messages: list[dict], tools: list[dict],
         add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return _compiled(template).render(
            messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:
        raise UserError(f"The chat template refuses these messages: {error}.",
                        "The checkpoint's template decides which chats it takes.", _FIX) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"The chat template fails on these messages: {error}.",
                        "The checkpoint's template decides which chats it takes.", _FIX) from None


@functools.lru_cache(maxsize=8)
def _compiled(template: str):
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: marks assistant text for training masks; shown as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def fail(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": fail,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"The chat template has an error in line {error.lineno}: {error.message}.",
                        "It must be a jinja2 template.", _FIX) from None


def _map_strings(value: Any, change) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(k, change): _map_strings(v, change) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_map_strings(item, change) for item in value]
    return value


def _map_message(message: Message, change) -> Message:
    return Message(
        message.role,
        tuple(Part(change(p.text), p.image, change(p.name)) for p in message.parts),
        change(message.name),
        tuple(FunctionCall(change(c.name), change(c.arguments)) for c in message.calls),
        change(message.call_id))


def _strings(messages: tuple[Message, ...], tools: list[dict]) -> list[str]:
    found: list[str] = []

    def keep(text: str) -> str:
        found.append(text)
        return text

    for message in messages:
        _map_message(message, keep)
    _map_strings(tools, keep)
    return found

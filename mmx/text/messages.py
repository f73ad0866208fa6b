"""Chat messages as users write them, checked and brought into one form."""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from mmx.errors import UserError
from mmx.text.functions import FunctionCall, to_json

IMAGE = "<image>"
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant",
          "function": "function", "tool": "function"}
_IMAGE_TYPES = ("image", "image_url")


@dataclasses.dataclass(frozen=True)
class Part:
    """One content item: an image, or text; `name` is the function a result item belongs to."""

    text: str = ""
    image: bool = False
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of role "system", "user", "assistant" or "function" (a function's result)."""

    role: str
    parts: tuple[Part, ...] = ()
    name: str = ""
    calls: tuple[FunctionCall, ...] = ()
    call_id: str = ""

    @property
    def text(self) -> str:
        return "".join(IMAGE if part.image else part.text for part in self.parts)


def read_messages(messages: Iterable[Mapping[str, Any]]) -> tuple[Message, ...]:
    """Returns messages with strings wrapped into items and OpenAI's forms translated.

    OpenAI's role "tool" becomes "function", named through its `tool_call_id`; "developer" becomes
    "system"; items of type "image" and "image_url" become images.
    Raises UserError naming the message and what is wrong with it.
    """
    if isinstance(messages, Mapping | str) or not isinstance(messages, Iterable):
        raise UserError("`messages` is not a list.", "It is a list of {\"role\", \"content\"}.",
                        "Put the message into a list.")
    names: dict[str, str] = {}
    result = []
    for index, message in enumerate(messages):
        result.append(_read(message, f"messages[{index}]", names))
    if not result:
        raise UserError("`messages` is empty.", "A chat has at least one message.",
                        "Add a message with role 'user'.")
    return tuple(result)


def _read(message: Any, what: str, names: dict[str, str]) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f"{what} is not an object.", "A message is {\"role\", \"content\"}.",
                        "Correct or remove it.")
    role = _ROLES.get(message.get("role")) if isinstance(message.get("role"), str) else None
    if role is None:
        raise UserError(f"{what} has role {message.get('role')!r}.",
                        f"A role is one of {', '.join(_ROLES)}.", "Correct the role.")
    calls = message.get("tool_calls")
    if calls and role != "assistant":
        raise UserError(f"{what} has tool_calls but role {message['role']!r}.",
                        "Only the assistant calls functions.", "Correct the role.")
    calls = _read_calls(calls or (), what, names)
    call_id = message.get("tool_call_id")
    parts = _read_parts(message.get("content"), what, empty_ok=bool(calls))
    if role != "function":
        return Message(role, parts, calls=calls)
    if any(part.image for part in parts):
        raise UserError(f"{what} returns an image from a function.",
                        "A function's result is text.", "Put the image into a user message.")
    name = message.get("name") or names.get(call_id if isinstance(call_id, str) else "")
    name = name or next((part.name for part in parts if part.name), "")
    if not isinstance(name, str) or not name:
        raise UserError(f"{what} is the result of an unknown function.",
                        "A result has a name, or the tool_call_id of an earlier tool_calls entry.",
                        "Add \"name\", or keep the assistant message that made the call.")
    return Message(role, parts, name=name, call_id=call_id if isinstance(call_id, str) else "")


def _read_parts(content: Any, what: str, empty_ok: bool) -> tuple[Part, ...]:
    if content is None and empty_ok:
        return ()
    if isinstance(content, str):
        return (Part(content),)
    if isinstance(content, Mapping | bytes) or not isinstance(content, Iterable):
        raise UserError(f"{what} has no text: its content is {type(content).__name__}.",
                        "Content is a string or a list of typed items.", "Write the text.")
    parts = []
    for index, item in enumerate(content):
        kind = item.get("type") if isinstance(item, Mapping) else None
        if kind in _IMAGE_TYPES:
            parts.append(Part(image=True))
        elif kind == "text" and isinstance(item.get("text"), str):
            name = item.get("name")
            parts.append(Part(item["text"], name=name if isinstance(name, str) else ""))
        else:
            raise UserError(f"{what}.content[{index}] is not an item this model reads.",
                            'An item is {"type": "text", "text": …} or {"type": "image"}.',
                            "Correct or remove it.")
    return tuple(parts)


def _read_calls(calls: Any, what: str, names: dict[str, str]) -> tuple[FunctionCall, ...]:
    if isinstance(calls, Mapping | str) or not isinstance(calls, Iterable):
        raise UserError(f"{what} has tool_calls that are not a list.",
                        "tool_calls is a list of calls.", "Put the call into a list.")
    result = []
    for index, call in enumerate(calls):
        place = f"{what}.tool_calls[{index}]"
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) \
                or not function["name"]:
            raise UserError(f"{place} has no function name.",
                            "A call is {\"id\", \"function\": {\"name\", \"arguments\"}}.",
                            "Give it a name.")
        arguments = function.get("arguments") or {}
        text = arguments if isinstance(arguments, str) else to_json(arguments, place)
        try:
            is_object = isinstance(json.loads(text), dict)
        except ValueError:
            is_object = False
        if not is_object:
            raise UserError(f"{place} ({function['name']}) has arguments {text[:80]!r}.",
                            "Arguments are a JSON object, or its text.", "Correct the JSON.")
        if isinstance(call.get("id"), str):
            names[call["id"]] = function["name"]
        result.append(FunctionCall(function["name"], text))
    return tuple(result)

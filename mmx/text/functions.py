"""Function calls: tool definitions, and the calls inside a model's reply.

Two protocols that must not be mixed: "text01" writes `<function_call>` and a fenced `typescript`
block of `functions.NAME({json})`; "m1" writes JSON lines between `<tool_calls>` tags
(function-call guides of MiniMax-Text-01 and MiniMax-M1).
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from mmx.errors import UserError
from mmx.text.stop import held_length

TEXT01, M1 = "text01", "m1"
PROTOCOLS = (TEXT01, M1)
CALL_MARKER = "<function_call>"


@dataclasses.dataclass(frozen=True)
class FunctionCall:
    """One call: `arguments` is the JSON text of an object, as the model wrote it where it could."""

    name: str
    arguments: str = "{}"

    @property
    def decoded(self) -> dict[str, Any]:
        return json.loads(self.arguments)


@dataclasses.dataclass(frozen=True)
class Reply:
    """A reply in two parts: the text outside of calls, unchanged, and the calls in order."""

    content: str = ""
    calls: tuple[FunctionCall, ...] = ()


def check_protocol(protocol: str) -> str:
    if protocol not in PROTOCOLS:
        raise UserError(f"Chat protocol {protocol!r} is unknown.",
                        f"It is one of {', '.join(PROTOCOLS)}.",
                        "Use 'text01' for MiniMax-Text-01 and VL-01, 'm1' for MiniMax-M1.")
    return protocol


def to_json(value: Any, what: str) -> str:
    """One line of JSON as the published templates write it: spaces after separators, no escapes."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} can not be written as JSON: {error}.",
                        "Only JSON values can be shown to the model.",
                        "Convert it first.") from None


def tool_definitions(tools: Iterable[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Returns bare `{"name", "description", "parameters"}` objects; unwraps OpenAI's `function`.

    Raises UserError for a definition without a name or with parameters that are not an object.
    """
    if isinstance(tools, Mapping | str):
        raise UserError("`tools` is not a list.", "It is a list of function definitions.",
                        "Put the definition into a list.")
    definitions = []
    for index, tool in enumerate(tools or ()):
        what = f"tools[{index}]"
        if isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
            tool = tool["function"]
        if not isinstance(tool, Mapping) or not isinstance(tool.get("name"), str) \
                or not tool["name"]:
            raise UserError(f"{what} has no function name.",
                            "A tool is {\"name\", \"description\", \"parameters\"}, alone or under "
                            "\"function\".", "Give it a name.")
        if not isinstance(tool.get("parameters", {}), Mapping):
            raise UserError(f"{what} ({tool['name']}) has parameters that are not an object.",
                            "Parameters are a JSON Schema object.",
                            "Write {\"type\": \"object\", …}.")
        definitions.append(dict(tool))
    return definitions


def call_text(calls: Iterable[FunctionCall], protocol: str) -> str:
    """Returns calls as a model of this protocol emits them."""
    if check_protocol(protocol) == TEXT01:
        return "".join(
            f"{CALL_MARKER}```typescript\nfunctions.{call.name}({call.arguments})\n```"
            for call in calls)
    lines = [f'{{"name": {to_json(call.name, "A function name")}, '
             f'"arguments": {to_json(call.decoded, call.name)}}}\n' for call in calls]
    return f"<tool_calls>\n{''.join(lines)}</tool_calls>"


def parse_reply(text: str, protocol: str = TEXT01) -> Reply:
    """Splits a whole reply into text and calls; what is not a well-formed call stays text."""
    splitter = CallSplitter(protocol)
    first, last = splitter.push(text), splitter.finish()
    return Reply(first.content + last.content, first.calls + last.calls)


def parse_calls(text: str, protocol: str = TEXT01) -> tuple[FunctionCall, ...]:
    """Returns the calls of a whole reply, in order."""
    return parse_reply(text, protocol).calls


class CallSplitter:
    """`parse_reply` for a stream: `push` pieces, then `finish`; any cut gives the same parts.

    Text is passed on at once, except for what may be the beginning of a call.
    thinking: the reply starts inside a `<think>` block ("m1"), where calls are not taken.
    """

    def __init__(self, protocol: str = TEXT01, thinking: bool = False):
        self._text01 = check_protocol(protocol) == TEXT01
        self._openers = (CALL_MARKER, "```typescript") if self._text01 else \
            ("<tool_calls>", "<think>")
        self._thinking = thinking and not self._text01
        self._buffer = ""
        self._searched = 0  # of the block at the start of the buffer, known to hold no end

    def push(self, text: str) -> Reply:
        self._buffer += text
        return self._drain(final=False)

    def finish(self) -> Reply:
        """Returns the rest; a block that the length limit cut keeps the calls it completed."""
        return self._drain(final=True)

    def _drain(self, final: bool) -> Reply:
        content: list[str] = []
        calls: list[FunctionCall] = []
        while self._buffer:
            openers = ("</think>",) if self._thinking else self._openers
            at, opener = _first(self._buffer, openers)
            if at < 0:
                keep = 0 if final else held_length(self._buffer, openers)
                self._pass_on(content, len(self._buffer) - keep)
                break
            if at:
                self._pass_on(content, at)
            if opener in ("<think>", "</think>"):
                self._thinking = opener == "<think>"
                self._pass_on(content, len(opener))
                continue
            block = self._fenced(opener, final) if self._text01 else self._tagged(opener, final)
            if block is None:
                break
            found, end = block
            if found:
                calls += found
                self._buffer, self._searched = self._buffer[end:], 0
            else:
                self._pass_on(content, len(opener))
        return Reply("".join(content), tuple(calls))

    def _pass_on(self, content: list[str], size: int):
        content.append(self._buffer[:size])
        self._buffer, self._searched = self._buffer[size:], 0

    def _end_of(self, closer: str, start: int) -> int:
        """Finds `closer` at or after `start`, looking at no character twice."""
        at = self._buffer.find(closer, max(start, self._searched))
        if at < 0:
            self._searched = max(start, len(self._buffer) - len(closer) + 1)
        return at

    def _fenced(self, opener: str, final: bool):
        """Returns (calls, end) of a Text-01 block, no calls for other text, None for "wait"."""
        text, pos = self._buffer, 0
        if opener == CALL_MARKER:
            pos = _skip_space(text, len(opener))
            if not text.startswith("```", pos):
                return None if not final and "```".startswith(text[pos:]) else ([], 0)
        line = text.find("\n", pos, pos + _INFO_LIMIT)
        if line < 0:
            return None if not final and len(text) < pos + _INFO_LIMIT else ([], 0)
        info = text[pos + 3:line].strip()
        if opener != CALL_MARKER:
            start = _skip_space(text, line)
            wanted = "functions."
            if info != "typescript":
                return [], 0
            if not text.startswith(wanted, start):
                return None if not final and wanted.startswith(text[start:]) else ([], 0)
        end = self._end_of("\n```", line)
        if end < 0 and not final:
            return None
        stop = len(text) if end < 0 else end
        calls, after = _scan_calls(text, line, stop)
        if text.startswith("```", after):
            return calls, after + 3
        return calls, after if end < 0 else end + 4

    def _tagged(self, opener: str, final: bool):
        """Returns (calls, end) of an M1 block, no calls for other text, None for "wait"."""
        start, closer = len(opener), "</tool_calls>"
        while (end := self._end_of(closer, start)) >= 0:
            line = self._buffer[self._buffer.rfind("\n", 0, end) + 1:end]
            if not _inside_string(line):
                return _json_calls(self._buffer[len(opener):end]), end + len(closer)
            start = end + 1
            self._searched = start
        if not final:
            return None
        end = self._buffer.find(closer)
        stop = len(self._buffer) if end < 0 else end
        after = stop if end < 0 else end + len(closer)
        return _json_calls(self._buffer[len(opener):stop]), after


_INFO_LIMIT = 80  # characters of an opening fence's line; more is not one
_CALL = re.compile(r"functions\.([\w.-]+)[ \t]*\(\s*")
_DECODER = json.JSONDecoder(strict=False)


def _scan_calls(text: str, pos: int, stop: int) -> tuple[list[FunctionCall], int]:
    """Returns the calls in text[pos:stop] and where the last one ended."""
    calls, end = [], pos
    while match := _CALL.search(text, pos, stop):
        pos = match.end()
        arguments, after = "{}", pos
        if not text.startswith(")", pos):
            try:
                value, after = _DECODER.raw_decode(text, pos)
            except (ValueError, RecursionError):
                continue
            if not isinstance(value, dict) or after > stop:
                continue
            arguments, after = text[pos:after], min(_skip_space(text, after), stop)
        if text.startswith(")", after):
            after += 1
        elif after < stop:  # a reply cut right after its arguments still counts
            continue
        calls.append(FunctionCall(match[1], arguments))
        pos = end = _skip_space(text, after, ";")
        if text.startswith("```", end):
            break
    return calls, end


def _json_calls(text: str) -> list[FunctionCall]:
    """Returns the calls of the JSON objects in `text`; surplus closing braces are dropped."""
    calls, pos = [], 0
    while (pos := text.find("{", pos)) >= 0:
        try:
            value, pos = _DECODER.raw_decode(text, pos)
        except (ValueError, RecursionError):
            pos = text.find("\n", pos)
            if pos < 0:
                break
            continue
        arguments = value.get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                continue
        if isinstance(value.get("name"), str) and isinstance(arguments, dict):
            calls.append(FunctionCall(value["name"], json.dumps(arguments, ensure_ascii=False)))
    return calls


def _first(text: str, targets: Iterable[str]) -> tuple[int, str]:
    """Returns (position, target) of the earliest target, (-1, "") if there is none."""
    for target in targets:
        if text.startswith(target):  # a block that is still open: no need to search it
            return 0, target
    return min(((at, target) for target in targets if (at := text.find(target)) >= 0),
               default=(-1, ""))


def _skip_space(text: str, pos: int, also: str = "") -> int:
    while pos < len(text) and (text[pos].isspace() or text[pos] in also):
        pos += 1
    return pos


def _inside_string(line: str) -> bool:
    """Whether a JSON line ends within a string."""
    return len(re.findall(r'(?<!\\)(?:\\\\)*"', line)) % 2 == 1

"""Chat messages to the text and ids that the model was trained on.

Protocols: "text01" (MiniMax-Text-01, VL-01) and "m1" (MiniMax-M1); formats of the published
tokenizer_config.json templates and function-call guides. A checkpoint's own jinja template can take
their place.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmx.errors import UserError
from mmx.text.functions import (
    CALL_MARKER,
    M1,
    TEXT01,
    call_text,
    check_protocol,
    to_json,
    tool_definitions,
)
from mmx.text.messages import IMAGE, Message, read_messages
from mmx.text.tokenizer import BEGIN_DOCUMENT, BEGIN_SENTENCE, END_SENTENCE, Tokenizer

# The system sentence of the model's documentation; no template adds it by itself.
DEFAULT_SYSTEM = "You are a helpful assistant created by MiniMax based on MiniMax-Text-01 model."
_M1_SYSTEM = "You are a helpful assistant created by Minimax based on MiniMax-M1 model."

_END_TURN = END_SENTENCE + "\n"
_TEXT01_HEADERS = {"system": "system ai_setting=assistant", "user": "user name=user",
                   "assistant": "ai name=assistant",
                   "function": "system function_response=functions"}
_M1_HEADERS = {"system": "system ai_setting=MiniMax AI", "user": "user name=user",
               "assistant": "ai name=MiniMax AI", "function": "tool name=tools"}
_M1_TOOLS = """You are provided with these tools:
<tools>
{}</tools>

If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide \
tool-name and json-object of arguments, following the format below:
<tool_calls>
{{"name": <tool-name>, "arguments": <args-json-object>}}
...
</tool_calls>"""

Messages = Iterable[Mapping[str, Any]]
Segment = tuple[str, bool]  # text, and whether it is the template's own


def render(messages: Messages, tools: Iterable[Mapping] | None = None,
           add_generation_prompt: bool = True, protocol: str = TEXT01,
           template: str | None = None) -> str:
    """Returns the prompt text of a chat.

    messages: OpenAI-style; content is a string or a list of text and image items. Of a function's
    result the "text01" template shows the first item only.
    tools: function definitions, bare or in OpenAI's wrapper; "text01" puts them after all messages.
    template: a jinja chat template, used in place of `protocol`'s own text.
    Raises UserError for a malformed message, tool or template.

    The text can not tell a marker from a message that spells one: use `render_ids` for messages
    that others wrote.
    """
    check_protocol(protocol)
    if template is not None:
        from mmx.text.template import render_template

        return render_template(template, read_messages(messages), tool_definitions(tools),
                               add_generation_prompt)
    segments = _segments(messages, tools, add_generation_prompt, protocol)
    return "".join(text for text, _ in segments)


def render_ids(tokenizer: Tokenizer, messages: Messages, tools: Iterable[Mapping] | None = None,
               add_generation_prompt: bool = True, protocol: str | None = None,
               allow_special: bool = False) -> list[int]:
    """Returns the prompt ids of a chat, in which no message can forge a marker.

    A marker spelled in a message, a function result or a tool is encoded as plain characters;
    for all other chats the ids are those of `tokenizer.encode(render(...))`.
    protocol: None takes the checkpoint's own template if it has one, else "text01".
    allow_special: markers spelled in messages count as markers.
    Raises UserError as `render`, or if the tokenizer has no turn markers.
    """
    if protocol is None and tokenizer.chat_template is not None:
        from mmx.text.template import render_segments

        segments = render_segments(tokenizer.chat_template, read_messages(messages),
                                   tool_definitions(tools), add_generation_prompt,
                                   tokenizer.markers)
    else:
        protocol = protocol or TEXT01
        segments = list(_segments(messages, tools, add_generation_prompt, protocol))
        needed = [BEGIN_SENTENCE, END_SENTENCE] + [BEGIN_DOCUMENT] * (protocol == M1) \
            + [IMAGE] * any(IMAGE in text for text, trusted in segments if trusted)
        for marker in needed:
            if marker not in tokenizer.markers:
                raise UserError(f"The tokenizer has no token {marker}.",
                                f"The {protocol!r} chat protocol marks its turns with it.",
                                "Use a checkpoint that was trained on chats, or a plain prompt.")
    if allow_special:
        return tokenizer.encode("".join(text for text, _ in segments))
    return tokenizer.encode_segments(segments)


def protocol_of(tokenizer: Tokenizer) -> str:
    """Returns the protocol in which replies of this checkpoint call functions."""
    template = tokenizer.chat_template or ""
    return M1 if "tool_calls>" in template else TEXT01


def _segments(messages: Messages, tools, add_generation_prompt: bool,
              protocol: str) -> Iterator[Segment]:
    build = _text01 if check_protocol(protocol) == TEXT01 else _m1
    return build(read_messages(messages), tool_definitions(tools), add_generation_prompt)


def _text01(messages: tuple[Message, ...], tools: list[dict],
            add_generation_prompt: bool) -> Iterator[Segment]:
    for message in messages:
        yield f"{BEGIN_SENTENCE}{_TEXT01_HEADERS[message.role]}\n", True
        if message.role == "function":
            yield '{"name": "', True
            yield message.name, False
            yield '", "response": ', True
            yield message.parts[0].text if message.parts else "", False
            yield "}", True
        else:
            for part in message.parts:
                yield (IMAGE, True) if part.image else (part.text, False)
            for call in message.calls:
                yield CALL_MARKER, True
                yield call_text([call], TEXT01).removeprefix(CALL_MARKER), False
        yield _END_TURN, True
    for tool in tools:
        yield f"{BEGIN_SENTENCE}system function_setting=functions\n", True
        yield to_json(tool, f"Tool {tool['name']}"), False
        yield _END_TURN, True
    if add_generation_prompt:
        yield f"{BEGIN_SENTENCE}{_TEXT01_HEADERS['assistant']}\n", True


def _m1(messages: tuple[Message, ...], tools: list[dict],
        add_generation_prompt: bool) -> Iterator[Segment]:
    if any(part.image for message in messages for part in message.parts):
        raise UserError("The chat holds an image.", "The 'm1' protocol is of text alone.",
                        "Remove the image.")
    yield BEGIN_DOCUMENT, True
    system = "".join(m.text for m in messages if m.role == "system").strip()
    if not any(message.role == "system" for message in messages):
        system = _M1_SYSTEM
    if system:
        yield f"{BEGIN_SENTENCE}{_M1_HEADERS['system']}\n", True
        yield system, False
        yield _END_TURN, True
    if tools:
        before, after = _M1_TOOLS.format("\0").split("\0")
        yield f"{BEGIN_SENTENCE}system tool_setting=tools\n{before}", True
        for tool in tools:
            yield to_json(tool, f"Tool {tool['name']}") + "\n", False
        yield after + _END_TURN, True
    previous = ""
    for message in messages:
        if message.role == "system":
            continue
        if previous == "function" != message.role:  # results in a row share one turn
            yield _END_TURN, True
        if not previous == message.role == "function":
            yield f"{BEGIN_SENTENCE}{_M1_HEADERS[message.role]}\n", True
        previous = message.role
        if message.role == "function":
            for part in message.parts:
                yield "tool name: ", True
                yield part.name or message.name, False
                yield "\ntool result: ", True
                yield part.text, False
                yield "\n\n", True
            continue
        text = message.text.strip()
        yield text, False
        if message.calls:
            yield "\n<tool_calls>\n" if text else "<tool_calls>\n", True
            body = call_text(message.calls, M1)
            yield body.removeprefix("<tool_calls>\n").removesuffix("</tool_calls>"), False
            yield "</tool_calls>", True
        yield _END_TURN, True
    if previous == "function":
        yield _END_TURN, True
    if add_generation_prompt:
        yield f"{BEGIN_SENTENCE}{_M1_HEADERS['assistant']}\n", True

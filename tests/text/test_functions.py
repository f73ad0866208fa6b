"""Function calls in replies, whole and streamed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmx.errors import UserError
from mmx.text import CallSplitter, FunctionCall, Reply, parse_calls, parse_reply
from mmx.text.functions import call_text, tool_definitions
from tests.text.conftest import ALPHABET

WEATHER = 'functions.get_weather({"location": "上海"})'
CALL = FunctionCall("get_weather", '{"location": "上海"}')

TEXT01 = [
    ("plain text", Reply("plain text")),
    (f"<function_call>```typescript\n{WEATHER}\n```", Reply("", (CALL,))),
    (f"```typescript\n{WEATHER}\n```", Reply("", (CALL,))),
    (f"Let me see.\n<function_call>```typescript\n{WEATHER}\n```\nbye",
     Reply("Let me see.\n\nbye", (CALL,))),
    (f"<function_call>```typescript\n{WEATHER}\n{WEATHER};\n```", Reply("", (CALL, CALL))),
    (f"<function_call>```typescript\n{WEATHER}\n```<function_call>```typescript\n{WEATHER}\n```",
     Reply("", (CALL, CALL))),
    (f"<function_call>\n``` ts \n  await {WEATHER}", Reply("", (CALL,))),
    (f"```typescript\n{WEATHER}```and on", Reply("and on", (CALL,))),
    ("<function_call>```typescript\nfunctions.now()\n```", Reply("", (FunctionCall("now"),))),
    ("<function_call>```typescript\nfunctions.a-b.c({\n  \"x\": [1,\n 2]\n})\n```",
     Reply("", (FunctionCall("a-b.c", '{\n  "x": [1,\n 2]\n}'),))),
    ('```typescript\nfunctions.f({"s": "a) ``` } \\" functions.g({})"})\n```',
     Reply("", (FunctionCall("f", '{"s": "a) ``` } \\" functions.g({})"}'),))),
    ('<function_call>```typescript\nfunctions.f({"cut": true', None),
    ('```typescript\nfunctions.f({bad})\n```', None),
    ('```typescript\nfunctions.f([1])\n```', None),
    ("```typescript\nconst x = functions.f({});\n```", None),
    ("```typescriptreact\nfunctions.f({})\n```", None),
    ("<function_call> and ```python\nfunctions.f({})\n```", None),
    ("```" + "typescript " * 20 + "\nfunctions.f({})\n```", None),
    ("```typescript", None),
]
LINE = '{"name": "get_weather", "arguments": {"location": "上海"}}'
M1 = [
    ("plain text", Reply("plain text")),
    (f"<tool_calls>\n{LINE}\n</tool_calls>", Reply("", (CALL,))),
    (f"<think>hm</think>\n<tool_calls>\n{LINE}\n{LINE}\n</tool_calls>\n",
     Reply("<think>hm</think>\n\n", (CALL, CALL))),
    (f"<tool_calls>\n{LINE}}}}}\n{LINE}}}\n</tool_calls>", Reply("", (CALL, CALL))),
    (f"<think><tool_calls>\n{LINE}\n</tool_calls></think>x<tool_calls>{LINE}</tool_calls>",
     Reply(f"<think><tool_calls>\n{LINE}\n</tool_calls></think>x", (CALL,))),
    (f"<think><tool_calls>\n{LINE}\n</tool_calls>", None),
    (f"<tool_calls>\n{LINE}\nnot json\n{LINE}", Reply("", (CALL, CALL))),
    (f"<tool_calls>\n{{bad\n{LINE}\n</tool_calls>", Reply("", (CALL,))),
    ('<tool_calls>\n{"name": "f", "arguments": "{\\"a\\": 1}"}\n</tool_calls>',
     Reply("", (FunctionCall("f", '{"a": 1}'),))),
    ('<tool_calls>\n{"name": "f", "arguments": {"s": "</tool_calls>"}}\n</tool_calls>!',
     Reply("!", (FunctionCall("f", '{"s": "</tool_calls>"}'),))),
    ('<tool_calls>\n{"name": "f"}\n</tool_calls>', Reply("", (FunctionCall("f"),))),
    ('<tool_calls>\n{"arguments": {}}\n</tool_calls>', None),
    ("<tool_calls></tool_calls> are tags", None),
    ("a <tool_cal", None),
    (f"<function_call>```typescript\n{WEATHER}\n```", None),
]
CASES = [("text01", text, reply) for text, reply in TEXT01] + [
    ("m1", text, reply) for text, reply in M1]


@pytest.mark.parametrize("protocol, text, expected", CASES)
def test_whole_reply(protocol, text, expected):
    expected = expected or Reply(text)  # not a call: everything stays text
    assert parse_reply(text, protocol) == expected
    assert parse_calls(text, protocol) == expected.calls


def streamed(text, protocol, cuts):
    splitter, content, calls = CallSplitter(protocol), "", ()
    bounds = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    parts = [splitter.push(text[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    for part in [*parts, splitter.finish()]:
        content, calls = content + part.content, calls + part.calls
    return Reply(content, calls)


@pytest.mark.parametrize("protocol, text, expected", CASES)
def test_reply_by_character(protocol, text, expected):
    assert streamed(text, protocol, range(1, len(text))) == (expected or Reply(text))


FRAGMENTS = ["<function_call>", "```", "typescript", "\n", WEATHER, "functions.f(", "{}", ")", " ",
             "<tool_calls>", "</tool_calls>", "<think>", "</think>", LINE, "}", '"', "\\", "x", "<",
             "{", ";"]


@given(parts=st.lists(st.sampled_from(FRAGMENTS), max_size=25), protocol=st.sampled_from(
    ["text01", "m1"]), cuts=st.lists(st.integers(1, 300), max_size=30))
def test_any_cut_gives_the_same_reply(parts, protocol, cuts):
    text = "".join(parts)
    assert streamed(text, protocol, cuts) == parse_reply(text, protocol)


def test_text_streams_until_a_call_may_begin():
    splitter = CallSplitter()
    assert splitter.push("Hello <fun") == Reply("Hello ")
    assert splitter.push("ny> ```type") == Reply("<funny> ")
    assert splitter.push("script\nlet x") == Reply("```typescript\nlet x")
    assert splitter.push(f"<function_call>```typescript\n{WEATHER}") == Reply()
    assert splitter.push("\n```") == Reply("", (CALL,))


def test_reply_that_starts_inside_thoughts():
    splitter = CallSplitter("m1", thinking=True)
    thought = f"<tool_calls>{LINE}</tool_calls></think>"
    assert splitter.push(f"{thought}<tool_calls>{LINE}</tool_calls>") == Reply(thought, (CALL,))


NAMES = st.text("abYZ09_-", min_size=1)
VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(ALPHABET),
                      lambda inner: st.lists(inner, max_size=3)
                      | st.dictionaries(st.text(ALPHABET), inner, max_size=3), max_leaves=6)


ARGUMENTS = st.dictionaries(st.text(ALPHABET), VALUES, max_size=3)


@given(calls=st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3),
       protocol=st.sampled_from(["text01", "m1"]))
def test_emitted_calls_parse_back(calls, protocol):
    import json

    calls = tuple(FunctionCall(name, json.dumps(arguments, ensure_ascii=False))
                  for name, arguments in calls)
    assert parse_reply(call_text(calls, protocol), protocol) == Reply("", calls)


def test_tool_definitions_are_unwrapped():
    bare = {"name": "f", "parameters": {"type": "object"}}
    assert tool_definitions([{"type": "function", "function": bare}, bare]) == [bare, bare]
    assert tool_definitions(None) == []


@pytest.mark.parametrize("tools, message", [
    ({"name": "f"}, "not a list"), ([{"type": "function"}], "tools\\[0\\] has no function name"),
    ([{"name": "f"}, "g"], "tools\\[1\\]"), ([{"name": ""}], "no function name"),
    ([{"name": "f", "parameters": []}], "parameters that are not an object")])
def test_bad_tools(tools, message):
    with pytest.raises(UserError, match=message):
        tool_definitions(tools)


def test_unknown_protocol():
    with pytest.raises(UserError, match="'m2' is unknown"):
        parse_reply("x", "m2")

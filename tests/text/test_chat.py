"""Chat prompts: exact text of both protocols, a checkpoint's own template, and forged markers."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmx.errors import UserError
from mmx.text import load_tokenizer, protocol_of, render, render_ids
from mmx.text.chat import DEFAULT_SYSTEM
from tests.text.conftest import ALPHABET, MARKERS

BOS, EOS = "<beginning_of_sentence>", "<end_of_sentence>"
TOOL = {"name": "get_weather", "description": "Wetter <für> 'Orte'",
        "parameters": {"type": "object", "properties": {"z": {"type": "string"}, "a": {}}}}
TOOL_LINE = ('{"name": "get_weather", "description": "Wetter <für> \'Orte\'", "parameters": '
             '{"type": "object", "properties": {"z": {"type": "string"}, "a": {}}}}')
WRAPPED = {"type": "function", "function": TOOL}
CALL = {"id": "c1", "type": "function",
        "function": {"name": "get_weather", "arguments": '{"location":  "上海"}'}}
DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Weather? "}, {"type": "image"}]},
    {"role": "assistant", "content": "I look.", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": '{"t": 25}'},
    {"role": "assistant", "content": "25 degrees"},
    {"role": "user", "content": "Thanks"},
]
TEXT01_DIALOGUE = f"""{BOS}system ai_setting=assistant
Be brief.{EOS}
{BOS}user name=user
Weather? <image>{EOS}
{BOS}ai name=assistant
I look.<function_call>```typescript
functions.get_weather({{"location":  "上海"}})
```{EOS}
{BOS}system function_response=functions
{{"name": "get_weather", "response": {{"t": 25}}}}{EOS}
{BOS}ai name=assistant
25 degrees{EOS}
{BOS}user name=user
Thanks{EOS}
"""
# The shape of the published Text-01 template: typed items, a "function" role, tools at the end.
TYPED_TEMPLATE = """
{%- set heads = {'system': 'system ai_setting=assistant', 'user': 'user name=user',
                 'assistant': 'ai name=assistant'} -%}
{%- for m in messages if m.role in heads or m.role == 'function' -%}
{%- if m.role == 'function' -%}
{{ '<beginning_of_sentence>system function_response=functions\\n{"name": "' ~ m.name
   ~ '", "response": ' ~ m.content[0].text ~ '}<end_of_sentence>\\n' }}
{%- else -%}
{{ '<beginning_of_sentence>' ~ heads[m.role] ~ '\\n' }}
{%- for item in m.content -%}
{{ '<image>' if item.type == 'image' else item.text }}
{%- endfor -%}
{{ '<end_of_sentence>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- for tool in tools or [] -%}
{{ '<beginning_of_sentence>system function_setting=functions\\n' ~ tool | tojson
   ~ '<end_of_sentence>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<beginning_of_sentence>ai name=assistant\\n' }}{% generation %}{% endgeneration %}
{%- endif -%}"""
STRING_TEMPLATE = """{% for m in messages %}[{{ m.role }}] {{ m['content'] | trim }}
{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function.name }}({{ c.function.arguments.location }})
{% endfor %}{% endif %}{% endfor %}"""  # noqa: E501


def test_conformance_11_template_example():
    text = render([{"role": "system", "content": DEFAULT_SYSTEM},
                   {"role": "user", "content": "Hello!"}])
    assert text == (
        "<beginning_of_sentence>system ai_setting=assistant\n"
        "You are a helpful assistant created by MiniMax based on MiniMax-Text-01 model."
        "<end_of_sentence>\n"
        "<beginning_of_sentence>user name=user\nHello!<end_of_sentence>\n"
        "<beginning_of_sentence>ai name=assistant\n")


def test_text01_dialogue():
    assert render(DIALOGUE, add_generation_prompt=False) == TEXT01_DIALOGUE
    assert render(DIALOGUE) == f"{TEXT01_DIALOGUE}{BOS}ai name=assistant\n"


@pytest.mark.parametrize("tool", [TOOL, WRAPPED], ids=["bare", "wrapped"])
def test_text01_tools_follow_all_messages(tool):
    setting = f"{BOS}system function_setting=functions\n{TOOL_LINE}{EOS}\n"
    assert render(DIALOGUE, [tool, tool]) == (
        f"{TEXT01_DIALOGUE}{setting}{setting}{BOS}ai name=assistant\n")


def test_text01_content_is_not_changed():
    text = "  two \n\n"
    items = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": "x"}}]
    assert render([{"role": "user", "content": items}], add_generation_prompt=False) == (
        f"{BOS}user name=user\n{text}<image>{EOS}\n")
    assert render([{"role": "user", "content": ""}], add_generation_prompt=False) == (
        f"{BOS}user name=user\n{EOS}\n")
    assert render([{"role": "developer", "content": "x"}]) == render(
        [{"role": "system", "content": "x"}])


def test_text01_function_result_is_raw_and_its_first_item():
    message = {"role": "function", "name": 'a"b', "content": [{"type": "text", "text": 'say "hi"'},
                                                              {"type": "text", "text": "more"}]}
    assert render([message], add_generation_prompt=False) == (
        f'{BOS}system function_response=functions\n{{"name": "a"b", "response": say "hi"}}{EOS}\n')


def test_text01_several_calls():
    two = [CALL, {"id": "c2", "function": {"name": "now", "arguments": {}}}]
    text = render([{"role": "assistant", "content": None, "tool_calls": two},
                   {"role": "tool", "tool_call_id": "c2", "content": "12:00"},
                   {"role": "tool", "tool_call_id": "c1", "content": "sun"}],
                  add_generation_prompt=False)
    assert text == (
        f"{BOS}ai name=assistant\n"
        '<function_call>```typescript\nfunctions.get_weather({"location":  "上海"})\n```'
        f"<function_call>```typescript\nfunctions.now({{}})\n```{EOS}\n"
        f'{BOS}system function_response=functions\n{{"name": "now", "response": 12:00}}{EOS}\n'
        f'{BOS}system function_response=functions\n{{"name": "get_weather", "response": sun}}{EOS}'
        "\n")


def test_m1_dialogue():
    messages = [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " Hi\n"},
                {"role": "assistant", "content": "<think>hm</think>", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "25"},
                {"role": "tool", "content": [{"type": "text", "text": "now", "name": "clock"}]},
                {"role": "assistant", "content": "25"}]
    assert render(messages, [WRAPPED], protocol="m1") == f"""<begin_of_document>\
{BOS}system ai_setting=MiniMax AI
Be brief.{EOS}
{BOS}system tool_setting=tools
You are provided with these tools:
<tools>
{TOOL_LINE}
</tools>

If you need to call tools, please respond with <tool_calls></tool_calls> XML tags, and provide \
tool-name and json-object of arguments, following the format below:
<tool_calls>
{{"name": <tool-name>, "arguments": <args-json-object>}}
...
</tool_calls>{EOS}
{BOS}user name=user
Hi{EOS}
{BOS}ai name=MiniMax AI
<think>hm</think>
<tool_calls>
{{"name": "get_weather", "arguments": {{"location": "上海"}}}}
</tool_calls>{EOS}
{BOS}tool name=tools
tool name: get_weather
tool result: 25

tool name: clock
tool result: now

{EOS}
{BOS}ai name=MiniMax AI
25{EOS}
{BOS}ai name=MiniMax AI
"""


def test_m1_without_system_message_has_its_own():
    assert render([{"role": "user", "content": "Hi"}], protocol="m1") == (
        f"<begin_of_document>{BOS}system ai_setting=MiniMax AI\n"
        f"You are a helpful assistant created by Minimax based on MiniMax-M1 model.{EOS}\n"
        f"{BOS}user name=user\nHi{EOS}\n{BOS}ai name=MiniMax AI\n")


@pytest.mark.parametrize("tools", [None, [WRAPPED]], ids=["plain", "tools"])
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "closed"])
def test_own_template_agrees(tools, prompt):
    """String content is wrapped, tool results and calls are given in a form the template shows."""
    assert render(DIALOGUE, tools, prompt, template=TYPED_TEMPLATE) == render(
        DIALOGUE, tools, prompt)


def test_own_template_of_strings():
    assert render(DIALOGUE, template=STRING_TEMPLATE) == (
        "[system] Be brief.\n[user] Weather? <image>\n[assistant] I look.\nget_weather(上海)\n"
        '[tool] {"t": 25}\n[assistant] 25 degrees\n[user] Thanks\n')


@pytest.mark.parametrize("template, message", [
    ("{% if %}", "error in line 1"),
    ("{{ raise_exception('no tools') }}{{ messages }}", "refuses these messages: no tools"),
    ("{{ messages[0].content + 3 }}", "fails on these messages"),
    ("{{ ''.__class__.__mro__ }}", "refuses these messages"),
    ("constant", "does not show a user's message"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
     "leaves out messages\\[0\\], of role 'system'"),
    ("{% for m in messages if m.role in ['system', 'user'] %}{{ m.content }}{% endfor %}",
     "leaves out messages\\[3\\], of role 'function'"),
])
def test_bad_templates(template, message):
    with pytest.raises(UserError, match=message):
        render(DIALOGUE, template=template)


@pytest.mark.parametrize("messages, message", [
    ([], "is empty"), ("hi", "not a list"), ({"role": "user"}, "not a list"), (None, "not a list"),
    (["hi"], "messages\\[0\\] is not an object"),
    ([{"content": "x"}], "role None"), ([{"role": "bot", "content": "x"}], "role 'bot'"),
    ([{"role": ["user"], "content": "x"}], "role \\['user'\\]"),
    ([{"role": "user"}], "has no text"), ([{"role": "user", "content": None}], "NoneType"),
    ([{"role": "user", "content": 3}], "is int"), ([{"role": "user", "content": {}}], "is dict"),
    ([{"role": "user", "content": ["x"]}], "content\\[0\\]"),
    ([{"role": "user", "content": [{"type": "text"}]}], "content\\[0\\]"),
    ([{"role": "user", "content": [{"type": "audio"}]}], "content\\[0\\]"),
    ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "role 'user'"),
    ([{"role": "assistant", "tool_calls": {}, "content": None}], "has no text"),
    ([{"role": "assistant", "tool_calls": CALL}], "not a list"),
    ([{"role": "assistant", "tool_calls": [{"id": "x"}]}], "no function name"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
     "has arguments '{'"),
    ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
     "JSON object"),
    ([{"role": "tool", "tool_call_id": "zz", "content": "x"}], "unknown function"),
    ([{"role": "function", "content": "x"}], "unknown function"),
    ([{"role": "function", "name": "f", "content": [{"type": "image"}]}], "image"),
])
def test_malformed_messages(messages, message):
    with pytest.raises(UserError, match=message) as error:
        render(messages)
    assert error.value.rule and error.value.fix


def test_m1_has_no_images():
    with pytest.raises(UserError, match="holds an image"):
        render(DIALOGUE, protocol="m1")


def test_unknown_protocol():
    with pytest.raises(UserError, match="'m3' is unknown"):
        render(DIALOGUE, protocol="m3")


def with_template(directory, path, template):
    shutil.copy(directory / "tokenizer.json", path)
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return load_tokenizer(path)


@pytest.fixture(scope="module")
def templated(bpe_dir, tmp_path_factory):
    return with_template(bpe_dir, tmp_path_factory.mktemp("templated"), TYPED_TEMPLATE)


@pytest.fixture(scope="module", params=["text01", "template"])
def chatter(request, bpe, templated):
    return bpe if request.param == "text01" else templated


def test_ids_of_a_chat(chatter):
    ids = render_ids(chatter, DIALOGUE, [TOOL])
    assert ids == chatter.encode(render(DIALOGUE, [TOOL]))
    assert ids.count(chatter.id_of(BOS)) == 8
    assert ids.count(chatter.id_of("<image>")) == 1


def test_ids_of_m1(bpe):
    messages = [{"role": "user", "content": "Hi"}]
    ids = render_ids(bpe, messages, protocol="m1")
    assert ids == bpe.encode(render(messages, protocol="m1"))
    assert ids[0] == bpe.id_of("<begin_of_document>")


SPELLED = st.lists(st.sampled_from(
    [*ALPHABET, *MARKERS, "<end_of_", "sentence>", "<think>"]), max_size=12).map("".join)


@given(texts=st.tuples(*[SPELLED] * 6))
def test_content_can_not_forge_a_marker(chatter, texts):
    def chat(system, user, reply, argument, result, description):
        return ([{"role": "system", "content": system}, {"role": "user", "content": user},
                 {"role": "assistant", "content": reply, "tool_calls": [
                     {"id": "1", "function": {"name": "f", "arguments": {"x": argument}}}]},
                 {"role": "tool", "tool_call_id": "1", "content": result}],
                [{"name": "f", "description": description}])

    def markers(ids):
        return [i for i in ids if i in chatter.markers.values()]

    ids = render_ids(chatter, *chat(*texts))
    assert chatter.decode(ids) == render(*chat(*texts))
    tame = render_ids(chatter, *chat(*"abcdef"))
    assert markers(ids) == markers(tame)


def test_m1_content_can_not_forge_a_marker(bpe):
    def chat(text):
        return ([{"role": role, "content": text} for role in ("system", "user", "assistant")]
                + [{"role": "assistant", "content": None, "tool_calls": [
                    {"id": "1", "function": {"name": text, "arguments": {text: text}}}]},
                   {"role": "tool", "tool_call_id": "1", "content": text}],
                [{"name": text, "description": text}])

    ids = render_ids(bpe, *chat(EOS + BOS), protocol="m1")
    assert bpe.decode(ids) == render(*chat(EOS + BOS), protocol="m1")
    assert ids.count(bpe.id_of(EOS)) == 6
    assert ids.count(bpe.id_of(BOS)) == 7


def test_trusted_content_may_hold_markers(chatter):
    chat = [{"role": "user", "content": f"a{EOS}b"}]
    assert render_ids(chatter, chat).count(chatter.id_of(EOS)) == 1
    assert render_ids(chatter, chat, allow_special=True) == chatter.encode(render(chat))


def test_private_use_characters_survive(templated):
    text = "\U000f0000\U000f0001\U000f0006" + EOS
    ids = render_ids(templated, [{"role": "user", "content": text}])
    assert templated.decode(ids) == render([{"role": "user", "content": text}])


def test_tokenizer_without_markers(fallback):
    with pytest.raises(UserError, match="no token <beginning_of_sentence>"):
        render_ids(fallback, DIALOGUE)


def test_protocol_of_a_checkpoint(bpe, bpe_dir, tmp_path):
    assert protocol_of(bpe) == "text01"
    own = with_template(bpe_dir, tmp_path, "{{ messages }}{{ '<tool_calls></tool_calls>' }}")
    assert protocol_of(own) == "m1"

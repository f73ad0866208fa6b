import json

import pytest

from mmx.batch import records
from mmx.engine.request import SamplingParams

DEFAULTS = SamplingParams(max_tokens=7, seed=3)


def read(data, index=4, line=9):
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return records.read(text, index, line, DEFAULTS)


def chat(**body):
    return {"custom_id": "a", "method": "POST", "url": records.CHAT,
            "body": {"messages": [{"role": "user", "content": "hi"}], **body}}


def completion(**body):
    return {"custom_id": "a", "url": records.COMPLETIONS, "body": {"prompt": "hi", **body}}


def test_plain_record():
    job = read({"id": 12, "prompt": "Once", "temperature": 0.5, "stop": ["x"], "max_tokens": None})
    assert (job.id, job.prompt, job.kind, job.index, job.line) == (12, "Once", "plain", 4, 9)
    assert job.sampling == SamplingParams(
        max_tokens=7, temperature=0.5, stop=("x",), seed=records.derived_seed(3, 4))


def test_plain_messages_and_ids():
    assert read({"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]}).tools
    assert read({"prompt_ids": [3, 1]}).prompt_ids == (3, 1)


def test_a_records_own_seed_wins():
    assert read({"prompt": "a", "seed": 5}).sampling.seed == 5


def test_derived_seeds_of_neighbouring_runs_do_not_meet():
    seeds = {records.derived_seed(seed, index) for seed in range(8) for index in range(200)}
    assert len(seeds) == 1600 and all(0 <= seed < 2**63 for seed in seeds)


def test_openai_chat():
    job = read(chat(model="m", max_completion_tokens=5, top_logprobs=3, logprobs=True, n=1,
                    stream=False, tool_choice="auto", user="u", top_k=2))
    assert (job.id, job.kind, job.model) == ("a", records.CHAT, "m")
    assert (job.sampling.max_tokens, job.sampling.logprobs, job.sampling.top_k) == (5, 3, 2)


def test_openai_completion():
    assert read(completion(logprobs=2, stop="x")).sampling.logprobs == 2
    assert read(completion(prompt=["hi"])).prompt == "hi"
    assert read(completion(prompt=[1, 2])).prompt_ids == (1, 2)


def test_tool_choice_none_offers_no_tools():
    assert read(chat(tools=[{"type": "function"}], tool_choice="none")).tools is None
    assert read(chat(tools=[{"type": "function"}])).tools


@pytest.mark.parametrize("data, words", [
    (b'{"prompt": "x"', "not JSON: expecting ',' delimiter at column 15"),
    (b'{"prompt": "x\t"}', "invalid control character at column 14"),
    (b'{"prompt": "\xff"}', "not UTF-8 (byte 12)"),
    (b"[" * 100000, "nested too deep"),
    (b"[1]", "holds a list"),
    (b"null", "holds null"),
    ({"id": 1}, "no prompt"),
    ({"prompt": "a", "messages": [{}]}, "prompt and messages"),
    ({"prompt": ["a", "b"]}, "one record for each prompt"),
    ({"prompt": "a", "temprature": 1}, "'temprature' is unknown. Did you mean 'temperature'?"),
    ({"prompt": "a", "temperature": -1}, "temperature=-1 is out of range"),
    ({"prompt": "a", "temperature": True}, "temperature=True is out of range"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature=nan is out of range"),
    ({"prompt": "a", "top_p": 1.5}, "top_p=1.5 is out of range"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens=0 is out of range"),
    ({"prompt": "a", "max_tokens": "9"}, "max_tokens='9' is out of range"),
    ({"prompt": "a", "stop": 3}, "stop=3 is not a list"),
    ({"prompt": "a", "stop": [""]}, "not a list of stop strings"),
    ({"prompt": "a", "stop_token_ids": ["x"]}, "not a list of ids"),
    ({"prompt": "a", "tools": [{}]}, "tools and no messages"),
    ({"prompt_ids": []}, "not a list of ids"),
    ({"prompt_ids": [True]}, "not a list of ids"),
    ({"messages": []}, "not a list of objects"),
    ({"messages": "hi"}, "not a list of objects"),
    ({**chat(), "url": "/v1/embeddings"}, "url='/v1/embeddings' is not served"),
    ({**chat(), "method": "GET"}, "method='GET' is not served"),
    ({**chat(), "custom_id": None}, "no custom_id"),
    ({**chat(), "body": None}, "no body"),
    ({**chat(), "extra": 1}, "'extra' is unknown"),
    (chat(n=2), "n=2 is not supported"),
    (chat(stream=True), "stream=True is not supported"),
    (chat(logit_bias={"1": 5}), "logit_bias={'1': 5} is not supported"),
    (chat(tool_choice="required"), "tool_choice='required' is not supported"),
    (chat(response_format={"type": "json_object"}), "response_format"),
    (chat(top_logprobs=2), "top_logprobs stands without logprobs"),
    (chat(logprobs=3), "logprobs=3 is out of range"),
    (chat(logprobs=True, top_logprobs=21), "logprobs=21 is out of range"),
    (chat(messages=None, prompt="x"), "'prompt' is unknown"),
    (chat(messages=None), "no prompt"),
    (completion(prompt=["a", "b"]), "several prompts"),
    (completion(logprobs=True), "logprobs=True is out of range"),
    (completion(suffix="x"), "suffix='x' is not supported"),
])
def test_refused_records_say_why(data, words):
    with pytest.raises(records.RecordError) as caught:
        read(data)
    assert words in str(caught.value)


def test_a_refused_record_keeps_what_was_read_of_it():
    with pytest.raises(records.RecordError) as caught:
        read({"id": "me", "prompt": 3})
    assert (caught.value.id, caught.value.kind) == ("me", records.PLAIN)
    with pytest.raises(records.RecordError) as caught:
        read(chat(n=2))
    assert (caught.value.id, caught.value.kind) == ("a", records.CHAT)

"""Lines of a batch: mmx's own records and OpenAI's batch requests, read into one form."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mmx.engine.request import MAX_LOGPROBS, SamplingParams
from mmx.errors import UserError, nearest

PLAIN = "plain"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
_PLAIN_KEYS = ("id", "prompt", "prompt_ids", "messages", "tools", *_SAMPLING)
_OPENAI_KEYS = ("custom_id", "method", "url", "body")
# Fields of a request body that change no token here and are taken as they are.
_IGNORED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier",
            "prompt_cache_key", "parallel_tool_calls")
# Fields that are taken only with the value that means "nothing special".
_NEUTRAL = {
    "n": (None, 1), "best_of": (None, 1), "stream": (None, False), "echo": (None, False),
    "suffix": (None, ""), "logit_bias": (None, {}), "stream_options": (None,),
    "response_format": (None, {"type": "text"}),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One record to answer: exactly one of `prompt`, `prompt_ids`, `messages` is set."""

    index: int
    line: int
    id: Any
    kind: str  # PLAIN, CHAT or COMPLETIONS
    sampling: SamplingParams
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    messages: list[dict] | None = None
    tools: list[dict] | None = None
    model: str = ""


class RecordError(UserError):
    """A record that cannot be answered; `id` and `kind` are what could be read of it."""

    def __init__(self, error: UserError, id: Any, kind: str):
        super().__init__(error.what, error.rule, error.fix)
        self.id, self.kind = id, kind


def derived_seed(seed: int, index: int) -> int:
    """A record's own seed: a function of the run's seed and the record's place in the input."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest()[:8], "big") >> 1


def read(line: bytes, index: int, line_number: int, defaults: SamplingParams,
         kind: str = PLAIN) -> Job:
    """Reads one line of the input.

    Args:
      line: the line's bytes.
      index: place among the records, from 0; the seed of a record without one comes from it.
      line_number: place in the file, from 1.
      defaults: sampling of a record that says nothing.
      kind: how to word the answer to a line that cannot be read at all.
    Raises RecordError for anything that cannot be answered.
    """
    id = None
    try:
        data = _object(line)
        openai = "custom_id" in data or "body" in data or "url" in data
        id = data.get("custom_id" if openai else "id")
        kind = _endpoint(data) if openai else PLAIN
        defaults = dataclasses.replace(defaults, seed=derived_seed(defaults.seed, index))
        fields = (_openai if openai else _plain)(data, kind, defaults)
    except UserError as error:
        raise RecordError(error, id, kind) from None
    return Job(index, line_number, id, kind, **fields)


def _object(line: bytes) -> dict:
    try:
        data = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"The line is not UTF-8 (byte {error.start}).",
                        "A batch is JSON Lines in UTF-8.", "Convert the file.") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"The line is not JSON: {_json_fault(error)}.",
                        "Each line holds one JSON object.", "Mend the line.") from None
    if not isinstance(data, dict):
        raise UserError(f"The line holds {_name(data)}.", "Each line holds one JSON object.",
                        'Write {"prompt": "…"}.')
    return data


def _json_fault(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        reason = error.msg[0].lower() + error.msg[1:].removesuffix(" at")
        return f"{reason} at column {error.colno}"
    return "it is nested too deep"


def _name(value: Any) -> str:
    return {list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number",
            dict: "an object", type(None): "null"}[type(value)]


def _known(data: Mapping, names: tuple[str, ...]) -> None:
    for key in data:
        if key not in names:
            raise UserError(f"The key '{key}' is unknown.", "",
                            nearest(key, names) or f"Keys are {', '.join(names)}.")


def _plain(data: dict, kind: str, defaults: SamplingParams) -> dict[str, Any]:
    _known(data, _PLAIN_KEYS)
    fields = _source(data)
    fields["sampling"] = _sampling(
        {name: data[name] for name in _SAMPLING if data.get(name) is not None}, defaults)
    return fields


def _source(data: dict) -> dict[str, Any]:
    """The one of prompt, prompt_ids and messages that a record gives, checked."""
    given = [name for name in ("prompt", "prompt_ids", "messages") if data.get(name) is not None]
    if len(given) != 1:
        raise UserError(f"The record has {' and '.join(given) or 'no prompt'}.",
                        "It has exactly one of prompt, prompt_ids and messages.",
                        'Write {"prompt": "…"}.')
    fields = {given[0]: data[given[0]]}
    if "prompt" in fields and not isinstance(fields["prompt"], str):
        raise UserError(f"prompt is {_name(fields['prompt'])}.", "It is text.",
                        "Give one record for each prompt.")
    if "prompt_ids" in fields:
        fields["prompt_ids"] = _ids(fields["prompt_ids"])
    if "messages" in fields:
        fields["messages"] = _objects("messages", fields["messages"])
    if data.get("tools"):
        if "messages" not in fields:
            raise UserError("The record has tools and no messages.",
                            "Functions are offered in a chat.", "Give messages.")
        fields["tools"] = _objects("tools", data["tools"])
    return fields


def _ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value or not all(
            isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in value):
        raise UserError("The prompt's token ids are not a list of ids.",
                        "They are whole numbers of 0 or more, at least one.",
                        "Give the text as prompt instead.")
    return tuple(value)


def _objects(name: str, value: Any) -> list[dict]:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise UserError(f"{name} is not a list of objects.", "It holds at least one object.",
                        'Write "messages": [{"role": "user", "content": "…"}].'
                        if name == "messages" else f"Leave {name} out.")
    return value


def _sampling(given: dict[str, Any], defaults: SamplingParams) -> SamplingParams:
    for name in ("stop", "stop_token_ids"):
        if name in given and not isinstance(given[name], (list, str) if name == "stop" else list):
            raise UserError(f"{name}={given[name]!r} is not a list.", "It is a list, may be empty.",
                            f"Write for example \"{name}\": [{given[name]!r}].")
    return dataclasses.replace(defaults, **given)


def _endpoint(data: dict) -> str:
    url = data.get("url")
    if url not in (CHAT, COMPLETIONS):
        raise UserError(f"url={url!r} is not served.", f"It is {CHAT} or {COMPLETIONS}.",
                        "Change the record's url.")
    return url


def _openai(data: dict, kind: str, defaults: SamplingParams) -> dict[str, Any]:
    _known(data, _OPENAI_KEYS)
    body = data.get("body")
    if data.get("method", "POST") != "POST":
        raise UserError(f"method={data['method']!r} is not served.", "It is POST.",
                        "Change the record's method.")
    if not isinstance(data.get("custom_id"), str):
        raise UserError("The record has no custom_id.", "It names the answer and is text.",
                        'Add "custom_id": "…".')
    if not isinstance(body, dict):
        raise UserError("The record has no body.", "It holds the request as an object.",
                        'Add "body": {"messages": […]}.')
    body = {key: value for key, value in body.items() if key not in _IGNORED}
    for key, neutral in _NEUTRAL.items():
        if (value := body.pop(key, None)) not in neutral:
            raise UserError(f"{key}={value!r} is not supported.",
                            f"The batch takes only {key}={neutral[-1]!r}.", f"Leave {key} out.")
    choice = body.pop("tool_choice", None)
    if choice not in (None, "auto", "none"):
        raise UserError(f"tool_choice={choice!r} is not supported.", "It is 'auto' or 'none'.",
                        "Leave tool_choice out.")
    if choice == "none":
        body.pop("tools", None)
    given = _openai_sampling(body, kind)
    _known(body, ("messages", "tools") if kind == CHAT else ("prompt",))
    fields = _source(_openai_prompt(body) if kind == COMPLETIONS else body)
    if kind == CHAT and "messages" not in fields:
        raise UserError("The body has no messages.", f"{CHAT} takes messages.",
                        f"Use the url {COMPLETIONS} for a prompt.")
    fields["sampling"] = _sampling(given, defaults)
    model = data["body"].get("model")
    fields["model"] = model if isinstance(model, str) else ""
    return fields


def _openai_sampling(body: dict, kind: str) -> dict[str, Any]:
    """Takes the sampling fields out of `body`, under our names."""
    given = {name: value for name in _SAMPLING if name != "logprobs"
             and (value := body.pop(name, None)) is not None}
    limit = body.pop("max_completion_tokens", None)
    if limit is not None:
        given["max_tokens"] = limit
    wanted, top = body.pop("logprobs", None), None
    if kind == CHAT:
        top = body.pop("top_logprobs", None)
        if wanted not in (None, True, False):
            raise UserError(f"logprobs={wanted!r} is out of range.", "It is true or false.",
                            "Give the number as top_logprobs.")
        if top is not None and not wanted:
            raise UserError("top_logprobs stands without logprobs.",
                            "It counts the alternatives of logprobs.", 'Add "logprobs": true.')
        # The engine counts alternatives from 1: 0 and "not said" get one.
        wanted = (top or 1) if wanted else None
    if wanted is not None:
        if isinstance(wanted, bool) or not isinstance(wanted, int) or not (
                0 <= wanted <= MAX_LOGPROBS):
            raise UserError(f"logprobs={wanted!r} is out of range.",
                            f"It is a whole number from 0 to {MAX_LOGPROBS}.", "Leave it out.")
        given["logprobs"] = max(wanted, 1)
    return given


def _openai_prompt(body: dict) -> dict[str, Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        if len(prompt) == 1 and isinstance(prompt[0], str):
            return {"prompt": prompt[0]}
        if prompt and all(isinstance(one, int) for one in prompt):
            return {"prompt_ids": prompt}
        raise UserError("prompt is a list of several prompts.",
                        "It is text, or the token ids of one text.",
                        "Give one record for each prompt.")
    return {"prompt": prompt}

"""Answers of a batch, in the format of their records: mmx's own, or OpenAI's batch output."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmx.batch.records import CHAT, PLAIN, Job, RecordError
from mmx.engine.request import Result, TokenLogprob

TokenBytes = Callable[[int], bytes]


def usage(result: Result) -> dict[str, int]:
    return {"prompt_tokens": result.prompt_tokens, "completion_tokens": len(result.ids),
            "total_tokens": result.prompt_tokens + len(result.ids)}


def answer(job: Job, result: Result, *, model: str, created: int, run: str,
           token_bytes: TokenBytes,
           tool_calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Returns the output line of an answered record.

    Args:
      job: the record.
      result: what the engine wrote for it.
      model: name of the model, where the record gives none.
      created: start of the batch in seconds since 1970; equal for all records and all resumes.
      run: identifies the batch; ids are made of it and the record's index.
      token_bytes: UTF-8 bytes, perhaps a part of a character, of a token id.
      tool_calls: function calls found in the text, in OpenAI's form.
    """
    if job.kind == PLAIN:
        record = {"id": job.id if job.id is not None else job.index, "text": result.text,
                  "finish_reason": result.finish_reason, "usage": usage(result)}
        if tool_calls:
            record["tool_calls"] = tool_calls
        if result.logprobs is not None:
            record["logprobs"] = token_logprobs(result.logprobs, token_bytes)
        return record
    choice = _chat_choice if job.kind == CHAT else _text_choice
    body = {
        "id": f"{'chatcmpl' if job.kind == CHAT else 'cmpl'}-{_name(run, job.index)}",
        "object": "chat.completion" if job.kind == CHAT else "text_completion",
        "created": created, "model": job.model or model,
        "choices": [choice(result, token_bytes, tool_calls)], "usage": usage(result)}
    return _openai(job.id, run, job.index, 200, body)


def failure(error: RecordError, *, line: int, index: int, run: str) -> dict[str, Any]:
    """Returns the output line of a record that cannot be answered; it names the input's line."""
    message = f"line {line}: {error}"
    if error.kind == PLAIN:
        # Without an id `line` tells which: a number made up could be another record's own.
        return {"id": error.id, "error": message, "line": line}
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None,
                      "code": None}}
    return _openai(error.id, run, index, 400, body)


def failed(line: Mapping[str, Any]) -> bool:
    """Whether an output line is one of `failure`."""
    response = line.get("response")
    return response["status_code"] >= 400 if response else "error" in line


def _openai(custom_id: Any, run: str, index: int, status: int, body: dict) -> dict[str, Any]:
    name = _name(run, index)
    return {"id": f"batch_req_{name}", "custom_id": custom_id,
            "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
            "error": None}


def _name(run: str, index: int) -> str:
    return hashlib.sha256(f"{run}:{index}".encode()).hexdigest()[:24]


def token_logprobs(entries: Sequence[TokenLogprob], token_bytes: TokenBytes) -> list[dict]:
    """Returns log-probabilities as JSON values: id, token, logprob, and `top` of the likeliest."""
    def one(id: int, logprob: float) -> dict[str, Any]:
        return {"id": id, "token": _text(token_bytes(id)), "logprob": logprob}

    return [{**one(entry.id, entry.logprob), "top": [one(*pair) for pair in entry.top]}
            for entry in entries]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _chat_choice(result: Result, token_bytes: TokenBytes, tool_calls) -> dict[str, Any]:
    def one(id: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(id)
        return {"token": _text(data), "logprob": logprob, "bytes": list(data)}

    message: dict[str, Any] = {"role": "assistant", "content": result.text}
    if tool_calls:
        message["tool_calls"] = tool_calls
    logprobs = None
    if result.logprobs is not None:
        logprobs = {"content": [{**one(entry.id, entry.logprob),
                                 "top_logprobs": [one(*pair) for pair in entry.top]}
                                for entry in result.logprobs]}
    return {"index": 0, "message": message, "logprobs": logprobs,
            "finish_reason": "tool_calls" if tool_calls else result.finish_reason}


def _text_choice(result: Result, token_bytes: TokenBytes, tool_calls) -> dict[str, Any]:
    logprobs = None
    if result.logprobs is not None:
        tokens = [_text(token_bytes(entry.id)) for entry in result.logprobs]
        starts = itertools.accumulate((len(token) for token in tokens), initial=0)
        logprobs = {
            "tokens": tokens,
            "token_logprobs": [entry.logprob for entry in result.logprobs],
            "top_logprobs": [{_text(token_bytes(id)): value for id, value in entry.top}
                             for entry in result.logprobs],
            "text_offset": list(starts)[:-1]}
    return {"index": 0, "text": result.text, "logprobs": logprobs,
            "finish_reason": result.finish_reason}

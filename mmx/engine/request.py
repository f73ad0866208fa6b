"""What goes into the engine and what comes out of it: plain data, no jax."""

import dataclasses
import math
from collections.abc import Hashable, Sequence

from mmx.errors import UserError

MAX_LOGPROBS = 20


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen; every field has a neutral default.

    Order of application: penalties, temperature, min-p, top-k, top-p, draw. `temperature` 0 is
    argmax. `top_k` 0 keeps all ids; ids tied with the k-th stay. `top_p` keeps the smallest set
    of the most likely ids that reaches that probability. `min_p` keeps ids at least that fraction
    as likely as the likeliest. `repetition_penalty` divides positive and multiplies negative
    logits of ids seen in prompt or output (CTRL, arXiv 1909.05858); presence and frequency
    penalties subtract once, or once per occurrence, for ids of the output (OpenAI's definition).
    `seed` is any integer of 64 bits: a request's random stream depends on it and the token index
    alone. `logprobs` n > 0 reports the chosen and the n likeliest ids per token, from the logits
    before penalties and temperature. Raises UserError for a value out of range.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids or ()))
        self._integer("max_tokens", 1, None)
        self._number("temperature", 0, None)
        self._integer("top_k", 0, 2**31 - 1)
        self._number("top_p", 0, 1, open_low=True)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, None, open_low=True)
        self._number("presence_penalty", None, None)
        self._number("frequency_penalty", None, None)
        self._integer("seed", -(2**63), 2**64 - 1)
        self._integer("logprobs", 0, MAX_LOGPROBS)
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop={list(self.stop)!r} is not a list of stop strings.",
                            "Each stop string is a non-empty text.", "Remove the empty entries.")
        if not all(_is_int(token) and token >= 0 for token in self.stop_token_ids):
            raise UserError(f"stop_token_ids={list(self.stop_token_ids)!r} is not a list of ids.",
                            "Each entry is a token id ≥ 0.", "Give integers, or use stop strings.")

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty != 1 or self.presence_penalty != 0
                or self.frequency_penalty != 0)

    @property
    def plain(self) -> bool:
        """True if the token is the argmax of the raw logits and nothing else is asked for."""
        return self.temperature == 0 and not self.penalised and not self.logprobs

    def _integer(self, name, low, high):
        value = getattr(self, name)
        if not _is_int(value) or (low is not None and value < low) or (
                high is not None and value > high):
            raise _range_error(name, value, "an integer", low, high)

    def _number(self, name, low, high, open_low=False):
        value = getattr(self, name)
        bad = isinstance(value, bool) or not isinstance(value, (int, float))
        if bad or not math.isfinite(value) or (low is not None and value < low) or (
                high is not None and value > high) or (open_low and value == low):
            raise _range_error(name, value, "a number", low, high, open_low)


def _is_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _range_error(name, value, kind, low, high, open_low=False) -> UserError:
    bounds = []
    if low is not None:
        bounds.append(f"{'>' if open_low else '≥'} {low}")
    if high is not None:
        bounds.append(f"≤ {high}")
    rule = f"It must be {kind}{' ' if bounds else ''}{' and '.join(bounds)}."
    default = SamplingParams.__dataclass_fields__[name].default
    return UserError(f"{name}={value!r} is out of range.", rule, f"The default is {default}.")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt. `key` names it in the events and must be unique among running requests."""

    key: Hashable
    prompt_ids: Sequence[int]
    sampling: SamplingParams = SamplingParams()


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probabilities at one output token; `top` is (id, logprob), likeliest first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Timings:
    """Seconds of wall clock, as seen by the host.

    `queue_s` from submission to the first prefill chunk, `prefill_s` from there to the first
    token, `decode_s` from the first to the last token. `decode_tokens_per_s` counts the tokens
    after the first.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    output_tokens: int

    @property
    def decode_tokens_per_s(self) -> float:
        return (self.output_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished request.

    `ids` holds every generated token, the end-of-sequence or stop token included; `text` leaves
    that token and a matched stop string out. `finish_reason` is "stop" (an end token or a stop
    string) or "length" (`max_tokens` or the cache's capacity). `logprobs` has one entry per id.
    """

    text: str
    ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    prompt_tokens: int
    timings: Timings


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one request: text and ids since its last event; `result` is set on the last."""

    key: Hashable
    text_piece: str
    new_ids: list[int]
    result: Result | None = None

"""Host side of one running request: ids to text, stop conditions, the result."""

import time

from mmx.engine.request import Event, Request, Result, Timings, TokenLogprob
from mmx.text.detok import IncrementalDecoder
from mmx.text.stop import StopMatcher

# Ids of the prompt's end that settle how a continuation's first piece is spelled.
_CONTEXT = 8


class Output:
    """Collects the tokens of one request until it is done.

    limit: most tokens it may have, `max_tokens` or what the cache leaves. `dispatched` counts the
    tokens asked of the device, which runs ahead of those read.
    """

    def __init__(self, request: Request, tokenizer, eos_ids, limit: int, submitted: float):
        sampling = request.sampling
        self.request, self.limit, self.dispatched = request, limit, 0
        self.result: Result | None = None
        self._stop_ids = frozenset(sampling.stop_token_ids) | (
            frozenset() if sampling.ignore_eos else frozenset(eos_ids))
        self._decoder = None if tokenizer is None else IncrementalDecoder(
            tokenizer, after=request.prompt_ids[-_CONTEXT:])
        self._matcher = StopMatcher(sampling.stop)
        self._ids: list[int] = []
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] | None = [] if sampling.logprobs else None
        self._submitted = submitted
        self._started = self._first = self._last = 0.0

    @property
    def exhausted(self) -> bool:
        """True when no further token may be asked for."""
        return self.dispatched >= self.limit

    def start(self):
        self._started = time.perf_counter()

    def push(self, token: int, logprob: TokenLogprob | None = None) -> Event:
        """Takes the next token; the event carries a result when it was the last."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self._ids.append(token)
        if self._logprobs is not None:
            self._logprobs.append(logprob)
        piece, reason = "", None
        if token in self._stop_ids:
            piece, reason = self._close(), "stop"
        else:
            if self._decoder is not None:
                piece, stopped = self._matcher.push(self._decoder.push(token))
                reason = "stop" if stopped else None
            if reason is None and len(self._ids) >= self.limit:
                piece, reason = piece + self._close(), "length"
                reason = "stop" if self._matcher.matched is not None else reason
        self._pieces.append(piece)
        if reason is not None:
            self.result = self._finish(reason)
        return Event(self.request.key, piece, [token], self.result)

    def _close(self) -> str:
        """Text still held back: an incomplete character, the beginning of a stop string."""
        if self._decoder is None:
            return ""
        piece, stopped = self._matcher.push(self._decoder.finish())
        return piece if stopped else piece + self._matcher.finish()

    def _finish(self, reason: str) -> Result:
        timings = Timings(
            queue_s=self._started - self._submitted, prefill_s=self._first - self._started,
            decode_s=self._last - self._first, output_tokens=len(self._ids))
        return Result("".join(self._pieces), self._ids, reason, self._logprobs,
                      len(self.request.prompt_ids), timings)

"""Continuous batching: prompts are prefilled one by one into slots, all slots decode together."""

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ModelConfig
from mmx.engine import memory, sampling
from mmx.engine.output import Output
from mmx.engine.request import Event, Request, TokenLogprob
from mmx.engine.steps import Key, Steps, common_mesh, find_forbidden
from mmx.errors import UserError
from mmx.nn.wide import widen
from mmx.parallel.hosts import smallest

CHUNK_SIZES = (16, 64, 256, 512)
PREFILL_CHUNK = 2048
MIN_CAPACITY = 256
# From here on a cache grows by eighths, not by doubling: what is too much is memory.
FINE_CAPACITY = 1 << 16
# A further chunk costs about as much as this many tokens of padding.
_CHUNK_COST = 32
# Chunks of a prompt that may wait on the device: their results take memory, too.
_AHEAD = 2

Told = Callable[[Hashable, int, int], None]


class _Pending(NamedTuple):
    """Tokens on their way from the device; `outputs` names the request of each row, or None."""

    ids: jax.Array
    sampled: sampling.Sampled | None
    outputs: list[Output | None]


class Engine:
    """Runs requests over `slots` rows of one cache; what a request gets depends on it alone.

    Scheduling is a function of the requests' order and outputs, never of the clock: a free slot
    takes the next request, whose prompt is prefilled before the next decode step. The host reads
    the tokens of one step while the device runs the next, so a request that ends by a stop token
    or string has one further token computed and thrown away.

    Args:
      config, params: the model; activations have the dtype of `params["norm/weight"]`.
      tokenizer: gives text and end tokens; with None, results have ids only.
      slots: sequences that decode together.
      capacity: most tokens of prompt and output together; None lets the cache grow as needed (by
        doubling, long ones by eighths; each new size compiles its own programs).
      prefill_chunk: longest piece of a prompt that is processed at once.
      kv_dtype: dtype of cached keys and values; that of the activations if None.
      forbidden_ids: ids never sampled, besides those whose head rows are all zero.
      eos_ids: end tokens; the configuration's and the tokenizer's if None.
    """

    def __init__(self, config: ModelConfig, params, tokenizer=None, *, slots: int = 1,
                 capacity: int | None = None, prefill_chunk: int = PREFILL_CHUNK,
                 kv_dtype: str | None = None, forbidden_ids: Iterable[int] = (), eos_ids=None):
        for name, value in (("slots", slots), ("capacity", capacity),
                            ("prefill_chunk", prefill_chunk)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UserError(f"{name}={value!r} is out of range.",
                                "It must be an integer ≥ 1.", f"Set {name} to a positive integer.")
        if jax.default_backend() == "cpu":
            memory.keep_freed_memory()
        self.config, self.tokenizer, self.slots = config, tokenizer, slots
        self.kv_dtype = str(jnp.dtype(kv_dtype or params["norm/weight"].dtype))
        self.fixed_capacity = capacity
        longest = min(prefill_chunk, capacity or prefill_chunk)
        self.chunk_sizes = tuple(size for size in CHUNK_SIZES if size < longest) + (longest,)
        if eos_ids is None:
            eos_ids = (*config.eos_token_ids, *getattr(tokenizer, "eos_ids", ()))
        self.eos_ids = frozenset(eos_ids)
        mesh = common_mesh(params)
        wide = jax.default_backend() == "cpu" and mesh is None
        self._steps = Steps(
            config, widen(params) if wide else params, slots, self.kv_dtype, mesh)
        forbidden_V = find_forbidden(params)
        forbidden_V[list(forbidden_ids)] = True
        if forbidden_V.all():
            raise UserError("Every token id is forbidden.",
                            "An id whose row of head/weight is all zero is never sampled.",
                            "Check that the checkpoint holds its lm_head.")
        self.forbidden_ids = frozenset(np.flatnonzero(forbidden_V).tolist())
        self._put = lambda tree: jax.device_put(tree, self._steps.sharding)
        self._forbidden_V = self._put(forbidden_V)
        self._one_1 = self._put(np.ones(1, np.int32))
        # Over several processes all must refuse alike: what the poorest had before any cache.
        self._have = None
        if self._steps.processes > 1:
            self._have = smallest(memory.available_bytes(self._steps.local_devices()))
        self.capacity = 0
        self._cache = self._one = self._state = self._plain_row = None
        self._ids_B = self._active_B = None
        self._running: list[Output | None] = [None] * slots
        self._busy = False
        smallest_capacity = self._capacity_for(1)
        self._check_memory(smallest_capacity,
                           f"Room for sequences of {smallest_capacity:,} tokens")

    @property
    def compile_count(self) -> int:
        """Programs traced so far; constant once everything needed has been compiled."""
        return self._steps.count

    def check(self, request: Request) -> None:
        """Raises UserError if `request` can never run here; allocates nothing."""
        prompt = len(request.prompt_ids)
        if not prompt:
            raise UserError("The prompt is empty.", "A reply needs at least one token before it.",
                            "Give a prompt of at least one character.")
        low, high = min(request.prompt_ids), max(request.prompt_ids)
        if low < 0 or high >= self.config.vocab_size:
            raise UserError(
                f"The prompt has the id {low if low < 0 else high}.",
                f"Ids lie in 0 … {self.config.vocab_size - 1} (the model's vocabulary).",
                "Encode it with the tokenizer of this checkpoint.")
        if self.fixed_capacity is not None and prompt > self.fixed_capacity:
            raise UserError(
                f"The prompt has {prompt:,} tokens.",
                f"The cache was set to hold {self.fixed_capacity:,} per sequence.",
                "Shorten the prompt, or raise the capacity.")
        self._check_memory(
            self._capacity_for(self.room(request)),
            f"A prompt of {prompt:,} tokens with max_tokens={request.sampling.max_tokens:,}")

    def reserve(self, tokens: int) -> None:
        """Makes room for sequences of `tokens` now, instead of growing when they come."""
        capacity = self._capacity_for(max(tokens, self.chunk_sizes[0]))
        if capacity > self.capacity:
            self._check_memory(capacity, f"Room for sequences of {tokens:,} tokens")
            self._allocate(capacity)

    def warmup(self, tokens: int | None = None, *, sampling_too: bool = True) -> int:
        """Compiles all that sequences of up to `tokens` can need; returns `compile_count`.

        The default is the capacity. Without `sampling_too` only greedy requests are prepared for.
        """
        self.reserve(tokens or self.fixed_capacity or self.capacity or MIN_CAPACITY)
        sizes = [size for size in self.chunk_sizes if size <= self.capacity]
        keys: list[Key] = [("prefill", size, self.capacity) for size in sizes]
        keys += self._decode_keys()
        if sampling_too:
            keys += [("sample", batch, None) for batch in {1, self.slots}]
        for future in self._steps.compile(keys):
            future.result()
        # The small programs compile by running once on rows that are thrown away.
        one = self._steps.reset(self._fresh_row())
        logits_1V = jnp.zeros((1, self.config.vocab_size), jnp.float32)
        logits_BV = jnp.zeros((self.slots, self.config.vocab_size), jnp.float32)
        self._steps.greedy(self._put(logits_1V), self._forbidden_V)
        self._steps.greedy(self._put(logits_BV), self._forbidden_V)
        if self.slots == 1:
            self._cache = one
        else:
            self._one = one
            if sampling_too:
                self._set_row(0, self._put(sampling.empty_state(1, self.config.vocab_size)))
        return self.compile_count

    def run(self, requests: Iterable[Request], told: Told | None = None) -> Iterator[Event]:
        """Runs requests, taken from the iterable as slots become free; yields their events.

        Each new token makes an event; the last event of a request carries its result. While a
        prompt of several chunks is read, `told(key, tokens read, tokens of the prompt)` is called
        after each. Raises UserError when a request that cannot run is reached (see `check`).
        """
        if self._busy:
            raise RuntimeError("Engine.run is already in progress; finish or close it first.")
        self._busy = True
        submitted = time.perf_counter()
        source, more = iter(requests), True
        flight: deque[_Pending] = deque()
        try:
            while True:
                while more and None in self._running:
                    request = next(source, None)
                    if request is None:
                        more = False
                        break
                    flight.append(self._admit(request, submitted, told))
                    yield from self._read(flight, keep=1)
                if not any(self._running):
                    if not flight:
                        return
                    yield from self._read(flight, keep=0)
                    continue
                if not self._steps.used(("decode", self.slots, self.capacity)):
                    # Show first tokens before waiting for a compilation.
                    yield from self._read(flight, keep=0)
                    if not any(self._running):
                        continue
                flight.append(self._decode())
                yield from self._read(flight, keep=1)
        finally:
            self._running = [None] * self.slots
            self._active_B = None
            self._busy = False

    def _admit(self, request: Request, submitted: float, told: Told | None) -> _Pending:
        """Prefills a prompt into a free slot and draws its first token."""
        self.check(request)
        prompt, params = request.prompt_ids, request.sampling
        capacity = self._capacity_for(self.room(request))
        if capacity > self.capacity:
            self._allocate(capacity)
        room = self.fixed_capacity or self.capacity
        limit = min(params.max_tokens, room - len(prompt) + 1)
        output = Output(request, self.tokenizer, self.eos_ids, limit, submitted)
        slot = self._running.index(None)
        chunks = plan_chunks(len(prompt), self.chunk_sizes)
        self._compile_ahead(chunks, params)
        output.start()

        one, first = self._steps.reset(self._fresh_row()), 0
        logits_1V, ahead = None, deque()
        for size in chunks:
            piece = prompt[first:first + size]
            ids_1T = np.zeros((1, size), np.int32)
            ids_1T[0, :len(piece)] = piece
            length_1 = np.asarray([len(piece)], np.int32)
            logits_1V, one = self._steps.prefill(one, ids_1T, length_1)
            first += len(piece)
            ahead.append((logits_1V, first))
            if len(ahead) > _AHEAD:
                oldest, read = ahead.popleft()
                oldest.block_until_ready()
                if told is not None:
                    told(request.key, read, len(prompt))
        if params.plain:
            id_1, sampled, row = self._steps.greedy(logits_1V, self._forbidden_V), None, None
        else:
            row = self._put(sampling.row_state(params, prompt, self.config.vocab_size))
            sampled, row = self._steps.sample(logits_1V, self._forbidden_V, row, self._one_1)
            id_1 = sampled.ids_B
        self._set_row(slot, row)
        if self.slots == 1:
            self._cache, self._ids_B = one, id_1
        else:
            self._one = one
            self._cache, self._ids_B = self._steps.admit(
                self._cache, self._ids_B, one, id_1, slot)
        output.dispatched = 1
        if not output.exhausted:
            self._running[slot], self._active_B = output, None
        return _in_flight(id_1, sampled, [output])

    def _decode(self) -> _Pending:
        """Starts one step of all running rows."""
        if self._active_B is None:
            active = [output is not None for output in self._running]
            self._active_B = self._put(np.asarray(active, np.int32))
        outputs = list(self._running)
        logits_BV, self._cache = self._steps.decode(self._cache, self._ids_B, self._active_B)
        sampled = None
        if all(output is None or output.request.sampling.plain for output in outputs):
            self._ids_B = self._steps.greedy(logits_BV, self._forbidden_V)
        else:
            sampled, self._state = self._steps.sample(
                logits_BV, self._forbidden_V, self._state, self._active_B)
            self._ids_B = sampled.ids_B
        for slot, output in enumerate(outputs):
            if output is not None:
                output.dispatched += 1
                if output.exhausted:
                    self._release(slot)
        return _in_flight(self._ids_B, sampled, outputs)

    def _read(self, flight: deque[_Pending], keep: int) -> Iterator[Event]:
        """Reads the oldest tokens until `keep` steps are in flight."""
        while len(flight) > keep:
            pending = flight.popleft()
            ids = np.asarray(pending.ids)
            wanted = any(output is not None and output.request.sampling.logprobs
                         for output in pending.outputs)
            numbers = jax.device_get(pending.sampled) if wanted else None
            for row, output in enumerate(pending.outputs):
                if output is None or output.result is not None:
                    continue  # an empty slot, or a token computed after the stop
                token = int(ids[row])
                if token < 0:
                    raise FloatingPointError(
                        f"Request {output.request.key!r}: no logit is finite. The weights or the "
                        "number format are broken; try dtype float32.")
                event = output.push(token, _logprob(numbers, row, token, output))
                if event.result is not None and output in self._running:
                    self._release(self._running.index(output))
                yield event

    def _release(self, slot: int):
        self._running[slot], self._active_B = None, None

    def _fresh_row(self):
        """The one-row cache that prompts are prefilled in; with one slot, the cache itself."""
        if self.slots == 1:
            return self._cache
        if self._one is None:
            self._one = self._steps.init(1, self.capacity)
        return self._one

    def _set_row(self, slot: int, row: sampling.SampleState | None):
        """Makes `row` the sampling state of `slot`; None stands for a plain greedy one."""
        if row is None and (self._state is None or self.slots == 1):
            return  # no step of this slot's batch has used settings yet, or none will
        if self.slots == 1:
            self._state = row
            return
        if self._state is None:
            vocab = self.config.vocab_size
            self._plain_row = self._put(sampling.empty_state(1, vocab))
            self._state = self._put(sampling.empty_state(self.slots, vocab))
        self._state = self._steps.insert(self._state, row or self._plain_row, slot)

    def _allocate(self, capacity: int):
        self._one = None
        if any(self._running):
            self._cache = self._steps.grow(self._cache, capacity)
        else:
            self._cache, self.capacity = None, 0  # there may be no room for both
            self._cache = self._steps.init(self.slots, capacity)
            self._ids_B = self._put(np.zeros(self.slots, np.int32))
        self.capacity = capacity

    def _decode_keys(self) -> list[Key]:
        names = ("decode",) if self.slots == 1 else ("decode", "admit")
        return [(name, self.slots, self.capacity) for name in names]

    def _compile_ahead(self, chunks, params):
        """Compiles what this request will need side by side, its decode step while it prefills."""
        keys = [("prefill", size, self.capacity) for size in dict.fromkeys(chunks)]
        if not params.plain:
            keys += [("sample", batch, None) for batch in dict.fromkeys((1, self.slots))]
        if params.max_tokens > 1:
            keys += self._decode_keys()
        self._steps.compile(keys)

    def room(self, request: Request) -> int:
        """Tokens that the cache must hold for this request; see `reserve`."""
        return max(len(request.prompt_ids) + request.sampling.max_tokens - 1,
                   *plan_chunks(len(request.prompt_ids), self.chunk_sizes))

    def _capacity_for(self, tokens: int) -> int:
        capacity = self.fixed_capacity
        if capacity is None:
            capacity = max(MIN_CAPACITY, 1 << (tokens - 1).bit_length())
            if capacity > FINE_CAPACITY:
                capacity = -(-tokens // (capacity // 16)) * (capacity // 16)
        pieces = self._steps.cache_pieces
        return -(-capacity // pieces) * pieces

    def _check_memory(self, capacity: int, what: str) -> None:
        if capacity <= self.capacity:
            return
        need = self._steps.cache_bytes(self.slots, capacity)
        if self.slots > 1:
            need += self._steps.cache_bytes(1, capacity)
        have = self._have
        if have is None:
            have = memory.available_bytes(self._steps.local_devices())
        if need > have:
            raise UserError(
                f"{what} needs {memory.human(need)} of cache for {self.slots} slot(s).",
                f"{memory.human(have)} are available.",
                "Shorten the prompt, lower max_tokens or the number of slots, or keep keys and "
                "values in bfloat16.")


@lru_cache(maxsize=4096)
def plan_chunks(tokens: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns chunk sizes that cover `tokens`: whole largest ones, then the cheapest rest.

    The last chunk may be longer than what is left (padding). A function of the arguments alone.
    """
    largest = sizes[-1]
    whole, rest = divmod(tokens, largest)
    return (largest,) * whole + (_cheapest(rest, sizes) if rest else ())


def _cheapest(rest: int, sizes) -> tuple[int, ...]:
    cover = next(size for size in sizes if size >= rest)
    below = [size for size in sizes if size < rest]
    if not below:
        return (cover,)
    split = (below[-1], *_cheapest(rest - below[-1], sizes))
    return min((cover,), split, key=lambda plan: sum(plan) + _CHUNK_COST * len(plan))


def _in_flight(ids, sampled, outputs) -> _Pending:
    ids.copy_to_host_async()
    return _Pending(ids, sampled, outputs)


def _logprob(numbers, row: int, token: int, output: Output) -> TokenLogprob | None:
    count = output.request.sampling.logprobs
    if not count:
        return None
    top = zip(numbers.top_ids_BK[row, :count], numbers.top_logprob_BK[row, :count], strict=True)
    return TokenLogprob(token, float(numbers.logprob_B[row]),
                        tuple((int(id_), float(value)) for id_, value in top))

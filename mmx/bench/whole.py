"""`mmx bench period` and `decode`: the engine's own programs on random weights."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mmx.bench import arrays, floors, records, trace
from mmx.bench.floors import Ceilings, Work
from mmx.bench.timing import Method, Run, Timing, first_sentence, in_turns
from mmx.cache import Cache
from mmx.config import ModelConfig
from mmx.engine.engine import MIN_CAPACITY
from mmx.engine.steps import Steps, find_forbidden
from mmx.nn.wide import widen

# Decode steps between two waits, each with tokens of its own.
STEPS = 16


@dataclasses.dataclass(frozen=True)
class Job:
    """One row: a prompt of `tokens`, read in chunks, or decode steps of `batch` rows."""

    operation: str          # "prefill" or "decode"
    batch: int
    tokens: int             # of the prompt, or cached before the first step
    chunk: int = 0

    @property
    def shape(self) -> str:
        if self.operation == "prefill":
            return f"{self.batch}x{self.tokens}"
        return f"b{self.batch}c{self.tokens}"

    @property
    def dims(self) -> dict[str, int]:
        sizes = {"batch": self.batch, "tokens": self.tokens}
        return sizes | ({"chunk": self.chunk} if self.chunk else {"steps": STEPS})

    def work(self, config: ModelConfig, dtype: str, quantize: str | None) -> Work:
        if self.operation == "prefill":
            return floors.prefill(config, self.tokens)
        return floors.decode(config, self.batch, self.tokens, dtype, quantize)

    def row(self, config: ModelConfig, dtype: str, quantize: str | None, implementation: str,
            timing: Timing | str, ceilings: Ceilings, **more) -> dict:
        """The record of this job."""
        moved = self.tokens if self.operation == "prefill" else self.batch
        name = f"{dtype}/{quantize}" if quantize else dtype
        return records.of_work(
            self.operation, self.shape, self.dims, name, implementation, timing,
            self.work(config, dtype, quantize), ceilings, moved, **more)


class Model:
    """Random weights of a geometry, as the engine holds them."""

    def __init__(self, config: ModelConfig, dtype: str, quantize: str | None, seed: int,
                 turned: bool | None = None):
        self.config, self.dtype, self.seed = config, dtype, seed
        params = arrays.weights(config, seed, dtype, quantize, turned)
        self._forbidden_V = jax.device_put(find_forbidden(params))
        self._params = widen(params) if jax.default_backend() == "cpu" else params

    def run(self, job: Job) -> Run:
        return self._prefill(job) if job.operation == "prefill" else self._decode(job)

    def _prefill(self, job: Job) -> Run:
        steps = Steps(self.config, self._params, 1, self.dtype)
        ids_T = np.random.default_rng(self.seed).integers(
            0, self.config.vocab_size, job.tokens).astype(np.int32)
        pieces = [ids_T[i:i + job.chunk] for i in range(0, job.tokens, job.chunk)]
        # The last piece is padded, as the engine pads it.
        padded = [jnp.asarray(np.pad(one, (0, job.chunk - len(one))))[None] for one in pieces]
        lengths = [jnp.asarray([len(one)], jnp.int32) for one in pieces]
        held = [steps.init(1, max(capacity(job.tokens), job.chunk))]

        def call(count):
            for _ in range(count):
                cache = steps.reset(held.pop())
                for ids_1T, length_1 in zip(padded, lengths, strict=True):
                    logits_1V, cache = steps.prefill(cache, ids_1T, length_1)
                held.append(cache)
                jax.block_until_ready((logits_1V, steps.greedy(logits_1V, self._forbidden_V)))
        return Run(call)

    def _decode(self, job: Job) -> Run:
        B = job.batch
        steps = Steps(self.config, self._params, B, self.dtype)
        ids = np.random.default_rng(self.seed).integers(0, self.config.vocab_size, (STEPS, B))
        ids = [jnp.asarray(row, jnp.int32) for row in ids]
        active_B = jnp.ones(B, jnp.int32)
        held = [self._remembered(steps.init(B, capacity(job.tokens + STEPS)))]

        def call(count):
            for _ in range(count):
                cache = Cache(held.pop().stacks, jnp.full(B, job.tokens, jnp.int32))
                for ids_B in ids:
                    logits_BV, cache = steps.decode(cache, ids_B, active_B)
                    out = steps.greedy(logits_BV, self._forbidden_V)
                held.append(cache)
                jax.block_until_ready((out, cache))
        return Run(call, STEPS)

    def _remembered(self, cache: Cache) -> Cache:
        """A cache of the same shapes full of random numbers: a memory of tokens never read."""
        leaves, tree = jax.tree.flatten(cache.stacks)
        drawn = [arrays.values(arrays.named_key(self.seed, f"cache{i}"), leaf.shape, leaf.dtype)
                 for i, leaf in enumerate(leaves)]
        return Cache(jax.tree.unflatten(tree, drawn), cache.lengths_B)


def capacity(tokens: int) -> int:
    """Room for `tokens` as the engine makes it: doubled until it suffices."""
    size = MIN_CAPACITY
    while size < tokens:
        size *= 2
    return size


def measure(jobs: Sequence[Job], make: Callable[[], Model], method: Method, tracing: bool = False
            ) -> Iterator[tuple[Job, Timing | str, dict]]:
    """Times each job in turn, and traces it once more if asked; a model that cannot be made fails
    them all."""
    try:
        model = make()
    except Exception as error:
        sentence = first_sentence(error)
        yield from ((job, sentence, {}) for job in jobs)
        return
    for job in jobs:
        made: list[Run] = []

        def start(job=job, made=made) -> Run:
            made.append(model.run(job))
            return made[0]

        timing, facts = in_turns({"mmx": start}, method)["mmx"], {}
        if tracing and isinstance(timing, Timing):
            run = made[0]
            found = trace.by_kernel(trace.planes(lambda run=run: run.call(1)), run.steps)
            facts = found or {"kernels_error": "The profiler names no programs on this device."}
        yield job, timing, facts


def describe(config: ModelConfig) -> str:
    """The geometry in words."""
    return (f"{config.num_lightning_layers} lightning and {config.num_softmax_layers} softmax "
            f"layers, {config.num_heads} heads of {config.head_dim}, hidden {config.hidden_size}, "
            f"{config.num_experts} experts of {config.expert_dim}, top-{config.experts_per_token}")


def pooled(parts: Sequence[Mapping]) -> Timing | str:
    """One Timing of the records of several turns, or the first failure."""
    found = [records.measured(one) for one in parts]
    failed = [one for one in found if isinstance(one, str)]
    if failed or not found:
        return failed[0] if failed else "No turn told a figure."
    return Timing(tuple(s for one in found for s in one.seconds), found[0].inner)

"""A model with random weights on a mesh, and its engine's programs, compiled once and timed."""

import concurrent.futures
import os
import time
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmx.bench import full_arrays
from mmx.bench.timing import Timing
from mmx.bench.whole import STEPS, Job
from mmx.cache import Cache
from mmx.config import ModelConfig
from mmx.engine.steps import Steps
from mmx.parallel.mesh_ops import MeshOps
from mmx.plan import programs
from mmx.sharding.rules import DECODE

# Capacities are multiples of it: any mesh's sequence axis divides them.
_UNIT = 256
ROUNDS = 5


def compiled(program, weight_bytes: int, *arguments) -> tuple[Callable, dict]:
    """A jitted program compiled for the arguments, and facts: compile_s, and one device's
    planned_bytes and planned_temporaries by the compiler's count, which is `mmx plan`'s.
    """
    begin = time.perf_counter()
    done = program.lower(*arguments).compile()
    found = {"compile_s": time.perf_counter() - begin}
    try:
        memory = programs.memory_of(done, {"weights": weight_bytes})
        found |= {"planned_bytes": memory.total, "planned_temporaries": memory.temporaries}
    except (AttributeError, NotImplementedError):
        pass  # a backend that counts nothing
    return done, found


class Model:
    """Random weights of a geometry on a mesh. `init_s`: seconds to draw them, compiling too."""

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: str, quantize: str | None,
                 seed: int = 0):
        self.config, self.mesh, self.dtype, self.seed = config, mesh, dtype, seed
        begin = time.perf_counter()
        self.params = full_arrays.weights(config, mesh, seed, dtype, quantize)
        self.init_s = time.perf_counter() - begin
        self._programs: dict[tuple, concurrent.futures.Future] = {}
        self._pool = concurrent.futures.ThreadPoolExecutor(
            max(2, min(8, (os.cpu_count() or 1) // 4)), thread_name_prefix="compile")

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on one device."""
        return programs.share_bytes(self.params)

    def run(self, job: Job, until: float, trace: Callable | None = None,
            then: int = 0) -> tuple[Timing, dict]:
        """Times a job until the clock reads `until`, once at least; returns timing and facts.

        The facts have compile_s, planned_bytes (one device's, by the compiler's count, which is
        `mmx plan`'s), and what `trace(call, steps)` returns. With `then`, as many decode steps
        follow a prefill, and continued_ms tells the time of each.
        """
        return (self._prefill if job.operation == "prefill" else self._decode)(
            job, until, trace, then)

    def compile_ahead(self, jobs: Iterable[tuple[Job, int]], timeout: float) -> None:
        """Compiles the programs of (job, then) side by side, and waits for them, `timeout` s at
        most; `run` waits for its own."""
        for job, then in jobs:
            for key in _keys(job, then):
                self._future(*key)
        concurrent.futures.wait(self._programs.values(), timeout)

    def planned(self, job: Job) -> dict:
        """The facts of a job's program, compiled: compile_s, and planned_bytes where counted."""
        return self._future(*_keys(job)[0]).result()[1]

    def _future(self, *key) -> concurrent.futures.Future:
        if key not in self._programs:
            self._programs[key] = self._pool.submit(self._compiled, *key)
        return self._programs[key]

    def _compiled(self, name: str, size: int, capacity: int) -> tuple[Callable, dict]:
        """The step over `size` tokens of one row ("prefill"), or over a token of `size` rows."""
        rows = 1 if name == "prefill" else size
        steps = Steps(self.config, self.params, rows, self.dtype, self.mesh)
        cache = full_arrays.cache_shapes(
            self.config, MeshOps(self.mesh, DECODE), rows, capacity, self.dtype)

        def numbers(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=steps.sharding)

        program, ids = ((steps._prefill, numbers(1, size)) if name == "prefill" else
                        (steps._decode, numbers(rows)))
        return compiled(program, self.weight_bytes, self.params, cache, ids, numbers(rows))

    def _prefill(self, job: Job, until: float, trace, then: int) -> tuple[Timing, dict]:
        steps = Steps(self.config, self.params, 1, self.dtype, self.mesh)

        def put(array):
            return jax.device_put(np.asarray(array, np.int32), steps.sharding)

        ids_T = np.random.default_rng(self.seed).integers(0, self.config.vocab_size, job.tokens)
        pieces = [ids_T[i:i + job.chunk] for i in range(0, job.tokens, job.chunk)]
        padded = [put(np.pad(one, (0, job.chunk - len(one)))[None]) for one in pieces]
        lengths = [put([len(one)]) for one in pieces]
        keys = _keys(job, then)
        program, facts = self._future(*keys[0]).result()
        found, held = dict(facts), [steps.init(1, keys[0][2])]

        def call(count=None):
            cache = steps.reset(held.pop())
            for ids, length in zip(padded[:count], lengths[:count], strict=True):
                logits, cache = program(self.params, cache, ids, length)
            jax.block_until_ready((logits, cache))
            held.append(cache)
            return logits

        call(1)
        timing = self._timed(call, 1, until)
        if then:
            decode, facts = self._future(*keys[1]).result()
            found["continued_compile_s"] = facts["compile_s"]
            cache, id_1, taken, one = held.pop(), put([int(ids_T[0])]), [], put([1])
            for _ in range(then):
                begin = time.perf_counter()
                logits, cache = decode(self.params, cache, id_1, one)
                id_1 = put(np.asarray(jnp.argmax(logits, axis=-1)))
                taken.append((time.perf_counter() - begin) * 1e3)
            found |= {"continued_ms": taken, "finite": bool(jnp.isfinite(logits).all()),
                      "length": int(np.asarray(cache.lengths_B)[0])}
            held.append(cache)
        if trace is not None:
            found |= trace(lambda: call(1), 1)
            found["collectives_of"] = f"the first chunk of {job.chunk} tokens"
        return timing, found

    def _decode(self, job: Job, until: float, trace, then: int) -> tuple[Timing, dict]:
        B = job.batch
        steps = Steps(self.config, self.params, B, self.dtype, self.mesh)

        def put(array):
            return jax.device_put(np.asarray(array, np.int32), steps.sharding)

        ids = [put(row) for row in np.random.default_rng(self.seed).integers(
            0, self.config.vocab_size, (STEPS, B))]
        active_B = put(np.ones(B))
        (key,) = _keys(job)
        # Compiled first: the compiler tries kernels out on memory of the same allocator.
        program, facts = self._future(*key).result()
        found, capacity = dict(facts), key[2]
        cache = full_arrays.cache(self.config, self.mesh, B, capacity, self.dtype, self.seed)
        where, held = cache.lengths_B.sharding, [cache]
        del cache

        def call(count=STEPS):
            lengths = jax.device_put(np.full(B, job.tokens, np.int32), where)
            cache = Cache(held.pop().stacks, lengths)
            for ids_B in ids[:count]:
                logits, cache = program(self.params, cache, ids_B, active_B)
            jax.block_until_ready((logits, cache))
            held.append(cache)

        call()
        timing = self._timed(call, STEPS, until)
        if trace is not None:
            found |= trace(lambda: call(1), 1)
            found["collectives_of"] = "one step"
        return timing, found

    @staticmethod
    def _timed(call, steps: int, until: float) -> Timing:
        seconds = []
        while not seconds or len(seconds) < ROUNDS and time.monotonic() < until:
            begin = time.perf_counter()
            call()
            seconds.append((time.perf_counter() - begin) / steps)
        return Timing(tuple(seconds), steps)


def _keys(job: Job, then: int = 0) -> list[tuple[str, int, int]]:
    """The programs of a job, and of the decode steps that follow it: name, size, capacity."""
    if job.operation == "decode":
        return [("decode", job.batch, room(job.tokens + STEPS))]
    capacity = room(-(-job.tokens // job.chunk) * job.chunk + then)
    return [("prefill", job.chunk, capacity)] + [("decode", 1, capacity)] * bool(then)


def room(tokens: int) -> int:
    """The capacity of a cache for `tokens`."""
    return -(-tokens // _UNIT) * _UNIT

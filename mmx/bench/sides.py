"""One model on one device, or over a mesh: the engine's programs, compiled before weights exist."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mmx import cache as caches
from mmx import model
from mmx.bench import full_arrays
from mmx.bench.full_model import compiled, room
from mmx.bench.timing import Run
from mmx.bench.whole import STEPS, Job
from mmx.cache import Cache
from mmx.config import ModelConfig
from mmx.engine.steps import Steps
from mmx.parallel.mesh_ops import MeshOps
from mmx.plan import programs
from mmx.sharding.rules import DECODE, LONG


@dataclasses.dataclass(frozen=True)
class Program:
    """A job's program. `bind(params)` gives what is timed; `facts` has compile_s and, where the
    backend counts them, planned_bytes and planned_temporaries of one device. `logits` holds the
    latest ones of a prompt."""

    bind: Callable[[Mapping], Run]
    facts: Mapping[str, Any]
    logits: list[jax.Array] = dataclasses.field(default_factory=list)


def one_device() -> Mesh:
    """The first device alone."""
    return Mesh(np.asarray(jax.devices()[:1]), ("tensor",), axis_types=(AxisType.Auto,))


def mesh_name(mesh: Mesh) -> str:
    """As in "1 device" or "2 devices, sequence=2"."""
    if mesh.size == 1:
        return "1 device"
    axes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"{mesh.size} devices, {axes}"


class Side:
    """A geometry on a mesh; on a mesh of one device, the engine without one.

    `long` lays the time of a prompt over the axis of experts too, as the engine does not do.
    """

    def __init__(self, config: ModelConfig, mesh: Mesh, dtype: str, long: bool = False,
                 seed: int = 0, quantize: str | None = None):
        self.config, self.mesh, self.dtype, self.seed = config, mesh, dtype, seed
        self.quantize = quantize
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.many = mesh.size > 1
        self.ops = MeshOps(mesh, LONG if long else DECODE)
        self.long = long
        self.shapes = full_arrays.shapes(config, mesh, dtype, quantize)

    @property
    def name(self) -> str:
        return mesh_name(self.mesh)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on one device."""
        return programs.share_bytes(self.shapes)

    def weights(self) -> dict:
        """Random parameters where this side has them."""
        return full_arrays.weights(self.config, self.mesh, self.seed, self.dtype, self.quantize)

    def own_part(self, params: Mapping) -> dict:
        """On one device, what it holds of parameters that every device of a mesh has whole."""
        (device,) = self.mesh.devices.flat
        return jax.tree.map(
            lambda leaf: jax.make_array_from_single_device_arrays(leaf.shape, self.whole, [
                next(part.data for part in leaf.addressable_shards if part.device == device)]),
            dict(params))

    def compile(self, job: Job) -> Program:
        """Compiles the program of a job from shapes alone."""
        return (self._prefill if job.operation == "prefill" else self._decode)(job)

    def _steps(self, slots: int) -> Steps:
        return Steps(self.config, {}, slots, self.dtype, self.mesh if self.many else None)

    def _cache_shapes(self, batch: int, capacity: int) -> Cache:
        return full_arrays.cache_shapes(self.config, self.ops, batch, capacity, self.dtype)

    def _numbers(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self.whole)

    def _put(self, array) -> jax.Array:
        return jax.device_put(np.asarray(array, np.int32), self.whole)

    def _compiled(self, program, *arguments) -> tuple[Callable, dict]:
        return compiled(program, self.weight_bytes, self.shapes, *arguments)

    def _prefill(self, job: Job) -> Program:
        pieces = -(-job.tokens // job.chunk)
        shapes = self._cache_shapes(1, room(pieces * job.chunk))
        source = self._long_program() if self.long else self._steps(1)._prefill
        program, facts = self._compiled(source, shapes, self._numbers(1, job.chunk),
                                        self._numbers(1))
        logits: list[jax.Array] = []

        def bind(params) -> Run:
            ids_T = np.random.default_rng(self.seed).integers(
                0, self.config.vocab_size, pieces * job.chunk)
            ids = [self._put(one[None]) for one in np.split(ids_T, pieces)]
            rest = job.tokens - (pieces - 1) * job.chunk
            lengths = [self._put([job.chunk])] * (pieces - 1) + [self._put([rest])]
            fresh = jax.jit(_forgotten, donate_argnums=0,
                            out_shardings=jax.tree.map(lambda x: x.sharding, shapes))
            held = [self._empty(shapes)]

            def call(count):
                for _ in range(count):
                    cache = fresh(held.pop())
                    for ids_1T, length_1 in zip(ids, lengths, strict=True):
                        logits_1V, cache = program(params, cache, ids_1T, length_1)
                    jax.block_until_ready((logits_1V, cache))
                    held.append(cache)
                    logits[:] = [logits_1V]
            return Run(call)
        return Program(bind, facts, logits)

    def _decode(self, job: Job) -> Program:
        B, capacity = job.batch, room(job.tokens + STEPS)
        program, facts = self._compiled(
            self._steps(B)._decode, self._cache_shapes(B, capacity), self._numbers(B),
            self._numbers(B))

        def bind(params) -> Run:
            ids = [self._put(row) for row in np.random.default_rng(self.seed).integers(
                0, self.config.vocab_size, (STEPS, B))]
            active_B = self._put(np.ones(B))
            held = [full_arrays.cache(self.config, self.mesh, B, capacity, self.dtype, self.seed)]
            where = held[0].lengths_B.sharding

            def call(count):
                for _ in range(count):
                    lengths = jax.device_put(np.full(B, job.tokens, np.int32), where)
                    cache = Cache(held.pop().stacks, lengths)
                    for ids_B in ids:
                        logits_BV, cache = program(params, cache, ids_B, active_B)
                    jax.block_until_ready((logits_BV, cache))
                    held.append(cache)
            return Run(call, STEPS)
        return Program(bind, facts)

    def _long_program(self):
        def prefill(params, cache, ids_1T, length_1):
            logits_1V, cache = model.step(
                self.config, params, cache, ids_1T, length_1, ops=self.ops)
            return self.ops.whole(logits_1V), caches.lay(cache, self.ops)
        return jax.jit(prefill, donate_argnums=1)

    @staticmethod
    def _empty(shapes: Cache) -> Cache:
        return jax.jit(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes),
                       out_shardings=jax.tree.map(lambda x: x.sharding, shapes))()


def _forgotten(cache: Cache) -> Cache:
    """Keys and values of an earlier turn are unseen until overwritten; states begin anew."""
    stacks = tuple(tuple({name: jnp.zeros_like(x) if name == "state" else x
                          for name, x in memory.items()} for memory in stack)
                   for stack in cache.stacks)
    return Cache(stacks, jnp.zeros_like(cache.lengths_B))

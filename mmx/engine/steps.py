"""The engine's programs: jitted pure functions over cache, tokens and sampling state.

Model and sampler are separate programs, so that a row's logits do not depend on which sampler its
batch needs, and sampling settings multiply no model program.
"""

import math
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from mmx import cache as caches
from mmx import model
from mmx.cache import Cache
from mmx.config import ModelConfig
from mmx.engine import sampling
from mmx.parallel.ops import Ops
from mmx.sharding.rules import DECODE, LONG, PREFILL

Key = tuple  # (program, batch or chunk, capacity)
# Tokens of a chunk on each device from which sharing out its time pays.
LONG_PIECE = 64


def find_forbidden(params) -> np.ndarray:
    """Returns bool [V]: ids whose head rows are all zero.

    Such a row's logit is exactly 0, which beats negative logits although the id was never
    trained; released checkpoints have dozens of them.
    """
    def zero_rows(head):
        leaves = [leaf for leaf in jax.tree.leaves(head) if jnp.ndim(leaf) == 2]
        rows = leaves[0].shape[0]
        # An int8 row is zero if its integers are or its scale is.
        zero = jnp.zeros(rows, bool)
        for leaf in leaves:
            if leaf.shape[0] == rows:
                zero |= jnp.all(leaf == 0, axis=1)
        return zero

    mesh = common_mesh(params)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return np.array(jax.jit(zero_rows, out_shardings=whole)(params["head/weight"]))


def common_mesh(params):
    """The parameters' mesh, or None when they lie on one device."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            return sharding.mesh
    return None


class Steps:
    """Programs of one engine. `count` is how many were traced (each is compiled once).

    With a `mesh`, decoding and prefill lie over it by their regimes' tables; whatever else the
    programs return, every device has whole. A prompt is prefilled alone, and its keys lie over all
    axes but that of heads: so they stay where one row decodes, and `admit` lays them anew among
    others. Its chunks are shared out over time as well (the table LONG), where pieces are not tiny.
    """

    def __init__(self, config: ModelConfig, params, slots: int, kv_dtype: str, mesh=None):
        self.config, self.params, self.slots, self.kv_dtype = config, params, slots, kv_dtype
        self.mesh = mesh
        self._many = self._some = self._long = Ops()
        if mesh is not None:
            from mmx.parallel.mesh_ops import MeshOps

            self._many, self._some, self._long = (
                MeshOps(mesh, rules) for rules in (PREFILL, DECODE, LONG))
        self.kv_heads = self._some.cache_kv_heads(config.num_kv_heads)
        everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        self.sharding = everywhere  # of everything but parameters and caches
        self.count = 0
        self._lock = threading.Lock()
        self._compiling: dict[Key, Future] = {}
        self._used: set[Key] = set()
        # A compiler uses several threads by itself.
        self._pool = ThreadPoolExecutor(max(2, min(8, (os.cpu_count() or 1) // 4)),
                                        thread_name_prefix="compile")

        def program(function, donate=(), static=(), caches_too=False):
            def counted(*args):
                with self._lock:
                    self.count += 1
                return function(*args)
            # Programs that return caches constrain their results themselves.
            kwargs = {} if mesh is None or caches_too else {"out_shardings": everywhere}
            return jax.jit(counted, donate_argnums=donate, static_argnums=static, **kwargs)

        some = self._some

        def prefill(params, cache, ids_1T, length_1):
            ops = self.prefill_ops(ids_1T.shape[1])
            logits_1V, cache = model.step(config, params, cache, ids_1T, length_1, ops=ops)
            return some.whole(logits_1V), caches.lay(cache, some)

        def decode(params, cache, ids_B, active_B):
            logits_BV, cache = model.step(
                config, params, cache, ids_B[:, None], active_B, ops=some)
            return some.whole(logits_BV), caches.lay(cache, some)

        def admit(cache, ids_B, one, id_1, slot):
            ids_B = jax.lax.dynamic_update_slice_in_dim(ids_B, id_1, slot, axis=0)
            return (caches.lay(caches.write_slot(cache, slot, one, some), some),
                    some.whole(ids_B))

        def init(batch, capacity):
            cache = caches.init_cache(config, batch, capacity, kv_dtype, self.kv_heads)
            return caches.lay(cache, some)

        self._prefill = program(prefill, donate=(1,), caches_too=True)
        self._decode = program(decode, donate=(1,), caches_too=True)
        self._admit = program(admit, donate=(0,), caches_too=True)
        self._insert = program(sampling.insert_row, donate=(0,))
        self._init = program(init, static=(0, 1), caches_too=True)
        self._reset = program(
            lambda cache: caches.lay(_reset(cache), some), donate=(0,), caches_too=True)
        self._grow = program(
            lambda cache, capacity: caches.lay(caches.grow(cache, capacity, some), some),
            static=(1,), caches_too=True)
        self._greedy = program(sampling.greedy)
        self._sample = program(sampling.sample, donate=(2,))

    def prefill_ops(self, chunk: int) -> Ops:
        """How a prompt's chunk of that many tokens lies."""
        if self.mesh is None:
            return self._many
        pieces = self._long.time_pieces(chunk)
        pays = pieces > self._many.time_pieces(chunk) and chunk >= LONG_PIECE * pieces
        return self._long if pays else self._many

    @property
    def cache_pieces(self) -> int:
        """A cache's capacity is a multiple of this."""
        return 1 if self.mesh is None else self._some.cache_pieces

    @property
    def processes(self) -> int:
        """Processes whose devices the model lies on."""
        return 1 if self.mesh is None else len({d.process_index for d in self.mesh.devices.flat})

    def local_devices(self) -> list[jax.Device]:
        """This process's devices that the model lies on."""
        if self.mesh is None:
            return jax.local_devices()[:1]
        return [one for one in self.mesh.devices.flat if one.process_index == jax.process_index()]

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """Bytes of a cache on all of `local_devices` together."""
        cache = self._cache_spec(batch, capacity)
        if self.mesh is None:
            return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        return len(self.local_devices()) * sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(cache))

    def init(self, batch: int, capacity: int) -> Cache:
        return self._init(batch, capacity)

    def reset(self, cache: Cache) -> Cache:
        """Forgets all rows; keys and values are left to be overwritten."""
        return self._reset(cache)

    def grow(self, cache: Cache, capacity: int) -> Cache:
        return self._grow(cache, capacity)

    def prefill(self, cache: Cache, ids_1T, length_1):
        self._wait(("prefill", ids_1T.shape[1], cache.capacity))
        return self._prefill(self.params, cache, ids_1T, length_1)

    def decode(self, cache: Cache, ids_B, active_B):
        self._wait(("decode", self.slots, cache.capacity))
        return self._decode(self.params, cache, ids_B, active_B)

    def admit(self, cache: Cache, ids_B, one: Cache, id_1, slot: int):
        self._wait(("admit", self.slots, cache.capacity))
        return self._admit(cache, ids_B, one, id_1, np.int32(slot))

    def insert(self, state, row, slot: int):
        return self._insert(state, row, np.int32(slot))

    def greedy(self, logits_BV, forbidden_V):
        return self._greedy(logits_BV, forbidden_V)

    def sample(self, logits_BV, forbidden_V, state, active_B):
        self._wait(("sample", logits_BV.shape[0], None))
        return self._sample(logits_BV, forbidden_V, state, active_B)

    def used(self, key: Key) -> bool:
        """True once the program has been called."""
        return key in self._used

    def compile(self, keys: Iterable[Key]) -> list[Future]:
        """Starts compiling the named programs in the background; a call waits for its own.

        The jitted functions find the results in jax's own caches.
        """
        for key in keys:
            if key not in self._compiling and key not in self._used:
                self._compiling[key] = self._pool.submit(
                    lambda key=key: self.lower(key).compile())
        return [self._compiling[key] for key in keys if key in self._compiling]

    def _wait(self, key: Key):
        if key not in self._used:
            self._used.add(key)
            if key in self._compiling:
                self._compiling[key].result()

    def lower(self, key: Key) -> jax.stages.Lowered:
        """The program of a key from shapes alone, to be compiled."""
        name, size, capacity = key
        spec = partial(jax.tree.map, self._abstract)
        vocab = self.config.vocab_size

        def cache(batch):
            return self._cache_spec(batch, capacity)

        def vector(n, dtype=jnp.int32):
            return self._abstract(jax.ShapeDtypeStruct((n,), dtype))

        def host(*shape):
            return jax.ShapeDtypeStruct(shape, jnp.int32)

        if name == "prefill":
            return self._prefill.lower(self.params, cache(1), host(1, size), host(1))
        if name == "decode":
            return self._decode.lower(self.params, cache(size), vector(size), vector(size))
        if name == "admit":
            return self._admit.lower(cache(size), vector(size), cache(1), vector(1), host())
        if name == "sample":
            logits = self._abstract(jax.ShapeDtypeStruct((size, vocab), jnp.float32))
            state = spec(jax.eval_shape(lambda: sampling.empty_state(size, vocab)))
            return self._sample.lower(logits, vector(vocab, jnp.bool_), state, vector(size))
        raise ValueError(f"There is no program '{name}'.")

    def _cache_spec(self, batch: int, capacity: int) -> Cache:
        shapes = caches.cache_shapes(self.config, batch, capacity, self.kv_dtype, self.kv_heads)
        if self.mesh is None:
            return jax.tree.map(self._abstract, shapes)
        return jax.tree.map(
            lambda leaf, axes: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=self._some.sharding(leaf.shape, *axes)),
            shapes, caches.cache_axes(shapes),
            is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))

    def _abstract(self, leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self.sharding)


def _reset(cache: Cache) -> Cache:
    def clear(memory):
        if "state" in memory:
            return {"state": jnp.zeros_like(memory["state"])}
        return memory

    stacks = tuple(tuple(clear(memory) for memory in stack) for stack in cache.stacks)
    return Cache(stacks, jnp.zeros_like(cache.lengths_B))

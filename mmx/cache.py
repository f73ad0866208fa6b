"""What a model remembers of each sequence: lightning states and softmax keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import LIGHTNING, STATE_DTYPE, ModelConfig
from mmx.parallel.ops import Ops


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Memory of B sequences.

    Over a mesh the slots of keys and values may lie round-robin (`MeshOps.cached_attention`).

    Attributes:
      stacks: per stack, per position in its pattern: {"state": [R, B, N, H, H] float32} for a
        lightning layer, {"k", "v": [R, B, K, S, H]} for a softmax layer (heads before time, as the
        products of a decode step read them).
      lengths_B: int32 tokens consumed by each row.
    """

    stacks: tuple[tuple[dict[str, jax.Array], ...], ...]
    lengths_B: jax.Array

    @property
    def batch(self) -> int:
        return self.lengths_B.shape[0]

    @property
    def capacity(self) -> int | None:
        """Tokens that each row can hold; None when no softmax layer limits it."""
        for stack in self.stacks:
            for memory in stack:
                if "k" in memory:
                    return memory["k"].shape[3]
        return None


def cache_shapes(config: ModelConfig, batch: int, capacity: int, dtype,
                 kv_heads: int | None = None) -> Cache:
    """Returns a Cache of ShapeDtypeStructs; `dtype` is of keys and values.

    `kv_heads` are those that a mesh holds copies of (`MeshOps.cache_kv_heads`).
    """
    N, K, H = config.num_heads, kv_heads or config.num_kv_heads, config.head_dim

    def memory(kind, repeats):
        if kind == LIGHTNING:
            return {"state": jax.ShapeDtypeStruct((repeats, batch, N, H, H), STATE_DTYPE)}
        kv = jax.ShapeDtypeStruct((repeats, batch, K, capacity, H), dtype)
        return {"k": kv, "v": kv}

    stacks = tuple(
        tuple(memory(kind, stack.repeats) for kind in stack.pattern) for stack in config.stacks
    )
    return Cache(stacks, jax.ShapeDtypeStruct((batch,), jnp.int32))


def init_cache(config: ModelConfig, batch: int, capacity: int, dtype="bfloat16",
               kv_heads: int | None = None) -> Cache:
    """Returns an empty cache for `batch` rows of up to `capacity` tokens."""
    shapes = cache_shapes(config, batch, capacity, dtype, kv_heads)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def cache_bytes(config: ModelConfig, batch: int, capacity: int, dtype="bfloat16",
                kv_heads: int | None = None) -> int:
    """Returns the bytes of `init_cache` with the same arguments, allocating nothing."""
    shapes = cache_shapes(config, batch, capacity, dtype, kv_heads)
    return sum(
        int(np.prod(x.shape, dtype=np.int64)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(shapes)
    )


def write_slot(cache: Cache, slot: jax.Array, one: Cache, ops: Ops | None = None) -> Cache:
    """Replaces row `slot` of `cache` by the only row of `one`, which has the same capacity.

    Of its keys and values those of its tokens are copied at least.
    """
    ops, tokens = ops or Ops(), one.lengths_B[0]
    return jax.tree.map(
        lambda big, small, axes: ops.write_row(big, small, slot, tokens, *axes),
        cache, one, cache_axes(cache))


def grow(cache: Cache, capacity: int, ops: Ops | None = None) -> Cache:
    """Returns the cache with room for `capacity` tokens a row; what it holds is kept."""
    ops = ops or Ops()

    def pad(leaf, axes):
        return ops.grow(leaf, capacity, *axes) if "cache_time" in axes else leaf

    return jax.tree.map(pad, cache, cache_axes(cache))


def lay(cache: Cache, ops: Ops) -> Cache:
    """Constrains every leaf to where `ops` has it."""
    return jax.tree.map(lambda leaf, axes: ops.constrain(leaf, *axes), cache, cache_axes(cache))


def cache_axes(cache: Cache) -> Cache:
    """Returns the logical axes of every leaf, as tuples of names."""
    def axes(memory):
        if "state" in memory:
            return {"state": (None, "batch", "heads", None, None)}
        return {name: (None, "batch", "kv_heads", "cache_time", None) for name in memory}

    return Cache(tuple(tuple(axes(m) for m in stack) for stack in cache.stacks), ("batch",))

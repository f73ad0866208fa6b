"""Random weights and memories of a model on a mesh: each device draws its own part alone."""

import dataclasses
import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from mmx import cache as caches
from mmx.bench.arrays import named_key
from mmx.cache import Cache
from mmx.config import ModelConfig
from mmx.model import param_specs
from mmx.nn.params import draw, initial_kind
from mmx.parallel.mesh_ops import MeshOps
from mmx.plan.programs import place
from mmx.quant import abstract_params
from mmx.sharding.rules import DECODE, param_shardings

# Numbers that are float32 at one time: the full model leaves a device little room.
_PIECE = 1 << 26
# Deviations that an int8 step of a normal distribution reaches.
_TAIL = 4.0


def values(key: jax.Array, shape, dtype, sharding: NamedSharding, kind: str = "normal",
           scale: float = 1.0) -> jax.Array:
    """Draws an array of `shape` where `sharding` has it; no device sees another's part.

    With dtype int8 the distribution is stretched over -127 … 127; `scale_of` takes it back.
    Devices that hold the same part draw the same numbers.
    """
    return _program(tuple(shape), str(jnp.dtype(dtype)), kind, sharding)(key, jnp.float32(scale))


def scale_of(kind: str, scale: float) -> float:
    """What one step of int8 stands for."""
    return scale * (_TAIL if kind == "normal" else 1.0) / 127


@lru_cache(maxsize=256)
def _program(shape, dtype, kind, sharding):
    local = sharding.shard_shape(shape)
    size, mesh = math.prod(local), sharding.mesh
    names = tuple(name for entry in sharding.spec if entry
                  for name in ((entry,) if isinstance(entry, str) else entry))
    pieces = 1
    while size // pieces > _PIECE and size % (2 * pieces) == 0:
        pieces *= 2

    def one(key, scale):
        if dtype != "int8":
            return draw(key, scale, kind, (size // pieces,), dtype)
        wide = draw(key, 127 / (_TAIL if kind == "normal" else 1), kind, (size // pieces,),
                    "float32")
        return jnp.clip(jnp.rint(wide), -127, 127).astype(jnp.int8)

    def part(key, scale):
        if names:
            key = jax.random.fold_in(key, jax.lax.axis_index(names))
        if pieces == 1:
            return one(key, scale).reshape(local)
        return jax.lax.map(partial(one, scale=scale),
                           jax.random.split(key, pieces)).reshape(local)

    whole = jax.sharding.PartitionSpec()
    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(whole, whole),
                                 out_specs=sharding.spec, check_vma=False))


def weights(config: ModelConfig, mesh: Mesh, seed: int, dtype: str, quantize: str | None) -> dict:
    """Random parameters by path, lying as `mmx.load(..., mesh=mesh)` lays them.

    int8 matrices are drawn as integers: a uniform distribution quantises to a uniform one, so
    that neither time nor memory is spent on a wide copy. Raises UserError where the model does
    not divide over the mesh.
    """
    specs, params = param_specs(config, dtype), {}
    for path, leaf in shapes(config, mesh, dtype, quantize).items():
        kind, scale = initial_kind(specs[path])
        draw_one = partial(values, named_key(seed, path))
        if isinstance(leaf, jax.ShapeDtypeStruct):
            params[path] = draw_one(leaf.shape, leaf.dtype, leaf.sharding, kind, scale)
        else:
            int8, ones = leaf.values, leaf.scale
            params[path] = dataclasses.replace(
                leaf, values=draw_one(int8.shape, int8.dtype, int8.sharding, kind),
                scale=draw_one(ones.shape, ones.dtype, ones.sharding, "ones")
                * jnp.float32(scale_of(kind, scale)))
        # One at a time: pieces of several in flight would add up.
        jax.block_until_ready(params[path])
    return params


def shapes(config: ModelConfig, mesh: Mesh, dtype: str, quantize: str | None) -> dict:
    """The parameters that `weights` draws, abstract, lying where it has them."""
    specs = param_specs(config, dtype)
    shardings = param_shardings(specs, mesh, DECODE)
    return {path: place(specs[path], leaf, shardings[path])
            for path, leaf in abstract_params(config, dtype, quantize).items()}


def cache_shapes(config: ModelConfig, ops: MeshOps, batch: int, capacity: int, dtype: str) -> Cache:
    """The leaves of a cache, abstract, lying as `ops` has them."""
    shapes = caches.cache_shapes(config, batch, capacity, dtype,
                                 ops.cache_kv_heads(config.num_kv_heads))
    return jax.tree.map(
        lambda leaf, axes: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=ops.sharding(leaf.shape, *axes)),
        shapes, caches.cache_axes(shapes), is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))


def cache(config: ModelConfig, mesh: Mesh, batch: int, capacity: int, dtype: str,
          seed: int) -> Cache:
    """A cache of `batch` rows full of random numbers, lying as a decode step has it; lengths 0."""
    leaves, tree = jax.tree.flatten(
        cache_shapes(config, MeshOps(mesh, DECODE), batch, capacity, dtype))
    drawn = [values(named_key(seed, f"cache{i}"), leaf.shape, leaf.dtype, leaf.sharding)
             if jnp.issubdtype(leaf.dtype, jnp.floating)
             else jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding)
             for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, drawn)

"""Random inputs and weights, born on the device in pieces: no second copy in float32."""

import math
import zlib
from functools import lru_cache, partial

import jax
import jax.numpy as jnp

from mmx.config import ModelConfig
from mmx.model import param_specs
from mmx.nn.params import draw, initial_kind
from mmx.quant import contracted_axes, quantize, turn, turns

_PIECE = 1 << 26


def values(key: jax.Array, shape, dtype, kind: str = "normal", scale: float = 1.0) -> jax.Array:
    """Draws an array of `shape`; `kind` as in `mmx.nn.params.draw`."""
    return _program(tuple(shape), str(jnp.dtype(dtype)), kind)(key, jnp.float32(scale))


@lru_cache(maxsize=256)
def _program(shape, dtype, kind):
    size = math.prod(shape)
    pieces = 1
    while size // pieces > _PIECE and size % (2 * pieces) == 0:
        pieces *= 2

    @jax.jit
    def program(key, scale):
        one = partial(draw, scale=scale, kind=kind, shape=(size // pieces,), dtype=dtype)
        if pieces == 1:
            return one(key).reshape(shape)
        keys = jax.random.split(key, pieces)
        return jax.lax.map(lambda key: one(key), keys).reshape(shape)

    return program


def named_key(seed: int, name: str) -> jax.Array:
    """A random key of its own for each name."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))


def weights(config: ModelConfig, seed: int, dtype: str, mode: str | None,
            turned: bool | None = None) -> dict:
    """Random parameters as `mmx.load(..., random_weights=True)` distributes them.

    With `mode` "int8" each matrix is quantised before the next is drawn, so that a device which
    holds the int8 model, but not the bfloat16 one, suffices. `turned` as in `mmx.quant.turns`.
    """
    params = {}
    for path, spec in param_specs(config, dtype).items():
        kind, scale = initial_kind(spec)
        leaf = values(named_key(seed, path), spec.shape, spec.dtype, kind, scale)
        axes = contracted_axes(path) if mode else ()
        if axes:
            leaf = quantize(leaf, axes)
            leaf = turn(path, leaf) if turns(spec, turned=turned) else leaf
        params[path] = jax.block_until_ready(leaf)
    return params

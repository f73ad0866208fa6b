"""Which (token, choice) pairs an expert of limited capacity takes.

Pairs of an expert are taken in the order of the batch (row, token, choice) until it is full.
"""

import math

import jax
import jax.numpy as jnp

GLOBAL, LOCAL = "global", "local"


def size(factor: float, pairs: int, num_experts: int) -> int:
    """Pairs that one expert takes at most, of `pairs` in all."""
    return math.ceil(factor * pairs / num_experts)


def within(expert_BTk, valid_BT, num_experts: int, factor: float, whole: int = 0,
           rows=(), pieces=()) -> jax.Array:
    """Returns bool [B, T, k]: which pairs find room; those of tokens that are not valid find none.

    Args:
      valid_BT: bool, or None for all. Only pairs of valid tokens count.
      whole: (token, choice) pairs of the batch over all devices; 0: those given.
      rows, pieces: mesh axes over which the batch's rows and their time lie, inside
        `jax.shard_map`: counts are gathered over them, so that capacity and order are those of
        the whole batch.
    """
    B, T, k = expert_BTk.shape
    id_BM = expert_BTk.reshape(B, T * k)
    if valid_BT is not None:
        id_BM = jnp.where(jnp.repeat(valid_BT, k, axis=1), id_BM, num_experts)
    hit_BME = jax.nn.one_hot(id_BM, num_experts, dtype=jnp.int32)
    upto_BME = jnp.cumsum(hit_BME, axis=1)
    count_BE = upto_BME[:, -1]
    before_BE, total = _before(count_BE, rows, pieces)
    most = size(factor, whole or id_BM.size, num_experts)
    if valid_BT is not None:
        most = jnp.minimum(most, jnp.ceil(factor * total / num_experts).astype(jnp.int32))
    place_BM = jnp.sum((upto_BME + before_BE[:, None]) * hit_BME, axis=2)  # from 1; 0 is nobody's
    return ((place_BM > 0) & (place_BM <= most)).reshape(B, T, k)


def _before(count_BE, rows, pieces):
    """Pairs of each expert in front of each local row's tokens, and all pairs."""
    B, E = count_BE.shape
    if not (rows or pieces):
        return jnp.cumsum(count_BE, axis=0) - count_BE, jnp.sum(count_BE)
    P, S = (jax.lax.axis_size(axes) if axes else 1 for axes in (rows, pieces))
    all_BSE = jax.lax.all_gather(count_BE, (*rows, *pieces)).reshape(P, S, B, E).swapaxes(1, 2)
    all_BSE = all_BSE.reshape(P * B, S, E)
    flat = all_BSE.reshape(-1, E)
    before_BSE = (jnp.cumsum(flat, axis=0) - flat).reshape(P * B, S, E)
    row, piece = (jax.lax.axis_index(axes) if axes else 0 for axes in (rows, pieces))
    mine_BE = jax.lax.dynamic_slice(before_BSE, (row * B, piece, 0), (B, 1, E))[:, 0]
    return mine_BE, jnp.sum(flat)

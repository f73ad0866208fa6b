"""What chunked kernels need to know of packed samples: where samples end, chunk by chunk."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Segments(NamedTuple):
    """Sample boundaries of rows cut into chunks of C tokens; places count from a chunk's first.

    A chunk's tokens before `first` belong to the sample that its incoming state belongs to, those
    from `last` on to the sample of its outgoing state; a chunk without a start has (C, 0).
    """

    ends_BT: jax.Array  # int32 in [1, C]: where the token's sample ends in its chunk
    first_Bc: jax.Array  # int32 in [0, C]
    last_Bc: jax.Array  # int32 in [0, C - 1]


def segments(starts_BT: jax.Array, lengths_B: jax.Array | None, C: int) -> Segments:
    """Returns the boundaries for `starts_BT` bool, T a multiple of C.

    Starts at or beyond `lengths_B` are none.
    """
    B, T = starts_BT.shape
    if lengths_B is not None:
        starts_BT = starts_BT & (jnp.arange(T) < lengths_B[:, None])
    starts_BcC = starts_BT.reshape(B, -1, C)
    place_C = jnp.arange(C, dtype=jnp.int32)
    start_at = jnp.where(starts_BcC, place_C, C)
    # The next start after a token: the smallest one behind it.
    behind = jnp.concatenate([start_at[..., 1:], jnp.full((*start_at.shape[:2], 1), C)], axis=-1)
    ends_BcC = jax.lax.cummin(behind.astype(jnp.int32), axis=2, reverse=True)
    first_Bc = start_at.min(axis=-1).astype(jnp.int32)
    last_Bc = jnp.where(starts_BcC, place_C, 0).max(axis=-1).astype(jnp.int32)
    return Segments(ends_BcC.reshape(B, T), first_Bc, last_Bc)

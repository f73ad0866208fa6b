"""What the layers are told of the tokens they are given."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Tokens(NamedTuple):
    """What every layer knows of the tokens it is given.

    position_BT: int32 position in the token's sample. starts_BT, samples_BT: bool starts and int32
    numbers of packed samples, or None. lengths_B: int32 valid tokens per row, or None. offsets_B:
    int32 tokens already cached per row, or None without a cache. last_only: the layer's output is
    wanted at each row's last token alone (of a cache's last layer), its memory at all of them.
    capacity: factor of an expert's equal share of tokens that it takes at most; 0: all.
    """

    position_BT: jax.Array
    starts_BT: jax.Array | None
    samples_BT: jax.Array | None
    lengths_B: jax.Array | None
    valid_BT: jax.Array | None
    offsets_B: jax.Array | None
    last_only: bool = False
    capacity: float = 0.0


def last_token(x_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    """Returns [B, 1, …]: each row at its last of `lengths_B` tokens (the first of an empty row)."""
    index_B = jnp.maximum(lengths_B - 1, 0)
    return jnp.take_along_axis(x_BT, index_B.reshape(-1, *[1] * (x_BT.ndim - 1)), axis=1)

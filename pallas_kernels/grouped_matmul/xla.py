"""Grouped matrix products that XLA runs on any device."""

import jax
import jax.numpy as jnp

from pallas_kernels import precision

# Rows per tile. Padding wastes at most one tile per group; smaller tiles re-read weights.
TILE = 128


def group_of_row(group_sizes_E: jax.Array, rows: int) -> jax.Array:
    """Returns the group of each of `rows` sorted rows; rows past the last group get the last."""
    ends_E = jnp.cumsum(group_sizes_E)
    group_M = jnp.searchsorted(ends_E, jnp.arange(rows), side="right")
    return jnp.minimum(group_M, group_sizes_E.shape[0] - 1)


def ragged_dot(x_MD, w_EDF, group_sizes_E):
    """XLA's own ragged product."""
    return jax.lax.ragged_dot(
        x_MD,
        w_EDF,
        group_sizes_E,
        precision=precision.for_dtype(x_MD.dtype),
        preferred_element_type=jnp.float32,
    )


def tiled(x_MD, w_EDF, group_sizes_E):
    """Pads each group to whole tiles and runs one batched product, a tile with its own matrix."""
    M, D = x_MD.shape
    E = w_EDF.shape[0]
    tile = min(TILE, -(-M // 8) * 8)
    count = -(-M // tile) + E - 1  # whole tiles that any group sizes can need
    tiles_E = -(-group_sizes_E // tile)
    first_tile_E = jnp.cumsum(tiles_E) - tiles_E
    first_row_E = jnp.cumsum(group_sizes_E) - group_sizes_E
    group_of_tile = group_of_row(tiles_E, count)

    row_M = jnp.arange(M)
    group_M = group_of_row(group_sizes_E, M)
    slot_M = first_tile_E[group_M] * tile + row_M - first_row_E[group_M]
    inside_M = row_M < jnp.sum(group_sizes_E)
    # The row of each padded slot, by arithmetic: a gather is far cheaper than a scatter on CPU.
    slot = jnp.arange(count * tile)
    group_of_slot = group_of_tile[slot // tile]
    local = slot - first_tile_E[group_of_slot] * tile
    source = jnp.where(local < group_sizes_E[group_of_slot], first_row_E[group_of_slot] + local, M)
    x_tiles = x_MD.at[source].get(mode="fill", fill_value=0).reshape(count, tile, D)
    out = jnp.einsum(
        "nmd,ndf->nmf",
        x_tiles,
        w_EDF[group_of_tile],
        precision=precision.for_dtype(x_MD.dtype),
        preferred_element_type=jnp.float32,
    ).reshape(count * tile, -1)
    return jnp.where(inside_M[:, None], out[jnp.where(inside_M, slot_M, 0)], 0.0)

"""The list of tiles that a grouped product for Hopper walks over, made by XLA before the kernel."""

import jax
import jax.numpy as jnp


def items_of(group_sizes_E: jax.Array, M: int, rows: int, bands: int, together: int, rest: bool,
             unit: int = 64, programs: int = 132):
    """Every tile of every group, in the order in which they run.

    The order: groups; within one, blocks of up to `together` row tiles; within one, bands of
    columns; within one, row tiles. So what runs at the same time shares weights and rows in L2.
    A group's tiles differ by a unit at most, and a program, which takes every `programs`th item,
    gets each of a block's tiles in turn: programs that fall behind or run ahead share nothing, and
    the last one ends late.

    Args:
      group_sizes_E: int32 rows per group.
      rows: most rows of a tile; bands: tiles along the columns.
      rest: also list the rows beyond the groups, as group E.
      unit: rows that are multiplied at once; a tile has whole ones, but a group's last.

    Returns:
      int32 [4 * most items], four numbers each (group, first row, rows, band), and their int32
      count.
    """
    sizes = group_sizes_E.astype(jnp.int32)
    if rest:
        sizes = jnp.append(sizes, jnp.maximum(M - jnp.sum(sizes), 0))
    G = sizes.shape[0]
    # Sums under a mask in place of cumsum: XLA fuses them with what follows.
    upto = jnp.arange(G)[:, None] >= jnp.arange(G)[None, :]
    ends = jnp.sum(jnp.where(upto, sizes[None, :], 0), axis=1)
    tiles = (sizes + (rows - 1)) // rows
    item_ends = jnp.sum(jnp.where(upto, tiles[None, :], 0), axis=1) * bands

    t = jnp.arange((M // rows + G) * bands, dtype=jnp.int32)
    behind = t[:, None] >= item_ends[None, :]  # the groups before an item's own
    group = jnp.sum(behind, axis=1, dtype=jnp.int32)
    is_own = jnp.arange(G)[None, :] == group[:, None]

    def own(values):
        return jnp.sum(jnp.where(is_own, values[None, :], 0), axis=1)

    own_tiles, own_size = jnp.maximum(own(tiles), 1), own(sizes)
    local = t - own(item_ends - tiles * bands)
    block = local // (together * bands)
    within = local - block * (together * bands)
    width = jnp.clip(own_tiles - block * together, 1, together)
    turn = (t - within % width) // programs
    tile = block * together + (within + turn) % width
    units = (own_size + (unit - 1)) // unit
    each, longer = units // own_tiles, units % own_tiles
    first = (tile * each + jnp.minimum(tile, longer)) * unit
    height = jnp.minimum((each + (tile < longer)) * unit, own_size - first)
    items = jnp.stack([group, own(ends - sizes) + first, jnp.maximum(height, 0), within // width],
                      axis=1)
    return items.reshape(-1), item_ends[-1]

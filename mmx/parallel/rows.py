"""A row's memory moved from where it lies alone to where it lies among others.

The keys of a row alone lie over all devices that do not hold other heads; those of many rows lie
with their rows over some mesh axes (the owners) and over the rest within each. Slots are
round-robin, so what the owners' axes hold of a row interleaves to the slots of the one that gets
it. All see each block and one keeps it: what a device has at once is a block, not a row.
"""

import jax
import jax.numpy as jnp

# Tokens that travel at once.
BLOCK = 4096


def write(big, one, slot, tokens, *, axis: int, time: int | None, owners, holders) -> jax.Array:
    """Returns `big` with its row `slot` replaced by that of `one`; inside `jax.shard_map`.

    Args:
      big, one: this device's share of [..., rows, ...] and of the same with one row.
      slot, tokens: int32: the row, and how many tokens it holds.
      axis: the dimension of rows; time: that of slots of keys, None where there are none.
      owners: mesh axes over which rows lie, in order. holders: those over which the slots of `one`
        lie, the owners among them before the others.
    """
    local, at = big.shape[axis], slot
    if owners:
        at = slot - jax.lax.axis_index(owners) * local
    mine = (at >= 0) & (at < local)
    start = [0] * big.ndim
    start[axis] = jnp.clip(at, 0, local - 1)

    def put(big, new, start):
        old = jax.lax.dynamic_slice(big, start, new.shape)
        return jax.lax.dynamic_update_slice(big, jnp.where(mine, new.astype(big.dtype), old), start)

    if time is None:
        return put(big, one, start)
    X = jax.lax.axis_size(owners) if owners else 1
    W = jax.lax.axis_size(holders) if holders else 1
    S = one.shape[time]
    size = min(max(BLOCK // W, 1), S)

    def block(i, big):
        first = jnp.minimum(i * size, S - size)  # the last may overlap its neighbour
        new = jax.lax.dynamic_slice_in_dim(one, first, size, time)
        if owners:
            new = jnp.moveaxis(jax.lax.all_gather(new, owners), 0, time + 1)
            new = new.reshape(*big.shape[:axis], 1, *big.shape[axis + 1:time], size * X,
                              *big.shape[time + 1:])
        at = list(start)
        at[time] = first * X
        return put(big, new, at)

    used = jnp.minimum(-(-tokens // W), S)
    return jax.lax.fori_loop(0, -(-used // size), block, big)

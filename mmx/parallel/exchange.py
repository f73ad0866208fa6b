"""Tokens sent to the devices that hold their experts, and back; runs inside `jax.shard_map`.

Each device sends at most C of its (token, choice) pairs to each other device in a round; whoever
has more sends the rest in further rounds, whose number depends on the router. So no token is
dropped whatever the skew, buffers have a fixed size, and a plain all-to-all serves on every
platform. With R devices and C = 2 M / R (M pairs of a device) one round carries 2 M rows there and
2 M back, where summing over all devices would bring R rows for each token.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Rows that a pair of devices has room for in a round, as a multiple of an even share.
ROOM = 2


def all_to_all_experts(run: Callable, g_TD, weight_Tk, expert_Tk, local_experts: int, owners,
                       everyone) -> jax.Array:
    """Returns the weighted sum over each local token's experts, float32 [T, D].

    Args:
      run: `run(x_MD, weight_M1, expert_M1)`: the experts of this device, ids from 0; ids of
        `local_experts` are of nobody.
      expert_Tk: global ids. owners: mesh axes over which experts lie, in order.
      everyone: all mesh axes, whose devices must agree on the number of rounds.

    Not differentiable (the number of rounds is data); training sums instead.
    """
    T, k = expert_Tk.shape
    D, R, M = g_TD.shape[1], jax.lax.axis_size(owners), T * k
    C = min(-(-ROOM * M // (8 * R)) * 8, -(-M // 8) * 8)
    owner_M = (expert_Tk // local_experts).reshape(M)
    hit_MR = (owner_M[:, None] == jnp.arange(R)).astype(jnp.int32)
    rank_M = jnp.sum((jnp.cumsum(hit_MR, axis=0) - 1) * hit_MR, axis=1)
    rounds = jax.lax.pmax(-(-jnp.max(jnp.sum(hit_MR, axis=0)) // C), everyone)
    token_M = jnp.arange(M) // k
    local_M = (expert_Tk % local_experts).reshape(M)

    def send(x):
        return jax.lax.all_to_all(x.reshape(R, C, *x.shape[1:]), owners, 0, 0).reshape(x.shape)

    def one_round(state):
        number, out_MD = state
        place_M = rank_M - number * C
        mine_M = (place_M >= 0) & (place_M < C)
        slot_M = jnp.where(mine_M, owner_M * C + place_M, R * C)  # beyond the buffer: dropped
        rows = jnp.zeros((R * C,), jnp.int32).at[slot_M].set(token_M, mode="drop")
        ids = jnp.full((R * C,), local_experts, jnp.int32).at[slot_M].set(local_M, mode="drop")
        x, ids = send(g_TD[rows]), send(ids)
        y = run(x, (ids < local_experts).astype(jnp.float32)[:, None], ids[:, None])
        y = send(y.astype(g_TD.dtype))
        got_MD = y.at[slot_M].get(mode="fill", fill_value=0)
        return number + 1, jnp.where(mine_M[:, None], got_MD, out_MD)

    start = jnp.int32(0), jnp.zeros((M, D), g_TD.dtype)
    _, out_MD = jax.lax.while_loop(lambda state: state[0] < rounds, one_round, start)
    out_TkD = out_MD.reshape(T, k, D).astype(jnp.float32)
    return jnp.sum(out_TkD * weight_Tk[..., None], axis=1)

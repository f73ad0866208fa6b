"""Tokens sent to the devices that hold their experts, and back; runs inside `jax.shard_map`.

A (token, choice) pair is a row. What a device can take in is fixed: ROOM times an even share;
whoever has more sends the rest in further rounds, whose number depends on the router. So no row is
lost whatever the skew, and memory is bounded.

Two forms. "ragged": rows sorted by expert, one exchange of their exact numbers
(`jax.lax.ragged_all_to_all`, which XLA has for TPU and GPU); counts are gathered first and tell the
rest. "all_to_all": each pair of devices has its own padded piece of the buffer, on any platform.

Where experts are also split by width over other axes, whose devices hold the same tokens, each of
these can send its part of them; what arrives is gathered over the width, and the experts' partial
sums are scattered over it before they return (MiniMax-01, arXiv 2501.08313). Or all of them send
all, and their sums are added up after the return.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Room of a pair of devices, and of a device, in a round, as a multiple of an even share: what all
# send to one varies less than what one sends to another.
ROOM = 2
RAGGED_ROOM = 1.5
# Rounds beyond the first are traced under this name: rare, so `mmx plan` does not count them.
FURTHER = "further_rounds"


class Wire(NamedTuple):
    """One exchange of some rows [M, D], in rounds.

    rounds: how many this device's group needs, a number on the device; most: never more than this.
    send(number) returns what arrives in a round: rows [W, D], and the experts of this device that
    they want [W], of which `local_experts` is nobody. back(number, y_WD, out_MD) adds what returns.
    pairs(out_MD) returns it in the order of the tokens' choices.
    """

    rounds: jax.Array
    most: int
    send: Callable
    back: Callable
    pairs: Callable


def exchange_experts(run: Callable, g_TD, weight_Tk, expert_Tk, local_experts: int, owners,
                     everyone, *, width=(), split: bool = True, form: str = "all_to_all",
                     groups: int = 1, limit: int | None = None,
                     inference: bool = True, apart: bool = False) -> jax.Array:
    """Returns the weighted sum over each local token's experts, of g's dtype [T, D].

    With `apart`, what is left over the axes of `width` is the caller's: with `split` [T / P, D],
    this device's part of the tokens, else its part of the sum.

    Args:
      run: `run(x_MD, weight_M1, expert_M1)`: the experts of this device, ids from 0; ids of
        `local_experts` are of nobody.
      expert_Tk: global ids; beyond the last expert: of nobody, which adds nothing.
      owners: mesh axes over which experts lie, in order. width: those over which each expert's
        width lies; their devices are given the same tokens.
      split: each device of `width` sends its part of the tokens, not all.
      everyone: all mesh axes, whose devices must agree on the number of rounds.
      form: "all_to_all" or "ragged".
      groups: parts of the tokens that are sent one by one: the first rounds of different groups do
        not depend on one another, so that one travels while another is computed.
      limit: rows that an owner is never asked for more of, over all devices, if known.
      inference: further rounds are a loop that cannot be differentiated.
    """
    (T, D), k = g_TD.shape, expert_Tk.shape[1]
    width, added = (width, ()) if split else ((), width)
    P = jax.lax.axis_size(width) if width else 1
    nobody = local_experts * jax.lax.axis_size(owners)
    padding = -T % (P * groups)
    g, weight = (jnp.pad(x, ((0, padding), (0, 0))) for x in (g_TD, weight_Tk))
    expert = jnp.pad(expert_Tk, ((0, padding), (0, 0)), constant_values=nobody)
    if width:
        part = (T + padding) // P
        g, weight, expert = (jax.lax.dynamic_slice_in_dim(
            x, jax.lax.axis_index(width) * part, part) for x in (g, weight, expert))
    wires = [{"ragged": _ragged, "all_to_all": _padded}[form](
        x, ids, local_experts, owners, limit)
        for x, ids in zip(jnp.split(g, groups), jnp.split(expert, groups), strict=True)]

    def one_round(number, outs):
        return [wire.back(number, _across(run, *wire.send(number), local_experts, width), out)
                for wire, out in zip(wires, outs, strict=True)]

    outs = one_round(0, [jnp.zeros((x.shape[0] * k, D), g.dtype) for x in jnp.split(g, groups)])
    most = max(wire.most for wire in wires)
    if most > 1:
        rounds = jax.lax.pmax(jnp.stack([wire.rounds for wire in wires]).max(), everyone)
        with jax.named_scope(FURTHER):
            outs = (_loop if inference else _scan)(one_round, outs, rounds, most)
    pairs = jnp.concatenate([wire.pairs(out) for wire, out in zip(wires, outs, strict=True)])
    out_TkD = pairs.reshape(-1, k, D).astype(jnp.float32)
    out_TD = jnp.sum(out_TkD * weight[..., None], axis=1).astype(g.dtype)
    if apart:
        return out_TD[:T]
    if width:
        out_TD = jax.lax.all_gather(out_TD, width, axis=0, tiled=True)
    return (jax.lax.psum(out_TD, added) if added else out_TD)[:T]


def _across(run, x_WD, ids_W, local_experts: int, width):
    """The experts' sums of the rows that arrived here, over all parts of the experts' width."""
    if width:
        x_WD, ids_W = (jax.lax.all_gather(x, width, axis=0, tiled=True) for x in (x_WD, ids_W))
    one_W1 = (ids_W < local_experts).astype(jnp.float32)[:, None]
    y_WD = run(x_WD, one_W1, ids_W[:, None]).astype(x_WD.dtype)
    if width:
        y_WD = jax.lax.psum_scatter(y_WD, width, scatter_dimension=0, tiled=True)
    return y_WD


def _loop(one_round, outs, rounds, most):
    def body(state):
        return state[0] + 1, one_round(*state)

    return jax.lax.while_loop(lambda state: state[0] < rounds, body, (jnp.int32(1), outs))[1]


def _scan(one_round, outs, rounds, most):
    """Differentiable: rounds are recomputed, and those that nobody needs cost nothing."""
    def body(outs, number):
        return jax.lax.cond(number < rounds, jax.checkpoint(one_round),
                            lambda number, outs: outs, number, outs), None

    def rest(outs):
        return jax.lax.scan(body, outs, jnp.arange(1, most))[0]

    return jax.lax.cond(rounds > 1, jax.checkpoint(rest), lambda outs: outs, outs)


def _eight(rows: int) -> int:
    return -(-rows // 8) * 8


def _padded(g_TD, expert_Tk, local_experts: int, owners, limit) -> Wire:
    """Each device has room for C rows of each other one in a round."""
    T, R, M = g_TD.shape[0], jax.lax.axis_size(owners), expert_Tk.size
    bound = min(M, limit or M)
    C = min(_eight(-(-ROOM * M // R)), _eight(bound))
    owner_M = (expert_Tk // local_experts).reshape(M)
    hit_MR = (owner_M[:, None] == jnp.arange(R)).astype(jnp.int32)
    upto_MR = jnp.cumsum(hit_MR, axis=0)
    rank_M = jnp.sum(upto_MR * hit_MR, axis=1) - 1  # -1 for nobody's
    token_M = jnp.arange(M) // expert_Tk.shape[1]
    local_M = (expert_Tk % local_experts).reshape(M)

    def exchange(x):
        return jax.lax.all_to_all(x.reshape(R, C, *x.shape[1:]), owners, 0, 0).reshape(x.shape)

    def slots(number):
        place_M = rank_M - number * C
        mine_M = (place_M >= 0) & (place_M < C)
        return jnp.where(mine_M, owner_M * C + place_M, R * C)  # beyond the buffer: dropped

    def send(number):
        slot_M = slots(number)
        rows = jnp.full((R * C,), T, jnp.int32).at[slot_M].set(token_M, mode="drop")
        ids = jnp.full((R * C,), local_experts, jnp.int32).at[slot_M].set(local_M, mode="drop")
        return exchange(g_TD.at[rows].get(mode="fill", fill_value=0)), exchange(ids)

    def back(number, y_WD, out_MD):
        return out_MD + exchange(y_WD).at[slots(number)].get(mode="fill", fill_value=0)

    return Wire(-(-jnp.max(upto_MR[-1]) // C), -(-bound // C), send, back, lambda out_MD: out_MD)


def _ragged(g_TD, expert_Tk, local_experts: int, owners, limit) -> Wire:
    """Rows for an owner form one queue over all senders, of which it takes W in a round."""
    R, M = jax.lax.axis_size(owners), expert_Tk.size
    bound = min(R * M, limit or R * M)
    W = min(_eight(math.ceil(RAGGED_ROOM * M)), _eight(bound))
    me, E = jax.lax.axis_index(owners), R * local_experts
    order_M = jnp.argsort(expert_Tk.reshape(M), stable=True)  # nobody's rows come last
    sorted_MD = g_TD[order_M // expert_Tk.shape[1]]
    count_E = jnp.bincount(expert_Tk.reshape(M), length=E).astype(jnp.int32)
    count_RRE = jax.lax.all_gather(count_E, owners).reshape(R, R, local_experts)
    size_RR = jnp.sum(count_RRE, axis=2)  # of a sender (first) for an owner
    queued_RR = jnp.cumsum(size_RR, axis=0) - size_RR
    offset_RR = jnp.cumsum(size_RR, axis=1) - size_RR
    # Within the queue rows lie by sender, and a sender's by expert.
    ends = jnp.cumsum(jax.lax.dynamic_index_in_dim(count_RRE, me, 1, keepdims=False).reshape(-1))

    def parts(number):
        """For each sender and owner: first row at the sender and at the owner, and how many."""
        low, high = (jnp.clip(n * W - queued_RR, 0, size_RR) for n in (number, number + 1))
        return offset_RR + low, queued_RR + low - number * W, high - low

    def send(number):
        at_sender, at_owner, size = parts(number)
        x_WD = jax.lax.ragged_all_to_all(
            sorted_MD, jnp.zeros((W, g_TD.shape[1]), g_TD.dtype), at_sender[me], size[me],
            at_owner[me], size[:, me], axis_name=owners)
        place_W = number * W + jnp.arange(W)
        group_W = jnp.sum(place_W[:, None] >= ends, axis=1)
        return x_WD, jnp.where(group_W < E, group_W % local_experts, local_experts)

    def back(number, y_WD, out_MD):
        at_sender, at_owner, size = parts(number)
        return jax.lax.ragged_all_to_all(y_WD, out_MD, at_owner[:, me], size[:, me],
                                         at_sender[:, me], size[me], axis_name=owners)

    def pairs(out_MD):
        return out_MD[jnp.argsort(order_M)]

    rounds = -(-jnp.max(jnp.sum(size_RR, axis=0)) // W)
    return Wire(rounds, -(-bound // W), send, back, pairs)

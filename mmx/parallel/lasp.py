"""Lightning attention over a sequence split between devices (LASP, LASP+).

Each device first makes the state that its own piece ends with, which needs only those tokens that
last to the end; these states travel, and the kernel then runs once over the piece, from the state
before it. A state is B·N·H² float32 values (4 MiB per row for 64 heads of 128), whatever the
length. Per device and direction, over W pieces:

| method | messages received | states received | steps in a row |
|---|---|---|---|
| "gather" (LASP+, arXiv 2501.08313 §3.2.2) | 1 all-gather | W - 1 | 1 |
| "log" | ⌈log2 W⌉ + 1 permutes, 1 all-reduce | ⌈log2 W⌉ + 3 | ⌈log2 W⌉ + 2 |
| "ring" (LASP, arXiv 2404.02882) | 1 permute, 1 all-reduce | 3 | W |

The all-reduce gives every device the last state (about two states each). With packed rows one
flag per row travels beside each state.

Gradients go the same way back: each device makes the gradient that its own outputs give to the
state before its piece, from those of its first tokens that the state reaches; the transposed
exchange turns them into the gradients in the states after the pieces; the kernel's gradient runs
once, from those.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mmx.parallel.collectives import permute
from pallas_kernels import lightning_attention as kernel
from pallas_kernels import lightning_state as own_state

METHODS = ("gather", "log", "ring")


def lightning_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    slopes_N: jax.Array,
    state_BNHH: jax.Array | None = None,
    *,
    axis: str | tuple[str, ...],
    starts_BT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    method: str = "gather",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`pallas_kernels.lightning_attention` of a sequence whose time lies over mesh `axis`.

    To be called inside `jax.shard_map`; T is the local piece's: rank r holds the tokens
    from r·T on.

    Args:
      q_BTNH, k_BTNH, v_BTNH: this device's piece, float32 or bfloat16.
      slopes_N: float32, ≥ 0, per token.
      state_BNHH: float32 state before the whole sequence, the same on every rank; zeros if None.
      axis: mesh axis, or several with the first one slowest.
      starts_BT: bool, true where a new sample begins, for this piece.
      lengths_B: int32 valid tokens of the whole sequence, the same on every rank. Padding neither
        decays nor enters the state; its output is zero.
      method: "gather", "log" or "ring": how states travel.
      implementation: as for the kernel.

    Returns:
      Output of this piece in q's dtype, and the float32 state after the last valid token of the
      whole sequence, the same on every rank. Differentiable in q, k, v and the state, not in the
      slopes; what travels for the gradients does not depend on T either.

    Raises:
      ValueError: an unknown method, or what the kernel refuses.
    """
    if method not in METHODS:
        raise ValueError(f"No method '{method}'. Pass one of {', '.join(METHODS)}.")
    B, _, N, H = q_BTNH.shape
    slopes_N = jnp.asarray(slopes_N, jnp.float32)
    if state_BNHH is None:
        state_BNHH = jnp.zeros((B, N, H, H), jnp.float32)
    if jax.lax.axis_size(axis) == 1:
        return kernel(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT=starts_BT,
                      lengths_B=lengths_B, implementation=implementation)
    return _pieces(q_BTNH, k_BTNH, v_BTNH, state_BNHH, slopes_N, starts_BT, lengths_B,
                   axis, method, implementation)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8, 9))
def _pieces(*arguments):
    # Without `jax.vjp`, under which kernels keep what only a gradient needs.
    return _forward(*arguments, vjp=lambda function, *x: (function(*x), None))[0]


def _forward(q, k, v, state, slopes_N, starts_BT, lengths_B, axis, method, implementation,
             vjp=jax.vjp):
    B, T = q.shape[:2]
    W, rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    own_B = None if lengths_B is None else jnp.clip(lengths_B - rank * T, 0, T)
    cut_B = None
    if starts_BT is not None:
        inside_BT = True if own_B is None else jnp.arange(T) < own_B[:, None]
        cut_B = (starts_BT & inside_BT).any(axis=1)

    def decay_BN(first, last):
        """Decay over pieces first … last-1; padding does not count."""
        count_B = (last - first) * jnp.full((B,), T, jnp.int32)
        if lengths_B is not None:
            count_B = jnp.minimum(last * T, lengths_B) - jnp.minimum(first * T, lengths_B)
        return jnp.exp(-slopes_N * count_B[:, None].astype(jnp.float32))

    def travel(local, state):
        send = {"gather": _gather, "log": _log, "ring": _ring}[method]
        return send(local, state, cut_B, decay_BN, axis, rank, W)

    marks = {"starts_BT": starts_BT, "lengths_B": own_B}

    def run(q, k, v, before):
        return kernel(q, k, v, slopes_N, before, **marks, implementation=implementation)

    local = own_state(k, v, slopes_N, **marks, implementation=implementation)
    (before, last), travel_back = vjp(travel, local, state)
    (out, _), run_back = vjp(run, q, k, v, before)
    return (out, last), (q, slopes_N, marks, travel_back, run_back)


def _backward(axis, method, implementation, kept, gradients):
    q, slopes_N, marks, travel_back, run_back = kept
    dout, dlast = gradients
    dbefore = own_state(q, dout, slopes_N, **marks, reverse=True, implementation=implementation)
    dafter, dstate = travel_back((dbefore, dlast))
    # What the state before this piece hands on is in other devices' `dafter`, and in `dstate`.
    dq, dk, dv, _ = run_back((dout, dafter))
    return dq, dk, dv, dstate, None, None, None


_pieces.defvjp(_forward, _backward)


def _scaled(decay_BN, cut_B, state_BNHH):
    """The state after tokens of that decay, which hold the start of a sample where `cut_B`."""
    if cut_B is not None:
        decay_BN = jnp.where(cut_B[:, None], 0.0, decay_BN)
    return decay_BN[..., None, None] * state_BNHH


def _gather(local, state, cut_B, decay_BN, axis, rank, W):
    local_WBNHH = jax.lax.all_gather(local, axis)
    cuts_WB = None if cut_B is None else jax.lax.all_gather(cut_B, axis)

    def after(count):
        """State after the first `count` pieces: each one's own, decayed over those between."""
        def one(piece, state):
            between_B = None
            if cuts_WB is not None:
                index_W1 = jnp.arange(W)[:, None]
                between_B = (cuts_WB & (index_W1 > piece) & (index_W1 < count)).any(axis=0)
            # Pieces from `count` on: a decay of nothing, times zero.
            scaled = _scaled(decay_BN(jnp.minimum(piece + 1, count), count), between_B, state)
            return jnp.where(piece < count, scaled, 0.0)

        whole = one(jnp.int32(-1), state)
        return whole + jax.vmap(one)(jnp.arange(W), local_WBNHH).sum(axis=0)

    return after(rank), after(W)


def _log(local, state, cut_B, decay_BN, axis, rank, W):
    # The state before the sequence counts as what rank 0's own piece ends with.
    total = local + _scaled(decay_BN(0, 1), cut_B, jnp.where(rank == 0, state, 0.0))
    cut, step = cut_B, 1
    while step < W:  # `total` and `cut` cover the last `step` pieces up to this one
        hops = [(source, source + step) for source in range(W - step)]
        # Ranks below `step`, which already cover all, receive zeros.
        received = permute(total, axis, hops)
        first = jnp.maximum(rank + 1 - step, 0)
        total = total + _scaled(decay_BN(first, rank + 1), cut, received)
        if cut is not None:
            cut = cut | permute(cut, axis, hops)
        step *= 2
    before = permute(total, axis, [(source, source + 1) for source in range(W - 1)])
    return jnp.where(rank == 0, state, before), _from_last(total, axis, rank, W)


def _ring(local, state, cut_B, decay_BN, axis, rank, W):
    before = jnp.where(rank == 0, state, 0.0)
    decay = decay_BN(rank, rank + 1)
    for source in range(W - 1):  # one sender and one receiver at a time
        after = _scaled(decay, cut_B, before) + local
        received = permute(after, axis, [(source, source + 1)])
        before = jnp.where(rank == source + 1, received, before)
    return before, _from_last(_scaled(decay, cut_B, before) + local, axis, rank, W)


def _from_last(x, axis, rank, W):
    return jax.lax.psum(jnp.where(rank == W - 1, x, 0.0), axis)

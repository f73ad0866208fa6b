"""Lightning attention over a sequence split between devices (LASP, LASP+).

Each device runs the kernel on its own piece from an empty state; the pieces' last states travel,
and what came before a piece is added as `q_t λ^(t+1) P` for the tokens that it reaches. A state is
B·N·H² float32 values (4 MiB per row for 64 heads of 128), whatever the length. Per device and
direction, over W pieces:

| method | messages received | states received | steps in a row |
|---|---|---|---|
| "gather" (LASP+, arXiv 2501.08313 §3.2.2) | 1 all-gather | W - 1 | 1 |
| "log" | ⌈log2 W⌉ + 1 permutes, 1 all-reduce | ⌈log2 W⌉ + 3 | ⌈log2 W⌉ + 2 |
| "ring" (LASP, arXiv 2404.02882) | 1 permute, 1 all-reduce | 3 | W |

The all-reduce gives every device the last state (about two states each). With packed rows one
flag per row travels beside each state.
"""

from functools import partial

import jax
import jax.numpy as jnp

from mmx.parallel.collectives import permute
from pallas_kernels import lightning_attention as kernel

METHODS = ("gather", "log", "ring")
# Tokens to which the state before a piece is added at once: bounds the float32 temporaries.
SPAN = 2048
# exp(-104) is zero in float32, denormals included: tokens decayed further see nothing.
VANISHED = 104.0


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
    B, T, N, H = q_BTNH.shape
    W, rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    slopes_N = jax.lax.stop_gradient(jnp.asarray(slopes_N, jnp.float32))
    if state_BNHH is None:
        state_BNHH = jnp.zeros((B, N, H, H), jnp.float32)
    run = partial(kernel, q_BTNH, k_BTNH, v_BTNH, slopes_N, implementation=implementation)
    if W == 1:
        return run(state_BNHH, starts_BT=starts_BT, lengths_B=lengths_B)

    own_B = None if lengths_B is None else jnp.clip(lengths_B - rank * T, 0, T)
    # From an empty state, so that nothing of a piece's own work waits for another device.
    out_BTNH, local_BNHH = run(starts_BT=starts_BT, lengths_B=own_B)

    def decay_BN(first, last):
        """Decay over pieces first … last-1; padding does not count."""
        count_B = (last - first) * jnp.full((B,), T, jnp.int32)
        if lengths_B is not None:
            count_B = jnp.minimum(last * T, lengths_B) - jnp.minimum(first * T, lengths_B)
        return jnp.exp(-slopes_N * count_B[:, None].astype(jnp.float32))

    reached_B = jnp.full((B,), T, jnp.int32) if own_B is None else own_B
    cut_B = None
    if starts_BT is not None:
        starts_BT = starts_BT & (jnp.arange(T) < reached_B[:, None])  # none among padding
        cut_B = starts_BT.any(axis=1)
        reached_B = jnp.where(cut_B, jnp.argmax(starts_BT, axis=1), reached_B).astype(jnp.int32)
    travel = {"gather": _gather, "log": _log, "ring": _ring}[method]
    before_BNHH, last_BNHH = travel(local_BNHH, state_BNHH, cut_B, decay_BN, axis, rank, W)
    return _add_before(out_BTNH, q_BTNH, before_BNHH, slopes_N, reached_B), last_BNHH


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


def _spans(T, slopes_N, reached_B):
    """Returns (span, count, window): which tokens the loops of `_add_before` visit.

    `window(i)` gives span i's first token and the decay [B, span, N] of the state before the
    piece there. Only spans that it reaches, and in which it has not vanished, are counted.
    """
    span = min(SPAN, T)
    alive = VANISHED / jnp.maximum(slopes_N.min(), 1e-30)
    reach = jnp.minimum(reached_B.max(), jnp.minimum(alive, T).astype(jnp.int32))
    count = -(-reach // span)

    def window(i):
        # The last span may overlap its neighbour: those tokens are masked as done.
        first = jnp.minimum(i * span, T - span)
        token = first + jnp.arange(span)
        mask_Bt = (token < reached_B[:, None]) & (token >= i * span)
        decay_tN = jnp.exp(-slopes_N * (token[:, None] + 1).astype(jnp.float32))
        return first, jnp.where(mask_Bt[..., None], decay_tN, 0.0)[..., None]

    return span, count, window


def _product(spec, a, b):
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)


@jax.custom_vjp
def _add_before(out_BTNH, q_BTNH, before_BNHH, slopes_N, reached_B):
    """Adds `q_t λ^(t+1) P` to the outputs of a row's first `reached_B` tokens, in float32."""
    span, count, window = _spans(q_BTNH.shape[1], slopes_N, reached_B)

    def one(i, out):
        first, decay = window(i)
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=span, axis=1)
        inter = _product("btnh,bnhg->btng", cut(q_BTNH).astype(jnp.float32), before_BNHH) * decay
        total = (cut(out).astype(jnp.float32) + inter).astype(out.dtype)
        return jax.lax.dynamic_update_slice_in_dim(out, total, first, 1)

    return jax.lax.fori_loop(0, count, one, out_BTNH)


def _add_before_fwd(out_BTNH, q_BTNH, before_BNHH, slopes_N, reached_B):
    out = _add_before(out_BTNH, q_BTNH, before_BNHH, slopes_N, reached_B)
    return out, (q_BTNH, before_BNHH, slopes_N, reached_B)


def _add_before_bwd(saved, dout_BTNH):
    q_BTNH, before_BNHH, slopes_N, reached_B = saved
    span, count, window = _spans(q_BTNH.shape[1], slopes_N, reached_B)

    def one(i, carry):
        dq, dbefore = carry
        first, decay = window(i)
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=span, axis=1)
        scaled = cut(dout_BTNH).astype(jnp.float32) * decay
        dbefore += _product("btnh,btng->bnhg", cut(q_BTNH).astype(jnp.float32), scaled)
        new = cut(dq) + _product("btng,bnhg->btnh", scaled, before_BNHH).astype(dq.dtype)
        return jax.lax.dynamic_update_slice_in_dim(dq, new, first, 1), dbefore

    zeros = jnp.zeros_like(q_BTNH), jnp.zeros_like(before_BNHH)
    dq, dbefore = jax.lax.fori_loop(0, count, one, zeros)
    return dout_BTNH, dq, dbefore, jnp.zeros_like(slopes_N), None


_add_before.defvjp(_add_before_fwd, _add_before_bwd)

"""Causal softmax attention over a sequence split between devices: ring, or gathered keys.

Keys and values are KV = 2·B·T·K·H values per device (T is the local piece). Bytes that one device
receives, over W pieces, with c bytes per value:

| method | forward | backward | keys held at once |
|---|---|---|---|
| "ring" | (W - 1)·KV·c | (W - 1)·KV·c + W·KV·4 | 2 pieces |
| "gather" | (W - 1)·KV·c | (W - 1)·KV·(c + 4) | W pieces |

(gradients travel in float32; packed rows add 4 bytes per token of k). The ring sends the next
piece while the present one is worked on; "gather" waits once, and has one loop over all keys.

In natural order the last rank has 2W - 1 times the causal work of the first. Zigzag order
(`zigzag`, `balanced=True`) gives rank r the half-pieces r and 2W - 1 - r, and every rank the same.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from mmx.parallel import blocks, ring_kernels
from mmx.parallel.collectives import permute
from pallas_kernels.attention.api import partial_form

METHODS = ("ring", "gather")


def attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    axis: str | tuple[str, ...],
    samples_BT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    method: str = "ring",
    balanced: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """`pallas_kernels.attention` of a sequence whose time lies over mesh `axis`.

    To be called inside `jax.shard_map`; all arrays are this device's piece. Varlen ring attention
    (arXiv 2501.08313 §3.2.2); results of pieces are merged by log-sum-exp in float32. Blocks of
    keys that lie in the future, among padding or before the sample's tokens are not visited.
    The forward pass runs by the platform's kernel where there is one for these arguments (TPU;
    NVIDIA in bfloat16, not packed); gradients, and all else, in blocks of XLA.

    Args:
      q_BTNH, k_BTKH, v_BTKH: float32 or bfloat16, K dividing N; rotation already applied.
      axis: mesh axis, or several with the first one slowest.
      samples_BT: int32 sample number per token of packed rows: attention within a sample only.
      lengths_B: int32 valid tokens of the whole sequence, the same on every rank; the output of
        padding is zero.
      method: "ring" (keys and values go round) or "gather" (all are gathered first).
      balanced: rank r holds the half-pieces r and 2W - 1 - r (see `zigzag`), not piece r.
      implementation: as of `pallas_kernels.partial_attention`.

    Returns:
      Output [B, T, N, H] in q's dtype. Differentiable in q, k and v.

    Raises:
      ValueError: an unknown method, shapes that do not fit, or an odd balanced piece.
    """
    if method not in METHODS:
        raise ValueError(f"No method '{method}'. Pass one of {', '.join(METHODS)}.")
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    if k_BTKH.shape != v_BTKH.shape or k_BTKH.shape != (B, T, K, H) or N % K:
        raise ValueError(
            f"q {q_BTNH.shape}, k {k_BTKH.shape} and v {v_BTKH.shape} must be [B, T, N, H], "
            "[B, T, K, H] and [B, T, K, H] with K dividing N."
        )
    for name, x, shape in (("samples_BT", samples_BT, (B, T)), ("lengths_B", lengths_B, (B,))):
        if x is not None and jnp.shape(x) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {jnp.shape(x)}.")
    if balanced and T % 2:
        raise ValueError(f"A balanced piece is two halves of one length; got {T} tokens.")
    form = implementation or partial_form(q_BTNH, k_BTKH, ends_BS=samples_BT)
    return _attention((axis, method, balanced, form), q_BTNH, k_BTKH, v_BTKH, samples_BT,
                      lengths_B)


def zigzag(x, W: int, axis: int = 1) -> jax.Array:
    """Returns a whole array reordered so that W equal pieces have equal causal work.

    Piece r becomes the half-pieces r and 2W - 1 - r. Raises ValueError if 2W does not divide.
    """
    return _half_pieces(x, _zigzag_order(W), axis)


def unzigzag(x, W: int, axis: int = 1) -> jax.Array:
    """Undoes `zigzag`."""
    return _half_pieces(x, np.argsort(_zigzag_order(W)), axis)


def _zigzag_order(W):
    return np.stack([np.arange(W), 2 * W - 1 - np.arange(W)], axis=1).ravel()


def _half_pieces(x, order, axis):
    axis %= x.ndim
    T = x.shape[axis]
    if T % len(order):
        raise ValueError(f"{T} tokens are not {len(order)} half-pieces of one length; pad them.")
    halves = x.reshape(*x.shape[:axis], len(order), T // len(order), *x.shape[axis + 1 :])
    return jnp.take(halves, order, axis=axis).reshape(x.shape)


def first_tokens(rank, W: int, T: int, balanced: bool):
    """Position of the first token of each segment (one, or two halves) that a rank holds."""
    if balanced:
        return jnp.stack([rank, 2 * W - 1 - rank]) * (T // 2)
    return jnp.stack([rank]) * T


def _gathered(x, axis, balanced):
    """All ranks' tokens in the order of the sequence."""
    x = jax.lax.all_gather(x, axis, axis=1, tiled=True)
    return unzigzag(x, jax.lax.axis_size(axis)) if balanced else x


class _Piece:
    """This device's piece as blocks, and how keys reach it."""

    def __init__(self, choice, q, k, v, samples, lengths):
        self.axis, self.method, self.balanced, _ = choice
        self.W, self.rank = jax.lax.axis_size(self.axis), jax.lax.axis_index(self.axis)
        B, self.T, self.K = k.shape[:3]
        self.segments = 2 if self.balanced else 1
        L = self.T // self.segments
        self.size = min(blocks.QUERY_BLOCK, L)
        first = first_tokens(self.rank, self.W, self.T, self.balanced)
        # Queries that only fill a block, or are padding, stand before all keys and see none.
        position_nBb = blocks.positions(first, L, self.size, -1)[:, None]
        position_nBb = jnp.broadcast_to(position_nBb, (len(position_nBb), B, self.size))
        if lengths is not None:
            position_nBb = jnp.where(position_nBb < lengths[:, None], position_nBb, -1)
        sample = None if samples is None else blocks.to_blocks(samples, self.segments, self.size)
        self.queries = self.query_blocks(q), position_nBb, sample

        self.key_segments = self.segments
        if self.method == "gather":
            k, v, samples = (None if x is None else _gathered(x, self.axis, self.balanced)
                             for x in (k, v, samples))
            self.key_segments = 1
        self.key_count = k.shape[1]
        self.key_size = min(blocks.KEY_BLOCK, self.key_count // self.key_segments)
        split = self.key_segments, self.key_size
        sample = None if samples is None else blocks.to_blocks(samples, *split)
        self.travellers = blocks.key_blocks(k, *split), blocks.key_blocks(v, *split), sample

    def query_blocks(self, x_BTNH):
        return blocks.query_blocks(x_BTNH, self.K, self.segments, self.size)

    def keys_of(self, rank, travellers):
        """Keys, values, positions and samples, where `travellers` are the rank's."""
        first = jnp.zeros(1, jnp.int32)
        if self.method == "ring":
            first = first_tokens(rank, self.W, self.T, self.balanced)
        k, v, sample = travellers
        L = self.key_count // self.key_segments
        return k, v, blocks.positions(first, L, self.key_size, blocks.NOWHERE), sample

    def go_round(self, work, carry, send):
        """`carry = work(rank, travellers, carry)` for the keys of every rank, the own ones first.

        `send(carry)` is applied after each work: a part of the carry may travel with the keys.
        """
        if self.method == "gather" or self.W == 1:
            return work(self.rank, self.travellers, carry)

        def step(i, state):
            travellers, carry = state
            # Sent before the work, which needs only what has arrived.
            arriving = self.pass_on(travellers)
            return arriving, send(work((self.rank - i) % self.W, travellers, carry))

        last = self.W - 1
        travellers, carry = jax.lax.fori_loop(0, last, step, (self.travellers, carry))
        return send(work((self.rank - last) % self.W, travellers, carry))

    def pass_on(self, tree):
        hops = [(source, (source + 1) % self.W) for source in range(self.W)]
        return permute(tree, self.axis, hops)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(choice, q, k, v, samples, lengths):
    return _forward(choice, q, k, v, samples, lengths)[0]


def _forward(choice, q, k, v, samples, lengths):
    if choice[-1] != "xla":
        return _forward_by_kernel(choice, q, k, v, samples, lengths)
    piece = _Piece(choice, q, k, v, samples, lengths)
    shape = piece.queries[0].shape
    sums = (
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape[:-1], 1), jnp.float32),
        jnp.full((*shape[:-1], 1), blocks.NEG_INF, jnp.float32),
    )

    def work(rank, travellers, sums):
        return blocks.attend(piece.queries, piece.keys_of(rank, travellers), sums)

    out, total, peak = piece.go_round(work, sums, send=lambda sums: sums)
    some = jnp.maximum(total, 1e-30)
    out = blocks.from_query_blocks(out / some, piece.segments, piece.T).astype(q.dtype)
    return out, (q, k, v, samples, lengths, out, peak + jnp.log(some))


def _forward_by_kernel(choice, q, k, v, samples, lengths):
    axis, method, balanced, form = choice
    W, (_, T, K) = jax.lax.axis_size(axis), k.shape[:3]
    keys = k, v, samples
    if method == "gather":
        keys = tuple(x if x is None else _gathered(x, axis, balanced) for x in keys)
    segments = 2 if balanced else 1
    out, total, peak = ring_kernels.attend(
        form, axis, q, keys, samples, partial(first_tokens, W=W, T=T, balanced=balanced),
        segments if method == "ring" else 1, method == "ring")
    out = (out / total[..., None]).astype(q.dtype)
    if lengths is not None:
        L = T // segments
        first = first_tokens(jax.lax.axis_index(axis), W, T, balanced)
        position_T = (first[:, None] + jnp.arange(L)).reshape(T)
        out = jnp.where((position_T < lengths[:, None])[..., None, None], out, 0)
    size = min(blocks.QUERY_BLOCK, T // segments)
    lse = blocks.query_blocks((peak + jnp.log(total))[..., None], K, segments, size)
    return out, (q, k, v, samples, lengths, out, lse)


def _backward(choice, saved, dout):
    q, k, v, samples, lengths, out, lse = saved
    piece = _Piece(choice, q, k, v, samples, lengths)
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1, keepdims=True)
    saved = piece.query_blocks(dout), lse, piece.query_blocks(delta)
    zeros = [jnp.zeros(x.shape, jnp.float32) for x in (piece.queries[0], *piece.travellers[:2])]

    def work(rank, travellers, gradients):
        keys = piece.keys_of(rank, travellers)
        return blocks.attend_gradients(piece.queries, keys, saved, gradients)

    def send(gradients):
        dq, *dkv = gradients
        return dq, *piece.pass_on(dkv)

    dq, *dkv = piece.go_round(work, tuple(zeros), send)
    dkv = [blocks.from_key_blocks(x, piece.key_segments, piece.key_count) for x in dkv]
    if piece.method == "gather":
        if piece.balanced:
            dkv = [zigzag(x, piece.W) for x in dkv]
        dkv = [jax.lax.psum_scatter(x, piece.axis, scatter_dimension=1, tiled=True) for x in dkv]
    dq = blocks.from_query_blocks(dq, piece.segments, piece.T).astype(q.dtype)
    return dq, dkv[0].astype(k.dtype), dkv[1].astype(v.dtype), None, None


_attention.defvjp(_forward, _backward)

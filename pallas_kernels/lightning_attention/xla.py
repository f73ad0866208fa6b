"""Lightning attention in chunks of matrix products, for XLA on any device.

Inside a chunk tokens meet through a decayed causal product; across chunks only the state travels
(arXiv 2501.08313 §2.2, block form). All exponents are ≤ 0: the decayed mask is never factored
into λ^r and λ^-c, which overflows for fast heads.
"""

import jax
import jax.numpy as jnp

from pallas_kernels import precision

# Rows of a chunk: 64 keep the intra-chunk arithmetic at or below the inter-chunk part's for
# H = 64 … 128, and 32 do for smaller heads.
CHUNK = 64
# Tokens handled at once: enough to fill a device, few enough to bound the memory for states.
SPAN = 2048


def lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B):
    """Chunked form; arguments and results as in the public function."""
    B, T, N, H = q_BTNH.shape
    C = min(CHUNK if H > 32 else CHUNK // 2, -(-T // 8) * 8)
    chunks = -(-T // C)
    span = C * -(-chunks // -(-chunks // (SPAN // C)))
    padding = -T % span
    if padding and lengths_B is None:
        lengths_B = jnp.full((B,), T, jnp.int32)

    def in_spans(x):
        x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, span, *x.shape[2:]), 1, 0)

    starts = None if starts_BT is None else in_spans(starts_BT)
    spans = in_spans(q_BTNH), in_spans(k_BTNH), in_spans(v_BTNH), starts
    count = spans[0].shape[0]
    first = jnp.arange(count, dtype=jnp.int32) * span

    def one_span(state, inputs):
        (q, k, v, starts), first = inputs
        left = None if lengths_B is None else jnp.clip(lengths_B - first, 0, span)
        return _span(q, k, v, slopes_N, state, starts, left, C)[::-1]

    if count == 1:
        state, out = one_span(state_BNHH, (jax.tree.map(lambda x: x[0], spans), first[0]))
        return out[:, :T], state
    state, out = jax.lax.scan(one_span, state_BNHH, (spans, first))
    return jnp.moveaxis(out, 0, 1).reshape(B, -1, N, H)[:, :T], state


def _span(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B, C):
    B, T, N, H = q_BTNH.shape
    dtype = q_BTNH.dtype
    prec = precision.for_dtype(dtype)
    # [B, chunks, N, C, H]: heads outside rows, so that each product is one batched matmul. Keys
    # lie transposed, [B, chunks, N, H, C], as both of their products take them.
    q, v = (x.reshape(B, -1, C, N, H).swapaxes(2, 3) for x in (q_BTNH, v_BTNH))
    k = k_BTNH.reshape(B, -1, C, N, H).transpose(0, 1, 3, 4, 2)
    row_C = jnp.arange(C, dtype=jnp.float32)
    s_N1 = slopes_N[:, None]

    distance_CC = row_C[:, None] - row_C[None, :]
    decay_NCC = jnp.where(distance_CC >= 0, jnp.exp(-s_N1[..., None] * jnp.abs(distance_CC)), 0.0)
    q_decay_NC = jnp.exp(-s_N1 * (row_C + 1))
    if lengths_B is None:
        k_decay = jnp.exp(-s_N1 * (C - 1 - row_C))  # [N, C]
        carry_decay = jnp.exp(-slopes_N * C)  # [N]
    else:
        chunk_first = jnp.arange(T // C, dtype=jnp.int32) * C
        m_Bc = jnp.clip(lengths_B[:, None] - chunk_first, 0, C).astype(jnp.float32)
        to_end = m_Bc[:, :, None, None] - 1 - row_C  # [B, c, 1, C]
        k_decay = jnp.where(to_end >= 0, jnp.exp(-s_N1 * jnp.maximum(to_end, 0)), 0.0)
        carry_decay = jnp.exp(-slopes_N * m_Bc[..., None])  # [B, c, N]
    mask_CC = decay_NCC
    if starts_BT is not None:
        starts_BcC = starts_BT.reshape(B, -1, C)
        if lengths_B is not None:  # a start among padding is no start
            starts_BcC = starts_BcC & (row_C < m_Bc[..., None])
        sample_BcC = jnp.cumsum(starts_BcC, axis=-1)
        last_Bc1 = sample_BcC[..., -1:]
        same_Bc1CC = (sample_BcC[..., :, None] == sample_BcC[..., None, :])[:, :, None]
        mask_CC = jnp.where(same_Bc1CC, decay_NCC, 0.0)
        q_decay_NC = jnp.where((sample_BcC == 0)[:, :, None], q_decay_NC, 0.0)
        k_decay = jnp.where((sample_BcC == last_Bc1)[:, :, None], k_decay, 0.0)
        carry_decay = jnp.where(last_Bc1 == 0, carry_decay, 0.0)

    def product(spec, a, b, prec=prec):
        return jnp.einsum(spec, a, b, precision=prec, preferred_element_type=jnp.float32)

    scores = product("bcnrh,bcnhs->bcnrs", q, k) * mask_CC
    intra = product("bcnrs,bcnsh->bcnrh", scores.astype(dtype), v)
    k_end = (k.astype(jnp.float32) * k_decay[..., None, :]).astype(dtype)
    update_BcNHH = product("bcnhs,bcnsg->bcnhg", k_end, v)

    carry_decay = jnp.broadcast_to(carry_decay, update_BcNHH.shape[:3])

    def next_state(S, inputs):
        decay, update = inputs
        return decay[..., None, None] * S + update, S

    by_chunk = lambda x: jnp.moveaxis(x, 1, 0)  # noqa: E731
    state, incoming = jax.lax.scan(
        next_state, state_BNHH, (by_chunk(carry_decay), by_chunk(update_BcNHH))
    )
    # fp32 on both sides: the state's small entries matter after long decays.
    inter = product(
        "bcnrh,bcnhg->bcnrg",
        q.astype(jnp.float32),
        by_chunk(incoming),
        jax.lax.Precision.HIGHEST,
    )
    out = (intra + inter * q_decay_NC[..., None]).swapaxes(2, 3).reshape(B, T, N, H)
    if lengths_B is not None:
        out = jnp.where((jnp.arange(T) < lengths_B[:, None])[..., None, None], out, 0.0)
    return out.astype(dtype), state

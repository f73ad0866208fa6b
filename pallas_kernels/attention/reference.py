"""Softmax attention with all scores at once, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.attention.shares import NEG_INF


def attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, samples_BT):
    """The definition itself: softmax(q k^T / √H) v under the causal mask."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    k, v = (jnp.repeat(x, N // K, axis=2) for x in (k, v))
    offsets_B = jnp.zeros(B, jnp.int32) if offsets_B is None else offsets_B
    position_BT = offsets_B[:, None] + jnp.arange(T)
    mask_BTS = jnp.arange(S) <= position_BT[..., None]
    if samples_BT is not None:
        mask_BTS &= samples_BT[:, :, None] == samples_BT[:, None, :]
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, precision="highest") / jnp.sqrt(H)
    weights = jax.nn.softmax(jnp.where(mask_BTS[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest").astype(q_BTNH.dtype)


def partial_attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, own, apart, ends_BS):
    """Sums over a part of the keys; needs neither `own` nor `apart`."""
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    S, K = k_BSKH.shape[1:3]
    q, k, v = (x.astype(jnp.float32) for x in (q_BTNH, k_BSKH, v_BSKH))
    k, v = (jnp.repeat(x, q.shape[2] // K, axis=2) for x in (k, v))
    position_BT = offsets_B[:, None] + jnp.arange(T)
    mask_BTS = jnp.arange(S) * stride + phase <= position_BT[..., None]
    if ends_BS is not None:
        mask_BTS &= jnp.arange(T)[:, None] < ends_BS[:, None]
    scores = jnp.einsum("btnh,bsnh->btns", q, k, precision="highest") / jnp.sqrt(H)
    scores = jnp.where(mask_BTS[:, :, None], scores, NEG_INF)
    peak = scores.max(-1)
    weights = jnp.where(mask_BTS[:, :, None], jnp.exp(scores - peak[..., None]), 0.0)
    weighted = jnp.einsum("btns,bsnh->btnh", weights, v, precision="highest")
    return weighted, weights.sum(-1), peak

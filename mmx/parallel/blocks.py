"""Attention of one device's queries over some keys, block by block, as sums that can be merged.

Arrays are worked on as blocks [n, B, ...] of a few hundred tokens, with a position per token, so
that any pieces of a sequence can meet. Sums are kept as (weighted values, weights, peak score).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import precision

QUERY_BLOCK = 512
KEY_BLOCK = 1024
NEG_INF = -1e30  # finite, so that a query without keys gives exp(0) · 0 and never NaN
NOWHERE = np.int32(2**31 - 1)  # the position of keys that only fill a block


def to_blocks(x_BT, segments: int, size: int):
    """[B, T, ...] to [n, B, size, ...]; each of `segments` equal parts fills whole blocks."""
    B, T = x_BT.shape[:2]
    x = x_BT.reshape(B, segments, T // segments, *x_BT.shape[2:])
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -(T // segments) % size)) + ((0, 0),) * (x.ndim - 3))
    return jnp.moveaxis(x.reshape(B, -1, size, *x.shape[3:]), 1, 0)


def from_blocks(x_nBb, segments: int, T: int):
    """Undoes `to_blocks`."""
    x = jnp.moveaxis(x_nBb, 0, 1)
    x = x.reshape(x.shape[0], segments, -1, *x.shape[3:])[:, :, : T // segments]
    return x.reshape(x.shape[0], T, *x.shape[3:])


def query_blocks(x_BTNH, K: int, segments: int, size: int):
    """[B, T, N, H] to [n, B, K, N / K, size, H]."""
    x_BTKGH = x_BTNH.reshape(*x_BTNH.shape[:2], K, -1, x_BTNH.shape[3])
    return to_blocks(x_BTKGH, segments, size).transpose(0, 1, 3, 4, 2, 5)


def from_query_blocks(x_nBKGbH, segments: int, T: int):
    """Undoes `query_blocks`."""
    x_BTKGH = from_blocks(x_nBKGbH.transpose(0, 1, 4, 2, 3, 5), segments, T)
    return x_BTKGH.reshape(*x_BTKGH.shape[:2], -1, x_BTKGH.shape[-1])


def key_blocks(x_BTKH, segments: int, size: int):
    """[B, T, K, H] to [n, B, K, size, H]."""
    return to_blocks(x_BTKH, segments, size).swapaxes(2, 3)


def from_key_blocks(x_nBKbH, segments: int, T: int):
    """Undoes `key_blocks`."""
    return from_blocks(x_nBKbH.swapaxes(2, 3), segments, T)


def positions(first_tokens, L: int, size: int, filler):
    """Positions [n, size] of segments of length L; `filler` for tokens that only fill a block."""
    token = jnp.arange(-(-L // size) * size, dtype=jnp.int32)
    return jnp.where(token < L, first_tokens[:, None] + token, filler).reshape(-1, size)


def visible(position_Bb, sample_Bb, key_position_nb, key_sample_nBb):
    """The range of key blocks, in order of position, that a block of queries can see."""
    last = (key_position_nb[:, 0] <= position_Bb.max()).sum()
    if sample_Bb is None:
        return 0, last
    behind_nB = key_sample_nBb.max(axis=2) < sample_Bb.min(axis=1)
    return jnp.cumprod(behind_nB.all(axis=1)).sum(), last


def _mask(position_Bb, sample_Bb, key_position_b, key_sample_Bb):
    mask = key_position_b <= position_Bb[..., None]
    if sample_Bb is not None:
        mask &= sample_Bb[..., None] == key_sample_Bb[:, None, :]
    return mask[:, None, None]


def _product(spec, a, b):
    b = b.astype(a.dtype)
    return jnp.einsum(
        spec, a, b, precision=precision.for_dtype(a.dtype), preferred_element_type=jnp.float32
    )


def _block(x, j):
    return None if x is None else jax.lax.dynamic_index_in_dim(x, j, keepdims=False)


def attend(queries, keys, sums):
    """Adds what queries see of some keys to their sums, and returns those.

    queries: blocks [n, B, K, G, b, H], positions [n, B, b], samples [n, B, b] or None. keys: key
    and value blocks [m, B, K, b, H], positions [m, b] in ascending order, samples [m, B, b] or
    None. sums: weighted values, weights and peak score per query, float32.
    """
    k, v, key_position, key_sample = keys
    scale = 1 / math.sqrt(k.shape[-1])

    def query_block(_, inputs):
        (q, position, sample), sums = inputs

        def key_block(j, carry):
            out, total, peak = carry
            mask = _mask(position, sample, key_position[j], _block(key_sample, j))
            scores = _product("bkgth,bksh->bkgts", q, _block(k, j)) * scale
            scores = jnp.where(mask, scores, NEG_INF)
            new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
            weights = jnp.where(mask, jnp.exp(scores - new_peak), 0.0)
            rescale = jnp.exp(peak - new_peak)
            values = _product("bkgts,bksh->bkgth", weights.astype(v.dtype), _block(v, j))
            total = total * rescale + weights.sum(-1, keepdims=True)
            return out * rescale + values, total, new_peak

        bounds = visible(position, sample, key_position, key_sample)
        return None, jax.lax.fori_loop(*bounds, key_block, sums)

    return jax.lax.scan(query_block, None, (queries, sums))[1]


def attend_gradients(queries, keys, saved, gradients):
    """Adds what pairs of queries and keys give to the gradients (dq, dk, dv), in float32.

    saved: per query the output's gradient, the log of its weights' sum (with the peak score), and
    the product of output and gradient. The rest as in `attend`.
    """
    k, v, key_position, key_sample = keys
    scale = 1 / math.sqrt(k.shape[-1])

    def query_block(carry, inputs):
        (q, position, sample), (dout, lse, delta), dq = inputs

        def key_block(j, carry):
            dq, dk, dv = carry
            mask = _mask(position, sample, key_position[j], _block(key_sample, j))
            k_j, v_j = _block(k, j), _block(v, j)
            scores = _product("bkgth,bksh->bkgts", q, k_j) * scale
            weights = jnp.where(mask, jnp.exp(scores - lse), 0.0)
            dweights = _product("bkgth,bksh->bkgts", dout, v_j)
            dscores = (weights * (dweights - delta) * scale).astype(q.dtype)
            dq = dq + _product("bkgts,bksh->bkgth", dscores, k_j)
            dk = dk.at[j].add(_product("bkgts,bkgth->bksh", dscores, q))
            dv = dv.at[j].add(_product("bkgts,bkgth->bksh", weights.astype(q.dtype), dout))
            return dq, dk, dv

        bounds = visible(position, sample, key_position, key_sample)
        dq, *carry = jax.lax.fori_loop(*bounds, key_block, (dq, *carry))
        return tuple(carry), dq

    dq, *dkv = gradients
    dkv, dq = jax.lax.scan(query_block, tuple(dkv), (queries, saved, dq))
    return dq, *dkv

"""Softmax attention in blocks for XLA on any device.

Without offsets (training, scoring) query blocks see a static prefix of the keys: no work above
the diagonal, and plain autodiff. With offsets (a cache) key blocks are visited up to the furthest
query by a loop of dynamic length with a running maximum and sum, so cost follows the tokens held
and not the capacity; a block is cut out of the stack of several layers where it lies.
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch, precision
from pallas_kernels.attention.shares import NEG_INF
from pallas_kernels.grouped_matmul.stacked import Stacked, cut

QUERY_BLOCK = 512
KEY_BLOCK = 1024
# Scores of one block that stay in a CPU core's cache: 4 times slower when they do not.
CPU_SCORES = 1 << 20
# Past this many static query blocks one compiled loop is better than a long program.
MAX_STATIC_BLOCKS = 16
# One block of a decode step on a CPU, whose copies of blocks cost more than idle scores.
DECODE_BLOCK = 1024


def attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, samples_BT):
    """Blocked form; arguments and results as in the public function."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    if offsets_B is None:
        k_BKSH, v_BKSH = (cut(x).astype(q_BTNH.dtype) for x in (k_BKSH, v_BKSH))
        out = _causal(q_BKGTH, k_BKSH, v_BKSH, samples_BT)
    else:
        out = _cached(q_BKGTH, k_BKSH, v_BKSH, offsets_B)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H).astype(q_BTNH.dtype)


def _scores(q, k):
    product = jnp.einsum(
        "bkgth,bksh->bkgts",
        q,
        k,
        precision=precision.for_dtype(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return product * (1.0 / math.sqrt(q.shape[-1]))


def _weighted(weights, v):
    return jnp.einsum(
        "bkgts,bksh->bkgth",
        weights.astype(v.dtype),
        v,
        precision=precision.for_dtype(v.dtype),
        preferred_element_type=jnp.float32,
    )


def _attend(q, k, v, mask):
    """Plain softmax over the given keys; mask broadcasts to [B, K, G, T, S]."""
    scores = jnp.where(mask, _scores(q, k), NEG_INF)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    return _weighted(weights, v) / weights.sum(-1, keepdims=True)


def _causal(q, k, v, samples_BT):
    T = q.shape[3]
    block = max(QUERY_BLOCK, -(-T // MAX_STATIC_BLOCKS))

    def rows(first, last):
        mask = jnp.arange(last) <= jnp.arange(first, last)[:, None]
        if samples_BT is not None:
            same = samples_BT[:, first:last, None] == samples_BT[:, None, :last]
            mask = mask & same[:, None, None]
        return _attend(q[..., first:last, :], k[..., :last, :], v[..., :last, :], mask)

    blocks = [rows(first, min(first + block, T)) for first in range(0, T, block)]
    return jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]


def _key_block(q, S: int) -> int:
    if dispatch.platform() != "cpu":
        return KEY_BLOCK
    rows = math.prod(q.shape[:-1])
    if q.shape[3] == 1:
        return min(DECODE_BLOCK, S)
    block = 1 << max(CPU_SCORES // rows, 1).bit_length() - 1
    return min(max(block, 128), KEY_BLOCK, S)


def partial_attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, own, apart, ends_BS):
    """Sums over a part of the keys; as the public function. Needs neither `own` nor `apart`."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    sums = _sums(q_BKGTH, k_BKSH, v_BKSH, offsets_B, stride, phase, ends_BS)
    out, total, peak = (x.transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1) for x in sums)
    return out, total[..., 0], peak[..., 0]


def _cached(q, k, v, offsets_B):
    out, total, _ = _sums(q, k, v, offsets_B, 1, 0, None)
    return out / total


def _sums(q, k, v, offsets_B, stride, phase, ends_BS):
    """Weighted values, weights and peak score per query; key s stands at s · stride + phase."""
    T, S = q.shape[3], k.shape[2]
    position = (offsets_B[:, None] + jnp.arange(T))[:, None, None, :, None]
    block_size = _key_block(q, S)

    def seen(key, ends_Bs):
        mask = key * stride + phase <= position
        if ends_Bs is not None:
            mask &= jnp.arange(T)[:, None] < ends_Bs[:, None, None, None]
        return mask

    if S <= block_size:
        k, v = cut(k).astype(q.dtype), cut(v).astype(q.dtype)
        mask = seen(jnp.arange(S), ends_BS)
        scores = jnp.where(mask, _scores(q, k), NEG_INF)
        peak = scores.max(-1, keepdims=True)
        weights = jnp.where(mask, jnp.exp(scores - peak), 0.0)
        return _weighted(weights, v), weights.sum(-1, keepdims=True), peak

    def block(i, carry):
        out, total, peak = carry
        # The last block may overlap its neighbour: its first keys are then masked as seen.
        first = jnp.minimum(i * block_size, S - block_size)
        # A narrower cache is cast block by block.
        k_block, v_block = (_block(x, first, block_size).astype(q.dtype) for x in (k, v))
        key = first + jnp.arange(block_size)
        ends = ends_BS
        if ends is not None:
            ends = jax.lax.dynamic_slice_in_dim(ends, first, block_size, 1)
        mask = seen(key, ends) & (key >= i * block_size)
        scores = jnp.where(mask, _scores(q, k_block), NEG_INF)
        new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
        weights = jnp.where(mask, jnp.exp(scores - new_peak), 0.0)
        rescale = jnp.exp(peak - new_peak)
        out = out * rescale + _weighted(weights, v_block)
        return out, total * rescale + weights.sum(-1, keepdims=True), new_peak

    shape = q.shape[:-1]
    start = (
        jnp.zeros((*shape, q.shape[-1]), jnp.float32),
        jnp.zeros((*shape, 1), jnp.float32),
        jnp.full((*shape, 1), NEG_INF, jnp.float32),
    )
    used = jnp.clip(-(-(jnp.max(offsets_B) + T - phase) // stride), 0, S)
    return jax.lax.fori_loop(0, -(-used // block_size), block, start)


def _block(x_BKSH, first, size: int):
    """Keys first … first + size - 1 of a cache or of its place in a stack."""
    if not isinstance(x_BKSH, Stacked):
        return jax.lax.dynamic_slice_in_dim(x_BKSH, first, size, 2)
    B, K, _, H = x_BKSH.shape
    return jax.lax.dynamic_slice(
        x_BKSH.whole, (x_BKSH.index, 0, 0, first, 0), (1, B, K, size, H))[0]

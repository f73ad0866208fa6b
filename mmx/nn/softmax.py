"""Softmax attention layer: grouped key/value heads, partial rotary positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from mmx.config import ModelConfig
from mmx.nn.linear import project
from mmx.nn.params import Factory, xavier
from mmx.nn.rope import apply_rope
from mmx.nn.tokens import Tokens, last_token
from pallas_kernels import attention


class SoftmaxAttention(nnx.Module):
    """Causal attention; keys enter a cache rotated, values raw."""

    def __init__(self, config: ModelConfig, make: Factory, gain: float):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = make.param("q", (D, N, H), ("embed", "heads", None), xavier(D, N * H))
        self.k = make.param("k", (D, K, H), ("embed", "kv_heads", None), xavier(D, K * H))
        self.v = make.param("v", (D, K, H), ("embed", "kv_heads", None), xavier(D, K * H, gain))
        self.out = make.param("out", (N, H, D), ("heads", None, "embed"), xavier(N * H, D, gain))
        self.rotary_dim, self.theta = config.rotary_dim, config.rope_theta

    def __call__(self, h_BTD, cache, tokens: Tokens, implementation=None):
        """Returns the layer's output [B, T, D] and the new (k, v) [B, K, S, H], or None.

        `cache` is None (attention among the given tokens) or (k, v, offsets_B): the tokens are
        written at `offsets_B` and attend to all that the cache holds. With `tokens.last_only` the
        output is [B, 1, D], at each row's last token.
        """
        position_BT, lengths_B = tokens.position_BT, tokens.lengths_B
        k = project("btd,dkh->btkh", h_BTD, self.k[...])
        v = project("btd,dkh->btkh", h_BTD, self.v[...])
        k = apply_rope(k, position_BT, self.rotary_dim, self.theta)
        if tokens.last_only:
            h_BTD, position_BT = (last_token(x, lengths_B) for x in (h_BTD, position_BT))
        q = project("btd,dnh->btnh", h_BTD, self.q[...])
        q = apply_rope(q, position_BT, self.rotary_dim, self.theta)
        if cache is None:
            out = attention(q, k, v, samples_BT=tokens.samples_BT, implementation=implementation)
            new = None
        else:
            k_cache, v_cache, offsets_B = cache
            new = tuple(
                write_rows(old, x.swapaxes(1, 2), offsets_B, lengths_B)
                for old, x in ((k_cache, k), (v_cache, v))
            )
            k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in new)
            out = attention(q, k, v, offsets_B=position_BT[:, 0], implementation=implementation)
        return project("btnh,nhd->btd", out, self.out[...]), new


def write_rows(cache_BKSH, x_BKTH, offsets_B, lengths_B) -> jax.Array:
    """Writes each row's first `lengths_B[b]` tokens at `offsets_B[b]`, and nothing else.

    A window of T tokens is read, merged and written back; near the end of the cache the window
    moves left and the tokens right, so padding can neither overwrite nor be cut into place.
    """
    S, T = cache_BKSH.shape[2], x_BKTH.shape[2]
    if T > S:
        raise ValueError(f"{T} tokens do not fit a cache of {S}; allocate at least the chunk.")
    x_BKTH = x_BKTH.astype(cache_BKSH.dtype)

    def row(cache_KSH, x_KTH, offset, length):
        first = jnp.clip(offset, 0, S - T)
        shift = offset - first
        index_T = jnp.arange(T) - shift
        mine_T1 = ((index_T >= 0) & (index_T < length))[:, None]
        old_KTH = jax.lax.dynamic_slice_in_dim(cache_KSH, first, T, 1)
        new_KTH = jnp.where(mine_T1, jnp.roll(x_KTH, shift, axis=1), old_KTH)
        return jax.lax.dynamic_update_slice_in_dim(cache_KSH, new_KTH, first, 1)

    # Row by row for small batches: a batched dynamic slice becomes a scatter, which is slow on CPU.
    if cache_BKSH.shape[0] == 1:
        return row(cache_BKSH[0], x_BKTH[0], offsets_B[0], lengths_B[0])[None]
    return jax.vmap(row)(cache_BKSH, x_BKTH, offsets_B, lengths_B)

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
                write_rows(old, x, offsets_B, lengths_B)
                for old, x in ((k_cache, k), (v_cache, v))
            )
            k, v = (x.swapaxes(1, 2).astype(q.dtype) for x in new)
            out = attention(q, k, v, offsets_B=position_BT[:, 0], implementation=implementation)
        return project("btnh,nhd->btd", out, self.out[...]), new


def write_rows(cache_BKSH, x_BTKH, offsets_B, lengths_B) -> jax.Array:
    """Writes each row's first `lengths_B[b]` tokens at `offsets_B[b]`, and nothing else."""
    B, T = x_BTKH.shape[:2]
    S = cache_BKSH.shape[2]
    if T > S:
        raise ValueError(f"{T} tokens do not fit a cache of {S}; allocate at least the chunk.")
    x_BTKH = x_BTKH.astype(cache_BKSH.dtype)
    # Padding goes beyond the cache, where it is dropped. Nothing of the cache is read, so that a
    # donated one is updated in place.
    if B * T == 1:  # XLA makes a slice update of a single index, and copies the cache for it
        x_BTKH, T = jnp.pad(x_BTKH, ((0, 0), (0, 1), (0, 0), (0, 0))), 2
    time_T = jnp.arange(T)
    index_BT = jnp.where(time_T < lengths_B[:, None], offsets_B[:, None] + time_T, S + time_T)
    rows_B1 = jnp.arange(B)[:, None]
    return cache_BKSH.at[rows_B1, :, index_BT].set(x_BTKH, mode="drop", unique_indices=True)

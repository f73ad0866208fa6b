"""Softmax attention layer: grouped key/value heads, partial rotary positions."""

from flax import nnx

from mmx.config import ModelConfig
from mmx.nn.linear import project
from mmx.nn.params import Factory, xavier
from mmx.nn.rope import apply_rope
from mmx.nn.tokens import Tokens, last_token
from mmx.parallel.ops import Ops


class SoftmaxAttention(nnx.Module):
    """Causal attention; keys enter a cache rotated, values raw."""

    def __init__(self, config: ModelConfig, make: Factory, gain: float):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = make.param("q", (D, N, H), ("embed", "heads", None), xavier(D, N * H))
        self.k = make.param("k", (D, K, H), ("embed", "kv_heads", None), xavier(D, K * H))
        self.v = make.param("v", (D, K, H), ("embed", "kv_heads", None), xavier(D, K * H, gain))
        self.out = make.param("out", (N, H, D), ("heads", None, "embed"), xavier(N * H, D, gain))
        self.rotary_dim, self.theta = config.rotary_dim, config.rope_theta

    def __call__(self, h_BTD, cache, tokens: Tokens, ops: Ops):
        """Returns the layer's output [B, T, D] and the new (k, v) [B, K, S, H], or None.

        `cache` is None (attention among the given tokens) or (k, v, offsets_B): the tokens are
        written at `offsets_B` and attend to all that the cache holds. With `tokens.last_only` the
        output is [B, 1, D], at each row's last token.
        """
        position_BT, lengths_B = tokens.position_BT, tokens.lengths_B
        h_BTD = ops.constrain(h_BTD, "rows", "time", "hidden")
        inference = cache is not None
        k, v = (ops.project(project, "btd,dkh->btkh", h_BTD, w[...], ("embed", "kv_heads", None),
                            None, inference) for w in (self.k, self.v))
        k = apply_rope(k, position_BT, self.rotary_dim, self.theta)
        if tokens.last_only:
            h_BTD, position_BT = (last_token(x, lengths_B) for x in (h_BTD, position_BT))
        q = ops.project(project, "btd,dnh->btnh", h_BTD, self.q[...], ("embed", "heads", None),
                        None, inference)
        q = apply_rope(q, position_BT, self.rotary_dim, self.theta)
        if cache is None:
            out, new = ops.attention(q, k, v, tokens.samples_BT), None
        else:
            k_cache, v_cache, offsets_B = cache
            out, new = ops.cached_attention(
                q, k, v, (k_cache, v_cache), offsets_B, lengths_B)
        out = ops.constrain(out, "rows", "time", "heads", None)
        out_BTD = ops.project(project, "btnh,nhd->btd", out, self.out[...],
                              ("heads", None, "embed"), None, inference)
        return out_BTD, new

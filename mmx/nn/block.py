"""One layer: attention and experts, each summed onto its own normalised input."""

from flax import nnx

from mmx.config import LIGHTNING, ModelConfig, deepnorm_beta
from mmx.nn.lightning import LightningAttention
from mmx.nn.linear import RMSNorm
from mmx.nn.moe import MoE
from mmx.nn.params import Factory
from mmx.nn.softmax import SoftmaxAttention
from mmx.nn.tokens import Tokens, last_token
from mmx.parallel.ops import Ops


class Block(nnx.Module):
    """`x' = α h + β attention(h)`, `x = α g + β experts(g)` with h, g the norms of x, x'.

    The residual is the normalised tensor (post-norm written at the next sublayer's start); only
    with `postnorm` false is it x itself.
    """

    def __init__(self, config: ModelConfig, kind: str, make: Factory):
        D, gain = config.hidden_size, deepnorm_beta(config.num_layers)
        self.kind, self.postnorm = kind, config.postnorm
        self.attn_norm = RMSNorm((D,), ("embed",), config.norm_eps, make.at("attn_norm"))
        self.mlp_norm = RMSNorm((D,), ("embed",), config.norm_eps, make.at("mlp_norm"))
        layer = LightningAttention if kind == LIGHTNING else SoftmaxAttention
        self.attn = layer(config, make.at("attn"), gain)
        self.moe = MoE(config, make.at("moe"), gain)
        self.attn_factors = (
            (config.lightning_alpha, config.lightning_beta)
            if kind == LIGHTNING
            else (config.softmax_alpha, config.softmax_beta)
        )
        self.mlp_factors = (config.mlp_alpha, config.mlp_beta)

    def __call__(self, x_BTD, slopes_N, memory, tokens: Tokens, ops: Ops):
        """Returns (x, new memory, RouterStats); memory is a lightning state, (k, v), or None."""
        inference = tokens.offsets_B is not None
        h = ops.between(self.attn_norm(x_BTD), inference)
        if self.kind == LIGHTNING:
            out, memory = self.attn(h, slopes_N, memory, tokens, ops)
        else:
            cache = None if memory is None else (*memory, tokens.offsets_B)
            out, memory = self.attn(h, cache, tokens, ops)
        valid_BT = tokens.valid_BT
        if tokens.last_only:
            h, x_BTD = (last_token(x, tokens.lengths_B) for x in (h, x_BTD))
            valid_BT = valid_BT[:, :1]
        alpha, beta = self.attn_factors
        x_BTD = alpha * (h if self.postnorm else x_BTD) + beta * out
        x_BTD = ops.between(x_BTD, inference)
        g = ops.between(self.mlp_norm(x_BTD), inference)
        out, stats = self.moe(g, valid_BT, ops, inference, tokens.capacity)
        alpha, beta = self.mlp_factors
        x_BTD = ops.between(alpha * (g if self.postnorm else x_BTD) + beta * out, inference)
        return x_BTD, memory, stats

"""One layer: attention and experts, each summed onto its own normalised input."""

from typing import NamedTuple

import jax
from flax import nnx

from mmx.config import LIGHTNING, ModelConfig, deepnorm_beta
from mmx.nn.lightning import LightningAttention
from mmx.nn.linear import RMSNorm
from mmx.nn.moe import MoE
from mmx.nn.params import Factory
from mmx.nn.softmax import SoftmaxAttention


class Tokens(NamedTuple):
    """What every layer knows of the tokens it is given.

    position_BT: int32 position in the token's sample. starts_BT, samples_BT: bool starts and int32
    numbers of packed samples, or None. lengths_B: int32 valid tokens per row, or None. offsets_B:
    int32 tokens already cached per row, or None without a cache.
    """

    position_BT: jax.Array
    starts_BT: jax.Array | None
    samples_BT: jax.Array | None
    lengths_B: jax.Array | None
    valid_BT: jax.Array | None
    offsets_B: jax.Array | None


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

    def __call__(self, x_BTD, slopes_N, memory, tokens: Tokens, implementations):
        """Returns (x, new memory, RouterStats); memory is a lightning state, (k, v), or None."""
        h = self.attn_norm(x_BTD)
        name = implementations.get(self.kind)
        if self.kind == LIGHTNING:
            out, memory = self.attn(h, slopes_N, memory, tokens.starts_BT, tokens.lengths_B, name)
        else:
            cache = None if memory is None else (*memory, tokens.offsets_B)
            out, memory = self.attn(
                h, tokens.position_BT, cache, tokens.samples_BT, tokens.lengths_B, name
            )
        alpha, beta = self.attn_factors
        x_BTD = alpha * (h if self.postnorm else x_BTD) + beta * out
        g = self.mlp_norm(x_BTD)
        out, stats = self.moe(g, tokens.valid_BT, implementations.get("moe"))
        alpha, beta = self.mlp_factors
        return alpha * (g if self.postnorm else x_BTD) + beta * out, memory, stats

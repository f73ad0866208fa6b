"""Lightning attention layer and its decay slopes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmx.config import DECAY_TRANSFORMERS, ModelConfig
from mmx.nn.linear import RMSNorm, project
from mmx.nn.params import Factory, xavier
from mmx.nn.tokens import Tokens, last_token
from mmx.nn.wide import Wide
from mmx.parallel.ops import Ops


def head_slopes(num_heads: int) -> np.ndarray:
    """ALiBi slopes for any head count (official code): 2^(-8(h+1)/P), P a power of two.

    With P the largest power of two up to `num_heads`, the rest are every second slope of 2P heads.
    """
    power = 2 ** int(math.log2(num_heads))
    slopes = [2.0 ** (-8 * (h + 1) / power) for h in range(power)]
    finer = [2.0 ** (-4 * (h + 1) / power) for h in range(0, 2 * power, 2)]
    return np.asarray(slopes + finer[: num_heads - power], np.float64)


def decay_slopes(config: ModelConfig) -> np.ndarray:
    """Returns slopes [L, N] float32 for every global layer index, softmax layers included.

    Official layer factor: 1 - i / (L - 1) + 1e-5, with a single layer taken as 1 + 1e-5.
    """
    L, N = config.num_layers, config.num_heads
    index_L = np.arange(L, dtype=np.float64)
    if config.decay_rule == DECAY_TRANSFORMERS:
        slopes_N = 2.0 ** (-8 * np.arange(1, N + 1, dtype=np.float64) / N)
        factor_L = 1 - index_L / (L - 1 + 1e-5) + 1e-5
    else:
        slopes_N = head_slopes(N)
        factor_L = 1 - index_L / max(L - 1, 1) + 1e-5
    return (factor_L[:, None] * slopes_N).astype(np.float32)


class LightningAttention(nnx.Module):
    """SiLU(q, k, v) through the decayed state, a norm over all heads, a sigmoid gate."""

    def __init__(self, config: ModelConfig, make: Factory, gain: float):
        D, N, H = config.hidden_size, config.num_heads, config.head_dim
        self.head_dim = H
        self.qkv = make.param(
            "qkv", (D, N, 3, H), ("embed", "heads", None, None), xavier(D, 3 * N * H)
        )
        self.gate = make.param("gate", (D, N, H), ("embed", "heads", None), xavier(D, N * H))
        self.norm = RMSNorm((N, H), ("heads", None), config.lightning_norm_eps, make.at("norm"))
        self.out = make.param("out", (N, H, D), ("heads", None, "embed"), xavier(N * H, D, gain))

    def __call__(self, h_BTD, slopes_N, state_BNHH, tokens: Tokens, ops: Ops):
        """Returns the layer's output and its float32 state after the last token.

        The output is [B, T, D], or [B, 1, D] at each row's last token with `tokens.last_only`.
        """
        h_BTD = ops.constrain(h_BTD, "rows", "time", "hidden")
        weight, gate, inference = self.qkv[...], None, tokens.offsets_B is not None
        if isinstance(weight, Wide):
            joint = project("btd,df->btf", h_BTD, weight.values)
            F = joint.shape[-1] // 4
            qkv = jax.nn.silu(joint[..., :3 * F]).reshape(*joint.shape[:2], -1, 3, self.head_dim)
            gate = joint[..., 3 * F:].reshape(*joint.shape[:2], -1, self.head_dim)
        else:
            qkv = ops.project(project, "btd,dnch->btnch", h_BTD, weight,
                              ("embed", "heads", None, None), jax.nn.silu, inference)
        q, k, v = (qkv[..., i, :] for i in range(3))
        out_BTNH, state_BNHH = ops.lightning(
            q, k, v, slopes_N, state_BNHH, tokens.starts_BT, tokens.lengths_B)
        if tokens.last_only:
            h_BTD, out_BTNH, gate = (
                None if x is None else last_token(x, tokens.lengths_B)
                for x in (h_BTD, out_BTNH, gate))
        if gate is None:
            gate = ops.project(project, "btd,dnh->btnh", h_BTD, self.gate[...],
                               ("embed", "heads", None), None, inference)
        rms = None
        if ops.shares_heads(inference):
            # A token's divisor commutes with the product; their sums over devices go together.
            rms = jnp.square(out_BTNH.astype(jnp.float32)).mean(-1), self.norm.eps
            normed = out_BTNH * self.norm.weight[...].astype(out_BTNH.dtype)
        else:
            normed = self.norm(out_BTNH)
        gated = ops.constrain(jax.nn.sigmoid(gate) * normed, "rows", "time", "heads", None)
        out_BTD = ops.project(project, "btnh,nhd->btd", gated, self.out[...],
                              ("heads", None, "embed"), None, inference, rms)
        return out_BTD, state_BNHH


def zero_state(config: ModelConfig, batch: int) -> jax.Array:
    """Returns a lightning state [B, N, H, H] with no history."""
    N, H = config.num_heads, config.head_dim
    return jnp.zeros((batch, N, H, H), jnp.float32)

"""Mixture of experts: float32 router, top-k, SwiGLU experts, no token dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmx.config import ROUTER_DTYPE, ModelConfig
from mmx.nn import experts
from mmx.nn.linear import project
from mmx.nn.params import Factory, xavier


class RouterStats(NamedTuple):
    """Sums over valid tokens, from which a load-balance loss is made.

    chosen_E: tokens that chose each expert (all k choices counted). probability_E: summed router
    probability. tokens: valid tokens.
    """

    chosen_E: jax.Array
    probability_E: jax.Array
    tokens: jax.Array


def route(logits_TE: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns weights [T, k] (summing to 1), experts [T, k] and probabilities [T, E], float32."""
    probability_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
    top_Tk, expert_Tk = jax.lax.top_k(probability_TE, k)
    return top_Tk / jnp.sum(top_Tk, axis=-1, keepdims=True), expert_Tk, probability_TE


class MoE(nnx.Module):
    """Routed experts; `implementation` names how their products are arranged."""

    def __init__(self, config: ModelConfig, make: Factory, gain: float):
        D, E, F = config.hidden_size, config.num_experts, config.expert_dim
        self.router = make.param("router", (D, E), ("embed", None), xavier(D, E))
        self.gate_up = make.param(
            "gate_up", (E, D, 2, F), ("expert", "embed", None, "mlp"), xavier(D, F, gain)
        )
        self.down = make.param("down", (E, F, D), ("expert", "mlp", "embed"), xavier(F, D, gain))
        self.k = config.experts_per_token

    def __call__(self, g_BTD, valid_BT, implementation: str | None = None, inference=False):
        """Returns the weighted expert sum [B, T, D] and RouterStats over valid tokens.

        `implementation` names a form in `mmx.nn.experts`; `inference` allows the automatic choice
        of one that cannot be differentiated.
        """
        B, T, D = g_BTD.shape
        g_TD = g_BTD.reshape(B * T, D)
        router = self.router[...].astype(ROUTER_DTYPE)
        logits_TE = project("td,de->te", g_TD.astype(ROUTER_DTYPE), router)
        weight_Tk, expert_Tk, probability_TE = route(logits_TE, self.k)
        E = logits_TE.shape[-1]
        valid_T = jnp.ones(B * T) if valid_BT is None else valid_BT.reshape(-1).astype(jnp.float32)
        hits_TE = jnp.sum(jax.nn.one_hot(expert_Tk, E, dtype=jnp.float32), axis=1)
        stats = RouterStats(valid_T @ hits_TE, valid_T @ probability_TE, jnp.sum(valid_T))
        name = implementation or experts.choose(
            B * T, self.k, E, self.down.shape[-2], inference)
        if name not in experts.TABLE:
            raise ValueError(
                f"MoE has no implementation '{name}'. It has {', '.join(experts.TABLE)}.")
        gate_up, down = self.gate_up[...], self.down[...]
        if name not in experts.TAKE_WIDE:
            gate_up = experts.stacked(gate_up, E, down.shape[-2])
        out_TD = experts.TABLE[name](g_TD, weight_Tk, expert_Tk, gate_up, down)
        return out_TD.reshape(B, T, D).astype(g_BTD.dtype), stats

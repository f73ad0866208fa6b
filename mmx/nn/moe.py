"""Mixture of experts: float32 router, top-k, SwiGLU experts; tokens dropped by capacity alone."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmx.config import ROUTER_DTYPE, ModelConfig
from mmx.nn import experts
from mmx.nn.linear import project
from mmx.nn.params import Factory, xavier
from mmx.parallel.ops import Ops


class RouterStats(NamedTuple):
    """Sums over valid tokens, from which a load-balance loss is made.

    chosen_E: tokens that chose each expert (all k choices counted). probability_E: summed router
    probability. tokens: valid tokens. dropped: (token, choice) pairs beyond an expert's capacity.
    """

    chosen_E: jax.Array
    probability_E: jax.Array
    tokens: jax.Array
    dropped: jax.Array


def route(logits_TE: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns weights [..., k] (summing to 1), experts [..., k], probabilities [..., E], float32.

    The logits are [..., E].
    """
    probability_TE = jax.nn.softmax(logits_TE.astype(jnp.float32), axis=-1)
    top_Tk, expert_Tk = jax.lax.top_k(probability_TE, k)
    # A sum of k slices joins what reads the weights; a reduction is a program of its own on a GPU.
    total_T = sum(top_Tk[..., i] for i in range(k))
    return top_Tk / total_T[..., None], expert_Tk, probability_TE


class MoE(nnx.Module):
    """Routed experts; `implementation` names how their products are arranged."""

    def __init__(self, config: ModelConfig, make: Factory, gain: float):
        D, E, F = config.hidden_size, config.num_experts, config.expert_dim
        self.router = make.param("router", (D, E), ("embed", None), xavier(D, E))
        self.gate_up = make.param(
            "gate_up", (2, E, D, F), (None, "expert", "embed", "mlp"), xavier(D, F, gain)
        )
        self.down = make.param("down", (E, F, D), ("expert", "mlp", "embed"), xavier(F, D, gain))
        self.k = config.experts_per_token

    def __call__(self, g_BTD, valid_BT, ops: Ops, inference=False, capacity=0.0):
        """Returns the weighted expert sum [B, T, D] and RouterStats over valid tokens.

        `inference` allows the automatic choice of a form that cannot be differentiated. With a
        `capacity` an expert takes at most ceil(capacity · k · tokens / E) pairs; the others add
        nothing, and the weights of a token's remaining choices stay as they are.
        """
        router = self.router[...].astype(ROUTER_DTYPE)
        logits_BTE = project("btd,de->bte", g_BTD.astype(ROUTER_DTYPE), router)
        weight_BTk, expert_BTk, probability_BTE = route(logits_BTE, self.k)
        E, dropped, held_BTk = logits_BTE.shape[-1], jnp.zeros(()), expert_BTk
        if capacity:
            kept_BTk = ops.within_capacity(expert_BTk, valid_BT, E, capacity)
            # An id beyond the last expert is nobody's.
            held_BTk = jnp.where(kept_BTk, expert_BTk, E)
            weight_BTk = jnp.where(kept_BTk, weight_BTk, 0.0)
            lost_BTk = ~kept_BTk if valid_BT is None else ~kept_BTk & valid_BT[..., None]
            dropped = jnp.sum(lost_BTk, dtype=jnp.float32)
        valid_BT = jnp.ones(g_BTD.shape[:2]) if valid_BT is None else valid_BT.astype(jnp.float32)
        hits_BTE = jnp.sum(jax.nn.one_hot(expert_BTk, E, dtype=jnp.float32), axis=2)
        stats = RouterStats(
            jnp.einsum("bt,bte->e", valid_BT, hits_BTE, precision="highest"),
            jnp.einsum("bt,bte->e", valid_BT, probability_BTE, precision="highest"),
            jnp.sum(valid_BT), dropped)
        run = partial(experts.apply, ops.names.get("moe"), inference)
        out_BTD = ops.experts(run, g_BTD, weight_BTk, held_BTk, self.gate_up[...],
                              self.down[...], inference, capacity)
        return out_BTD.astype(g_BTD.dtype), stats

"""Mixture of experts: float32 router, top-k, SwiGLU experts, no token dropped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mmx.config import ROUTER_DTYPE, ModelConfig
from mmx.nn.linear import project
from mmx.nn.params import Factory, xavier
from pallas_kernels import grouped_matmul
from pallas_kernels.quantized import QuantizedTensor, dequantize


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

    def __call__(self, g_BTD, valid_BT, implementation: str | None = None):
        """Returns the weighted expert sum [B, T, D] and RouterStats over valid tokens."""
        B, T, D = g_BTD.shape
        g_TD = g_BTD.reshape(B * T, D)
        router = self.router[...].astype(ROUTER_DTYPE)
        logits_TE = project("td,de->te", g_TD.astype(ROUTER_DTYPE), router)
        weight_Tk, expert_Tk, probability_TE = route(logits_TE, self.k)
        E = logits_TE.shape[-1]
        valid_T = jnp.ones(B * T) if valid_BT is None else valid_BT.reshape(-1).astype(jnp.float32)
        hits_TE = jnp.sum(jax.nn.one_hot(expert_Tk, E, dtype=jnp.float32), axis=1)
        stats = RouterStats(valid_T @ hits_TE, valid_T @ probability_TE, jnp.sum(valid_T))
        name = implementation or _automatic(B * T, self.k, E, self.down.shape[-2])
        run = {"gather": _gather, "dense": _dense, "grouped": _grouped}.get(name)
        if run is None:
            raise ValueError(f"MoE has no implementation '{name}'. It has gather, dense, grouped.")
        out_TD = run(g_TD, weight_Tk, expert_Tk, self.gate_up[...], self.down[...])
        return out_TD.reshape(B, T, D).astype(g_BTD.dtype), stats


def _automatic(tokens: int, k: int, num_experts: int, width: int) -> str:
    """Few tokens read only the experts they hit; a few more stream all; many are grouped."""
    if tokens * k <= num_experts // 2:
        return "gather"
    # Sorting costs more than idle products when all experts together are one thin matrix.
    if jax.default_backend() != "cpu" and num_experts * width <= 2048:
        return "dense"
    return "dense" if tokens <= 16 else "grouped"


def _swiglu(gate_up):
    """SiLU(gate) · up for [..., 2, F] products, in float32."""
    return jax.nn.silu(gate_up[..., 0, :]) * gate_up[..., 1, :]


def _gather(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Reads the chosen experts' weights per token: the decode step of a small batch."""
    chosen_gate_up, chosen_down = (
        dequantize(jax.tree.map(lambda w: w[expert_Tk], w), g_TD.dtype) for w in (gate_up, down)
    )
    hidden = _swiglu(project("td,tkdcf->tkcf", g_TD, chosen_gate_up, jnp.float32))
    out_TkD = project("tkf,tkfd->tkd", hidden.astype(g_TD.dtype), chosen_down, jnp.float32)
    return jnp.sum(out_TkD * weight_Tk[..., None], axis=1)


def _dense(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Runs every expert on every token and weighs by zero or more: the weights move once."""
    E = gate_up.shape[0]
    weight_TE = jnp.sum(jax.nn.one_hot(expert_Tk, E) * weight_Tk[..., None], axis=1)
    hidden = _swiglu(project("td,edcf->tecf", g_TD, gate_up, jnp.float32))
    hidden = (hidden * weight_TE[..., None]).astype(g_TD.dtype)
    return project("tef,efd->td", hidden, _dequantized_if_summed(down, g_TD.dtype), jnp.float32)


def _dequantized_if_summed(weight, dtype):
    # The dense form sums over experts, whose scales differ, so they cannot follow the product.
    return dequantize(weight, dtype) if isinstance(weight, QuantizedTensor) else weight


def _grouped(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Sorts (token, choice) pairs by expert and multiplies each group by its own matrices."""
    T, k = expert_Tk.shape
    E, D, _, F = gate_up.shape
    flat = expert_Tk.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes_E = jnp.bincount(flat, length=E).astype(jnp.int32)
    rows = jnp.take(g_TD, order // k, axis=0)
    merged = jax.tree.map(lambda w: w.reshape(E, w.shape[1], 2 * F), gate_up)
    hidden = _swiglu(grouped_matmul(rows, merged, sizes_E).reshape(-1, 2, F).astype(jnp.float32))
    out = grouped_matmul(hidden.astype(g_TD.dtype), down, sizes_E)
    back = jnp.argsort(order)
    out_TkD = jnp.take(out, back, axis=0).reshape(T, k, D).astype(jnp.float32)
    return jnp.sum(out_TkD * weight_Tk[..., None], axis=1)

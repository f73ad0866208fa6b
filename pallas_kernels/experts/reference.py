"""The weighted sum over each token's experts, one expert at a time, in float32."""

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul.stacked import cut
from pallas_kernels.quantized import dequantize


def experts(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """The definition itself: every expert runs on every token, weighed by zero or more."""
    gate, up = dequantize(cut(gate_up), jnp.float32)
    down = dequantize(cut(down), jnp.float32)
    dot = lambda x, w: jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)  # noqa: E731
    g_TD, out_TD = g_TD.astype(jnp.float32), 0.0
    for e in range(down.shape[0]):
        y_TD = dot(jax.nn.silu(dot(g_TD, gate[e])) * dot(g_TD, up[e]), down[e])
        weight_T = jnp.sum(jnp.where(expert_Tk == e, weight_Tk, 0.0), axis=1)
        out_TD += weight_T[:, None] * y_TD
    return out_TD

"""Lightning attention for one token: update the state, read it."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch


def lightning_decode(
    q_B1NH: jax.Array,
    k_B1NH: jax.Array,
    v_B1NH: jax.Array,
    slopes_N: jax.Array,
    state_BNHH: jax.Array,
    *,
    starts_BT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of the recurrence; arguments and results as in `lightning_attention` with T = 1."""
    q_BNH, k_BNH, v_BNH = (x[:, 0].astype(jnp.float32) for x in (q_B1NH, k_B1NH, v_B1NH))
    decay_BN = jnp.broadcast_to(jnp.exp(-slopes_N), q_BNH.shape[:2])
    if starts_BT is not None:
        decay_BN = jnp.where(starts_BT, 0.0, decay_BN)
    if lengths_B is not None:
        # An inert row keeps its state: decay 1 and a zero update.
        active_B1 = (lengths_B > 0)[:, None]
        decay_BN = jnp.where(active_B1, decay_BN, 1.0)
        k_BNH = jnp.where(active_B1[..., None], k_BNH, 0.0)
        q_BNH = jnp.where(active_B1[..., None], q_BNH, 0.0)
    update_BNHH = k_BNH[..., :, None] * v_BNH[..., None, :]
    state_BNHH = decay_BN[..., None, None] * state_BNHH + update_BNHH
    if dispatch.platform() == "cpu":
        out_BNH = jnp.einsum("bnh,bnhg->bng", q_BNH, state_BNHH, precision="highest")
    else:
        # A sum of products, not a matrix product: fused with the update, the state moves once.
        out_BNH = jnp.sum(q_BNH[..., :, None] * state_BNHH, axis=-2)
    return out_BNH[:, None].astype(q_B1NH.dtype), state_BNHH

"""Lightning attention as its recurrence, one token at a time in float32."""

import jax
import jax.numpy as jnp


def lightning_attention(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B):
    """The definition itself: `S_t = λ S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`."""
    B, T, _, _ = q_BTNH.shape
    decay_N11 = jnp.exp(-slopes_N)[:, None, None]
    starts_BT = jnp.zeros((B, T), bool) if starts_BT is None else starts_BT
    valid_BT = jnp.ones((B, T), bool)
    if lengths_B is not None:
        valid_BT = jnp.arange(T) < lengths_B[:, None]

    def token(S_BNHH, inputs):
        q_BNH, k_BNH, v_BNH, start_B, valid_B = inputs
        start_B111, valid_B111 = (x[:, None, None, None] for x in (start_B & valid_B, valid_B))
        decayed = jnp.where(start_B111, 0.0, decay_N11 * S_BNHH)
        S_BNHH = jnp.where(valid_B111, decayed + k_BNH[..., :, None] * v_BNH[..., None, :], S_BNHH)
        o_BNH = jnp.einsum("bnk,bnkv->bnv", q_BNH, S_BNHH, precision="highest")
        return S_BNHH, jnp.where(valid_B[:, None, None], o_BNH, 0.0)

    by_time = lambda x: jnp.moveaxis(x, 1, 0)  # noqa: E731
    inputs = [by_time(x.astype(jnp.float32)) for x in (q_BTNH, k_BTNH, v_BTNH)]
    state, out_TBNH = jax.lax.scan(
        token, state_BNHH, (*inputs, by_time(starts_BT), by_time(valid_BT))
    )
    return by_time(out_TBNH).astype(q_BTNH.dtype), state

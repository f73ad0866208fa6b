"""Rotary position embedding over the first part of each head (rotate-half pairs)."""

import jax
import jax.numpy as jnp
import numpy as np

from mmx.config import ROPE_DTYPE


def inverse_frequencies(rotary_dim: int, theta: float) -> np.ndarray:
    """Returns 1 / theta^(2j / rotary_dim) for j < rotary_dim / 2, float32.

    Exponent, power and reciprocal are each rounded to float32, as in the released code: at position
    1e7 one bit of a frequency is 0.06 of an angle.
    """
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    # NumPy's own float32 power is a bit off at some exponents.
    powers = (float(theta) ** exponents.astype(np.float64)).astype(ROPE_DTYPE)
    return np.float32(1) / powers


def apply_rope(x_BTNH: jax.Array, position_BT: jax.Array, rotary_dim: int, theta: float):
    """Rotates dims (j, j + rotary_dim/2) of the first `rotary_dim`; the rest passes unchanged.

    Angles are float32 position times float32 frequency: the trained behaviour, not the exact
    product.
    """
    if rotary_dim == 0:
        return x_BTNH
    angle_BTj = position_BT.astype(ROPE_DTYPE)[..., None] * inverse_frequencies(rotary_dim, theta)
    cos, sin = (f(angle_BTj)[:, :, None] for f in (jnp.cos, jnp.sin))
    half = rotary_dim // 2
    x32 = x_BTNH[..., :rotary_dim].astype(ROPE_DTYPE)
    first, second = x32[..., :half], x32[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([rotated.astype(x_BTNH.dtype), x_BTNH[..., rotary_dim:]], axis=-1)

"""Shares of an attention: weighted values, their total weight and peak score, float32."""

import jax.numpy as jnp

# The peak of a share without keys: finite, so that it gives exp(0) · 0 and never NaN.
NEG_INF = -1e30


def add(one, other):
    """The share of the keys of both: each (weighted [..., H], total [...], peak [...])."""
    peak = jnp.maximum(one[2], other[2])
    first, second = jnp.exp(one[2] - peak), jnp.exp(other[2] - peak)
    return (one[0] * first[..., None] + other[0] * second[..., None],
            one[1] * first + other[1] * second, peak)

"""Sums over devices of many tokens, of which each device keeps a piece; inside `jax.shard_map`."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch

# How a device gets the sum of all tokens ("whole", in float32), or of its piece of their time, of
# parts in the activations' dtype: the collective's ("pieces"), or its own ("narrow").
FORMS = WHOLE, PIECES, NARROW = "whole", "pieces", "narrow"
# Of fewer tokens on a device (a decode step's) the number of messages counts, not their bytes.
MANY = 256


def form(ops, tokens: int) -> str:
    """The named form of `ops`, or what suits so many tokens of a device.

    A reduce-scatter of a torus adds along its way; GPUs reach each other directly, so that parts of
    half the width are half of the bytes.
    """
    named = ops.names.get("sums")
    if named not in (None, *FORMS):
        raise ValueError(f"sums='{named}' is not one of {', '.join(map(repr, FORMS))}.")
    if named is None and tokens >= MANY:
        return NARROW if dispatch.platform() == "gpu" else PIECES
    return named or WHOLE


def keep_piece(x: jax.Array, names, axis: int, dtype, form: str) -> jax.Array:
    """This device's piece along `axis` of the sum of x over mesh axes; float32.

    Each device's part is rounded to `dtype` once; "narrow" adds them in float32.
    """
    if form == PIECES:
        x = jax.lax.psum_scatter(x.astype(dtype), names, scatter_dimension=axis, tiled=True)
        return x.astype(jnp.float32)
    parts = jax.lax.axis_size(names)
    x = x.reshape(*x.shape[:axis], parts, x.shape[axis] // parts, *x.shape[axis + 1:])
    x = jax.lax.all_to_all(x.astype(dtype), names, axis, axis)
    return jnp.sum(x.astype(jnp.float32), axis=axis)

"""The Hopper form of lightning attention: its forward and backward kernels as one function."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.lightning_attention import mosaic_gpu, mosaic_gpu_backward

HEAD_DIMS = (64, 128)


def lightning_attention(
    q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B, *, interpret=False
):
    """Arguments and results as in the public function, in bfloat16.

    Raises ValueError where there is no GPU to run on, for float32 and for other heads than of 64
    or 128.
    """
    platform, H = dispatch.platform(), q_BTNH.shape[-1]
    if platform != "gpu" and not interpret:
        raise ValueError(
            f"lightning_attention's 'mosaic_gpu' runs on NVIDIA GPUs of the Hopper generation; "
            f"this is a {platform}. Pass implementation=None for the form made for it."
        )
    if q_BTNH.dtype != jnp.bfloat16 or H not in HEAD_DIMS:
        raise ValueError(
            f"lightning_attention's 'mosaic_gpu' takes bfloat16 and heads of 64 or 128; got "
            f"{q_BTNH.dtype} and {H}. Pass 'xla' or None."
        )
    samples_BT = None
    if starts_BT is not None:
        samples_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
    return _attention(
        q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, samples_BT, lengths_B, interpret
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(q, k, v, slopes, state, samples, lengths, interpret):
    return mosaic_gpu.forward(q, k, v, slopes, state, samples, lengths, interpret=interpret)


def _forward(q, k, v, slopes, state, samples, lengths, interpret):
    results = _attention(q, k, v, slopes, state, samples, lengths, interpret)
    return results, (q, k, v, slopes, state, samples, lengths)


def _backward(interpret, kept, gradients):
    dq, dk, dv, dstate = mosaic_gpu_backward.backward(*kept, *gradients, interpret=interpret)
    return dq, dk, dv, None, dstate, None, None


_attention.defvjp(_forward, _backward)

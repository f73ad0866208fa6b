"""The TPU form of lightning attention: its forward and backward kernels as one function."""

import functools

import jax

from pallas_kernels import dispatch
from pallas_kernels.lightning_attention.pallas_tpu import forward
from pallas_kernels.lightning_attention.pallas_tpu_backward import backward
from pallas_kernels.lightning_attention.pallas_tpu_block import LANES, tuned


def lightning_attention(
    q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B, *, interpret=None
):
    """Arguments and results as in the public function; on a CPU the kernels are interpreted.

    Raises ValueError on a GPU and for heads that are no multiple of 128.
    """
    platform = dispatch.platform()
    if platform == "gpu":
        raise ValueError(
            "lightning_attention's 'pallas_tpu' runs on TPU, and interpreted on CPU; this is a "
            "GPU. Pass implementation=None for the form made for it."
        )
    # Blocks of [B, T, N·H] hold whole heads only where a head fills whole lanes.
    if q_BTNH.shape[-1] % LANES:
        raise ValueError(
            f"lightning_attention's 'pallas_tpu' takes heads of a multiple of 128; these have "
            f"{q_BTNH.shape[-1]}. Pass 'xla' or None."
        )
    interpret = platform == "cpu" if interpret is None else interpret
    return _attention(
        q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B, interpret
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(7,))
def _attention(q, k, v, slopes, state, starts, lengths, interpret):
    return forward(q, k, v, slopes, state, starts, lengths,
                   blocks=tuned(*q.shape[1:3]), interpret=interpret)


def _forward(q, k, v, slopes, state, starts, lengths, interpret):
    # The gradients walk the same blocks, whose first states are kept.
    out, last, saved = forward(q, k, v, slopes, state, starts, lengths,
                               blocks=tuned(*q.shape[1:3]), interpret=interpret, saves=True)
    return (out, last), (q, k, v, slopes, saved, starts, lengths)


def _backward(interpret, kept, gradients):
    q, k, v, slopes, saved, starts, lengths = kept
    dq, dk, dv, dfirst = backward(q, k, v, slopes, saved, starts, lengths, *gradients,
                                  blocks=tuned(*q.shape[1:3]), interpret=interpret)
    return dq, dk, dv, None, dfirst, None, None


_attention.defvjp(_forward, _backward)

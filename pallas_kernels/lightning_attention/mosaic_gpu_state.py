"""The state after a piece of a sequence on Hopper GPUs: a row as the one part of `local_states`."""

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.lightning_attention.mosaic_gpu import local_states
from pallas_kernels.lightning_attention.mosaic_gpu_block import C

# A piece for so many chunks of a row, and no more than these: each costs a start and a state.
_CHUNKS, _MOST_PIECES = 128, 16


def state(k_BTNH, v_BTNH, slopes_N, first_B, end_B, reverse, *, interpret=False):
    """The state [B, N, H, H] float32 of the tokens from `first_B` to `end_B`; see `state.py`.

    Raises ValueError where there is no GPU to run on, for float32 and for other heads than of 64
    or 128.
    """
    B, T, N, H = k_BTNH.shape
    platform = dispatch.platform()
    if platform != "gpu" and not interpret:
        raise ValueError(
            "lightning_state's 'mosaic_gpu' runs on NVIDIA GPUs of the Hopper generation; this is "
            f"a {platform}. Pass implementation=None for the form made for it.")
    if k_BTNH.dtype != jnp.bfloat16 or H not in (64, 128):
        raise ValueError(
            "lightning_state's 'mosaic_gpu' takes bfloat16 and heads of 64 or 128; got "
            f"{k_BTNH.dtype} and {H}. Pass 'xla' or None.")
    (state_BPNHH,) = local_states(
        (k_BTNH, v_BTNH), ((0, 0, 1),), jnp.asarray(slopes_N, jnp.float32), first_B[:, None],
        jnp.maximum(first_B, end_B)[:, None], span=T,
        pieces=min(-(-T // (_CHUNKS * C)), _MOST_PIECES), reverse=reverse, interpret=interpret)
    return state_BPNHH[:, 0]

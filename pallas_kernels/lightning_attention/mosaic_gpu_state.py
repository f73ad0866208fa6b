"""The state after a piece of a sequence on Hopper GPUs: the state passes of `mosaic_gpu`, windowed.

The chunks of each head that still matter at the row's end are shared out evenly to parts, which run
at the same time: one slow head would else keep one multiprocessor busy while the others wait.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.lightning_attention.mosaic_gpu import Config, choose, one_pass
from pallas_kernels.lightning_attention.mosaic_gpu_block import C
from pallas_kernels.lightning_attention.state import windows

# A part for so many chunks of a row, and no more than these: each costs a start and a state.
_CHUNKS, _MOST_PARTS = 128, 16


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
    begin_BN, stop_BN = windows(slopes_N, first_B, end_B, T, reverse)
    begin_BN, stop_BN = (begin_BN // C, -(-stop_BN // C))
    parts = min(-(-T // (_CHUNKS * C)), _MOST_PARTS)
    # Whole heads where the copies allow it, so that keys are read once.
    config = Config(value_splits=1, stages=4, output_warpgroups=1, sequence_splits=1)
    shape = dataclasses.replace(
        choose(config, ((0, 0, 1),), reverse, False, True, B, T, N, H, bool(interpret)),
        outputs=False, windowed=True, parts=parts)
    share_BN = -(-jnp.maximum(stop_BN - begin_BN, 0) // parts)
    low_BN = jnp.broadcast_to(first_B[:, None], begin_BN.shape)
    (local_RBPNHH,) = one_pass(
        shape, tensors=(k_BTNH, v_BTNH), slopes_N=slopes_N, lengths_B=end_B, interpret=interpret,
        windows_BN4=jnp.stack([begin_BN, share_BN, stop_BN, low_BN], axis=-1))
    part_P1 = jnp.arange(parts + 1, dtype=jnp.int32)[:, None]
    edge_BPN = (begin_BN[:, None] + part_P1 * share_BN[:, None]) * C
    if reverse:  # a part's state lies before its first token
        steps_BPN = edge_BPN[:, :-1]
    else:
        steps_BPN = jnp.maximum(end_B[:, None, None] - edge_BPN[:, 1:], 0)
    decay_BPN = jnp.exp(-slopes_N * steps_BPN.astype(jnp.float32))
    return (decay_BPN[..., None, None] * local_RBPNHH[0]).sum(axis=1)

"""Lightning attention for one token on NVIDIA GPUs (Triton): states move once, in place."""

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.costs import kernel_cost
from pallas_kernels.lightning_attention import triton_gpu


def decode(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B, *,
           device: tuning.Nvidia | None = None):
    """Arguments and results as in `lightning_decode_slots`; H one of `triton_gpu.HEAD_DIMS`.

    A program owns some columns of one head's state, and none waits for another.
    """
    from pallas_kernels.lightning_attention import triton_gpu_kernels as kernels

    B, N, H = q_BNH.shape
    config = triton_gpu.tuned("decode", device)
    W = min(config.columns, H)
    out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q_BNH, states_PNHH)]
    with kernel_cost(5 * B * N * H * H, 8 * B * N * H * H):
        out, states = triton_gpu.launch(
            kernels.lightning_step, q_BNH, k_BNH, v_BNH, jnp.asarray(slopes_N, jnp.float32),
            slots_B.astype(jnp.int32), states_PNHH, out_shape=out_shape, grid=(N * (H // W), B),
            config=config, aliases={5: 1}, N=N, H=H, W=W)
    return out, states

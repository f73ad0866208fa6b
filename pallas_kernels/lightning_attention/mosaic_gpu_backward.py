"""Gradients of lightning attention on Hopper GPUs: three passes of the forward's kind.

With G the gradient in the state: `dq_t = dO_t S_t^T` walks forward; `dv_t = k_t G_t` and
`dk_t = v_t G_t^T` walk back (arXiv 2501.08313 §2.2, with q, k, v and dO in each other's places).
Nothing is kept from the forward pass but its inputs.
"""

import jax.numpy as jnp

from pallas_kernels.lightning_attention.mosaic_gpu import Config, run
from pallas_kernels.lightning_attention.parts import without_unread


def backward(
    q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, samples_BT, lengths_B, dout_BTNH, dstate_BNHH,
    *, config: Config | None = None, interpret=False,
):
    """Gradients in q, k, v (bfloat16) and in the incoming state (float32).

    Arguments as in `mosaic_gpu.forward`; `dout_BTNH` (cast to bfloat16) and `dstate_BNHH` (float32)
    are the gradients in its two results.
    """
    config = config or Config()
    dout_BTNH = dout_BTNH.astype(jnp.bfloat16)
    marks = samples_BT, lengths_B
    (dq,), _ = run(
        (dout_BTNH, v_BTNH, k_BTNH), ((0, 1, 2),), slopes_N, (state_BNHH.swapaxes(-1, -2),),
        *marks, reverse=False, config=config, interpret=interpret,
    )
    tensors = (q_BTNH, k_BTNH, v_BTNH, dout_BTNH)
    roles = (1, 0, 3), (2, 3, 0)  # dv = k G, dk = v G^T
    incoming = dstate_BNHH, dstate_BNHH.swapaxes(-1, -2)
    back = dict(reverse=True, config=config, interpret=interpret)
    if config.joint:
        (dv, dk), (dstate, _) = run(tensors, roles, slopes_N, incoming, *marks, **back)
    else:
        (dv,), (dstate,) = run(tensors, roles[:1], slopes_N, incoming[:1], *marks, **back)
        (dk,), _ = run(tensors, roles[1:], slopes_N, incoming[1:], *marks, **back)
    return dq, dk, dv, without_unread(dstate, samples_BT, lengths_B)

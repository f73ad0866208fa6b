"""Public function of lightning attention and the choice of its implementation."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.lightning_attention import reference, xla
from pallas_kernels.lightning_attention.decode import (
    lightning_decode,
    takes_hopper_kernels,
    takes_triton_kernels,
)


def _pallas_tpu(*arguments):
    # Imported where it is used: Pallas would make every start slower.
    from pallas_kernels.lightning_attention import tpu

    return tpu.lightning_attention(*arguments)


def _mosaic_gpu(*arguments):
    from pallas_kernels.lightning_attention import gpu

    return gpu.lightning_attention(*arguments)


def _triton_gpu(*arguments):
    from pallas_kernels.lightning_attention import triton_gpu_vjp

    return triton_gpu_vjp.lightning_attention(*arguments)


_IMPLEMENTATIONS = {
    "reference": reference.lightning_attention,
    "xla": xla.lightning_attention,
    "pallas_tpu": _pallas_tpu,
    "mosaic_gpu": _mosaic_gpu,
    "triton_gpu": _triton_gpu,
}


def lightning_attention(
    q_BTNH: jax.Array,
    k_BTNH: jax.Array,
    v_BTNH: jax.Array,
    slopes_N: jax.Array,
    state_BNHH: jax.Array | None = None,
    *,
    starts_BT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Linear attention with one exponential decay per head (arXiv 2501.08313, lightning attention).

    Per head: `S_t = exp(-slope) S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`; no scale on q. The current
    token is included and undecayed.

    Args:
      q_BTNH, k_BTNH, v_BTNH: float32 or bfloat16, any T ≥ 1.
      slopes_N: float32, ≥ 0, per token.
      state_BNHH: float32 state before the first token, rows keys and columns values; zeros if None.
      starts_BT: bool, true where a new sample begins: the state is reset before that token, so
        decay counts only a sample's own tokens.
      lengths_B: int32 in [0, T]; tokens from `lengths_B[b]` on are padding, which neither decays
        nor enters the state, and whose output is zero.
      implementation: "reference" (one token at a time), "xla" (chunks of matrix products),
        "pallas_tpu" (the automatic choice on TPU for heads of a multiple of 128; interpreted on a
        CPU), "mosaic_gpu" (the automatic choice on Hopper GPUs for bfloat16 and heads of 64 or
        128), "triton_gpu" (the automatic choice on other NVIDIA GPUs of compute capability 8.0 or
        more, for heads of 16, 32, 64 or 128 where jax-triton is installed), or None. One token
        alone is a decode step under None, whatever the device.

    Returns:
      Output [B, T, N, H] in q's dtype, and the float32 state [B, N, H, H] after the last token.
      Differentiable in q, k, v and the state.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    check(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B)
    B, T, N, H = q_BTNH.shape
    if state_BNHH is None:
        state_BNHH = jnp.zeros((B, N, H, H), jnp.float32)
    slopes_N = jnp.asarray(slopes_N, jnp.float32)
    if implementation is None and T == 1:
        return lightning_decode(
            q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT=starts_BT, lengths_B=lengths_B
        )
    default = "xla"
    if dispatch.platform() == "tpu" and H % 128 == 0:
        default = "pallas_tpu"
    elif takes_hopper_kernels(q_BTNH.dtype, H):
        default = "mosaic_gpu"
    elif takes_triton_kernels(H):
        default = "triton_gpu"
    run = dispatch.choose(
        "lightning_attention",
        _IMPLEMENTATIONS,
        implementation,
        default,
        (B, T, N, H),
    )
    return run(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, starts_BT, lengths_B)


def check(q, k, v, slopes, state, starts, lengths) -> None:
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"q, k and v must share one shape [B, T, N, H]; got {q.shape}, {k.shape}, {v.shape}."
        )
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"q, k and v must all be float32 or all bfloat16; got {q.dtype}, {k.dtype}, {v.dtype}."
        )
    B, T, N, H = q.shape
    expected = {
        "slopes_N": (slopes, (N,)),
        "state_BNHH": (state, (B, N, H, H)),
        "starts_BT": (starts, (B, T)),
        "lengths_B": (lengths, (B,)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and jnp.shape(array) != shape:
            raise ValueError(f"{name} must have shape {shape}; got {jnp.shape(array)}.")
    if state is not None and state.dtype != jnp.float32:
        raise ValueError(f"state_BNHH must be float32; got {state.dtype}.")

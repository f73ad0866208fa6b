"""Lightning attention for one token: update the state, read it."""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels import dispatch, tuning
from pallas_kernels.grouped_matmul.stacked import Stacked


def lightning_decode(
    q_B1NH: jax.Array,
    k_B1NH: jax.Array,
    v_B1NH: jax.Array,
    slopes_N: jax.Array,
    state_BNHH: jax.Array,
    *,
    starts_BT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of the recurrence; arguments and results as in `lightning_attention` with T = 1."""
    q_BNH, k_BNH, v_BNH = (x[:, 0].astype(jnp.float32) for x in (q_B1NH, k_B1NH, v_B1NH))
    decay_BN = jnp.broadcast_to(jnp.exp(-slopes_N), q_BNH.shape[:2])
    if starts_BT is not None:
        decay_BN = jnp.where(starts_BT, 0.0, decay_BN)
    if lengths_B is not None:
        # An inert row keeps its state: decay 1 and a zero update.
        active_B1 = (lengths_B > 0)[:, None]
        decay_BN = jnp.where(active_B1, decay_BN, 1.0)
        k_BNH = jnp.where(active_B1[..., None], k_BNH, 0.0)
        q_BNH = jnp.where(active_B1[..., None], q_BNH, 0.0)
    update_BNHH = k_BNH[..., :, None] * v_BNH[..., None, :]
    state_BNHH = decay_BN[..., None, None] * state_BNHH + update_BNHH
    if dispatch.platform() == "cpu":
        out_BNH = jnp.einsum("bnh,bnhg->bng", q_BNH, state_BNHH, precision="highest")
    else:
        if dispatch.platform() == "gpu":
            # XLA may lay q, k and v otherwise, and transposed all states before and after a scan.
            state_BNHH = with_layout_constraint(state_BNHH, Layout((0, 1, 2, 3)))
        # A sum of products, not a matrix product: fused with the update, the state moves once.
        out_BNH = jnp.sum(q_BNH[..., :, None] * state_BNHH, axis=-2)
    return out_BNH[:, None].astype(q_B1NH.dtype), state_BNHH


def takes_hopper_kernels(dtype, H: int) -> bool:
    """Whether programs traced now run on a Hopper GPU, whose kernels take such heads."""
    return tuning.hopper() and dtype == jnp.bfloat16 and H in (64, 128)


def decodes_in_stack(dtype, H: int) -> bool:
    """Whether `lightning_decode_stacked` takes such heads where programs traced now run."""
    if dispatch.platform() == "tpu":
        return H % 128 == 0
    if not takes_hopper_kernels(dtype, H):
        return False
    from pallas_kernels.lightning_attention import mosaic_gpu_decode

    return mosaic_gpu_decode.AVAILABLE


def lightning_decode_stacked(
    q_B1NH: jax.Array,
    k_B1NH: jax.Array,
    v_B1NH: jax.Array,
    slopes_N: jax.Array,
    states: Stacked,
    lengths_B: jax.Array | None = None,
    *,
    implementation: str | None = None,
    interpret=False,
) -> tuple[jax.Array, Stacked]:
    """One step of a layer whose states lie in the stack of all layers, where they are updated.

    Cut out of the stack and put back by XLA, a state is read and written twice in a step.

    Args:
      q_B1NH, k_B1NH, v_B1NH, slopes_N: as in `lightning_decode`; bfloat16 on a GPU.
      states: float32 [R, B, N, H, H] and the layer's place; donate them.
      lengths_B: rows of 0 are inert: their states stay, their outputs are zero.
      implementation: "pallas_tpu", "mosaic_gpu" (both of `lightning_decode_slots`), or None.
      interpret: as the kernel of that name takes it.

    Returns:
      Output [B, 1, N, H] and the stack with the layer's states one token on.

    Raises:
      ValueError: where `decodes_in_stack` is false and nothing is interpreted.
    """
    if not interpret and not decodes_in_stack(q_B1NH.dtype, q_B1NH.shape[-1]):
        raise ValueError(
            "lightning_decode_stacked runs on TPU, for heads of a multiple of 128, and on NVIDIA "
            "GPUs of the Hopper generation, in bfloat16, with heads of 64 or 128, from jax 0.11 "
            "on. Pass the layer's own states to lightning_attention.")
    B = q_B1NH.shape[0]
    name = implementation or ("pallas_tpu" if dispatch.platform() == "tpu" else "mosaic_gpu")
    pool = states.whole.reshape(-1, *states.shape[1:])
    slots_B = states.index * B + jnp.arange(B, dtype=jnp.int32)
    rows, slopes_N = (x[:, 0] for x in (q_B1NH, k_B1NH, v_B1NH)), jnp.asarray(slopes_N, jnp.float32)
    if name == "pallas_tpu":
        from pallas_kernels.lightning_attention import pallas_tpu_decode

        active_B = None if lengths_B is None else lengths_B > 0
        out_BNH, pool = pallas_tpu_decode.decode(
            *rows, slopes_N, pool, slots_B, active_B, interpret=interpret)
    else:
        from pallas_kernels.lightning_attention import mosaic_gpu_decode

        if lengths_B is not None:
            slots_B = jnp.where(lengths_B > 0, slots_B, -1)
        out_BNH, pool = mosaic_gpu_decode.decode(
            *rows, slopes_N, pool, slots_B, interpret=interpret)
    return out_BNH[:, None], Stacked(pool.reshape(states.whole.shape), states.index)


def takes_triton_kernels(H: int) -> bool:
    """Whether Triton's kernels are the automatic choice where programs traced now run.

    Not on Hopper, where XLA has been measured and they have not.
    """
    if dispatch.platform() != "gpu" or tuning.hopper():
        return False
    from pallas_kernels.lightning_attention import triton_gpu_vjp

    return triton_gpu_vjp.suits(H)


def lightning_decode_slots(
    q_BNH: jax.Array,
    k_BNH: jax.Array,
    v_BNH: jax.Array,
    slopes_N: jax.Array,
    states_PNHH: jax.Array,
    slots_B: jax.Array,
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of the recurrence for B rows whose states lie in a pool of P.

    Args:
      q_BNH, k_BNH, v_BNH: float32 or bfloat16, one token per row.
      slopes_N: float32, ≥ 0, per token.
      states_PNHH: float32 pool; donate it, so that it is updated in place.
      slots_B: int32 in [0, P), each at most once: where each row's state lies.
      implementation: "xla", "pallas_tpu" (the automatic choice on TPU for heads of a multiple of
        128; interpreted on a CPU), "mosaic_gpu" (the automatic choice on Hopper GPUs for bfloat16
        and heads of 64 or 128, where jax is 0.11 or newer), "triton_gpu" (the automatic choice on
        other NVIDIA GPUs, as in `lightning_attention`), or None.

    Returns:
      Output [B, N, H] in q's dtype, and the pool with the states of `slots_B` one token on.

    Raises:
      ValueError: shapes or dtypes that do not fit, or an unknown implementation.
    """
    B, N, H = q_BNH.shape
    if states_PNHH.shape[1:] != (N, H, H) or states_PNHH.dtype != jnp.float32:
        raise ValueError(
            f"states_PNHH must be float32 [P, {N}, {H}, {H}]; got {states_PNHH.dtype} "
            f"{states_PNHH.shape}."
        )
    if k_BNH.shape != q_BNH.shape or v_BNH.shape != q_BNH.shape or slots_B.shape != (B,):
        raise ValueError(
            f"q, k and v must share one shape [B, N, H] and slots_B be [B]; got {q_BNH.shape}, "
            f"{k_BNH.shape}, {v_BNH.shape}, {slots_B.shape}."
        )
    slopes_N = jnp.asarray(slopes_N, jnp.float32)
    run = dispatch.choose(
        "lightning_decode_slots",
        _IMPLEMENTATIONS,
        implementation,
        _slots_default(q_BNH, k_BNH, v_BNH),
        (B, N, H),
    )
    return run(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B)


def _slots_default(q_BNH, k_BNH, v_BNH) -> str:
    H = q_BNH.shape[-1]
    if dispatch.platform() == "tpu":
        return "pallas_tpu" if H % 128 == 0 else "xla"
    if q_BNH.dtype == k_BNH.dtype == v_BNH.dtype and takes_hopper_kernels(q_BNH.dtype, H):
        from pallas_kernels.lightning_attention import mosaic_gpu_decode

        if mosaic_gpu_decode.AVAILABLE:
            return "mosaic_gpu"
    return "triton_gpu" if takes_triton_kernels(H) else "xla"


def _slots_by_xla(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B):
    rows = (x[:, None] for x in (q_BNH, k_BNH, v_BNH))
    out_B1NH, new_BNHH = lightning_decode(*rows, slopes_N, states_PNHH[slots_B])
    return out_B1NH[:, 0], states_PNHH.at[slots_B].set(new_BNHH, unique_indices=True)


def _slots_on_tpu(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B):
    from pallas_kernels.lightning_attention import pallas_tpu_decode

    platform = dispatch.platform()
    if platform == "gpu" or q_BNH.shape[-1] % 128:
        raise ValueError(
            "lightning_decode_slots' 'pallas_tpu' runs on TPU, and interpreted on CPU, for heads "
            f"of a multiple of 128; this is a {platform} with heads of {q_BNH.shape[-1]}. "
            "Pass 'xla' or None."
        )
    return pallas_tpu_decode.decode(
        q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B, interpret=platform == "cpu"
    )


def _slots_on_hopper(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B):
    from pallas_kernels.lightning_attention import mosaic_gpu_decode

    if (platform := dispatch.platform()) != "gpu":
        raise ValueError(
            "lightning_decode_slots' 'mosaic_gpu' runs on NVIDIA GPUs of the Hopper generation; "
            f"this is a {platform}. Pass implementation=None for the form made for it."
        )
    return mosaic_gpu_decode.decode(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B)


def _slots_by_triton(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B):
    from pallas_kernels.lightning_attention import triton_gpu_decode, triton_gpu_vjp

    triton_gpu_vjp.check("lightning_decode_slots", q_BNH.shape[-1])
    return triton_gpu_decode.decode(q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B)


_IMPLEMENTATIONS = {"xla": _slots_by_xla, "pallas_tpu": _slots_on_tpu,
                    "mosaic_gpu": _slots_on_hopper, "triton_gpu": _slots_by_triton}

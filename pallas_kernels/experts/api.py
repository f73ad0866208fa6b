"""Public function of a decode step's experts and the choice of its implementation."""

import jax

from pallas_kernels import dispatch, tuning
from pallas_kernels.experts import reference
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor


def _pallas_tpu(g_TD, weight_Tk, expert_Tk, gate_up, down):
    from pallas_kernels.experts import hit_pallas_tpu  # Pallas is slow to import

    if dispatch.platform() == "gpu":
        raise ValueError("hit_experts 'pallas_tpu' runs on a TPU, and is interpreted on a CPU. "
                         "Pass 'reference' or None.")
    return hit_pallas_tpu.hit_experts(g_TD, weight_Tk, expert_Tk, gate_up, down)


def _mosaic_gpu(g_TD, weight_Tk, expert_Tk, gate_up, down):
    if dispatch.platform() != "gpu":
        raise ValueError("hit_experts 'mosaic_gpu' runs on NVIDIA GPUs of the Hopper generation; "
                         f"this is a {dispatch.platform()}. Pass 'reference' or None.")
    return _hopper_kernel(gate_up).hit_experts(g_TD, weight_Tk, expert_Tk, gate_up, down)


def _hopper_kernel(gate_up):
    from pallas_kernels.experts import hit_int8_mosaic_gpu, hit_mosaic_gpu

    own = gate_up.whole if isinstance(gate_up, Stacked) else gate_up
    return hit_int8_mosaic_gpu if isinstance(own, TurnedTensor) else hit_mosaic_gpu


_IMPLEMENTATIONS = {"reference": reference.experts, "pallas_tpu": _pallas_tpu,
                    "mosaic_gpu": _mosaic_gpu}


def hit_experts(
    g_TD: jax.Array,
    weight_Tk: jax.Array,
    expert_Tk: jax.Array,
    gate_up: jax.Array | QuantizedTensor | TurnedTensor | Stacked,
    down: jax.Array | QuantizedTensor | TurnedTensor | Stacked,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """The weighted sum of SwiGLU experts for few tokens, reading only experts that are hit.

    `out_t = Σ_j weight_tj · down_e (SiLU(gate_e g_t) · up_e g_t)` with e = expert_tj.

    Args:
      g_TD: float32 or bfloat16. weight_Tk: float32. expert_Tk: int32 ids; ids outside 0 … E-1 are
        of nobody and add nothing.
      gate_up: [2, E, D, F]; down: [E, F, D]; of g's dtype, or int8 with scales [2, E, 1, F] and
        [E, 1, D], or such matrices turned; either may lie inside a stack of layers.
      implementation: "reference" (all experts), "pallas_tpu" (one kernel, interpreted on a CPU),
        "mosaic_gpu" (Hopper GPUs: bfloat16 tokens, D and F multiples of 128; turned matrices meet
        tokens as two int8 parts), or None: the kernel of a TPU or Hopper GPU where it fits, else
        the reference.

    Returns:
      float32 [T, D]. The kernels cannot be differentiated.

    Raises:
      ValueError: shapes that do not fit each other or the chip, an unknown implementation, or one
        that does not run here.
    """
    (T, D), (E, F) = g_TD.shape, down.shape[:2]
    if gate_up.shape != (2, E, D, F) or down.shape != (E, F, D):
        raise ValueError(
            f"gate_up and down must be [2, E, {D}, F] and [E, F, {D}] for g {g_TD.shape}; got "
            f"{gate_up.shape}, {down.shape}.")
    if weight_Tk.shape != expert_Tk.shape or expert_Tk.shape[0] != T:
        raise ValueError(f"weights and experts must be [{T}, k]; got {weight_Tk.shape}, "
                         f"{expert_Tk.shape}.")
    default = "reference"
    if hit_fits(g_TD, gate_up):
        default = "pallas_tpu" if dispatch.platform() == "tpu" else "mosaic_gpu"
    run = dispatch.choose("hit_experts", _IMPLEMENTATIONS, implementation, default,
                          (T, D, E, F, expert_Tk.shape[1]))
    return run(g_TD, weight_Tk, expert_Tk, gate_up, down)


def hit_fits(g_TD, gate_up) -> bool:
    """Whether this is a TPU or a Hopper GPU and its kernel takes these shapes there."""
    if tuning.hopper():
        return _hopper_kernel(gate_up).refusal(g_TD, gate_up) is None
    if dispatch.platform() != "tpu":
        return False
    from pallas_kernels.experts import hit_pallas_tpu

    return hit_pallas_tpu.fits(*g_TD.shape, gate_up.shape[-1], g_TD.dtype, gate_up.dtype)

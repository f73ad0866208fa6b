"""Public functions of the grouped matrix product and the choice of its implementation.

On TPU, compiled for v5e, v5p, v6e and tpu7x at [64, 4,096, 65,536 rows] x 32 x [6144, 9216] in
bfloat16 (compiled, not run): `ragged_dot` writes float32 and casts it (0.14 and 2.25 GiB of
temporary memory at 4,096 and 65,536 rows), and inside a scan over layers tpu7x lays all weights of
all layers anew, outside the loop, every step (8.2 GB of weights: 7.6 GiB of temporary memory).
`megablox` and `pallas_tpu` need neither. int8 weights are cast to bfloat16 in main memory in front
of the first two (three times their bytes written and read), inside the kernel by `pallas_tpu`.
So: bfloat16 by `megablox`, int8 and weights inside a stack by `pallas_tpu`, float32 by
`ragged_dot`.

On an H200 at the same widths (gate and up with SiLU / down, TFLOP/s) `hopper` reaches 610 / 585 at
32,768 rows and 421 / 391 at 4,096, `mosaic_gpu` 536 / 539 and 282 / 289, `ragged_dot` 24. So
`hopper`, ours, is chosen there for bfloat16, and `ragged_dot` on other GPUs.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, tuning
from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.grouped_matmul.stacked import Stacked, cut
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor, dequantize


# Kernels are imported where they are chosen: Pallas takes as long to import as the rest of jax.
def _megablox(x_MD, w_EDF, group_sizes_E):
    from pallas_kernels.grouped_matmul import megablox

    _refuse_gpu("megablox")
    return megablox.grouped_matmul(x_MD, w_EDF, group_sizes_E)


def _mosaic_gpu(x_MD, w_EDF, group_sizes_E):
    from pallas_kernels.grouped_matmul import mosaic_gpu

    return mosaic_gpu.grouped_matmul(x_MD, w_EDF, group_sizes_E)


def _hopper(x_MD, w_EDF, group_sizes_E):
    from pallas_kernels.grouped_matmul import mosaic_gpu_vjp

    return mosaic_gpu_vjp.grouped_matmul(x_MD, w_EDF, group_sizes_E)


@jax.custom_vjp
def _pallas_tpu(x_MD, w_EDF, group_sizes_E):
    from pallas_kernels.grouped_matmul import pallas_tpu

    _refuse_gpu("pallas_tpu")
    return pallas_tpu.grouped_matmul(x_MD, w_EDF, group_sizes_E)


def _pallas_tpu_forward(x_MD, w_EDF, group_sizes_E):
    return _pallas_tpu(x_MD, w_EDF, group_sizes_E), (x_MD, w_EDF, group_sizes_E)


def _pallas_tpu_backward(residuals, grad_MF):
    x_MD, w_EDF, group_sizes_E = residuals
    if isinstance(w_EDF, Stacked):
        raise ValueError("Weights inside a stack have no gradient: `cut` them in training.")
    plain = dequantize(w_EDF, x_MD.dtype)
    _, back = jax.vjp(lambda x, w: _megablox(x, w, group_sizes_E), x_MD, plain)
    grad_x, grad_w = back(grad_MF)
    if isinstance(w_EDF, QuantizedTensor):
        grad_w = QuantizedTensor(np.zeros(w_EDF.shape, jax.dtypes.float0),
                                 jnp.zeros_like(w_EDF.scale))
    return grad_x, grad_w, None


_pallas_tpu.defvjp(_pallas_tpu_forward, _pallas_tpu_backward)

_IMPLEMENTATIONS = {
    "reference": reference.grouped_matmul,
    "ragged_dot": xla.ragged_dot,
    "tiled": xla.tiled,
    "megablox": _megablox,
    "pallas_tpu": _pallas_tpu,
    "mosaic_gpu": _mosaic_gpu,
    "hopper": _hopper,
}


def grouped_matmul(
    x_MD: jax.Array,
    w_EDF: jax.Array | QuantizedTensor | TurnedTensor | Stacked,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies consecutive groups of rows, each by its own matrix.

    Args:
      x_MD: float32 or bfloat16 rows, sorted by group.
      w_EDF: one matrix per group, of x's dtype, or int8 with a scale per output column, which is
        applied to the product, plain or turned; or such weights inside a stack of layers.
      group_sizes_E: int32 rows per group, zeros allowed; rows beyond their sum give zeros.
      implementation: "reference" (every product, then a choice), "ragged_dot"
        (`jax.lax.ragged_dot`), "tiled" (one batched product over row tiles of one group each; the
        automatic choice on CPU, where ragged_dot runs 40 times slower), "megablox" (JAX's kernel
        for TPU), "pallas_tpu" (ours: weights are read once, where they lie, int8 as int8),
        "mosaic_gpu" (JAX's kernel for Hopper, bfloat16, forward only), "hopper" (ours: bfloat16,
        weights read where they lie), or None. The kernels for TPU are interpreted on a CPU.

    Returns:
      [M, F] in x's dtype, summed in float32. Differentiable in x and plain w, by "pallas_tpu" not
      in w's scale, not through a stack, and by "hopper" not with turned w.

    Raises:
      ValueError: shapes that do not fit, or an unknown implementation, or one that does not take
        these arguments here.
    """
    if x_MD.ndim != 2 or w_EDF.ndim != 3 or x_MD.shape[1] != w_EDF.shape[1]:
        raise ValueError(f"x [M, D] and w [E, D, F] must share D; got {x_MD.shape}, {w_EDF.shape}.")
    if group_sizes_E.shape != w_EDF.shape[:1]:
        raise ValueError(
            f"group_sizes_E must have shape {w_EDF.shape[:1]}; got {group_sizes_E.shape}."
        )
    run = dispatch.choose(
        "grouped_matmul", _IMPLEMENTATIONS, implementation, _default(x_MD, w_EDF),
        (x_MD.shape, w_EDF.shape),
    )
    if run is _pallas_tpu or run is _hopper and w_EDF.dtype == jnp.bfloat16:
        return run(x_MD, w_EDF, group_sizes_E)
    if w_EDF.dtype == jnp.int8:
        x_MD, w_EDF = _in_turn(x_MD, w_EDF)
        return _by_cast(run, x_MD, cut(w_EDF), group_sizes_E)
    return run(x_MD, cut(w_EDF), group_sizes_E).astype(x_MD.dtype)


def _by_cast(run, x_MD, weight, group_sizes_E):
    """The product by an int8 leaf, whose values are cast in main memory."""
    if isinstance(weight, TurnedTensor):
        if run is _hopper:
            from pallas_kernels.grouped_matmul import mosaic_gpu_vjp

            return mosaic_gpu_vjp.turned_grouped_matmul(x_MD, weight, group_sizes_E)
        weight = weight.plain()
    out_MF = run(x_MD, weight.values.astype(x_MD.dtype), group_sizes_E)
    group_M = xla.group_of_row(group_sizes_E, out_MF.shape[0])
    return (out_MF * jnp.take(weight.scale[:, 0], group_M, axis=0)).astype(x_MD.dtype)


def _in_turn(before, weight):
    """Lets a cast of the weight wait for what is `before` it.

    Without that XLA casts those of several layers ahead: 20 GiB for a long prompt's chunk on 4
    H200s.
    """
    if isinstance(weight, Stacked):
        before, index = jax.lax.optimization_barrier((before, weight.index))
        return before, Stacked(weight.whole, index)
    return jax.lax.optimization_barrier((before, weight))


def grouped_swiglu(
    x_MD: jax.Array,
    w_2EDF: jax.Array | QuantizedTensor | TurnedTensor | Stacked,
    group_sizes_E: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """SiLU(x · gate) · (x · up) with a gate and an up matrix per group, as one product.

    Args:
      w_2EDF: gate and up, as `grouped_matmul` takes weights; int8 scales are [2, E, 1, F], or
        [2, E, F] of turned ones.
      implementation: "pallas_tpu" (one kernel; the products themselves stay on the chip; forward
        only; the automatic choice on TPU), "hopper" (as one kernel too, for bfloat16 weights; the
        automatic choice there), or a name of `grouped_matmul`, for two products, or None.

    Returns:
      [M, F] in x's dtype; rows beyond the groups may hold anything.

    Raises:
      ValueError: as `grouped_matmul`.
    """
    if w_2EDF.ndim != 4 or w_2EDF.shape[0] != 2:
        raise ValueError(f"w must be [2, E, D, F]; got {w_2EDF.shape}.")
    if implementation is None and dispatch.platform() == "tpu" and fused_fits(x_MD, w_2EDF):
        implementation = "pallas_tpu"
    if implementation == "pallas_tpu":
        from pallas_kernels.grouped_matmul import pallas_tpu

        _refuse_gpu("pallas_tpu")
        return pallas_tpu.grouped_swiglu(x_MD, w_2EDF, group_sizes_E)
    if implementation is None and _takes_hopper(x_MD, w_2EDF):
        implementation = "hopper"
    if implementation == "hopper" and w_2EDF.dtype == jnp.bfloat16:
        from pallas_kernels.grouped_matmul import mosaic_gpu_vjp

        return mosaic_gpu_vjp.grouped_swiglu(x_MD, w_2EDF, group_sizes_E)
    def half(c):
        return jax.tree.map(lambda w: w[c], cut(w_2EDF))

    if implementation == "hopper":
        # A layer's place in its stack waits, not a copy of the layer.
        x_MD, w_2EDF = _in_turn(x_MD, w_2EDF)
        if isinstance(leaf := cut(w_2EDF), TurnedTensor):
            from pallas_kernels.grouped_matmul import mosaic_gpu_vjp

            return mosaic_gpu_vjp.turned_grouped_swiglu(x_MD, leaf, group_sizes_E)
        gate = _by_cast(_hopper, x_MD, half(0), group_sizes_E)
        # And up's cast for gate.
        gate, w_2EDF = _in_turn(gate, w_2EDF)
        up = _by_cast(_hopper, x_MD, half(1), group_sizes_E)
    else:
        gate, up = (grouped_matmul(x_MD, half(c), group_sizes_E, implementation=implementation)
                    for c in range(2))
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return (jax.nn.silu(gate) * up).astype(x_MD.dtype)


def fused_fits(x_MD, w) -> bool:
    """Whether "pallas_tpu" or "hopper" takes these on the device at hand; w may be a pair."""
    if dispatch.platform() != "tpu":
        return _takes_hopper(x_MD, w)
    from pallas_kernels.grouped_matmul import pallas_tpu

    E, D, F = w.shape[-3:]
    return pallas_tpu.fits(x_MD.shape[0], w.ndim - 2, E, D, F, x_MD.dtype, w.dtype)


def _default(x_MD, w_EDF) -> str:
    platform = dispatch.platform()
    if platform == "tpu":
        plain = not isinstance(w_EDF, QuantizedTensor | Stacked)
        if not plain and fused_fits(x_MD, w_EDF):
            return "pallas_tpu"
        return "megablox" if x_MD.dtype == jnp.bfloat16 else "ragged_dot"
    if _takes_hopper(x_MD, w_EDF):
        return "hopper"
    return "tiled" if platform == "cpu" else "ragged_dot"


def _takes_hopper(x_MD, w) -> bool:
    """Whether "hopper" runs here and takes these arguments; int8 is cast in front of it."""
    if not tuning.hopper() or x_MD.dtype != jnp.bfloat16:
        return False
    D, F = w.shape[-2:]
    return w.dtype in (jnp.bfloat16, jnp.int8) and D % 64 == 0 and F % 128 == 0


def _refuse_gpu(name: str) -> None:
    if dispatch.platform() == "gpu":
        raise ValueError(f"grouped_matmul '{name}' runs on a TPU, and is interpreted on a CPU. "
                         "Pass 'mosaic_gpu', 'ragged_dot' or None.")

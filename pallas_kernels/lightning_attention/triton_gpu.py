"""Lightning attention on NVIDIA GPUs from Ampere on (Triton through jax-triton).

The programs are in `triton_gpu_kernels`; here are their tuning, the split of long sequences into
parts that run at the same time, and the calls. The same pass run towards earlier tokens gives the
gradients (`triton_gpu_vjp`).
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels import tuning
from pallas_kernels.costs import kernel_cost
from pallas_kernels.lightning_attention.parts import chunk_boundaries, givers, prefix

HEAD_DIMS = (16, 32, 64, 128)
_SIZES = pathlib.Path(__file__).with_suffix(".json")


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning choices of one pass; `None` leaves a choice to the table of sizes, or to the shapes.

    Attributes:
      chunk: tokens of one step, a power of two from 16.
      columns: value columns of one program, a power of two from 16.
      warps, stages: of a program; stages are chunks loaded ahead, and the one at work.
      resident: programs that a multiprocessor has registers for at once.
      parts: of a sequence, that run at the same time; more than one costs a second reading of k
        and v, as far back as they last, for the states between the parts.
      device: the GPU to compile for; None is the one that programs traced now will run on.
    """

    chunk: int | None = None
    columns: int | None = None
    warps: int | None = None
    stages: int | None = None
    resident: int | None = None
    parts: int | None = None
    device: tuning.Nvidia | None = None


def forward(q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, samples_BT=None, lengths_B=None,
            *, config: Config | None = None):
    """Output [B, T, N, H] in q's dtype and the float32 state [B, N, H, H] after the last token.

    Args:
      q_BTNH, k_BTNH, v_BTNH: all bfloat16 or all float32, H one of HEAD_DIMS.
      slopes_N: float32; state_BNHH: float32, before the first token.
      samples_BT: int32, nondecreasing along T: the sample of each token. The state is reset where
        it changes; sample 0 continues `state_BNHH`.
      lengths_B: int32; tokens from there on are padding: never read, output zero.
    """
    (out,), (state,) = run(((q_BTNH, k_BTNH, v_BTNH),), slopes_N, (state_BNHH,), samples_BT,
                           lengths_B, reverse=False, config=config)
    return out, state


def run(roles: Sequence[tuple[jax.Array, jax.Array, jax.Array]], slopes_N,
        states: Sequence[jax.Array], samples_BT, lengths_B, *, reverse: bool,
        config: Config | None = None):
    """One pass over the sequence for each of one or two `roles`, which stand for (q, k, v).

    Towards later tokens (`reverse=False`): `S_t = λ S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`.
    Towards earlier ones: `G_t = E_t + k_t^T v_t`, `o_t = q_t G_t`, `E_{t-1} = λ G_t`, where E at
    the last token is the incoming state and E before the first token the outgoing one.

    Returns the outputs and the outgoing states, a tuple of one per role each.
    """
    from pallas_kernels.lightning_attention import triton_gpu_kernels as kernels

    B, T, N, H = roles[0][0].shape
    dtype, R = roles[0][0].dtype, len(roles)
    config = _choose(config or Config(), dtype, B, T, N, H, R)
    C, W = config.chunk, config.columns
    chunks = -(-T // C)
    chunks_per_part = -(-chunks // config.parts)
    P = -(-chunks // chunks_per_part)
    slopes_N = jnp.asarray(slopes_N, jnp.float32)
    # What a kernel does not read is any array.
    lengths = samples = edges = slopes_N
    if lengths_B is not None:
        lengths = lengths_B.astype(jnp.int32)
    if samples_BT is not None:
        samples = samples_BT.astype(jnp.int32)
        edges = jnp.stack(chunk_boundaries(samples, lengths_B, C, reverse), axis=-1)
    tensors = (*roles[0], *roles[-1])
    marks = slopes_N, lengths, samples, edges
    common = dict(
        grid=(N * R * (H // W), P, B), config=config, N=N, H=H, C=C, W=W, ROLES=R, REVERSE=reverse,
        LENGTHS=lengths_B is not None, SAMPLES=samples_BT is not None,
        RAGGED=lengths_B is not None or T % C != 0)

    incoming = jnp.stack(states)[:, :, None]  # [roles, B, parts, N, H, H]
    rows, size, f32 = R * B * T * N, dtype.itemsize, jnp.float32
    if P > 1:
        local = jax.ShapeDtypeStruct((R, B, P, N, H, H), f32)
        with kernel_cost(2 * rows * H * H, rows * H * size * 2 + local.size * 4):
            (local,) = launch(
                kernels.lightning_states, *tensors[1:3], *tensors[4:], *marks, T, chunks_per_part,
                out_shape=(local,), **common)
        incoming = prefix(local[:, :, givers(P, reverse)], incoming, slopes_N, samples_BT,
                          lengths_B, T=T, span=chunks_per_part * C, reverse=reverse)
    out, unused = (jax.ShapeDtypeStruct(shape, dtype) for shape in ((B, T, N, H), (1,)))
    outgoing = jax.ShapeDtypeStruct((R, B, N, H, H), f32)
    # A chunk's scores and values for each share of the columns, the state's update and reading.
    flops = rows * (4 * H * H + 2 * C * H * (1 + H // W))
    with kernel_cost(flops, rows * H * size * 4 + (incoming.size + outgoing.size) * 4):
        *outs, outgoing = launch(
            kernels.lightning_walk, *tensors, slopes_N, incoming, *marks[1:], T, chunks_per_part,
            out_shape=(out, out if R == 2 else unused, outgoing), **common)
    return tuple(outs[:R]), tuple(outgoing)


def _choose(config: Config, dtype, B, T, N, H, R) -> Config:
    kind = dtype.name + (", heads of 64 or less" if dtype == jnp.bfloat16 and H <= 64 else "")
    config = tuned(kind, config.device, config)
    config = dataclasses.replace(config, columns=min(config.columns, H))
    for name in ("chunk", "columns"):
        size = getattr(config, name)
        if size < 16 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two from 16; got {size}.")
    if config.parts is None:
        programs = B * N * R * (H // config.columns)
        slots = config.device.multiprocessors * config.resident
        config = dataclasses.replace(config, parts=_parts(programs / slots, T, H))
    return config


def _parts(waves: float, T: int, H: int) -> int:
    """The fewest parts of at least 1,024 tokens that come within a tenth of the least time.

    An estimate, not a measurement, in units of a full chip's time for one pass: a last wave of
    programs takes as long as a full one; parts read a half of k and v again, and each of them the
    states of all before it. `waves` are those of a single part.
    """
    def time(parts):
        whole = math.ceil(waves * parts) / (waves * parts)
        return whole if parts == 1 else 1.25 * whole + parts * parts * H / (2 * T)

    times = {parts: time(parts) for parts in range(1, max(1, min(64, T // 1024)) + 1)}
    return next(parts for parts in times if times[parts] <= 1.1 * min(times.values()))


def tuned(kind: str, device: tuning.Nvidia | None,
          config: Config | None = None) -> Config:
    """`config` with what it leaves open from the table of sizes, for `device` or the one at hand.

    Raises ValueError where that is no NVIDIA GPU, or an unknown one.
    """
    config, device = config or Config(), device or tuning.nvidia()
    if device is None:
        raise ValueError("lightning_attention's 'triton_gpu' must know which NVIDIA GPU it is "
                         "compiled for. Trace under that GPU's mesh, or pass 'xla' or None.")
    sizes = tuning.table(_SIZES)[kind]
    sizes = sizes["any"] | sizes.get(f"sm_{device.capability}", {})
    open_ones = {name: size for name, size in sizes.items() if getattr(config, name) is None}
    return dataclasses.replace(config, device=device, **open_ones)


def launch(kernel, *arguments, out_shape, grid, config: Config, aliases=None, **constants):
    """The arrays that `kernel` writes, called with arrays and numbers as `arguments`."""
    import jax_triton

    return jax_triton.triton_call(
        *arguments, kernel=kernel, out_shape=out_shape, grid=grid, name=kernel.__name__,
        num_warps=config.warps, num_stages=config.stages, input_output_aliases=aliases,
        compute_capability=config.device.capability, **constants)

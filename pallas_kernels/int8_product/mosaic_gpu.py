"""Few rows times int8 matrices on Hopper GPUs, as products of integers: no weight is cast.

Casting int8 weights to bfloat16 on their way to the matrix unit takes them through shared memory
twice more, which then bounds such a kernel: 3/4 of the byte floor. Here the unit reads them as they
came. A row of x is cut into two int8 parts, `x ≈ s (128 high + low)`: 15 bits under the row's
largest value, where bfloat16 has 8 under each value's own. Both meet the same tile of weights, and
their sums are exact in int32.

The unit takes 8-bit operands with the contracted axis innermost alone, so weights lie [out, in].
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.costs import kernel_cost
from pallas_kernels.int8_product.rows import MOST, two_parts
from pallas_kernels.lightning_attention.mosaic_gpu_block import load, transposed

STEP = 128  # of the contracted axis: 128 bytes, the widest swizzle
MOST_ROWS = 64
_WGMMA = plgpu.Layout.WGMMA
_TILES8 = (plgpu.TilingTransform((8, STEP)), plgpu.SwizzleTransform(STEP))
_MULTIPROCESSORS = 132  # of an H100 or H200


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning choices; `None` leaves one to the shapes.

    Attributes:
      rows: of a block, 16, 32 or 64.
      columns: of a tile of each matrix, 64 or 128.
      stages: depth of the ring of loaded tiles.
      splits: parts of the contracted axis, whose sums are added after the kernel: as many as keep
        every multiprocessor busy.
    """

    rows: int | None = None
    columns: int | None = None
    stages: int | None = None
    splits: int | None = None


def refusal(x_dtype, inner: int, outer: int) -> str | None:
    """Says in a sentence why the kernel does not take such rows and matrices; None if it does."""
    if x_dtype != jnp.bfloat16:
        return (f"the int8 product got rows of {x_dtype}. It takes bfloat16; cast them, or pass "
                "None.")
    if inner % STEP or outer % 128:
        return (f"the int8 product got matrices of {outer} x {inner}. It takes multiples of 128; "
                "pass None.")
    return None


@functools.partial(jax.jit, static_argnames=("rows", "swiglu", "config", "interpret"))
def product(x_MK, w_LPENK, scale_LPEN, index_1, matrix_B, count_1, *, rows, swiglu=False,
            config=None, interpret=False):
    """Blocks of `rows` rows of x, each times its own matrix (or pair of matrices).

    Args:
      x_MK: bfloat16, M = blocks · rows; or what `two_parts_of` makes of such rows.
      w_LPENK: int8: layers, one or two matrices that a block takes together, experts, out, in.
      scale_LPEN: float32.
      index_1, matrix_B, count_1: int32: the layer, each block's expert, how many blocks count.
      swiglu: the pair is gate and up: return SiLU(gate) · up.

    Returns:
      float32 [P, N, M], or bfloat16 [N, M] with `swiglu`; what lies beyond the blocks that count
      may be anything.
    """
    # What makes plain rows fuses into the programs that cut them.
    parts_2MK, peak_M = x_MK if isinstance(x_MK, tuple) else two_parts(x_MK)
    (M, K), (P, E, N) = parts_2MK.shape[1:], w_LPENK.shape[1:4]
    config = config or Config()
    # Measured on an H200: 64 columns beat 128 for 1, 16, 64 and 256 tokens of experts (1: 110 us
    # beside 118, 64: 1,367 beside 1,437), and for 1 and 64 rows of the matrices of attention.
    W = config.columns or 64
    tiles = M // rows * (N // W)
    splits = config.splits or _splits(tiles, K // STEP)
    steps = K // STEP // splits
    one = STEP * (P * W + 2 * rows)
    stages = min(steps, config.stages or max(2, _shared_memory(tiles * splits) // one))
    fused = swiglu and splits == 1
    bf16, f32, int8 = jnp.bfloat16, jnp.float32, jnp.int8

    def int8_product(index, matrices, count, x, w, scale, peak, y, *, x_smem, w_smem, full,
                     done, out_smem=None):
        block, tile, split = (lax.axis_index(name) for name in ("block", "tile", "split"))
        columns, own_rows = pl.ds(tile * W, W), pl.ds(block * rows, rows)

        @pl.when(block < count[0])
        def _():
            layer, matrix = index[0], matrices[block]

            def fetch(i):
                slot = lax.rem(i, jnp.int32(stages))
                part = pl.ds((split * steps + i) * STEP, STEP)
                for p in range(P):
                    plgpu.copy_gmem_to_smem(
                        w.at[layer, p, matrix, columns, part], w_smem.at[slot, p], full.at[slot])
                plgpu.copy_gmem_to_smem(x.at[:, own_rows, part], x_smem.at[slot], full.at[slot])

            for i in range(stages):
                fetch(jnp.int32(i))

            def release(i):
                """All four warps are done with step i: its slot may be filled again."""
                plgpu.barrier_arrive(done)
                plgpu.barrier_wait(done)

                @pl.when(i + stages < steps)
                def _():
                    fetch(i + stages)

            def products(*accs):
                @pl.loop(0, steps)
                def _(i):
                    slot = lax.rem(i, jnp.int32(stages))
                    plgpu.barrier_wait(full.at[slot])
                    for p in range(P):
                        for half in range(2):
                            plgpu.wgmma(accs[2 * p + half], w_smem.at[slot, p],
                                        transposed(x_smem.at[slot, half]))
                    # One step stays in flight while the next one's operands are awaited.
                    plgpu.wgmma_wait(2 * P)

                    @pl.when(i > 0)
                    def _():
                        release(i - 1)

                return tuple(acc[...] for acc in accs)

            sums = pl.run_scoped(products, *[plgpu.ACC((W, rows), jnp.int32)] * (2 * P))
            by_row = load(peak.at[own_rows], layout=_WGMMA.reduce(0), optimized=False) / MOST

            def scaled(p):
                high, low = (total.astype(f32) for total in sums[2 * p:2 * p + 2])
                by_column = load(scale.at[layer, p, matrix, columns], layout=_WGMMA.reduce(1),
                                 optimized=False)
                return ((128 * high + low) * lax.broadcast_in_dim(by_row, (W, rows), [1])
                        * lax.broadcast_in_dim(by_column, (W, rows), [0]))

            if not fused:
                for p in range(P):
                    target = y.at[split, p, columns, own_rows]
                    target[...] = scaled(p)
                return
            gate, up = scaled(0), scaled(1)
            out_smem[...] = (gate / (1 + jnp.exp(-gate)) * up).astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, y.at[columns, own_rows])
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "x_smem": plgpu.SMEM((stages, 2, rows, STEP), int8, transforms=_TILES8),
        "w_smem": plgpu.SMEM((stages, P, W, STEP), int8, transforms=_TILES8),
        "full": plgpu.Barrier(num_arrivals=P + 1, num_barriers=stages),
        "done": plgpu.Barrier(),
    }
    if fused:
        lines = (plgpu.TilingTransform((8, rows)), plgpu.SwizzleTransform(2 * rows))
        scratch["out_smem"] = plgpu.SMEM((W, rows), bf16, transforms=lines)
    # Experts: tiles of a block run next to each other and share its rows through L2. One matrix:
    # blocks of a tile do, and share its weights.
    axes = [(M // rows, "block"), (N // W, "tile")]
    grid, names = zip(*(axes if E > 1 else axes[::-1]), (splits, "split"), strict=True)
    run = plgpu.kernel(
        int8_product,
        out_type=jax.ShapeDtypeStruct((N, M) if fused else (splits, P, N, M),
                                      bf16 if fused else f32),
        scratch_types=scratch,
        grid=grid, grid_names=names,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )
    # As many matrices as can be hit; what a step really reads, its tokens decide.
    weights = min(M // rows, E) * P * K * N
    results = (2 if fused else 4 * P * splits) * N * M
    with kernel_cost(4 * M * P * K * N, weights + 2 * K * M + results):
        y = run(index_1, matrix_B, count_1, parts_2MK, w_LPENK, scale_LPEN, peak_M)
    if fused:
        return y
    y = jnp.sum(y, axis=0)
    return (jax.nn.silu(y[0]) * y[1]).astype(bf16) if swiglu else y


def _shared_memory(blocks: int) -> int:
    """Bytes for a block's ring: two blocks share the 227 KiB of a multiprocessor, or three where
    then all of them run at once."""
    return 104 * 1024 if not 2 < blocks / _MULTIPROCESSORS <= 3 else 73 * 1024


def _splits(tiles: int, steps: int) -> int:
    """Enough parts for three blocks on each multiprocessor."""
    parts = 1
    while 2 * parts * tiles <= 3 * _MULTIPROCESSORS and steps % (2 * parts) == 0:
        parts *= 2
    return parts

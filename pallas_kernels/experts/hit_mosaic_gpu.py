"""A decode step's experts on Hopper GPUs, reading only the experts that are hit.

Rows are laid by expert into blocks of `rows`, so that an expert's few rows meet its matrices once.
One kernel multiplies such blocks by tiles of their expert's columns, with the weights as the left
operand: `y[columns, rows] = w[:, columns]^T x[:, rows]`. It runs twice, for gate and up with SiLU
at its end, and for down. Blocks of threads are small, so that several share a multiprocessor: all
tiles of one token are in flight at once, and many tokens have no idle end.

int8 weights have a kernel of their own, `hit_int8_mosaic_gpu`: casting them here, on their way to
the matrix unit, took a third longer than their bytes (64 tokens; H200).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.costs import kernel_cost
from pallas_kernels.grouped_matmul.stacked import stack
from pallas_kernels.lightning_attention.mosaic_gpu_block import TILES, transposed

MOST_ROWS = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning choices; `None` leaves one to the shapes.

    Attributes:
      rows: of a block, 16, 32 or 64; an expert with more has several blocks.
      columns: of a tile, 64 or 128.
      step: of the contracted axis, 64 or 128.
      stages: depth of the ring of loaded weights.
    """

    rows: int | None = None
    columns: int = 128
    step: int = 64
    stages: int | None = None


def refusal(g_TD, gate_up) -> str | None:
    """Says in a sentence why the kernel does not take these arguments; None if it does."""
    D, F = gate_up.shape[-2:]
    if g_TD.dtype != jnp.bfloat16 or gate_up.dtype != jnp.bfloat16:
        return (f"hit_experts 'mosaic_gpu' got tokens of {g_TD.dtype} and weights of "
                f"{gate_up.dtype}. It takes bfloat16 tokens and bfloat16 or turned int8 weights; "
                "cast or turn them, or pass None.")
    if D % 128 or F % 128:
        return (f"hit_experts 'mosaic_gpu' got matrices of {D} x {F}. It takes multiples of 128; "
                "pass None.")
    return None


def hit_experts(g_TD, weight_Tk, expert_Tk, gate_up, down, *, config=None, interpret=False):
    """As the public function; raises ValueError for a dtype or width that it does not take."""
    if sentence := refusal(g_TD, gate_up):
        raise ValueError(sentence)
    E = down.shape[0]
    config = config or Config()
    rows = config.rows or rows_of_block(expert_Tk.size, E)
    slot_M, source, plan = layout(expert_Tk, E, rows)
    (up_values, _, index), (down_values, _, _) = stack(gate_up), stack(down)
    plan = (index, *plan)
    # Rows of padding take token 0: their sums are finite and read by nobody.
    x_MD = jnp.take(g_TD, source, axis=0)
    call = functools.partial(_product, plan=plan, rows=rows, config=config, interpret=interpret)
    hidden_FM = call(x_MD, up_values)
    out_DM = call(hidden_FM.T, down_values[:, None])
    return sum_by_token(out_DM, slot_M, weight_Tk, expert_Tk, E)


def sum_by_token(out_DM, slot_M, weight_Tk, expert_Tk, E: int):
    """float32 [T, D]: each token's weighted rows of `out_DM`."""
    T, k = expert_Tk.shape
    out_TkD = jnp.take(out_DM, slot_M, axis=1).T.reshape(T, k, -1)
    # Ids of nobody, whose slots hold anything.
    mine_Tk1 = ((expert_Tk >= 0) & (expert_Tk < E))[..., None]
    return jnp.sum(jnp.where(mine_Tk1, out_TkD * weight_Tk[..., None], 0), axis=1)


def rows_of_block(pairs: int, experts: int) -> int:
    """A block holds twice an expert's mean: a second one reads its weights again, through L2."""
    for rows in (16, 32):
        if pairs <= rows // 2 * experts:
            return rows
    return MOST_ROWS


def layout(expert_Tk, E: int, rows: int):
    """Where each (token, choice) pair lies among blocks of one expert each.

    Returns:
      slot_M: int32 [T k], the row of each pair; 0 for ids outside 0 … E-1.
      source: int32 [blocks · rows], the token of each row, 0 for padding.
      plan: int32 [blocks], the expert of each block, and their number [1]; blocks are as many as
        can be needed, those beyond that number repeat the last.
    """
    (T, k), M = expert_Tk.shape, expert_Tk.size
    if T == 1:
        return _layout_of_one(expert_Tk[0], E, rows)
    blocks = M if M <= E else E + (M - E) // rows
    expert_M = expert_Tk.reshape(-1)
    hit_ME = (expert_M[:, None] == jnp.arange(E)).astype(jnp.int32)
    upto_ME = jnp.cumsum(hit_ME, axis=0)
    blocks_E = -(-upto_ME[-1] // rows)
    ends_E = jnp.cumsum(blocks_E)
    first_E = (ends_E - blocks_E) * rows
    slot_M = jnp.sum(hit_ME * (first_E + upto_ME - 1), axis=1)
    mine_M = jnp.any(hit_ME > 0, axis=1)
    token_M = jnp.arange(M, dtype=jnp.int32) // k
    source = jnp.zeros(blocks * rows, jnp.int32).at[
        jnp.where(mine_M, slot_M, blocks * rows)].set(token_M, mode="drop")
    place = jnp.minimum(jnp.arange(blocks), jnp.maximum(ends_E[-1] - 1, 0))
    experts = jnp.minimum(jnp.sum(place[:, None] >= ends_E, axis=1), E - 1)
    return slot_M, source, (experts.astype(jnp.int32), ends_E[-1:].astype(jnp.int32))


def _layout_of_one(expert_k, E: int, rows: int):
    """As `layout` for one token: a block for each choice, by scalars that make one program.

    Sums, scatters and gathers would each be a program of a few microseconds: 60 a step and layer.
    """
    k = expert_k.shape[0]
    each = [expert_k[j] for j in range(k)]
    mine = [((e >= 0) & (e < E)).astype(jnp.int32) for e in each]
    # Ids of nobody make no block, so that theirs is not read.
    blocks = [sum(mine[:j], jnp.int32(0)) for j in range(k + 1)]
    experts_k = jnp.stack([
        sum((m * (place == b) * e for m, place, e in zip(mine, blocks, each, strict=False)),
            jnp.int32(0)) for b in range(k)])
    slot_k = jnp.stack([m * place * rows for m, place in zip(mine, blocks, strict=False)])
    return slot_k, jnp.zeros(k * rows, jnp.int32), (experts_k, blocks[k][None])


@functools.partial(jax.jit, static_argnames=("rows", "config", "interpret"))
def _product(x_MK, w_LPEKN, *, plan, rows, config, interpret):
    """[N, M]: float32 products for one matrix (P = 1), or SiLU(gate) · up in bfloat16 for two."""
    M, K = x_MK.shape
    P, N = w_LPEKN.shape[1], w_LPEKN.shape[-1]
    W, step = config.columns, config.step
    steps, fused = K // step, P == 2
    bf16, f32 = jnp.bfloat16, jnp.float32
    # Two blocks share the 227 KiB of a multiprocessor.
    one = step * (P * W + rows) * 2
    stages = min(steps, config.stages or max(2, 106 * 1024 // one))

    def experts_product(index, experts, count, x, w, y, *, x_smem, w_smem, full, done,
                        out_smem=None):
        block, tile = lax.axis_index("block"), lax.axis_index("tile")
        columns, own_rows = pl.ds(tile * W, W), pl.ds(block * rows, rows)

        @pl.when(block < count[0])
        def _():
            layer, expert = index[0], experts[block]

            def fetch(i):
                slot, part = lax.rem(i, jnp.int32(stages)), pl.ds(i * step, step)
                for p in range(P):
                    plgpu.copy_gmem_to_smem(
                        w.at[layer, p, expert, part, columns],
                        w_smem.at[slot, pl.ds(p * step, step)], full.at[slot])
                plgpu.copy_gmem_to_smem(x.at[own_rows, part], x_smem.at[slot], full.at[slot])

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
                        plgpu.wgmma(accs[p], transposed(w_smem.at[slot, pl.ds(p * step, step)]),
                                    transposed(x_smem.at[slot]))
                    # One step stays in flight while the next one's operands are awaited.
                    plgpu.wgmma_wait(P)

                    @pl.when(i > 0)
                    def _():
                        release(i - 1)

                return tuple(acc[...] for acc in accs)

            sums = pl.run_scoped(products, *[plgpu.ACC((W, rows), f32)] * P)
            if not fused:
                target = y.at[columns, own_rows]
                target[...] = sums[0]
                return
            gate, up = sums
            out_smem[...] = (gate / (1 + jnp.exp(-gate)) * up).astype(bf16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem, y.at[columns, own_rows])
            plgpu.wait_smem_to_gmem(0)

    scratch = {
        "x_smem": plgpu.SMEM((stages, rows, step), bf16, transforms=TILES),
        "w_smem": plgpu.SMEM((stages, P * step, W), bf16, transforms=TILES),
        "full": plgpu.Barrier(num_arrivals=P + 1, num_barriers=stages),
        "done": plgpu.Barrier(),
    }
    if fused:
        row_tiles = (plgpu.TilingTransform((8, rows)), plgpu.SwizzleTransform(2 * rows))
        scratch["out_smem"] = plgpu.SMEM((W, rows), bf16, transforms=row_tiles)
    run = plgpu.kernel(
        experts_product,
        out_type=jax.ShapeDtypeStruct((N, M), bf16 if fused else f32),
        scratch_types=scratch,
        # Tiles of one block run next to each other: they share its rows through L2.
        grid=(M // rows, N // W), grid_names=("block", "tile"),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )
    # As many experts as can be hit; what a step really reads, its tokens decide.
    weights = min(M // rows, w_LPEKN.shape[2]) * P * K * N * 2
    with kernel_cost(2 * M * P * K * N, weights + 2 * K * M + (2 if fused else 4) * N * M):
        return run(*plan, x_MK, w_LPEKN)

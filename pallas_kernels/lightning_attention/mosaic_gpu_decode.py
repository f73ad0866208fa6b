"""Lightning attention for one token on Hopper GPUs: each state is read and written once, in place.

A block owns some columns of one head's state. TMA brings them to shared memory and takes them back;
several blocks share a multiprocessor, so that one's arithmetic hides behind the others' traffic.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.costs import kernel_cost
from pallas_kernels.lightning_attention.mosaic_gpu_block import load

# In-place updates came with jax 0.11, as the interpreter did.
AVAILABLE = hasattr(plgpu, "InterpretGPUParams")
_MULTIPROCESSORS = 132  # of an H100 or H200
_WGMMA = plgpu.Layout.WGMMA
_TILES = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Tuning choices.

    Attributes:
      columns: width of a block's share of a state, 32, 64 or 128.
      heads: states a block takes, neighbours of one row; a divisor of N. All of them are asked for
        before the first is worked on, so that later loads overlap earlier stores.
      resident: None for a block per `heads` states, else how many blocks stay on each
        multiprocessor and take the shares of all states in turn.
      stages: tiles of a resident block's ring, at least 2: loads of the next ones run while one is
        worked on and the one before it is stored.
    """

    columns: int = 64
    heads: int = 1
    resident: int | None = None
    stages: int = 3


def decode(
    q_BNH, k_BNH, v_BNH, slopes_N, states_PNHH, slots_B,
    *, config: DecodeConfig | None = None, interpret=False,
):
    """One step of `S = λ S + k^T v`, `o = q S` for the states in `slots_B`.

    Args:
      q_BNH, k_BNH, v_BNH: bfloat16, H = 64 or 128.
      slopes_N: float32; states_PNHH: float32, donate it to have it updated in place.
      slots_B: int32, each row's own state, no two alike; a negative slot is an inert row, whose
        output is zero.

    Returns:
      The output [B, N, H] bfloat16 and all states, those of `slots_B` updated.
    """
    B, N, H = q_BNH.shape
    config = config or DecodeConfig()
    W, G = min(config.columns, H), config.heads
    if any(x.dtype != jnp.bfloat16 for x in (q_BNH, k_BNH, v_BNH)):
        raise ValueError(
            f"the Mosaic GPU kernel takes bfloat16; got {q_BNH.dtype}. Cast q, k and v, or use "
            "implementation='xla' for float32."
        )
    if H not in (64, 128):
        raise ValueError(
            f"the Mosaic GPU kernel takes heads of 64 or 128; got {H}. Use implementation='xla'."
        )
    if W not in (32, 64, 128):
        raise ValueError(f"columns must be 32, 64 or 128; got {W}.")
    if G < 1 or N % G:
        raise ValueError(f"heads must divide {N}; got {G}.")
    if config.resident is not None and (config.resident < 1 or config.stages < 2 or G != 1):
        raise ValueError(f"{config}: resident must be at least 1, stages at least 2, heads 1.")
    if not AVAILABLE:
        raise ValueError(
            "the Mosaic GPU decode updates states in place, which needs jax 0.11 or newer; got "
            f"{jax.__version__}. Upgrade jax, or use implementation='xla'."
        )

    def vector(ref, layout):
        return load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def by_row(x):
        return lax.broadcast_in_dim(x, (H, W), [0])

    def vectors(q_ref, k_ref, v_ref, b, n, columns):
        rows = (vector(ref.at[b, n], _WGMMA.reduce(1)) for ref in (q_ref, k_ref))
        return *rows, vector(v_ref.at[b, n, columns], _WGMMA.reduce(0))

    def update(tile, decay, q, k, v):
        """The tile's state one token on, and what the query reads from it."""
        new = by_row(k) * lax.broadcast_in_dim(v, (H, W), [1])
        state = load(tile, layout=_WGMMA) * decay + new
        tile[...] = state
        plgpu.commit_smem()
        return jnp.sum(by_row(q) * state, axis=0).astype(jnp.bfloat16)

    def zeros():
        return plgpu.layout_cast(jnp.zeros((W,), jnp.bfloat16), _WGMMA.reduce(0))

    def lightning_decode(q_ref, k_ref, v_ref, slopes_ref, slots_ref, states_ref, out_ref,
                         tiles, arrived):
        b, first = lax.axis_index("batch"), lax.axis_index("head") * G
        columns = pl.ds(lax.axis_index("column") * W, W)
        slot = slots_ref[b]

        def step(g):
            n, tile = first + g, tiles.at[g]
            token = vectors(q_ref, k_ref, v_ref, b, n, columns)
            decay = jnp.exp(-slopes_ref[n])
            plgpu.barrier_wait(arrived.at[g])
            out = update(tile, decay, *token)
            plgpu.copy_smem_to_gmem(tile, states_ref.at[slot, n, :, columns])
            out_ref[b, n, columns] = out

        @pl.when(slot >= 0)
        def _():
            for g in range(G):
                source = states_ref.at[slot, first + g, :, columns]
                plgpu.copy_gmem_to_smem(source, tiles.at[g], arrived.at[g])
            for g in range(G):
                step(g)
            plgpu.wait_smem_to_gmem(0)

        @pl.when(slot < 0)
        def _():
            for g in range(G):
                out_ref[b, first + g, columns] = zeros()

    splits = H // W
    items, stages = B * N * splits, config.stages
    blocks = min(_MULTIPROCESSORS * (config.resident or 1), items)

    def lightning_decode_resident(q_ref, k_ref, v_ref, slopes_ref, slots_ref, states_ref, out_ref,
                                  tiles, arrived):
        block = lax.axis_index("block")
        count = lax.div(items - block + (blocks - 1), jnp.int32(blocks))

        def place(i):
            item = block + i * blocks
            head = lax.div(item, jnp.int32(splits))
            columns = pl.ds(lax.rem(item, jnp.int32(splits)) * W, W)
            b = lax.div(head, jnp.int32(N))
            return b, lax.rem(head, jnp.int32(N)), columns, slots_ref[b]

        def fetch(i):
            b, n, columns, slot = place(i)
            turn = lax.rem(i, jnp.int32(stages))

            @pl.when(slot >= 0)
            def _():
                source = states_ref.at[slot, n, :, columns]
                plgpu.copy_gmem_to_smem(source, tiles.at[turn], arrived.at[turn])

        def token_of(i):
            return vectors(q_ref, k_ref, v_ref, *place(i)[:3])

        for i in range(stages - 1):
            pl.when(i < count)(lambda i=i: fetch(jnp.int32(i)))

        def step(i, token):
            b, n, columns, slot = place(i)
            turn = lax.rem(i, jnp.int32(stages))
            # Asked for a step ahead, so that they are here when they are needed.
            ahead = token_of(jnp.minimum(i + 1, count - 1))

            @pl.when(slot >= 0)
            def _():
                plgpu.barrier_wait(arrived.at[turn])
                out = update(tiles.at[turn], jnp.exp(-slopes_ref[n]), *token)
                plgpu.copy_smem_to_gmem(tiles.at[turn], states_ref.at[slot, n, :, columns])
                out_ref[b, n, columns] = out
                # The tile before this one is free once its store has read it.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)

            @pl.when(slot < 0)
            def _():
                out_ref[b, n, columns] = zeros()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            pl.when(i + stages - 1 < count)(lambda: fetch(i + stages - 1))
            return ahead

        lax.fori_loop(0, count, step, token_of(jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0)

    if config.resident is None:
        kernel, tiles = lightning_decode, G
        grid, names = (B, N // G, splits), ("batch", "head", "column")
    else:
        kernel, tiles, grid, names = lightning_decode_resident, stages, (blocks,), ("block",)
    states = jax.new_ref(states_PNHH)
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((B, N, H), jnp.bfloat16),
        scratch_types=[
            plgpu.SMEM((tiles, H, W), jnp.float32, transforms=_TILES),
            plgpu.Barrier(num_barriers=tiles),
        ],
        grid=grid,
        grid_names=names,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )
    # Of a pool those states that have a row: as many as there are.
    with kernel_cost(5 * B * N * H * H, 8 * B * N * H * H):
        out = run(q_BNH, k_BNH, v_BNH, jnp.asarray(slopes_N, jnp.float32),
                  slots_B.astype(jnp.int32), states)
    return out, jax.freeze(states)

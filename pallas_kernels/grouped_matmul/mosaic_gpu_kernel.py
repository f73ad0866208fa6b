"""Our grouped products for Hopper GPUs: one persistent kernel (Pallas Mosaic GPU).

An item is a tile of one group's rows times a band of columns. Blocks stay on their multiprocessor
and walk over the list of items; a loader warpgroup keeps a ring of tiles of x and of the weights
full through TMA, also across the end of an item, and two warpgroups multiply, the first up to half
a tile's most rows, the second what lies beyond. What an item stores leaves while the next one is
computed.

Tiles begin where their group begins and are as even as units of 64 rows allow; a warpgroup
multiplies no more units than it has. Items of one band and one group follow each other: they run
at the same time, and share weights through L2; two blocks of a cluster share them for certain.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.costs import kernel_cost
from pallas_kernels.grouped_matmul import tiles
from pallas_kernels.grouped_matmul.mosaic_gpu_items import items_of
from pallas_kernels.grouped_matmul.mosaic_gpu_pace import keep_pace
from pallas_kernels.grouped_matmul.stacked import stack
from pallas_kernels.lightning_attention.mosaic_gpu_block import IN_PLACE, load, transposed
from pallas_kernels.once import once

K = 64  # inner columns of a tile: 128 bytes, the widest swizzle
_UNIT = 64  # rows that the matrix unit takes at once
_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# The same bytes as rows one by one, so that TMA takes any first row and any number of rows.
_ROWS = (plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning choices.

    Attributes:
      rows: most rows of a block's tile, 128 or 256; half of them for each of two warpgroups.
      columns: columns of each product of an item, 64, 128 or 256. `rows * columns` times the
        number of products (2 for gate and up) is at most 32,768: the accumulators' registers.
      stages: depth of the ring of loaded tiles.
      together: row tiles of a group that run next to each other over the same columns.
      cluster: 2 lets two neighbouring blocks load once what both need: `shared`.
      shared: "x", and they take neighbouring bands; or "w", and they take neighbouring rows, up to
        twice `rows` of them.
      paced: programs ahead of the others wait before an item (`mosaic_gpu_pace`). Needs jax 0.11,
        and a function that nobody differentiates: its counter is an array that changes in place.
      blocks: how many blocks run; an H200 has 132 multiprocessors.
    """

    rows: int = 128
    columns: int | None = None
    stages: int = 4
    together: int = 16
    cluster: int = 1
    shared: str = "x"
    paced: bool = False
    blocks: int = 132


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What a compiled kernel depends on beside its arrays."""

    parts: int  # products of an item: 1, or gate and up
    E: int
    D: int
    F: int
    half: int  # rows of a warpgroup
    columns: int
    stages: int
    cluster: int
    shared: str
    paced: bool
    programs: int
    turned: bool  # each matrix lies [F, D]
    scaled: bool
    interpret: bool

    @property
    def width(self) -> int:
        """Columns that are multiplied at once.

        Gate's and up's lie in shared memory side by side, as those of one matrix: apart, 64 and 64,
        the matrix unit reads x twice and waits for shared memory.
        """
        return self.parts * self.columns

    @property
    def heights(self) -> tuple[int, ...]:
        """Rows that a warpgroup multiplies: as few as hold its own, of what wgmma takes."""
        return tuple(range(_UNIT, self.half + 1, _UNIT))

    @property
    def chunk(self) -> int:
        """Columns that are laid in shared memory and stored at a time."""
        return min(self.columns, 8192 // self.half)


def grouped_matmul(x_MD, w_EDF, group_sizes_E, *, config: Config | None = None, interpret=False,
                   turned: bool = False, scale_EF=None, pace: bool = True):
    """As the public function, for bfloat16 x and plain or stacked bfloat16 weights.

    turned: the weights lie [E, F, D]; the matrix unit reads bfloat16 either way.
    scale_EF: float32, multiplies the columns of the products before they are rounded.
    pace: False takes listed tiles that need no counter in memory.

    Raises ValueError for widths or a configuration that do not fit.
    """
    return _run(x_MD, w_EDF, group_sizes_E, 1, config, interpret, turned, scale_EF, pace)


def grouped_swiglu(x_MD, w_2EDF, group_sizes_E, *, config: Config | None = None, interpret=False,
                   turned: bool = False, scale_2EF=None, pace: bool = True):
    """As the public function; SiLU and the product with up happen in registers, in float32."""
    return _run(x_MD, w_2EDF, group_sizes_E, 2, config, interpret, turned, scale_2EF, pace)


def _run(x_MD, weight, group_sizes_E, parts, config, interpret, turned, scale_EF, pace):
    values, scale, layer_1 = stack(weight)
    E, *matrix = values.shape[-3:]
    D, F = matrix[::-1] if turned else matrix
    if config is None:
        # Listed for 32 groups: their mean size counts.
        found = tiles.listed("hopper", x_MD.shape[0] * 32 // E, D, parts * F)
        unpaced = found.pop("unpaced", found)
        config = Config(**(found if pace and IN_PLACE else unpaced))
    columns = config.columns or 32768 // (config.rows * parts)
    taller = config.cluster if config.shared == "w" else 1
    wider = config.cluster // taller
    if config.columns is None and F % (columns * wider):
        columns = 64 * (1 + (F % (128 * wider) == 0))
    if scale is not None or x_MD.dtype != jnp.bfloat16 or values.dtype != jnp.bfloat16:
        raise ValueError(f"the Mosaic GPU kernel takes bfloat16; got x of {x_MD.dtype} and w of "
                         f"{values.dtype}. Cast them, or pass None.")
    if D % K or F % (columns * wider):
        raise ValueError(f"the Mosaic GPU kernel got matrices of {(D, F)}. It takes multiples of "
                         f"{(K, columns * wider)} with {config}; pass None.")
    if (config.rows not in (128, 256) or columns not in (64, 128, 256) or config.stages < 2
            or config.rows * columns * parts > 32768):
        raise ValueError(f"{config} does not fit: rows are 128 or 256, columns 64, 128 or 256, "
                         f"rows x columns x {parts} products at most 32,768, stages at least 2.")
    rows_M, half = x_MD.shape[0], config.rows // 2
    x_MD = jnp.pad(x_MD, ((0, max(config.rows - rows_M, 0)), (0, 0)))  # a TMA box fits its tensor
    M = x_MD.shape[0]
    programs = max(config.blocks // config.cluster, 1)
    s = _Shape(parts, E, D, F, half, columns, config.stages, config.cluster, config.shared,
               config.paced and IN_PLACE and not interpret, programs, turned,
               scale_EF is not None, bool(interpret))
    items, count = items_of(group_sizes_E, M, config.rows * taller, F // (columns * wider),
                            config.together, parts == 1, _UNIT * taller, programs)
    header = jnp.concatenate([count.reshape(1), layer_1])
    rows_of_all = values.reshape(-1, E * matrix[0], matrix[1])
    if parts == 2 and not turned and not interpret:
        rows_of_all = rows_of_all.reshape(-1, E * D // 8, 8, F)
    if scale_EF is None:
        scale_EF = jnp.zeros((1, 1), jnp.float32)  # for nobody
    scale = scale_EF.reshape(-1, *scale_EF.shape[-2:])
    out_MF = _call(s, header, items, x_MD, rows_of_all, scale, interpret=interpret)
    return out_MF[:rows_M]


@once
def _call(s: _Shape, header, items, x_MD, w, scale, *, interpret):
    bf16 = jnp.bfloat16
    x_tiles = plgpu.SMEM((s.stages, 2 * s.half, K), bf16, transforms=_TILES)
    if not interpret:  # the interpreter moves logical arrays
        x_tiles = plgpu.RefUnion(
            x_tiles, plgpu.SMEM((s.stages, 2 * s.half, K), bf16, transforms=_ROWS))
    w_tiles = plgpu.SMEM((s.stages, *_turn(s, K, s.width)), bf16, transforms=_TILES)
    if s.parts == 2 and not interpret:
        # The same bytes as TMA brings them: of 8 rows gate's columns, then up's. Turned, all of
        # gate's, then up's.
        brought = (s.parts, s.columns, K) if s.turned else (K // 8, s.parts, 8, s.columns)
        w_tiles = plgpu.RefUnion(w_tiles, plgpu.SMEM((s.stages, *brought), bf16,
                                                     transforms=_TILES))
    if s.cluster > 1:
        empty = plgpu.ClusterBarrier(collective_axes=("cluster",), num_arrivals=2,
                                     num_barriers=s.stages)
        cluster = dict(cluster=(s.cluster,), cluster_names=("cluster",))
    else:
        empty = plgpu.Barrier(num_arrivals=2, num_barriers=s.stages)
        cluster = {}

    def kernel(*refs, **scratch):
        names = ("header", "items", "x", "w", "scale", *["pace"] * s.paced, "out")
        _Block(s, dict(zip(names, refs, strict=True)) | scratch).run()

    kernel.__name__ = "grouped_swiglu" if s.parts == 2 else "grouped_matmul"
    pace = [jax.new_ref(jnp.zeros(1 + s.programs, jnp.int32))] if s.paced else []
    run = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((x_MD.shape[0], s.F), bf16),
        scratch_types={
            "x_tiles": x_tiles,
            "w_tiles": w_tiles,
            # Without a layout of ours: a store may begin and end at any row.
            "out_tiles": plgpu.SMEM((2, s.half, s.chunk), bf16),
            "full": plgpu.Barrier(num_arrivals=2 + bool(s.parts == 2 and interpret),
                                  num_barriers=s.stages),
            "empty": empty,
        },
        grid=(s.programs,), grid_names=("program",), **cluster,
        num_threads=3, thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret or None,
    )
    M, weights = x_MD.shape[0], s.E * s.parts * s.D * s.F
    with kernel_cost(2 * M * s.parts * s.D * s.F, 2 * (weights + M * (s.D + s.F))):
        return run(header, items, x_MD, w, scale, *pace)


def _turn(s: _Shape, inner, column):
    """Both in the order in which a matrix has them."""
    return (column, inner) if s.turned else (inner, column)


class _Block:
    """The program of one block: a loader and two warpgroups that multiply."""

    def __init__(self, s: _Shape, refs: dict):
        self.s, self.refs = s, refs
        self.x = self.x_tma = refs["x_tiles"]
        self.w = self.w_tma = refs["w_tiles"]
        if not s.interpret:
            self.x, self.x_tma = refs["x_tiles"]
            if s.parts == 2:
                self.w, self.w_tma = refs["w_tiles"]
        self.program = lax.axis_index("program")
        self.count, self.layer = refs["header"][0], refs["header"][1]

    def run(self):
        group = lax.axis_index("warpgroup")

        @pl.when(group < 2)
        def _():
            plgpu.set_max_registers(232, action="increase")
            self.walk(lambda item, step: self.multiply(group, item, step))
            plgpu.wait_smem_to_gmem(0)

        @pl.when(group == 2)
        def _():
            plgpu.set_max_registers(40, action="decrease")
            self.drain(self.walk(self.load))

    def walk(self, visit):
        """Calls `visit(item, step)` for this block's items; returns how many steps they took."""
        s, items = self.s, self.refs["items"]
        turns = lax.div(self.count - self.program + (s.programs - 1), jnp.int32(s.programs))

        def turn(i, step):
            at = self.program + i * s.programs
            expert, start, rows, band = (items[at * 4 + field] for field in range(4))
            if s.cluster > 1:
                place = lax.axis_index("cluster")
                if s.shared == "x":
                    band = band * s.cluster + place
                else:
                    share = lax.div(rows + (_UNIT * s.cluster - 1), jnp.int32(_UNIT * s.cluster))
                    before = jnp.minimum(place * share * _UNIT, rows)
                    rows = jnp.minimum(rows - before, share * _UNIT)
                    # A block without rows loads some that it does not use.
                    start = start + jnp.where(rows > 0, before, 0)
            # Rows of no group: nothing is multiplied, and the zeros are stored.
            steps = jnp.where(expert < s.E, s.D // K, 0)
            visit((expert, start, rows, band * s.columns, steps), step)
            return step + steps

        return lax.fori_loop(0, turns, turn, jnp.int32(0))

    def load(self, item, step):
        s, refs = self.s, self.refs
        expert, start, rows, column, steps = item
        if s.paced:
            keep_pace(refs["pace"], refs["header"], s.programs)
        both = {name: dict(collective_axes="cluster") if s.cluster > 1 and s.shared == name else {}
                for name in "xw"}

        @pl.loop(0, steps)
        def _(k):
            slot = lax.rem(step + k, jnp.int32(s.stages))
            full = refs["full"].at[slot]

            @pl.when(step + k >= s.stages)
            def _():
                plgpu.barrier_wait(refs["empty"].at[slot])

            # One copy for each operand: every thread of the warpgroup arrives for every copy.
            for source, target in self.weights(expert, k, column, slot):
                plgpu.copy_gmem_to_smem(source, target, full, **both["w"])

            def load_x(size):
                source = refs["x"].at[pl.ds(start, size), pl.ds(k * K, K)]
                target = self.x_tma.at[slot, pl.ds(0, size)]
                plgpu.copy_gmem_to_smem(source, target, full, **both["x"])

            sizes = (*s.heights, 2 * s.half)
            for size, fewer in zip(sizes, (-1, *sizes), strict=False):
                last = size == 2 * s.half

                @pl.when((rows > fewer) if last else (rows > fewer) & (rows <= size))
                def _(size=size):
                    load_x(size)

    def weights(self, expert, k, column, slot):
        """Pairs of weights in memory and where they go."""
        s, w, target = self.s, self.refs["w"], self.w_tma.at[slot]
        columns = pl.ds(column, s.columns)
        if s.parts == 1:
            (row, rows), (at, width) = _turn(s, (k * K, K), (column, s.columns))
            first = expert * (s.F if s.turned else s.D) + row
            return [(w.at[self.layer, pl.ds(first, rows), pl.ds(at, width)], target)]
        both = pl.ds(self.layer * 2, 2)
        if s.interpret:  # whose tiles have no other shape
            def half(part):
                return pl.ds(part * s.columns, s.columns)

            if s.turned:
                lies = pl.ds(expert * s.F + column, s.columns), pl.ds(k * K, K)
                goes = [target.at[half(part), :] for part in range(2)]
            else:
                lies = pl.ds(expert * s.D + k * K, K), columns
                goes = [target.at[:, half(part)] for part in range(2)]
            return [(w.at[(self.layer * 2 + part, *lies)], goes[part]) for part in range(2)]
        if s.turned:
            return [(w.at[both, pl.ds(expert * s.F + column, s.columns), pl.ds(k * K, K)], target)]
        eighths = pl.ds(expert * (s.D // 8) + k * (K // 8), K // 8)
        source = w.at[both, eighths, :, columns]
        return [(source, plgpu.transpose_ref(target, (1, 0, 2, 3)))]

    def drain(self, total):
        """Awaits the last releases: no barrier, nor a neighbour's arrival, is left behind."""
        s = self.s

        @pl.loop(jnp.maximum(total - s.stages, 0), total)
        def _(step):
            plgpu.barrier_wait(self.refs["empty"].at[lax.rem(step, jnp.int32(s.stages))])

    def multiply(self, group, item, step):
        s, refs = self.s, self.refs
        expert, start, rows, column, steps = item
        mine = jnp.clip(rows - group * s.half, 0, s.half)

        def slot_of(k):
            return lax.rem(step + k, jnp.int32(s.stages))

        def multiplied(height):
            def products(acc):
                @pl.loop(0, steps)
                def _(k):
                    slot = slot_of(k)
                    plgpu.barrier_wait(refs["full"].at[slot])
                    left = self.x.at[slot, pl.ds(group * s.half, height)]
                    right = self.w.at[slot]
                    plgpu.wgmma(acc, left, transposed(right) if s.turned else right)
                    # The step before is done: its tiles may go while this one still runs.
                    plgpu.wgmma_wait(1)

                    @pl.when(k > 0)
                    def _():
                        plgpu.barrier_arrive(refs["empty"].at[slot_of(k - 1)])

                return acc[...]

            out = pl.run_scoped(products, plgpu.ACC((height, s.width), jnp.float32))

            @pl.when(steps > 0)
            def _():
                plgpu.barrier_arrive(refs["empty"].at[slot_of(steps - 1)])

            parts = [out[:, part * s.columns:(part + 1) * s.columns] for part in range(s.parts)]
            if s.scaled:
                # Rows of no group have no matrix, and zeros.
                own = jnp.minimum(expert, s.E - 1)
                parts = [product * self.scale(part, own, column, height)
                         for part, product in enumerate(parts)]
            out = parts[0]
            if s.parts == 2:
                out = out / (1 + jnp.exp(-out)) * parts[1]
            self.store(group, out.astype(jnp.bfloat16), start + group * s.half, mine, column)

        for height, fewer in zip(s.heights, (0, *s.heights), strict=False):
            @pl.when((mine > fewer) & (mine <= height))
            def _(height=height):
                multiplied(height)

        @pl.when(mine <= 0)
        def _():
            @pl.loop(0, steps)
            def _(k):
                plgpu.barrier_wait(refs["full"].at[slot_of(k)])
                plgpu.barrier_arrive(refs["empty"].at[slot_of(k)])

    def scale(self, part, expert, column, height):
        s = self.s
        by_column = load(self.refs["scale"].at[part, expert, pl.ds(column, s.columns)],
                         layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return lax.broadcast_in_dim(by_column, (height, s.columns), [1])

    def store(self, group, out, start, mine, column):
        """Stores the first `mine` rows: all, or copies of 1, 2, 4, ... rows that sum to them."""
        s, height = self.s, out.shape[0]
        tile = self.refs["out_tiles"].at[group, pl.ds(0, height)]
        for at in range(0, s.columns, s.chunk):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile[...] = out[:, at:at + s.chunk]
            plgpu.commit_smem()
            rows = height
            while rows:
                @pl.when(mine & rows != 0)
                def _(rows=rows, at=at):
                    before = mine - mine % (2 * rows) if rows < height else 0
                    plgpu.copy_smem_to_gmem(
                        tile.at[pl.ds(before, rows)],
                        self.refs["out"].at[pl.ds(start + before, rows),
                                            pl.ds(column + at, s.chunk)])
                rows //= 2

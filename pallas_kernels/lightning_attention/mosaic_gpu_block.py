"""The program of one thread block of lightning attention on Hopper GPUs.

One block owns one head's value columns (or a half of them) and walks over the chunks of a
sequence; nothing but the state travels between chunks. Its warpgroups work on different chunks
at the same time:

* the loader keeps a ring of shared-memory stages filled with q, k and v through TMA;
* the state warpgroup carries the state in float32 registers, and lays a bfloat16 copy of it into
  shared memory before each chunk's update;
* the output warpgroups take chunks in turn: masked scores, times values, plus q times the state.

All exponents
are ≤ 0: the decayed mask is never factored into λ^r and λ^-c, which overflows for fast heads.
"""

import dataclasses
import inspect

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Whether kernels may change arrays in place: that came with jax 0.11, as the interpreter did.
IN_PLACE = hasattr(plgpu, "InterpretGPUParams")
C = 64  # rows of a chunk: those of one warpgroup's matrix instruction
# Integers per chunk of packed samples: where each row's own sample begins (ends, for `reverse`);
# from and to of the rows of the incoming state's sample, and of the outgoing one's; whether these
# two are one sample, and whether all is; and what makes TMA's 128 bytes whole.
MARKS = C + 32
_WGMMA = plgpu.Layout.WGMMA
_ROW = _WGMMA.reduce(1)  # one value per row
TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Of tiles 64 columns wide, the same bytes as rows one by one: TMA then takes any T, where tiles of
# 8 rows would need a multiple of 8.
ROWS = (plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one compiled pass depends on beside its tensors."""

    roles: tuple[tuple[int, int, int], ...]  # which tensors stand for q, k and v
    reverse: bool
    lengths: bool
    samples: bool
    outputs: bool  # False: only states, of what the windows name of each head for each part
    T: int
    H: int
    parts: int
    chunks_per_part: int
    value_splits: int
    stages: int
    output_warpgroups: int
    scores_in_registers: bool
    queries_in_registers: bool
    interpret: bool

    @property
    def width(self) -> int:
        return self.H // self.value_splits

    @property
    def chunks(self) -> int:
        return -(-self.T // C)

    @property
    def row_copies(self) -> bool:
        """Whether TMA must see single rows. The interpreter moves logical arrays: never."""
        return self.T % 8 != 0 and not self.interpret

    @property
    def ragged(self) -> bool:
        return self.lengths or not self.outputs or self.T % C != 0


class Block:
    """The program of one block; a method per kind of warpgroup."""

    def __init__(self, shape: Shape, refs: dict):
        self.s, self.refs, self.tma = shape, refs, refs
        if shape.row_copies:
            pairs = {x: tuple(refs[x]) for x in ("q", "k", "v", "out_smem") if x in refs}
            self.refs = refs | {x: pair[0] for x, pair in pairs.items()}
            self.tma = refs | {x: pair[1] for x, pair in pairs.items()}
        self.b, self.n = lax.axis_index("batch"), lax.axis_index("head")
        self.part = lax.axis_index("part")
        column = lax.axis_index("column")
        self.role = lax.div(column, jnp.int32(shape.value_splits))
        self.columns = pl.ds(lax.rem(column, jnp.int32(shape.value_splits)) * shape.width,
                             shape.width)
        self.slope = refs["slopes"][self.n]
        if not shape.outputs:
            self.first, stop, self.low, self.length = (
                refs["windows"][self.b, self.part, self.n, i] for i in range(4))
            self.count = stop - self.first
            return
        self.length = refs["lengths"][self.b] if shape.lengths else jnp.int32(shape.T)
        self.first = self.part * shape.chunks_per_part
        filled = lax.div(self.length + (C - 1), jnp.int32(C))
        self.count = jnp.clip(filled - self.first, 0, shape.chunks_per_part)

    def run(self):
        group = lax.axis_index("warpgroup")
        groups = self.s.output_warpgroups if self.s.outputs else 0
        # The warpgroups share 65,536 registers, 512 for each of the 128 threads in one. With fewer
        # the loader spills.
        output, state, load = {0: (0, 232, 40), 1: (232, 232, 40), 2: (160, 152, 40)}[groups]

        if self.s.outputs:
            @pl.when(group < groups)
            def _():
                plgpu.set_max_registers(output, action="increase")
                self.write_outputs(group, groups)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(state, action="increase")
            self.carry_state()

        @pl.when(group == groups + 1)
        def _():
            plgpu.set_max_registers(load, action="decrease")
            self.load()

    def chunk(self, i):
        """Chunk of step i."""
        return self.first + (self.count - 1 - i if self.s.reverse else i)

    def rows(self, chunk):
        """How many of the chunk's rows are tokens: C itself, where that is known."""
        if not self.s.ragged:
            return C
        return jnp.minimum(self.length - chunk * C, C)

    def decay(self, distance):
        """λ^distance for integer distances ≥ 0."""
        return jnp.exp(-self.slope * distance.astype(jnp.float32))

    def load(self):
        s, refs = self.s, self.refs
        @pl.loop(0, self.count)
        def _(i):
            slot = lax.rem(i, jnp.int32(s.stages))
            chunk = self.chunk(i)
            barrier = refs["full"].at[slot]

            @pl.when(i >= s.stages)
            def _():
                plgpu.barrier_wait(refs["empty"].at[slot])

            def copy(tensor, columns, target):
                source = refs[f"x{tensor}"].at[self.b, pl.ds(chunk * C, C), self.n, columns]
                plgpu.copy_gmem_to_smem(source, target, barrier)

            for role, (q, k, v) in enumerate(s.roles):
                @pl.when(self.role == role)
                def _(q=q, k=k, v=v):
                    for half in range(s.H // 64):
                        columns = pl.ds(half * 64, 64)
                        copy(k, columns, self.tma["k"].at[slot * (s.H // 64) + half])
                        if s.outputs:
                            copy(q, columns, self.tma["q"].at[slot * (s.H // 64) + half])
                    copy(v, self.columns, self.tma["v"].at[slot])

            if s.samples:
                plgpu.copy_gmem_to_smem(
                    refs["marks"].at[self.b, chunk], refs["marks_smem"].at[slot], barrier
                )

        self.drain("empty", s.stages)

    def drain(self, name, ring):
        """Awaits the last releases of a ring: no barrier is left in the middle of a phase."""
        @pl.loop(jnp.maximum(self.count - ring, 0), self.count)
        def _(i):
            plgpu.barrier_wait(self.refs[name].at[lax.rem(i, jnp.int32(ring))])

    def carry_state(self):
        s, refs = self.s, self.refs
        halves = range(s.H // 64)  # of the state's rows

        def global_state(name, part, half):
            return refs[name].at[
                self.role, self.b, part, self.n, pl.ds(half * 64, 64), self.columns]

        if "incoming" in refs:
            state = tuple(
                load(global_state("incoming", self.part, h), layout=_WGMMA, optimized=False)
                for h in halves)
        else:
            zeros = jnp.zeros((64, s.width), jnp.float32)
            state = tuple(plgpu.layout_cast(zeros, _WGMMA) for _ in halves)
        row = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=_ROW)

        def step(i, state):
            slot, buffer = lax.rem(i, jnp.int32(s.stages)), lax.rem(i, jnp.int32(2))
            chunk = self.chunk(i)
            rows = self.rows(chunk)
            if s.outputs:
                @pl.when(i >= 2)
                def _():
                    plgpu.barrier_wait(refs["free"].at[buffer])

                for h in halves:
                    refs["states"][buffer * len(halves) + h] = state[h].astype(jnp.bfloat16)
                plgpu.commit_smem()
                plgpu.barrier_arrive(refs["ready"].at[buffer])

            plgpu.barrier_wait(refs["full"].at[slot])
            distance = row + 1 if s.reverse else jnp.maximum(rows - 1 - row, 0)
            enters, stays = row < rows, self.decay(jnp.asarray(rows, jnp.int32))
            if not s.outputs:
                enters = enters & (row >= self.low - chunk * C)
            decay_C = self.decay(distance)
            if s.ragged:
                decay_C = jnp.where(enters, decay_C, 0.0)
            if s.samples:
                marks = refs["marks_smem"].at[slot]
                stays = jnp.where(marks[C + 4] != 0, stays, 0.0)
                of_target = (row >= marks[C + 2]) & (row < marks[C + 3])
                decay_C = jnp.where(of_target, decay_C, 0.0)
            v = load(refs["v"].at[slot], layout=_WGMMA).astype(jnp.float32)
            decayed = v * lax.broadcast_in_dim(decay_C, v.shape, [0])
            refs["decayed"][...] = decayed.astype(jnp.bfloat16)
            plgpu.commit_smem()
            keys = [transposed(refs["k"].at[slot * len(halves) + h]) for h in halves]
            state = self.accumulate([state[h] * stays for h in halves], keys, refs["decayed"])
            plgpu.barrier_arrive(refs["empty"].at[slot])
            return state

        state = lax.fori_loop(0, self.count, step, state)
        if s.outputs:
            self.drain("free", 2)
            last = self.part == (0 if s.reverse else s.parts - 1)
            part = 0
        else:
            last, part = True, self.part

        @pl.when(last)
        def _():
            for h in halves:
                ref = global_state("outgoing", part, h)
                ref[...] = state[h]

    def write_outputs(self, group, groups):
        s, refs = self.s, self.refs
        row = plgpu.broadcasted_iota(jnp.int32, (C, C), 0, layout=_WGMMA)
        column = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=_WGMMA)
        ahead = column - row if s.reverse else row - column
        mask = jnp.where(ahead >= 0, self.decay(jnp.maximum(ahead, 0)), 0.0)
        row_C = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=_ROW)
        out_smem, halves = refs["out_smem"].at[group], range(s.H // 64)

        def store(chunk):
            plgpu.commit_smem()
            for role in range(len(s.roles)):
                @pl.when(self.role == role)
                def _(role=role):
                    target = refs[f"out{role}"].at[
                        self.b, pl.ds(chunk * C, C), self.n, self.columns]
                    plgpu.copy_smem_to_gmem(self.tma["out_smem"].at[group], target)

        @pl.loop(0, lax.div(self.count - group + (groups - 1), jnp.int32(groups)))
        def _(turn):
            i = turn * groups + group
            slot, buffer = lax.rem(i, jnp.int32(s.stages)), lax.rem(i, jnp.int32(2))
            chunk = self.chunk(i)
            rows = self.rows(chunk)
            plgpu.barrier_wait(refs["full"].at[slot])
            tiles = [slot * len(halves) + h for h in halves]
            queries = [refs["q"].at[tile] for tile in tiles]
            if s.queries_in_registers:
                queries = [load(q, layout=_WGMMA) for q in queries]
            plgpu.barrier_wait(refs["ready"].at[buffer])

            def products(scores_acc, inter_acc):
                for h in halves:
                    plgpu.wgmma(scores_acc, queries[h], transposed(refs["k"].at[tiles[h]]))
                for h in halves:
                    states = refs["states"].at[buffer * len(halves) + h]
                    plgpu.wgmma(inter_acc, queries[h], states)
                # The scores are masked while the second product still runs.
                scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=len(halves))
                scores = self.mask(scores, mask, slot).astype(jnp.bfloat16)
                return scores, inter_acc[...]

            scores, out = pl.run_scoped(
                products, plgpu.ACC((C, C), jnp.float32), plgpu.ACC((C, s.width), jnp.float32)
            )
            plgpu.barrier_arrive(refs["free"].at[buffer])
            decay_C = self.decay(jnp.maximum(rows - 1 - row_C, 0) if s.reverse else row_C + 1)
            if s.samples:
                marks = refs["marks_smem"].at[slot]
                of_source = (row_C >= marks[C]) & (row_C < marks[C + 1])
                decay_C = jnp.where(of_source, decay_C, 0.0)
            out = out * lax.broadcast_in_dim(decay_C, out.shape, [0])
            if not s.scores_in_registers:
                refs["scores"][group] = scores
                plgpu.commit_smem()
                scores = refs["scores"].at[group]
            (out,) = self.accumulate([out], [scores], refs["v"].at[slot])
            plgpu.barrier_arrive(refs["empty"].at[slot])
            if s.lengths:
                inside = lax.broadcast_in_dim(row_C, out.shape, [0]) < rows
                out = jnp.where(inside, out, 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = out.astype(jnp.bfloat16)
            store(chunk)

        if s.lengths:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            zeros = jnp.zeros((C, s.width), jnp.bfloat16)
            out_smem[...] = plgpu.layout_cast(zeros, _WGMMA)
            own = jnp.clip(s.chunks - self.first, 0, s.chunks_per_part)

            @pl.loop(self.first + self.count + group, self.first + own, step=groups)
            def _(chunk):
                store(chunk)

        plgpu.wait_smem_to_gmem(0)

    def mask(self, scores, mask, slot):
        scores = scores * mask
        if not self.s.samples:
            return scores
        marks = self.refs["marks_smem"].at[slot]

        def same_sample(scores):
            edge_C = load(marks.at[pl.ds(0, C)], layout=_ROW, optimized=False)
            edge = lax.broadcast_in_dim(edge_C, (C, C), [0])
            column = plgpu.broadcasted_iota(jnp.int32, (C, C), 1, layout=_WGMMA)
            same = column <= edge if self.s.reverse else column >= edge
            return jnp.where(same, scores, 0.0)

        # Most chunks hold one sample alone.
        return lax.cond(marks[C + 5] == 0, same_sample, lambda scores: scores, scores)

    def accumulate(self, totals, lefts, right):
        """total + left @ right for each pair, in the registers of the totals."""
        if self.s.interpret:  # it cannot begin with registers that hold something
            def product(acc, left):
                plgpu.wgmma(acc, left, right)
                return acc[...]

            acc = plgpu.ACC(totals[0].shape, jnp.float32)
            return tuple(total + pl.run_scoped(lambda acc, left=left: product(acc, left), acc)
                         for total, left in zip(totals, lefts, strict=True))

        def products(accs):
            for acc, left in zip(accs, lefts, strict=True):
                plgpu.wgmma(acc, left, right)

        return tuple(pl.run_state(products)([plgpu.ACC.init(total) for total in totals]))


def load(ref, layout, **options):
    """`plgpu.load`, which before jax 0.11 took an index apart from the reference."""
    index = inspect.signature(plgpu.load).parameters.get("idx")
    if index is not None and index.default is inspect.Parameter.empty:
        return plgpu.load(ref, (), layout=layout, **options)
    return plgpu.load(ref, layout=layout, **options)


def transposed(ref):
    transpose = getattr(ref, "transpose", None)
    return plgpu.transpose_ref(ref, (1, 0)) if transpose is None else transpose((1, 0))

"""Lightning attention on Hopper GPUs (Pallas Mosaic GPU): forward, and the pass it is made of.

One block owns one head's value columns (or a half of them) and walks over the chunks of a
sequence; nothing but the state travels between chunks. Its warpgroups work on different chunks
at the same time:

* the loader keeps a ring of shared-memory stages filled with q, k and v through TMA;
* the state warpgroup carries the state in float32 registers, and lays a bfloat16 copy of it into
  shared memory before each chunk's update;
* the output warpgroups take chunks in turn: masked scores, times values, plus q times the state.

The same pass run towards earlier tokens gives the gradients (`mosaic_gpu_backward`). All exponents
are ≤ 0: the decayed mask is never factored into λ^r and λ^-c, which overflows for fast heads.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

C = 64  # rows of a chunk: those of one warpgroup's matrix instruction
_WGMMA = plgpu.Layout.WGMMA
_ROW, _COLUMN = _WGMMA.reduce(1), _WGMMA.reduce(0)  # one value per row, per column
_TILES = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Of tiles 64 columns wide, the same bytes as rows one by one: TMA then takes any T, where tiles of
# 8 rows would need a multiple of 8.
_ROWS = (plgpu.TilingTransform((1, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning choices of one pass; `None` leaves a choice to the shapes.

    Attributes:
      value_splits: blocks per head, each with its share of the value columns: 64 columns where T
        is no multiple of 8, whatever is asked for.
      stages: depth of the ring of loaded chunks, a multiple of `output_warpgroups`.
      output_warpgroups: warpgroups that take chunks' outputs in turn, 1 or 2.
      sequence_splits: parts of a sequence that run at the same time; more than one costs a second
        reading of k and v for the states between the parts.
      scores_in_registers: hand the masked scores to the second product without shared memory.
    """

    value_splits: int | None = None
    stages: int | None = None
    output_warpgroups: int = 2
    sequence_splits: int | None = None
    scores_in_registers: bool = True


@dataclasses.dataclass(frozen=True)
class _Shape:
    """What one compiled pass depends on beside its tensors."""

    roles: tuple[tuple[int, int, int], ...]  # which tensors stand for q, k and v
    reverse: bool
    lengths: bool
    samples: bool
    outputs: bool  # False: only the states after each part
    T: int
    H: int
    parts: int
    chunks_per_part: int
    value_splits: int
    stages: int
    output_warpgroups: int
    scores_in_registers: bool
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
        return self.lengths or self.T % C != 0


def forward(
    q_BTNH, k_BTNH, v_BTNH, slopes_N, state_BNHH, samples_BT=None, lengths_B=None,
    *, config: Config | None = None, interpret=False,
):
    """Output [B, T, N, H] bfloat16 and the float32 state [B, N, H, H] after the last token.

    Args:
      q_BTNH, k_BTNH, v_BTNH: bfloat16, H = 64 or 128.
      slopes_N: float32; state_BNHH: float32, before the first token.
      samples_BT: int32, nondecreasing along T: the sample of each token. The state is reset where
        it changes; sample 0 continues `state_BNHH`.
      lengths_B: int32; tokens from there on are padding (finite values): no decay, no update,
        output zero.
      interpret: False, or `plgpu.InterpretGPUParams()` to run on a CPU.
    """
    (out,), (state,) = run(
        (q_BTNH, k_BTNH, v_BTNH), ((0, 1, 2),), slopes_N, (state_BNHH,), samples_BT, lengths_B,
        reverse=False, config=config, interpret=interpret,
    )
    return out, state


def run(
    tensors: Sequence[jax.Array], roles, slopes_N, states: Sequence[jax.Array],
    samples_BT, lengths_B, *, reverse: bool, config: Config | None = None, interpret=False,
):
    """One pass over the sequence for each of `roles`, triples of indices into `tensors`.

    Towards later tokens (`reverse=False`): `S_t = λ S_{t-1} + k_t^T v_t`, `o_t = q_t S_t`.
    Towards earlier ones: `G_t = E_t + k_t^T v_t`, `o_t = q_t G_t`, `E_{t-1} = λ G_t`, where E at
    the last token is the incoming state and E before the first token the outgoing one.

    Returns the outputs and the outgoing states, a tuple of one per role each.
    """
    B, T, N, H = tensors[0].shape
    if any(x.dtype != jnp.bfloat16 for x in tensors):
        raise ValueError(
            f"the Mosaic GPU kernel takes bfloat16; got {tensors[0].dtype}. "
            "Cast q, k and v, or use implementation='xla' for float32."
        )
    if H not in (64, 128):
        raise ValueError(
            f"the Mosaic GPU kernel takes heads of 64 or 128; got {H}. Use implementation='xla'."
        )
    shape = _shape(config or Config(), roles, reverse, samples_BT is not None,
                   lengths_B is not None, B, T, N, H, bool(interpret))
    slopes_N = jnp.asarray(slopes_N, jnp.float32)
    marks = None if samples_BT is None else _marks(samples_BT, lengths_B, reverse)
    call = functools.partial(_call, tensors=tensors, slopes_N=slopes_N, lengths_B=lengths_B,
                             marks=marks, interpret=interpret)
    incoming = jnp.stack(states)[:, :, None]  # [roles, B, parts, N, H, H]
    if shape.parts > 1:
        local = call(dataclasses.replace(shape, outputs=False), incoming=None)[-1]
        incoming = _prefix(local, incoming, slopes_N, samples_BT, lengths_B, shape)
    *outs, outgoing = call(shape, incoming=incoming)
    return tuple(outs), tuple(outgoing[:, :, 0])


def _shape(config, roles, reverse, samples, lengths, B, T, N, H, interpret) -> _Shape:
    chunks = -(-T // C)
    value_splits = config.value_splits
    if T % 8:
        value_splits = H // 64
    elif value_splits is None:
        # Enough blocks for the 132 multiprocessors of an H200 come before the cheaper whole head.
        value_splits = 2 if H == 128 else 1
    blocks = B * N * len(roles) * value_splits
    parts = config.sequence_splits
    if parts is None:
        # Whole parts of at least 16 chunks, and as many as still run at once.
        parts = max(1, min(132 // blocks, chunks // 16))
    chunks_per_part = -(-chunks // parts)
    output_warpgroups = config.output_warpgroups
    stages = config.stages or (4 if H // value_splits == 64 else 2)
    if H % (64 * value_splits) or output_warpgroups not in (1, 2) or stages % output_warpgroups:
        raise ValueError(
            f"{config}: value_splits must leave 64 or 128 columns of {H}, output_warpgroups be 1 "
            "or 2, and stages a multiple of output_warpgroups."
        )
    return _Shape(
        roles=tuple(roles), reverse=reverse, lengths=lengths, samples=samples, outputs=True, T=T,
        H=H, parts=-(-chunks // chunks_per_part), chunks_per_part=chunks_per_part,
        value_splits=value_splits, stages=stages, output_warpgroups=output_warpgroups,
        # The interpreter knows matrix products of shared memory only.
        scores_in_registers=config.scores_in_registers and not interpret, interpret=interpret,
    )


def _valid_lengths(lengths_B, B, T):
    if lengths_B is None:
        return jnp.full((B,), T, jnp.int32)
    return jnp.clip(lengths_B.astype(jnp.int32), 0, T)


def _boundaries(samples_BT, lengths_B, first_c, last_c, reverse):
    """Samples that a span of tokens takes its state from and hands its state to, [B, spans].

    `first_c`, `last_c`: positions of the spans' first token and of the one after their last.
    """
    B, T = samples_BT.shape
    length_B1 = _valid_lengths(lengths_B, B, T)[:, None]
    at = lambda index: jnp.take_along_axis(samples_BT, jnp.clip(index, 0, T - 1), axis=1)  # noqa: E731
    first_Bc = jnp.broadcast_to(first_c, (B, first_c.shape[0]))
    end_Bc = jnp.minimum(last_c, length_B1)
    if reverse:
        return at(jnp.where(end_Bc < length_B1, end_Bc, length_B1 - 1)), at(first_Bc)
    return jnp.where(first_Bc == 0, 0, at(jnp.minimum(first_Bc, length_B1) - 1)), at(end_Bc - 1)


def _marks(samples_BT, lengths_B, reverse):
    """int32 [B, chunks, 2C]: a chunk's samples, then those of its incoming and outgoing state."""
    B, T = samples_BT.shape
    chunks = -(-T // C)
    first_c = jnp.arange(chunks, dtype=jnp.int32) * C
    source, target = _boundaries(samples_BT, lengths_B, first_c, first_c + C, reverse)
    padded = jnp.pad(samples_BT.astype(jnp.int32), ((0, 0), (0, -T % C)))
    edges = jnp.pad(jnp.stack([source, target], axis=-1), ((0, 0), (0, 0), (0, C - 2)))
    return jnp.concatenate([padded.reshape(B, chunks, C), edges.astype(jnp.int32)], axis=-1)


def _prefix(local, incoming, slopes_N, samples_BT, lengths_B, shape: _Shape):
    """States at which the parts begin, from those each part makes of an empty one.

    local: [roles, B, parts, N, H, H]; incoming: the same with one part.
    """
    _, B, P, N, _, _ = local.shape
    span = shape.chunks_per_part * C
    length_B1 = _valid_lengths(lengths_B, B, shape.T)[:, None]
    edge_p = jnp.arange(P + 1, dtype=jnp.int32) * span
    edge_Bp = jnp.minimum(edge_p, length_B1)
    first_Bp, end_Bp = edge_Bp[:, :-1], edge_Bp[:, 1:]
    part_P = jnp.arange(P)
    if shape.reverse:  # part p takes from part q behind it
        gap_BPP = first_Bp[:, None, :] - end_Bp[:, :, None]
        feeds_BPP = jnp.broadcast_to(part_P[None, :] > part_P[:, None], gap_BPP.shape)
        gap_BP = length_B1 - end_Bp
    else:
        gap_BPP = first_Bp[:, :, None] - end_Bp[:, None, :]
        feeds_BPP = jnp.broadcast_to(part_P[None, :] < part_P[:, None], gap_BPP.shape)
        gap_BP = first_Bp
    own_BP = jnp.ones((B, P), bool)
    if samples_BT is not None:
        source, target = _boundaries(samples_BT, lengths_B, edge_p[:-1], edge_p[1:], shape.reverse)
        # A part of padding alone hands on nothing of its own: its local state is zero.
        feeds_BPP &= source[:, :, None] == target[:, None, :]
        last_B1 = jnp.take_along_axis(samples_BT, jnp.maximum(length_B1 - 1, 0), axis=1)
        own_BP = source == (last_B1 if shape.reverse else 0)

    def weight(gap, mask):
        decay = jnp.exp(-slopes_N * jnp.maximum(gap, 0)[..., None].astype(jnp.float32))
        return jnp.where(mask[..., None], decay, 0.0)

    # Plain sums of products: exact in float32, and one fusion.
    between = weight(gap_BPP, feeds_BPP)[None, ..., None, None] * local[:, :, None]
    return between.sum(3) + weight(gap_BP, own_BP)[None, ..., None, None] * incoming


def _call(shape: _Shape, *, tensors, slopes_N, lengths_B, marks, incoming, interpret):
    """Runs one compiled pass; returns outputs (if any) and states [roles, B, parts, N, H, H]."""
    B, T, N, H = tensors[0].shape
    R, P, W, stages = len(shape.roles), shape.parts, shape.width, shape.stages
    bf16, f32 = jnp.bfloat16, jnp.float32
    inputs = {"slopes": slopes_N, **{f"x{i}": x for i, x in enumerate(tensors)}}
    if shape.lengths:
        inputs["lengths"] = lengths_B.astype(jnp.int32)
    if shape.samples:
        inputs["marks"] = marks
    if incoming is not None:
        inputs["incoming"] = incoming
    results = {"outgoing": jax.ShapeDtypeStruct((R, B, 1 if shape.outputs else P, N, H, H), f32)}
    tiles = functools.partial(plgpu.SMEM, dtype=bf16, transforms=_TILES)

    def moved(*dims):  # shared memory that TMA fills or reads
        if not shape.row_copies:
            return tiles(dims)
        return plgpu.RefUnion(tiles(dims), plgpu.SMEM(dims, bf16, transforms=_ROWS))

    halves = H // 64
    loads = halves * (1 + shape.outputs) + 1 + shape.samples
    scratch = {
        "k": moved(stages * halves, C, 64), "v": moved(stages, C, W), "decayed": tiles((C, W)),
        "full": plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=1 + shape.outputs, num_barriers=stages),
    }
    if shape.samples:
        scratch["marks_smem"] = plgpu.SMEM((stages, 2 * C), jnp.int32)
    groups = 0
    if shape.outputs:
        groups = shape.output_warpgroups
        results |= {f"out{i}": jax.ShapeDtypeStruct((B, T, N, H), bf16) for i in range(R)}
        scratch |= {
            "q": moved(stages * halves, C, 64), "out_smem": moved(groups, C, W),
            "states": tiles((2 * halves, 64, W)),
            "ready": plgpu.Barrier(num_barriers=2), "free": plgpu.Barrier(num_barriers=2),
        }
        if not shape.scores_in_registers:
            scratch["scores"] = tiles((groups, C, C))
    names = (*inputs, *results)

    def kernel(*refs, **scratch_refs):
        _Block(shape, dict(zip(names, refs, strict=True)) | scratch_refs).run()

    direction = "reverse" if shape.reverse else "forward"
    kernel.__name__ = f"lightning_{direction if shape.outputs else direction + '_states'}"
    got = plgpu.kernel(
        kernel,
        out_type=tuple(results.values()),
        scratch_types=scratch,
        # Blocks of one head run next to each other, so that they share loads through L2.
        grid=(B, P, N, R * shape.value_splits),
        grid_names=("batch", "part", "head", "column"),
        num_threads=groups + 2,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret or None,
    )(*inputs.values())
    return (*got[1:], got[0])


class _Block:
    """The program of one block; a method per kind of warpgroup."""

    def __init__(self, shape: _Shape, refs: dict):
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
        self.length = refs["lengths"][self.b] if shape.lengths else jnp.int32(shape.T)
        self.first = self.part * shape.chunks_per_part
        filled = lax.div(self.length + (C - 1), jnp.int32(C))
        self.count = jnp.clip(filled - self.first, 0, shape.chunks_per_part)

    def run(self):
        group = lax.axis_index("warpgroup")
        groups = self.s.output_warpgroups if self.s.outputs else 0
        registers = {0: 232, 1: 208, 2: 152}[groups]

        @pl.when(group < groups)
        def _():
            plgpu.set_max_registers(registers, action="increase")
            self.write_outputs(group, groups)

        @pl.when(group == groups)
        def _():
            plgpu.set_max_registers(registers, action="increase")
            self.carry_state()

        @pl.when(group == groups + 1)
        def _():
            plgpu.set_max_registers(40, action="decrease")
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
                plgpu.load(global_state("incoming", self.part, h), layout=_WGMMA, optimized=False)
                for h in halves)
        else:
            zeros = jnp.zeros((64, s.width), jnp.float32)
            state = tuple(plgpu.layout_cast(zeros, _WGMMA) for _ in halves)
        row = plgpu.broadcasted_iota(jnp.int32, (C,), 0, layout=_ROW)

        def step(i, state):
            slot, buffer = lax.rem(i, jnp.int32(s.stages)), lax.rem(i, jnp.int32(2))
            rows = self.rows(self.chunk(i))
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
            if s.samples:
                marks = refs["marks_smem"].at[slot]
                source, target = marks[C], marks[C + 1]
                samples = plgpu.load(marks.at[pl.ds(0, C)], layout=_ROW, optimized=False)
                enters = enters & (samples == target)
                stays = jnp.where(source == target, stays, 0.0)
            decay_C = self.decay(distance)
            if s.samples or s.ragged:
                decay_C = jnp.where(enters, decay_C, 0.0)
            v = plgpu.load(refs["v"].at[slot], layout=_WGMMA).astype(jnp.float32)
            decayed = v * lax.broadcast_in_dim(decay_C, v.shape, [0])
            refs["decayed"][...] = decayed.astype(jnp.bfloat16)
            plgpu.commit_smem()
            state = tuple(
                self.accumulate(state[h] * stays, _transposed(refs["k"].at[slot * len(halves) + h]),
                                refs["decayed"])
                for h in halves)
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
            plgpu.barrier_wait(refs["ready"].at[buffer])

            def products(scores_acc, inter_acc):
                for h in halves:
                    tile = slot * len(halves) + h
                    plgpu.wgmma(scores_acc, refs["q"].at[tile], _transposed(refs["k"].at[tile]))
                for h in halves:
                    q = refs["q"].at[slot * len(halves) + h]
                    plgpu.wgmma(inter_acc, q, refs["states"].at[buffer * len(halves) + h])
                # The scores are masked while the second product still runs.
                scores = plgpu.wgmma_accumulator_load(scores_acc, wait_n=len(halves))
                scores = self.mask(scores, mask, slot, rows, column).astype(jnp.bfloat16)
                return scores, inter_acc[...]

            scores, out = pl.run_scoped(
                products, plgpu.ACC((C, C), jnp.float32), plgpu.ACC((C, s.width), jnp.float32)
            )
            plgpu.barrier_arrive(refs["free"].at[buffer])
            decay_C = self.decay(jnp.maximum(rows - 1 - row_C, 0) if s.reverse else row_C + 1)
            if s.samples:
                marks = refs["marks_smem"].at[slot]
                samples = plgpu.load(marks.at[pl.ds(0, C)], layout=_ROW, optimized=False)
                decay_C = jnp.where(samples == marks[C], decay_C, 0.0)
            out = out * lax.broadcast_in_dim(decay_C, out.shape, [0])
            if not s.scores_in_registers:
                refs["scores"][group] = scores
                plgpu.commit_smem()
                scores = refs["scores"].at[group]
            out = self.accumulate(out, scores, refs["v"].at[slot])
            plgpu.barrier_arrive(refs["empty"].at[slot])
            if s.lengths:
                inside = lax.broadcast_in_dim(row_C, out.shape, [0]) < rows
                out = jnp.where(inside, out, 0.0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = out.astype(jnp.bfloat16)
            store(chunk)

        if s.lengths:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            out_smem[...] = jnp.zeros((C, s.width), jnp.bfloat16)
            own = jnp.clip(s.chunks - self.first, 0, s.chunks_per_part)

            @pl.loop(self.first + self.count + group, self.first + own, step=groups)
            def _(chunk):
                store(chunk)

        plgpu.wait_smem_to_gmem(0)

    def mask(self, scores, mask, slot, rows, column):
        s = self.s
        if s.samples:
            marks = self.refs["marks_smem"].at[slot, pl.ds(0, C)]
            of_row = plgpu.load(marks, layout=_ROW, optimized=False)
            of_column = plgpu.load(marks, layout=_COLUMN, optimized=False)
            same = (lax.broadcast_in_dim(of_row, (C, C), [0])
                    == lax.broadcast_in_dim(of_column, (C, C), [1]))
            mask = jnp.where(same, mask, 0.0)
        if s.lengths and s.reverse:  # padding lies ahead of the tokens
            mask = jnp.where(column < rows, mask, 0.0)
        return scores * mask

    def accumulate(self, total, a, b):
        """total + a @ b, in the registers of `total`."""
        def product(acc):
            plgpu.wgmma(acc, a, b)
            return acc[...]

        if self.s.interpret:  # it cannot begin with registers that hold something
            return total + pl.run_scoped(product, plgpu.ACC(total.shape, jnp.float32))
        return pl.run_state(lambda acc: plgpu.wgmma(acc, a, b))(plgpu.ACC.init(total))


def _transposed(ref):
    transpose = getattr(ref, "transpose", None)
    return plgpu.transpose_ref(ref, (1, 0)) if transpose is None else transpose((1, 0))

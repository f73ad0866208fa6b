"""Lightning attention on Hopper GPUs (Pallas Mosaic GPU): forward, and the pass it is made of.

The work of a block is in `mosaic_gpu_block`; here are its memory, its tuning, and the split of long
sequences into parts that run at the same time.

The same pass run towards earlier tokens gives the gradients (`mosaic_gpu_backward`).
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.costs import kernel_cost
from pallas_kernels.lightning_attention.mosaic_gpu_block import (
    MARKS,
    ROWS,
    TILES,
    Block,
    C,
    Shape,
)
from pallas_kernels.lightning_attention.parts import (
    chunk_boundaries,
    edges,
    givers,
    prefix,
    valid_lengths,
)
from pallas_kernels.lightning_attention.pieces import put_together, share_out
from pallas_kernels.once import once

_MULTIPROCESSORS = 132  # of an H100 or H200
_NOBODY = 2**30  # beyond any sample's number
# What lasts in a part is cut into pieces of no fewer chunks than these, where all of it lasts.
_PIECE = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """Tuning choices of one pass; `None` leaves a choice to the shapes.

    Attributes:
      value_splits: blocks per head, each with its share of the value columns: 64 columns where T
        is no multiple of 8, whatever is asked for.
      stages: depth of the ring of loaded chunks, a multiple of `output_warpgroups`.
      output_warpgroups: warpgroups that take chunks' outputs in turn, 1 or 2. Two of them with 128
        columns each run out of registers.
      sequence_splits: parts of a sequence that run at the same time; more than one costs a second
        reading of k and v, as far back as they last in each part, for the states between the parts.
      scores_in_registers: hand the masked scores to the second product without shared memory.
      queries_in_registers: read q from shared memory once for both of its products.
      joint: gradients in k and v at once, so that they share what they read through L2.
    """

    value_splits: int | None = None
    stages: int | None = None
    output_warpgroups: int | None = None
    sequence_splits: int | None = None
    scores_in_registers: bool = True
    queries_in_registers: bool | None = None
    joint: bool = True


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
    for x in tensors:
        if x.dtype != jnp.bfloat16:
            raise ValueError(
                f"the Mosaic GPU kernel takes bfloat16; got {x.dtype}. "
                "Cast q, k and v, or use implementation='xla' for float32."
            )
    if H not in (64, 128):
        raise ValueError(
            f"the Mosaic GPU kernel takes heads of 64 or 128; got {H}. Use implementation='xla'."
        )
    if reverse and lengths_B is not None and samples_BT is None:
        # Here padding lies ahead of the tokens: it must be told from them, as another sample is.
        samples_BT = jnp.zeros((B, T), jnp.int32)
    shape = choose(config or Config(), roles, reverse, samples_BT is not None,
                   lengths_B is not None, B, T, N, H, bool(interpret))
    slopes_N = jnp.asarray(slopes_N, jnp.float32)
    marks = None if samples_BT is None else _marks(samples_BT, lengths_B, reverse)
    call = functools.partial(one_pass, tensors=tensors, slopes_N=slopes_N, lengths_B=lengths_B,
                             marks=marks, interpret=interpret)
    incoming = jnp.stack(states)[:, :, None]  # [roles, B, parts, N, H, H]
    if shape.parts > 1:
        span, given = shape.chunks_per_part * C, givers(shape.parts, reverse)
        first_BP, end_BP = (x[:, given] for x in edges(lengths_B, B, T, span))
        # About two for each multiprocessor: a slow head's may be much longer than the rest.
        pieces = 2 * _MULTIPROCESSORS // (first_BP.size * N * len(roles))
        local = local_states(
            tensors, roles, slopes_N, first_BP, end_BP, span=span, reverse=reverse,
            pieces=max(1, min(pieces, shape.chunks_per_part // _PIECE)), samples_BT=samples_BT,
            marks=marks, interpret=interpret)
        incoming = prefix(local, incoming, slopes_N, samples_BT, lengths_B, T=T, span=span,
                          reverse=reverse)
    *outs, outgoing = call(shape, incoming=incoming)
    return tuple(outs), tuple(outgoing[:, :, 0])


def local_states(tensors, roles, slopes_N, first_BP, end_BP, *, span: int, pieces: int,
                 reverse: bool, samples_BT=None, marks=None, interpret):
    """States [roles, B, P, N, H, H] that parts of a sequence end with, from an empty one each.

    The parts lie from `first_BP` to `end_BP`, of at most `span` tokens. Only what lasts until their
    end is read, in so many pieces.
    """
    B, T, N, H = tensors[0].shape
    # Whole heads where the copies allow it, so that keys are read once.
    config = Config(value_splits=1, stages=4, output_warpgroups=1, sequence_splits=1)
    shape = dataclasses.replace(
        choose(config, roles, reverse, marks is not None, False, B, T, N, H, bool(interpret)),
        outputs=False, parts=first_BP.shape[1] * pieces,
        chunks_per_part=-(-span // (C * pieces)))
    table_BQN4 = share_out(slopes_N, first_BP, end_BP, pieces, T=T, C=C, reverse=reverse)
    (local,) = one_pass(shape, tensors=tensors, slopes_N=slopes_N, lengths_B=None, marks=marks,
                        windows_BQN4=table_BQN4, interpret=interpret)
    return put_together(local, table_BQN4, slopes_N, samples_BT, pieces, C=C, reverse=reverse)


def choose(config: Config, roles, reverse, samples, lengths, B, T, N, H, interpret) -> Shape:
    """The pass with outputs over these sizes, with what `config` leaves open."""
    chunks = -(-T // C)
    value_splits = config.value_splits
    if T % 8:
        value_splits = H // 64
    elif value_splits is None:
        value_splits = 1 if H == 64 or _whole_heads(B * N * len(roles), chunks) else 2
    blocks = B * N * len(roles) * value_splits
    parts = config.sequence_splits
    if parts is None:
        # Whole parts of at least 16 chunks, and as many as still run at once.
        parts = max(1, min(_MULTIPROCESSORS // blocks, chunks // 16))
    chunks_per_part = -(-chunks // parts)
    narrow = H // value_splits <= 64
    queries_in_registers = config.queries_in_registers
    if queries_in_registers is None:
        # Measured on an H200: 79.8 % of the byte floor instead of 74.9 % at 1 x 131,072, and a
        # little less at 8,192 tokens (83.3 % and 84.0 %) or where parts are of 16,384.
        queries_in_registers = narrow and chunks_per_part >= 512
    output_warpgroups = config.output_warpgroups or (2 if narrow else 1)
    stages = config.stages or (4 if narrow else 2)
    if H % (64 * value_splits) or output_warpgroups not in (1, 2) or stages % output_warpgroups:
        raise ValueError(
            f"{config}: value_splits must leave 64 or 128 columns of {H}, output_warpgroups be 1 "
            "or 2, and stages a multiple of output_warpgroups."
        )
    return Shape(
        roles=tuple(roles), reverse=reverse, lengths=lengths, samples=samples, outputs=True, T=T,
        H=H, parts=-(-chunks // chunks_per_part), chunks_per_part=chunks_per_part,
        value_splits=value_splits, stages=stages, output_warpgroups=output_warpgroups,
        # The interpreter knows matrix products of shared memory only.
        scores_in_registers=config.scores_in_registers and not interpret,
        queries_in_registers=queries_in_registers and not interpret, interpret=interpret,
    )


def _whole_heads(heads: int, chunks: int) -> bool:
    """Whether blocks of whole heads of 128 beat twice as many of half ones, by their waves.

    Over a long sequence the two halves of a head drift so far apart that they no longer share q and
    k through L2: on an H200 64 heads of the middle layer reach, halved and whole (in two parts), 86
    and 80 % of the byte floor at 16,384 tokens, 78 and 88 % at 65,536, 85 and 92 % at 131,072, 80
    and 96 % at 1,048,576; 8 heads (in 8 and 16 parts) 69 and 70 % at 131,072.

    Every block has a multiprocessor to itself. A wave of whole heads takes about 1.6 of one of
    halves: on an H200 the forward of 8 x 8,192 (512 heads) reaches 98 % of the byte floor whole and
    79 % halved, that of 1 x 8,192 (64) 58 % and 84 %. The gradients in k and v of 64 heads (128
    blocks whole) take 0.25 ms whole and 0.30 ms halved at 8,192 tokens.
    """
    if chunks * C >= (65536 if 2 * heads >= 0.9 * _MULTIPROCESSORS else 131072):
        return True
    return 1.6 * -(-heads // _MULTIPROCESSORS) <= -(-2 * heads // _MULTIPROCESSORS)


def _marks(samples_BT, lengths_B, reverse):
    """int32 [B, chunks, MARKS]: what a block is told of the samples in each of its chunks."""
    B, T = samples_BT.shape
    source, target = chunk_boundaries(samples_BT, lengths_B, C, reverse)
    # Padding is of no sample, behind all others.
    inside_BT = jnp.arange(T) < valid_lengths(lengths_B, B, T)[:, None]
    samples = jnp.where(inside_BT, samples_BT, _NOBODY)
    samples = jnp.pad(samples, ((0, 0), (0, -T % C)), constant_values=_NOBODY).reshape(B, -1, C)
    row, column = samples[..., :, None], samples[..., None, :]
    if reverse:
        edge = C - 1 - jnp.sum(column > row, axis=-1, dtype=jnp.int32)
    else:
        edge = jnp.sum(column < row, axis=-1, dtype=jnp.int32)

    def rows_of(sample):
        """A sample's rows are neighbours: the first, and the one behind the last."""
        own = samples == sample[..., None]
        first = jnp.argmax(own, axis=-1).astype(jnp.int32)
        return [first, first + jnp.sum(own, axis=-1, dtype=jnp.int32)]

    continues = source == target
    plain = (samples == source[..., None]).all(-1) & continues
    told = jnp.stack([*rows_of(source), *rows_of(target), continues, plain], axis=-1)
    told = jnp.pad(told.astype(jnp.int32), ((0, 0), (0, 0), (0, MARKS - C - told.shape[-1])))
    return jnp.concatenate([edge, told], axis=-1)


@once
def one_pass(shape: Shape, *, tensors, slopes_N, lengths_B, marks=None, windows_BQN4=None,
             incoming=None, interpret):
    """Runs one compiled pass; returns outputs (if any) and states [roles, B, parts, N, H, H].

    windows_BQN4: without outputs, what each part reads of each head; see `pieces.share_out`.
    """
    B, T, N, H = tensors[0].shape
    R, P, W, stages = len(shape.roles), shape.parts, shape.width, shape.stages
    bf16, f32 = jnp.bfloat16, jnp.float32
    inputs = {"slopes": slopes_N, **{f"x{i}": x for i, x in enumerate(tensors)}}
    if shape.lengths:
        inputs["lengths"] = lengths_B.astype(jnp.int32)
    if shape.samples:
        inputs["marks"] = marks
    if not shape.outputs:
        inputs["windows"] = windows_BQN4
    if incoming is not None:
        inputs["incoming"] = incoming
    results = {"outgoing": jax.ShapeDtypeStruct((R, B, 1 if shape.outputs else P, N, H, H), f32)}
    tiles = functools.partial(plgpu.SMEM, dtype=bf16, transforms=TILES)

    def moved(*dims):  # shared memory that TMA fills or reads
        if not shape.row_copies:
            return tiles(dims)
        return plgpu.RefUnion(tiles(dims), plgpu.SMEM(dims, bf16, transforms=ROWS))

    halves = H // 64
    loads = halves * (1 + shape.outputs) + 1 + shape.samples
    scratch = {
        "k": moved(stages * halves, C, 64), "v": moved(stages, C, W), "decayed": tiles((C, W)),
        "full": plgpu.Barrier(num_arrivals=loads, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=1 + shape.outputs, num_barriers=stages),
    }
    if shape.samples:
        scratch["marks_smem"] = plgpu.SMEM((stages, MARKS), jnp.int32)
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
        Block(shape, dict(zip(names, refs, strict=True)) | scratch_refs).run()

    direction = "reverse" if shape.reverse else "forward"
    kernel.__name__ = f"lightning_{direction if shape.outputs else direction + '_states'}"
    program = plgpu.kernel(
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
    )
    # Without outputs the most that windows can name: they are data.
    rows = R * B * N * min(T, P * shape.chunks_per_part * C)
    # A chunk's scores and values, and the state's update and reading.
    flops = rows * (4 * H * H if shape.outputs else 2 * H * H) + shape.outputs * rows * 4 * C * H
    states = ((incoming is not None) * P * R * B * N * H * H + results["outgoing"].size) * 4
    with kernel_cost(flops, rows * H * 2 * (4 if shape.outputs else 2) + states):
        got = program(*inputs.values())
    return (*got[1:], got[0])

"""Flash attention over a cache on TPU: dynamic offsets, long keys, one kernel for any chunk.

Blocks of keys beyond a row's furthest query are neither fetched nor computed. The query heads of a
group are rows of one product, so that keys and values are read once per group and block of rows.
Arithmetic per byte of keys is the number of rows of a block: 1,024 in prefill, N / K in decode.
A narrower cache (float8) is read as it is and cast in on-chip memory. A layer's cache is read where
it lies in the stack of several: rows of the stack are numbered through.

Compiled for v5e, v5p, v6e and tpu7x; compiled, not run.
"""

import functools
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, precision, tuning
from pallas_kernels.attention.operands import dtype_refusal
from pallas_kernels.grouped_matmul.stacked import stack

_SIZES = pathlib.Path(__file__).with_name("blocks.json")

LANES = 128
# Finite, so that a fully masked block gives exp(0) · 0 and never NaN; in units of log 2.
NEG_INF = -1e30 / math.log(2.0)
# A chunk of at most this many rows per group is bound by memory: small blocks of rows, long keys.
DECODE_ROWS = 128


def refusal(q_BTNH, k_BSKH, samples_BT) -> str | None:
    """Says in a sentence why the kernel does not take these arguments; None if it does."""
    if samples_BT is not None:
        return ("attention 'pallas_tpu' has no packed rows. Samples are for training: "
                "pass 'splash', 'xla' or None.")
    if sentence := dtype_refusal("pallas_tpu", q_BTNH, k_BSKH):
        return sentence
    if dispatch.platform() == "gpu":
        return "attention 'pallas_tpu' runs on a TPU (interpreted on a CPU). Pass 'cudnn' or None."
    return None


def attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, samples_BT):
    """As the public function; on a CPU the kernel is interpreted. Forward only."""
    if sentence := refusal(q_BTNH, k_BSKH, samples_BT):
        raise ValueError(sentence)
    if offsets_B is None:
        offsets_B = jnp.zeros(q_BTNH.shape[0], jnp.int32)
    return _flash(q_BTNH, k_BSKH, v_BSKH, offsets_B, 1, 0, sums=False)


def partial_attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, own, apart, ends_BS):
    """As the public function; on a CPU the kernel is interpreted. Needs no `own`, no `apart`."""
    if sentence := refusal(q_BTNH, k_BSKH, None):
        raise ValueError(sentence)
    return _flash(q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, ends_BS, sums=True)


def _flash(q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, ends_BS=None, *, sums, sizes=None,
           interpret=None):
    """Lays queries as rows and calls the kernel; `sizes` and `interpret` are for tests."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    if sizes is None:
        sizes = tuning.entry(_SIZES, "decode" if T * G <= DECODE_ROWS else "prefill")
    rows = min(sizes["rows"], -(-T * G // 16) * 16)
    keys = min(sizes["keys"], -(-S // LANES) * LANES)
    padded = -(-T * G // rows) * rows
    # Rows are token-major: row r of a group belongs to token r // G.
    q_BKRH = q_BTNH.reshape(B, T, K, G, H).transpose(0, 2, 1, 3, 4).reshape(B, K, T * G, H)
    q_BKRH = jnp.pad(q_BKRH, ((0, 0), (0, 0), (0, padded - T * G), (0, 0)))
    # A cache lies heads first: its caller's transposition and these cancel.
    (k, _, layer_1), (v, _, _) = (stack(x.swapaxes(1, 2)) for x in (k_BSKH, v_BSKH))
    k_RKSH, v_RKSH = (x.reshape(-1, K, S, H) for x in (k, v))
    if interpret is None:
        interpret = dispatch.platform() == "cpu"
    shape = _Shape(B, K, G, T, S, H, rows, keys, stride, sizes["vmem_mib"])
    scalars = (jnp.asarray(offsets_B, jnp.int32), jnp.asarray(phase, jnp.int32).reshape(1),
               layer_1 * B)
    # Ends in rows, not tokens: one comparison per score tells packed samples apart.
    ends = () if ends_BS is None else (jnp.asarray(ends_BS, jnp.int32)[:, None] * G,)
    out = _call(shape, scalars, (q_BKRH, k_RKSH, v_RKSH, *ends), sums, interpret)

    def tokens(x_BKR):
        x = x_BKR[:, :, :T * G].reshape(B, K, T, G, *x_BKR.shape[3:])
        return jnp.moveaxis(x, 2, 1).reshape(B, T, N, *x_BKR.shape[3:])

    if not sums:
        return tokens(out)
    weighted, total, peak = out
    return tokens(weighted), tokens(total[:, :, 0]), tokens(peak[:, :, 0])


class _Shape(NamedTuple):
    """What the kernel is built for: sizes of arrays, of blocks, and the stride of key positions."""

    B: int
    K: int
    G: int
    T: int
    S: int
    H: int
    rows: int
    keys: int
    stride: int
    vmem_mib: int  # the compiler's own limit is 16 on v5e, of the 128 there are

    @property
    def row_blocks(self) -> int:
        return -(-self.T * self.G // self.rows)

    @property
    def key_blocks(self) -> int:
        return -(-self.S // self.keys)

    def visited(self, offset, phase, i):
        """Blocks of keys at or before the last query of block `i` of rows."""
        last = offset + jnp.minimum(((i + 1) * self.rows - 1) // self.G, self.T - 1)
        held = jnp.clip((last - phase + self.stride) // self.stride, 0, self.S)
        return (held + self.keys - 1) // self.keys


def _call(shape: _Shape, scalars, operands, sums: bool, interpret):
    """`scalars`: offsets [B], the phase [1], and the row [1] of keys and values that is row 0."""
    q_BKRH, k_RKSH = operands[:2]
    first_B, phase_1, _ = scalars
    B, K, H, rows, keys = shape.B, shape.K, shape.H, shape.rows, shape.keys

    def row_map(b, n, i, j, *refs):
        return b, n, i, 0

    def key_block(b, i, j, first_ref, phase_ref, _):
        # The last block that is needed stays where it is: the pipeline fetches nothing anew.
        visited = shape.visited(first_ref[b], phase_ref[0], i)
        return jnp.minimum(j, jnp.maximum(visited - 1, 0))

    def key_map(b, n, i, j, *refs):
        return refs[2][0] + b, n, key_block(b, i, j, *refs), 0

    def end_map(b, n, i, j, *refs):
        return b, 0, key_block(b, i, j, *refs)

    def sum_map(b, n, i, j, *refs):
        return b, n, 0, i

    row_spec = pl.BlockSpec((1, 1, rows, H), row_map)
    key_spec = pl.BlockSpec((1, 1, keys, H), key_map)
    in_specs = [row_spec, key_spec, key_spec]
    packed = len(operands) > 3
    if packed:
        in_specs.append(pl.BlockSpec((1, 1, keys), end_map))
    out_shape = [jax.ShapeDtypeStruct(q_BKRH.shape, jnp.float32 if sums else q_BKRH.dtype)]
    out_specs = [row_spec]
    if sums:
        R = q_BKRH.shape[2]
        out_shape += [jax.ShapeDtypeStruct((B, K, 1, R), jnp.float32)] * 2
        out_specs += [pl.BlockSpec((1, 1, 1, rows), sum_map)] * 2
    # As many blocks of keys as the furthest row needs: what a cache could hold costs nothing.
    longest = shape.visited(jnp.max(first_B), phase_1[0], shape.row_blocks - 1)
    out = pl.pallas_call(
        functools.partial(_kernel, shape, sums, packed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(B, K, shape.row_blocks, jnp.maximum(longest, 1)),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((rows, H), jnp.float32),
                            pltpu.VMEM((rows, LANES), jnp.float32),
                            pltpu.VMEM((rows, LANES), jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=shape.vmem_mib << 20),
        cost_estimate=_cost(shape, q_BKRH.dtype.itemsize, k_RKSH.dtype.itemsize, sums),
        name="cached_attention",
        interpret=interpret,
    )(*scalars, *operands)
    return out if sums else out[0]


def _cost(shape: _Shape, itemsize: int, key_itemsize: int, sums: bool) -> pl.CostEstimate:
    """Of a full cache: the compiler does not know offsets."""
    row_count = shape.B * shape.K * shape.row_blocks * shape.rows
    scores = row_count * shape.S
    read = 2 * shape.B * shape.K * shape.row_blocks * shape.S * shape.H * key_itemsize
    written = row_count * (shape.H * (4 if sums else itemsize) + (8 if sums else 0))
    return pl.CostEstimate(flops=4 * scores * shape.H, transcendentals=scores,
                           bytes_accessed=read + row_count * shape.H * itemsize + written)


def _kernel(shape: _Shape, sums, packed, first_ref, phase_ref, _, q_ref, k_ref, v_ref, *refs):
    if packed:
        ends_ref, *refs = refs
    out_ref, (acc_ref, total_ref, peak_ref) = refs[0], refs[-3:]
    b, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    offset, phase = first_ref[b], phase_ref[0]
    first_row = i * shape.rows

    @pl.when(j == 0)
    def start():
        acc_ref[...] = jnp.zeros_like(acc_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        peak_ref[...] = jnp.full_like(peak_ref, NEG_INF)

    last_key = (j * shape.keys + shape.keys - 1) * shape.stride + phase
    seen_by_all = last_key <= offset + first_row // shape.G
    if shape.S % shape.keys:
        seen_by_all &= j < shape.key_blocks - 1
    needed = j < shape.visited(offset, phase, i)
    if packed:
        needed &= jnp.max(ends_ref[0]) > first_row
        seen_by_all &= jnp.min(ends_ref[0]) >= first_row + shape.rows

    @pl.when(needed & seen_by_all)
    def inner():
        _accumulate(q_ref, k_ref[0, 0], v_ref[0, 0], None, acc_ref, total_ref, peak_ref)

    @pl.when(needed & ~seen_by_all)
    def edge():
        key = j * shape.keys + jax.lax.broadcasted_iota(jnp.int32, (1, shape.keys), 1)
        row = first_row + jax.lax.broadcasted_iota(jnp.int32, (shape.rows, 1), 0)
        # key's position ≤ offset + row // G, without the division
        mask = (key * shape.stride + phase - offset) * shape.G <= row
        if packed:
            mask &= row < ends_ref[0]
        v = v_ref[0, 0]
        if shape.S % shape.keys:  # what lies beyond the array may be anything
            mask &= key < shape.S
            inside = jax.lax.broadcasted_iota(jnp.int32, (shape.keys, 1), 0)
            v = jnp.where(inside < shape.S - j * shape.keys, v, jnp.zeros_like(v))
        _accumulate(q_ref, k_ref[0, 0], v, mask, acc_ref, total_ref, peak_ref)

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        if not sums:
            out_ref[0, 0] = (acc_ref[...] / total_ref[:, :1]).astype(out_ref.dtype)
            return
        out_ref[0, 0] = acc_ref[...]
        refs[1][0, 0] = total_ref[...].T[:1]
        refs[2][0, 0] = peak_ref[...].T[:1] * math.log(2.0)


def _accumulate(q_ref, k, v, mask, acc_ref, total_ref, peak_ref):
    """One block of the running softmax; scores are in units of log 2, as exp2 is cheaper."""
    q = q_ref[0, 0]
    k, v = k.astype(q.dtype), v.astype(q.dtype)
    scale = math.log2(math.e) / math.sqrt(q.shape[-1])
    scores = scale * jax.lax.dot_general(
        q, k, (((1,), (1,)), ((), ())), precision=precision.for_dtype(q.dtype),
        preferred_element_type=jnp.float32)
    if mask is not None:
        scores = jnp.where(mask, scores, NEG_INF)
    old = peak_ref[:, :1]
    peak = jnp.maximum(old, scores.max(axis=1, keepdims=True))
    weights = jnp.exp2(scores - peak)
    if mask is not None:  # a row that has seen no key yet has the peak of what is masked
        weights = jnp.where(mask, weights, 0.0)
    rescale = jnp.exp2(old - peak)
    total = total_ref[:, :1] * rescale + weights.sum(axis=1, keepdims=True)
    acc_ref[...] = acc_ref[...] * rescale + jax.lax.dot_general(
        weights.astype(v.dtype), v, (((1,), (0,)), ((), ())),
        precision=precision.for_dtype(v.dtype), preferred_element_type=jnp.float32)
    total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
    peak_ref[...] = jnp.broadcast_to(peak, peak_ref.shape)

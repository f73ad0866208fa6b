"""Grouped matrix product on TPU whose weights are read once, in place, as int8 or as they are.

The grid runs over (column tiles, visits): a visit is a tile of rows and one of the groups in it, in
order of groups, and the inner axis is not cut. So a group's tile of weights stays on the chip while
its rows pass by: weights are read once whatever the group sizes; rows once per column tile. int8
weights are cast on the chip, once per group and tile, and their scales multiply the product. Two
matrices per group (a gate and an up projection) can share the rows, whose `SiLU(gate) · up` is
then written alone.

Compiled for v4, v5e, v5p, v6e and tpu7x; compiled, not run.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, precision
from pallas_kernels.grouped_matmul import tiles
from pallas_kernels.grouped_matmul.stacked import stack


class Visits(NamedTuple):
    """The steps over rows, of which the first `total` count; later ones repeat the last.

    group_V, tile_V: group and row tile of each step. starts: first row of each group [E + 1].
    """

    group_V: jax.Array
    tile_V: jax.Array
    starts: jax.Array
    total: jax.Array


def visits(group_sizes_E: jax.Array, rows: int, tile: int) -> Visits:
    """Returns the steps of `rows` sorted rows in tiles of `tile`; empty groups have none."""
    E = group_sizes_E.shape[0]
    sizes_E = group_sizes_E.astype(jnp.int32)
    ends_E = jnp.cumsum(sizes_E)
    starts_E = ends_E - sizes_E
    first_E = starts_E // tile
    count_E = jnp.where(sizes_E > 0, (ends_E - 1) // tile - first_E + 1, 0)
    upto_E = jnp.cumsum(count_E)
    steps = -(-rows // tile) + E - 1
    step_V = jnp.minimum(jnp.arange(steps), jnp.maximum(upto_E[-1] - 1, 0))
    group_V = jnp.minimum(jnp.sum(step_V[:, None] >= upto_E, axis=1), E - 1).astype(jnp.int32)
    tile_V = first_E[group_V] + step_V - (upto_E - count_E)[group_V]
    # With no rows at all nothing is computed, but a block is still named.
    tile_V = jnp.clip(tile_V, 0, -(-rows // tile) - 1).astype(jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E])
    return Visits(group_V, tile_V, starts, upto_E[-1:])


def grouped_matmul(x_MD, w_EDF, group_sizes_E, *, interpret=None):
    """As the public function; w may be int8 or a `Stacked` of either. Returns x's dtype."""
    values, scale, index = stack(w_EDF)
    if scale is not None:
        scale = scale[:, None]
    out_MF = _product(x_MD, values[:, None], scale, index, group_sizes_E, interpret)
    inside_M = jnp.arange(x_MD.shape[0]) < jnp.sum(group_sizes_E)
    return jnp.where(inside_M[:, None], out_MF, 0)


def grouped_swiglu(x_MD, w_2EDF, group_sizes_E, *, interpret=None):
    """As the public function; tiles of rows beyond the groups are not written."""
    return _product(x_MD, *stack(w_2EDF), group_sizes_E, interpret)


def _product(x_MK, w_RPEKN, scale_RPE1N, index_1, group_sizes_E, interpret):
    M, K = x_MK.shape
    P, E, _, N = w_RPEKN.shape[1:]
    tm, tn = tile_sizes(M, P, E, K, N, x_MK.dtype, w_RPEKN.dtype)
    plan = visits(group_sizes_E, M, tm)
    if interpret is None:
        interpret = dispatch.platform() == "cpu"
    return _call(x_MK, w_RPEKN, scale_RPE1N, index_1, plan, tm, tn, interpret)


def tile_sizes(M, P, E, K, N, x_dtype, w_dtype) -> tuple[int, int]:
    """Returns the tiles of rows and of columns; raises ValueError where none fit the chip."""
    found = tiles.listed("pallas_tpu", M, K, P * N)
    if found is not None and jnp.dtype(x_dtype) == jnp.bfloat16:
        return min(found["rows"], -(-M // 16) * 16), found["columns"]
    room = tiles.vmem_bytes()
    x_bytes, w_bytes = jnp.dtype(x_dtype).itemsize, jnp.dtype(w_dtype).itemsize
    tm = tiles.row_tile(M, E)
    while tm > 16 and 2 * tm * K * x_bytes > room // 3:
        tm = -(-tm // 32) * 16
    return tm, tiles.column_tile(N, 1024 // P, _column_bytes(tm, P, K, x_bytes, w_bytes),
                                 room - 2 * tm * K * x_bytes)


def fits(M, P, E, K, N, x_dtype, w_dtype) -> bool:
    """Whether there are tiles for these shapes on the chip at hand."""
    try:
        return bool(tile_sizes(M, P, E, K, N, x_dtype, w_dtype))
    except ValueError:
        return False


def _column_bytes(tm, P, K, x_bytes, w_bytes) -> int:
    """VMEM of one column: weights twice and cast, products, what is written twice."""
    cast = x_bytes if w_bytes < x_bytes else 0
    return P * K * (2 * w_bytes + cast) + tm * (4 * (P + 1) + 2 * x_bytes)


@functools.partial(jax.jit, static_argnames=("tm", "tn", "interpret"))
def _call(x_MK, w_RPEKN, scale_RPE1N, index_1, plan, tm, tn, interpret):
    M, K = x_MK.shape
    P, E, _, N = w_RPEKN.shape[1:]
    steps, quantised = plan.group_V.shape[0], scale_RPE1N is not None

    def rows(n, v, index, group, tile, starts, total):
        return tile[v], 0

    def weights(n, v, index, group, tile, starts, total):
        return index[0], 0, group[v], 0, n

    def outputs(n, v, index, group, tile, starts, total):
        return tile[v], n

    operands, specs, scratch = [x_MK, w_RPEKN], [
        pl.BlockSpec((tm, K), rows), pl.BlockSpec((None, P, None, K, tn), weights)], []
    if quantised:
        operands.append(scale_RPE1N)
        specs.append(pl.BlockSpec((None, P, None, 1, tn), weights))
        scratch.append(pltpu.VMEM((P, K, tn), x_MK.dtype))
    x_bytes, w_bytes = x_MK.dtype.itemsize, w_RPEKN.dtype.itemsize
    column_tiles = -(-N // tn)
    need = 2 * tm * K * x_bytes + tn * _column_bytes(tm, P, K, x_bytes, w_bytes)
    return pl.pallas_call(
        functools.partial(_kernel, tm=tm, quantised=quantised),
        out_shape=jax.ShapeDtypeStruct((M, N), x_MK.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5, grid=(column_tiles, steps), in_specs=specs,
            out_specs=pl.BlockSpec((tm, tn), outputs), scratch_shapes=scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=max(16 << 20, need + (4 << 20))),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * P * K * N, transcendentals=(P - 1) * M * N,
            bytes_accessed=column_tiles * M * K * x_bytes + M * N * x_bytes
            + min(E, steps) * P * K * N * w_bytes),
        interpret=interpret,
        name="grouped_swiglu" if P == 2 else "grouped_matmul",
    )(index_1, *plan, *operands)


def cast(w_ref, cast_ref):
    """Casts [K, N] a few rows at a time: all at once would go through spilled registers."""
    K = w_ref.shape[0]
    step = next((step for step in (256, 128) if K % step == 0), K)

    def rows(i, _):
        at = pl.ds(pl.multiple_of(i * step, step), step)
        cast_ref[at] = w_ref[at].astype(cast_ref.dtype)
        return 0

    jax.lax.fori_loop(0, K // step, rows, 0)


def _kernel(index_1, group_V, tile_V, starts, total, x_ref, w_ref, *refs, tm, quantised):
    del index_1
    scale_ref, out_ref, cast_ref = refs if quantised else (None, *refs, w_ref)
    v = pl.program_id(1)
    before = jnp.maximum(v - 1, 0)

    @pl.when(v < total[0])
    def _():
        group, tile = group_V[v], tile_V[v]
        if quantised:
            @pl.when((v == 0) | (group_V[before] != group))
            def _():
                for p in range(w_ref.shape[0]):
                    cast(w_ref.at[p], cast_ref.at[p])

        parts = [jax.lax.dot(x_ref[...], cast_ref[p], precision=precision.for_dtype(x_ref.dtype),
                             preferred_element_type=jnp.float32) for p in range(w_ref.shape[0])]
        if quantised:
            parts = [y * scale_ref[p] for p, y in enumerate(parts)]
        y = parts[0] if len(parts) == 1 else jax.nn.silu(parts[0]) * parts[1]
        row = tile * tm + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
        mine = (row >= starts[group]) & (row < starts[group + 1])
        # A tile's first group clears it: what a group before or behind left out stays zero.
        kept = jnp.where((v == 0) | (tile_V[before] != tile), 0.0, out_ref[...].astype(jnp.float32))
        out_ref[...] = jnp.where(mine, y, kept).astype(out_ref.dtype)

"""A decode step's experts on TPU in one kernel that reads only the experts that are hit.

The grid runs over (halves of the width, hit experts, tiles of the width). Per step: gate and up
products of a tile, SiLU(gate) · up, weighed by each token's share of the expert, and the tile's
part of the down product, added up in float32 on the chip. So a hit expert's matrices are read once,
others never, and hidden activations stay on the chip. The list of hit experts is as long as it can
get; behind the last one, block numbers stand still, so that nothing is fetched or computed. The
halves are for chips with two cores, and are added at the end.

Compiled for v4, v5e, v5p, v6e and tpu7x; compiled, not run.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, precision
from pallas_kernels.grouped_matmul import tiles
from pallas_kernels.grouped_matmul.pallas_tpu import cast
from pallas_kernels.grouped_matmul.stacked import stack

_HALVES = 2
_ROWS = 16  # rows of a bfloat16 tile


def hit_list(expert_Tk: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Returns the hit experts in order, [min(T k, E)] with the last repeated, and their number [1].

    Ids outside 0 … E-1 hit nobody.
    """
    all_E = jnp.arange(num_experts)
    hit_E = jnp.any(expert_Tk.reshape(-1, 1) == all_E, axis=0)
    upto_E = jnp.cumsum(hit_E.astype(jnp.int32))
    count = upto_E[-1]
    place = jnp.minimum(jnp.arange(min(expert_Tk.size, num_experts)), jnp.maximum(count - 1, 0))
    # The n-th hit expert is the number of experts up to which at most n are hit.
    found = jnp.sum(upto_E <= place[:, None], axis=1)
    return jnp.minimum(found, num_experts - 1).astype(jnp.int32), count[None]


def hit_experts(g_TD, weight_Tk, expert_Tk, gate_up, down, *, interpret=None):
    """As the public function."""
    T, D = g_TD.shape
    E, F = down.shape[:2]
    up_values, up_scale, index = stack(gate_up)
    down_values, down_scale, _ = stack(down)
    tile = tile_size(T, D, F, g_TD.dtype, up_values.dtype)
    padding = ((0, -T % _ROWS), (0, 0))
    hits, count = hit_list(expert_Tk, E)
    if interpret is None:
        interpret = dispatch.platform() == "cpu"
    out_TD = _call(
        jnp.pad(g_TD, padding), jnp.pad(weight_Tk.astype(jnp.float32), padding),
        jnp.pad(expert_Tk.astype(jnp.int32), padding, constant_values=E), up_values, up_scale,
        down_values, down_scale, (index, hits, count), tile, interpret)
    return out_TD[:T]


def tile_size(T, D, F, x_dtype, w_dtype) -> int:
    """Returns the tile of the width; raises ValueError where none fits the chip."""
    found = tiles.listed("hit", T, D, F)
    if found is not None and jnp.dtype(x_dtype) == jnp.bfloat16:
        return found["width"]
    held, one = _vmem(T, D, x_dtype, w_dtype)
    return tiles.column_tile(F, 512, one, tiles.vmem_bytes() - held)


def fits(T, D, F, x_dtype, w_dtype) -> bool:
    """Whether there is a tile for these shapes on the chip at hand."""
    try:
        return bool(tile_size(T, D, F, x_dtype, w_dtype))
    except ValueError:
        return False


def _vmem(T, D, x_dtype, w_dtype) -> tuple[int, int]:
    """Bytes of tokens and sums, and of one unit of width: three matrices twice, and cast."""
    rows = -(-T // _ROWS) * _ROWS
    x_bytes, w_bytes = jnp.dtype(x_dtype).itemsize, jnp.dtype(w_dtype).itemsize
    cast_bytes = x_bytes if w_bytes < x_bytes else 0
    return rows * (D * (2 * x_bytes + 12) + 2048), 3 * D * (2 * w_bytes + cast_bytes) + 16 * rows


def _tiles_of_half(F: int, tile: int) -> int:
    tiles_F = -(-F // tile)
    return -(-tiles_F // _HALVES)


def up_block(c, h, f, index, hits, count, F: int, tile: int):
    """The block of gate and up [R, 2, E, D, F] for tile f of half c of the h-th hit expert.

    Behind the last hit expert its last tile stays, and so it does for an odd number's missing tile.
    """
    per_half = _tiles_of_half(F, tile)
    place = c * per_half + jnp.where(h < count[0], f, per_half - 1)
    return index[0], 0, hits[h], 0, jnp.minimum(place, -(-F // tile) - 1)


@functools.partial(jax.jit, static_argnames=("tile", "interpret"))
def _call(g_TD, weight_Tk, expert_Tk, up_RPEDF, up_scale, down_REFD, down_scale, plan, tile,
          interpret):
    T, D = g_TD.shape
    E, F = down_REFD.shape[1:3]
    k, n = expert_Tk.shape[1], plan[1].shape[0]
    quantised = up_scale is not None
    per_half = _tiles_of_half(F, tile)

    def whole(c, h, f, index, hits, count):
        return 0, 0

    def up(*step):
        return up_block(*step, F, tile)

    def down(*step):
        layer, _, expert, _, place = up_block(*step, F, tile)
        return layer, expert, place, 0

    def down_scales(c, h, f, index, hits, count):
        return index[0], hits[h], 0, 0

    operands = [g_TD, weight_Tk, expert_Tk, up_RPEDF, down_REFD]
    specs = [pl.BlockSpec((T, D), whole), pl.BlockSpec((T, k), whole),
             pl.BlockSpec((T, k), whole), pl.BlockSpec((None, 2, None, D, tile), up),
             pl.BlockSpec((None, None, tile, D), down)]
    scratch = []
    if quantised:
        operands += [up_scale, down_scale]
        specs += [pl.BlockSpec((None, 2, None, 1, tile), up),
                  pl.BlockSpec((None, None, 1, D), down_scales)]
        scratch = [pltpu.VMEM((2, D, tile), g_TD.dtype), pltpu.VMEM((tile, D), g_TD.dtype)]
    held, one = _vmem(T, D, g_TD.dtype, up_RPEDF.dtype)
    out_CTD = pl.pallas_call(
        functools.partial(_kernel, tile=tile, width=F, per_half=per_half, quantised=quantised),
        out_shape=jax.ShapeDtypeStruct((_HALVES, T, D), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=(_HALVES, n, per_half), in_specs=specs,
            out_specs=pl.BlockSpec((None, T, D), lambda c, h, f, *_: (c, 0, 0)),
            scratch_shapes=scratch),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=max(16 << 20, held + tile * one + (4 << 20))),
        cost_estimate=pl.CostEstimate(
            flops=6 * n * T * D * F, transcendentals=n * T * F,
            bytes_accessed=3 * n * D * F * up_RPEDF.dtype.itemsize
            + _HALVES * T * D * (4 + g_TD.dtype.itemsize)),
        interpret=interpret,
        name="hit_experts",
    )(*plan, *operands)
    return jnp.sum(out_CTD, axis=0)


def _kernel(index, hits, count, g_ref, weight_ref, expert_ref, up_ref, down_ref, *refs, tile, width,
            per_half, quantised):
    del index
    up_scale, down_scale, out_ref, up_cast, down_cast = (
        refs if quantised else (None, None, *refs, up_ref, down_ref))
    c, h, f = (pl.program_id(axis) for axis in range(3))
    dot = functools.partial(jax.lax.dot, precision=precision.for_dtype(g_ref.dtype),
                            preferred_element_type=jnp.float32)

    @pl.when((h == 0) & (f == 0))
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    first = (c * per_half + f) * tile

    @pl.when((h < count[0]) & (first < width))
    def _():
        if quantised:
            for p in range(2):
                cast(up_ref.at[p], up_cast.at[p])
            cast(down_ref, down_cast)
        gate, up = (dot(g_ref[...], up_cast[p]) for p in range(2))
        if quantised:
            gate, up = gate * up_scale[0], up * up_scale[1]
        mine_Tk = expert_ref[...] == hits[h]
        weight_T1 = jnp.sum(jnp.where(mine_Tk, weight_ref[...], 0.0), axis=1, keepdims=True)
        hidden = jax.nn.silu(gate) * up * weight_T1
        down = down_cast[...]
        if width % tile:  # what lies beyond the width may hold anything
            column = jax.lax.broadcasted_iota(jnp.int32, hidden.shape, 1)
            hidden = jnp.where(first + column < width, hidden, 0.0)
            row = jax.lax.broadcasted_iota(jnp.int32, down.shape, 0)
            down = jnp.where(first + row < width, down.astype(jnp.float32), 0.0).astype(down.dtype)
        y = dot(hidden.astype(g_ref.dtype), down)
        out_ref[...] += y * down_scale[...] if quantised else y

"""Ways to arrange the experts' products; each takes (g_TD, weight_Tk, expert_Tk, gate_up, down).

All give the weighted sum over each token's experts, float32 [T, D]. Which is fastest depends on
tokens and device; `choose` knows. `filled`, `hit` and `fused` cannot be differentiated.

A scan over layers cuts weights out of their stack. On TPU `dense` reads them in place, others copy
the layer first; `hit` and `fused`, kernels for TPU and Hopper, read a `Stacked` weight where it
lies. One token through 3 layers of 8 experts on v6e: 2.0 GB by `hit`, 8.2 by `dense`, 46 by
`gather` (compiled, not run). A step of 16 tokens through 8 layers on an H200: 190 ms by `dense`,
14.9 by `hit`.
"""

import jax
import jax.numpy as jnp

from mmx.nn.expert_layout import halves, is_turned, merged, narrow, one_expert, plain
from mmx.nn.linear import project
from mmx.nn.wide import Wide
from pallas_kernels import dispatch, grouped_matmul
from pallas_kernels.experts.api import hit_experts, hit_fits
from pallas_kernels.grouped_matmul.api import fused_fits, grouped_swiglu
from pallas_kernels.grouped_matmul.stacked import Stacked, cut
from pallas_kernels.quantized import QuantizedTensor, dequantize

# `filled`: room per expert in quarters of its equal share, and rows of a block beyond it.
_ROOM = 5
_BLOCK = 128


def choose(tokens: int, k: int, num_experts: int, width: int, inference: bool,
           kernels: tuple[str, ...] = (), stacked: bool = False) -> str:
    """Few tokens read only the experts they hit; a few more stream all; many are grouped.

    kernels: which of "hit" and "fused" take these arguments on the TPU or Hopper GPU at hand.
    stacked: weights are not cut out yet.
    """
    platform = dispatch.platform()
    if platform == "cpu":
        if tokens * k <= num_experts // 2:
            return "sliced"
        if tokens <= 64:
            return "dense"
        return "filled" if inference else "tiled"
    # Sorting costs more than idle products when all experts together are one thin matrix.
    thin = num_experts * width <= 2048
    if platform == "tpu":
        # A TPU waits for weights, not for products, until tokens outnumber its flops per byte.
        if tokens <= 128 or thin:
            return "hit" if "hit" in kernels and inference and stacked and not thin else "dense"
        return "fused" if "fused" in kernels and inference else "grouped"
    # A GPU's kernel reads an expert once for 64 of its rows.
    if "hit" in kernels and inference and not thin and tokens * k <= 16 * num_experts:
        return "hit"
    if tokens * k <= num_experts:
        return "gather"
    if "fused" in kernels and inference:
        return "fused"
    return "dense" if tokens <= 16 or thin else "grouped"


def apply(name, inference: bool, g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Runs the form `name`, or the best one here; ids beyond the last expert are nobody's.

    Raises ValueError for a name that is not in `TABLE`.
    """
    E, F = down.shape[:2]
    T, k = expert_Tk.shape
    name = name or choose(T, k, E, F, inference, _kernels(g_TD, k, gate_up, down),
                          isinstance(gate_up, Stacked))
    if name not in TABLE:
        raise ValueError(f"MoE has no implementation '{name}'. It has {', '.join(TABLE)}.")
    if name not in TAKE_NOBODY:  # whose weights are 0: any expert will do
        expert_Tk = jnp.minimum(expert_Tk, E - 1)
    if name not in TAKE_WIDE:
        gate_up = narrow(gate_up, E, F)
    if name not in TAKE_STACKED:
        gate_up, down = cut(gate_up), cut(down)
    # Kernels for TPU take none, and others both or neither.
    both = is_turned(gate_up) == is_turned(down) and dispatch.platform() != "tpu"
    if name not in TAKE_TURNED or not both:
        gate_up, down = plain(gate_up), plain(down)
    return TABLE[name](g_TD, weight_Tk, expert_Tk, gate_up, down)


def _kernels(g_TD, k: int, gate_up, down) -> tuple[str, ...]:
    """The kernels that fit the TPU or Hopper GPU at hand; none elsewhere."""
    if isinstance(gate_up, Wide):
        return ()
    (T, D), F = g_TD.shape, down.shape[1]
    fused = all(fused_fits(jax.ShapeDtypeStruct((T * k, size), g_TD.dtype), w)
                for size, w in ((D, gate_up), (F, down)))
    return ("hit",) * hit_fits(g_TD, gate_up) + ("fused",) * fused


def _swiglu(gate, up):
    """SiLU(gate) · up in float32."""
    return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)


def _swiglu_flat(gate_up):
    """SiLU(gate) · up for [..., 2F] products; on a CPU a split inner axis costs more than exp."""
    F = gate_up.shape[-1] // 2
    return jax.nn.silu(gate_up[..., :F]) * gate_up[..., F:]


def sliced(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """One product per token and choice, each with its expert's matrices cut out of the whole."""
    out, F = [], down.shape[1]
    for t in range(expert_Tk.shape[0]):
        terms = []
        for j in range(expert_Tk.shape[1]):
            e = expert_Tk[t, j]
            if isinstance(gate_up, Wide):
                w1 = jax.lax.dynamic_slice_in_dim(gate_up.values, e * 2 * F, 2 * F, axis=1)
                hidden = _swiglu_flat(project("d,df->f", g_TD[t], w1, jnp.float32))
            else:
                hidden = _swiglu(*(
                    project("d,df->f", g_TD[t], one_expert(w, e, g_TD.dtype), jnp.float32)
                    for w in halves(gate_up)))
            w2 = one_expert(down, e, g_TD.dtype)
            y = project("f,fd->d", hidden.astype(g_TD.dtype), w2, jnp.float32)
            terms.append(weight_Tk[t, j] * y)
        out.append(sum(terms[1:], terms[0]))
    return jnp.stack(out)


def gather(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Reads the chosen experts' weights per token: the decode step of a small batch.

    XLA's reductions read through the gather, in place; its matrix products have a copy written
    first. One token on an H200: 9 MiB of temporary memory in place of 648 (compiled, not run).
    """
    gate, up, chosen_down = (
        jax.tree.map(lambda w: w[expert_Tk], w) for w in (*halves(gate_up), down))
    hidden = _swiglu(*(_vector_products(g_TD[:, None], w) for w in (gate, up)))
    out_TkD = _vector_products(hidden.astype(g_TD.dtype), chosen_down)
    return jnp.sum(out_TkD * weight_Tk[..., None], axis=1)


def _vector_products(x, w):
    """x [..., I] times w [..., I, O] in float32; an int8 scale multiplies the sum."""
    values = w.values if isinstance(w, QuantizedTensor) else w
    y = jnp.sum(x.astype(jnp.float32)[..., None] * values.astype(jnp.float32), axis=-2)
    return y * w.scale[..., 0, :] if isinstance(w, QuantizedTensor) else y


def hit(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """A kernel that reads the hit experts once, where they lie."""
    name = "mosaic_gpu" if dispatch.platform() == "gpu" else "pallas_tpu"
    return hit_experts(g_TD, weight_Tk, expert_Tk, gate_up, down, implementation=name)


def dense(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Runs every expert on every token and weighs by zero or more: the weights move once."""
    E, F, D = down.shape
    weight_TE = jnp.sum(jax.nn.one_hot(expert_Tk, E) * weight_Tk[..., None], axis=1)
    if isinstance(gate_up, Wide):
        hidden = project("td,df->tf", g_TD, gate_up.values, jnp.float32).reshape(-1, E, 2 * F)
        hidden = (_swiglu_flat(hidden) * weight_TE[..., None]).astype(g_TD.dtype)
    elif dispatch.platform() == "cpu":
        # Batched over experts: as one product XLA's CPU backend would transpose the weights first.
        g_ETD = jnp.broadcast_to(g_TD, (E, *g_TD.shape))
        hidden = _swiglu(*(project("etd,edf->etf", g_ETD, dequantize(w, g_TD.dtype), jnp.float32)
                           for w in halves(gate_up)))
        hidden = (hidden * weight_TE.T[..., None]).swapaxes(0, 1).astype(g_TD.dtype)
    else:
        # One product: a scan's slice of the weights with one reader is not copied first.
        both = project("td,cedf->tcef", g_TD, gate_up, jnp.float32)
        hidden = _swiglu(both[:, 0], both[:, 1])
        hidden = (hidden * weight_TE[..., None]).astype(g_TD.dtype)
    # The sum runs over experts, whose scales differ, so int8 is multiplied out first.
    if isinstance(down, QuantizedTensor):
        down = dequantize(down, g_TD.dtype)
    return project("tef,efd->td", hidden, down, jnp.float32)


def grouped(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Sorts (token, choice) pairs by expert and multiplies each group by its own matrices."""
    def run(rows, sizes_E):
        hidden = _swiglu(*(grouped_matmul(rows, w, sizes_E) for w in halves(gate_up)))
        return grouped_matmul(hidden.astype(g_TD.dtype), down, sizes_E)

    return _sorted(run, g_TD, weight_Tk, expert_Tk, down.shape[0])


def fused(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """As `grouped` by kernels that take gate and up at once and read weights where they lie."""
    name = "hopper" if dispatch.platform() == "gpu" else "pallas_tpu"

    def run(rows, sizes_E):
        hidden = grouped_swiglu(rows, gate_up, sizes_E, implementation=name)
        return grouped_matmul(hidden, down, sizes_E, implementation=name)

    return _sorted(run, g_TD, weight_Tk, expert_Tk, down.shape[0])


def _sorted(run, g_TD, weight_Tk, expert_Tk, E: int):
    """Runs `run(rows, sizes_E)` on pairs in the order of experts, and sums them by token."""
    T, k = expert_Tk.shape
    flat = expert_Tk.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes_E = jnp.bincount(flat, length=E).astype(jnp.int32)
    out = run(_rows(g_TD, order // k), sizes_E)
    out_TkD = _rows(out, jnp.argsort(order)).reshape(T, k, -1).astype(jnp.float32)
    # Rows of no group may hold anything.
    return jnp.sum(jnp.where(expert_Tk[..., None] < E, out_TkD * weight_Tk[..., None], 0), axis=1)


def _rank(expert_M, E: int):
    """Each pair's place among the pairs of its expert, and the pairs per expert: no sort."""
    hit_ME = (expert_M[:, None] == jnp.arange(E)).astype(jnp.int32)
    upto_ME = jnp.cumsum(hit_ME, axis=0)
    return hit_ME, jnp.sum(upto_ME * hit_ME, axis=1) - 1, upto_ME[-1]


def tiled(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Pairs lie in tiles of one expert each, padded; one batched product runs over the tiles."""
    T, k = expert_Tk.shape
    E, F, D = down.shape
    M = T * k
    tile = 256 if M >= 4096 else 128
    count = -(-M // tile) + E - 1  # whole tiles that any sizes can need
    hit_ME, rank_M, sizes_E = _rank(expert_Tk.reshape(-1), E)
    tiles_E = -(-sizes_E // tile)
    ends_E = jnp.cumsum(tiles_E)
    slot_M = jnp.sum(hit_ME * ((ends_E - tiles_E) * tile), axis=1) + rank_M
    # Padding rows take token 0 and are read by nobody.
    source = jnp.zeros(count * tile, jnp.int32).at[slot_M].set(jnp.arange(M) // k)
    expert_of_tile = jnp.minimum(jnp.sum(jnp.arange(count)[:, None] >= ends_E, axis=1), E - 1)
    w1, w2 = (dequantize(jax.tree.map(lambda x: x[expert_of_tile], w), g_TD.dtype)
              for w in (merged(gate_up), down))
    x = _rows(g_TD, source).reshape(count, tile, D)
    hidden = project("nmd,ndf->nmf", x, w1, jnp.float32)
    out = project("nmf,nfd->nmd", _swiglu_flat(hidden).astype(g_TD.dtype), w2, jnp.float32)
    out_TkD = _rows(out.reshape(-1, D), slot_M).reshape(T, k, D)
    return jnp.sum(out_TkD * weight_Tk[..., None], axis=1)


def filled(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Every expert has room for a little more than its share; what overflows runs in blocks.

    The room is one batched product without copies of weights. Pairs beyond it lie sorted behind,
    and a loop of dynamic length walks over them: few, unless the router is badly out of balance.
    """
    T, k = expert_Tk.shape
    E, F, D = down.shape
    M, dtype = T * k, g_TD.dtype
    room = -(-M * _ROOM // (4 * E * 16)) * 16
    hit_ME, rank_M, sizes_E = _rank(expert_Tk.reshape(-1), E)
    over_E = jnp.maximum(sizes_E - room, 0)
    behind_E = jnp.cumsum(over_E) - over_E
    inside_M = rank_M < room
    rows = E * room
    first_M = jnp.sum(hit_ME * (rows - room + behind_E), axis=1)
    slot_M = rank_M + jnp.where(inside_M, expert_Tk.reshape(-1) * room, first_M)
    # Padding rows take token 0 and are read by nobody.
    source = jnp.zeros(rows + M + _BLOCK, jnp.int32).at[slot_M].set(jnp.arange(M) // k)
    if isinstance(gate_up, Wide):
        w1 = gate_up.values.reshape(D, E, 2 * F).swapaxes(0, 1)
    else:
        w1 = merged(gate_up)

    def run(spec, x, w1, w2):
        first, second = spec
        hidden = _swiglu_flat(project(first, x, dequantize(w1, dtype), jnp.float32))
        return project(second, hidden.astype(dtype), dequantize(w2, dtype), jnp.float32)

    x = _rows(g_TD, source[:rows]).reshape(E, room, D)
    inside = run(("emd,edf->emf", "emf,efd->emd"), x, w1, down).reshape(rows, D)

    blocks_E = -(-over_E // _BLOCK)
    ends_E = jnp.cumsum(blocks_E)

    def block(i, out):
        e = jnp.sum(i >= ends_E)
        at = behind_E[e] + (i - ends_E[e] + blocks_E[e]) * _BLOCK
        x = _rows(g_TD, jax.lax.dynamic_slice_in_dim(source, rows + at, _BLOCK))
        one1, one2 = (one_expert(w, e, dtype) for w in (w1, down))
        y = run(("md,df->mf", "mf,fd->md"), x, one1, one2)
        # An expert's last block runs into the next one's rows, which are written after it.
        return jax.lax.dynamic_update_slice_in_dim(out, y, at, 0)

    behind = jnp.zeros((M + _BLOCK, D), jnp.float32)
    behind = jax.lax.fori_loop(0, ends_E[-1], block, behind)
    out = jnp.where(
        inside_M[:, None],
        _rows(inside, jnp.where(inside_M, slot_M, 0)),
        _rows(behind, jnp.where(inside_M, 0, slot_M - rows)),
    )
    return jnp.sum(out.reshape(T, k, D) * weight_Tk[..., None], axis=1)


def _rows(x, index):
    return x.at[index].get(mode="promise_in_bounds")


TABLE = {"sliced": sliced, "gather": gather, "dense": dense, "grouped": grouped, "tiled": tiled,
         "filled": filled, "hit": hit, "fused": fused}
# Forms that read a `Wide` gate_up, a `Stacked` or a `TurnedTensor` leaf as it is, and that leave
# nobody's ids out.
TAKE_WIDE = ("sliced", "dense", "filled")
TAKE_STACKED = ("hit", "fused")
TAKE_TURNED = ("grouped", "hit", "fused")
TAKE_NOBODY = ("grouped", "hit", "fused")

"""Ways to arrange the experts' products; each takes (g_TD, weight_Tk, expert_Tk, gate_up, down).

All give the weighted sum over each token's experts, float32 [T, D]. Which is fastest depends on
tokens and device; `choose` knows. `filled` cannot be differentiated.
"""

import jax
import jax.numpy as jnp

from mmx.nn.linear import project
from mmx.nn.wide import Wide
from pallas_kernels import dispatch, grouped_matmul
from pallas_kernels.quantized import QuantizedTensor, dequantize

# `filled`: room per expert in quarters of its equal share, and rows of a block beyond it.
_ROOM = 5
_BLOCK = 128


def choose(tokens: int, k: int, num_experts: int, width: int, inference: bool) -> str:
    """Few tokens read only the experts they hit; a few more stream all; many are grouped."""
    cpu = dispatch.platform() == "cpu"
    if tokens * k <= num_experts // 2:
        return "sliced" if cpu else "gather"
    if cpu:
        if tokens <= 64:
            return "dense"
        return "filled" if inference else "tiled"
    # A TPU waits for the weights, not for the products, until tokens outnumber its flops per byte.
    few = 128 if dispatch.platform() == "tpu" else 16
    # Sorting costs more than idle products when all experts together are one thin matrix.
    return "dense" if tokens <= few or num_experts * width <= 2048 else "grouped"


def apply(name, inference: bool, g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Runs the form `name`, or the best one here; ids beyond the last expert are nobody's.

    Raises ValueError for a name that is not in `TABLE`.
    """
    E, F = down.shape[:2]
    T, k = expert_Tk.shape
    name = name or choose(T, k, E, F, inference)
    if name not in TABLE:
        raise ValueError(f"MoE has no implementation '{name}'. It has {', '.join(TABLE)}.")
    if name != "grouped":  # whose weights are 0: any expert will do
        expert_Tk = jnp.minimum(expert_Tk, E - 1)
    if name not in TAKE_WIDE:
        gate_up = narrow(gate_up, E, F)
    return TABLE[name](g_TD, weight_Tk, expert_Tk, gate_up, down)


def _swiglu(gate, up):
    """SiLU(gate) · up in float32."""
    return jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)


def _halves(gate_up):
    """The matrices of gate and of up, [E, D, F] each."""
    return (jax.tree.map(lambda w, c=c: w[c], gate_up) for c in range(2))


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
                    project("d,df->f", g_TD[t], _expert(w, e, g_TD.dtype), jnp.float32)
                    for w in _halves(gate_up)))
            w2 = _expert(down, e, g_TD.dtype)
            y = project("f,fd->d", hidden.astype(g_TD.dtype), w2, jnp.float32)
            terms.append(weight_Tk[t, j] * y)
        out.append(sum(terms[1:], terms[0]))
    return jnp.stack(out)


def _expert(weight, index, dtype):
    """The matrix of one expert; a plain int8 leaf is cut before it is multiplied out."""
    one = jax.tree.map(
        lambda w: jax.lax.dynamic_index_in_dim(w, index, 0, keepdims=False), weight)
    return dequantize(one, dtype)


def gather(g_TD, weight_Tk, expert_Tk, gate_up, down):
    """Reads the chosen experts' weights per token: the decode step of a small batch."""
    gate, up, chosen_down = (
        dequantize(jax.tree.map(lambda w: w[expert_Tk], w), g_TD.dtype)
        for w in (*_halves(gate_up), down))
    hidden = _swiglu(*(project("td,tkdf->tkf", g_TD, w, jnp.float32) for w in (gate, up)))
    out_TkD = project("tkf,tkfd->tkd", hidden.astype(g_TD.dtype), chosen_down, jnp.float32)
    return jnp.sum(out_TkD * weight_Tk[..., None], axis=1)


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
                           for w in _halves(gate_up)))
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
    T, k = expert_Tk.shape
    E, F, D = down.shape
    flat = expert_Tk.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes_E = jnp.bincount(flat, length=E).astype(jnp.int32)
    rows = jnp.take(g_TD, order // k, axis=0)
    hidden = _swiglu(*(grouped_matmul(rows, w, sizes_E) for w in _halves(gate_up)))
    out = grouped_matmul(hidden.astype(g_TD.dtype), down, sizes_E)
    back = jnp.argsort(order)
    out_TkD = jnp.take(out, back, axis=0).reshape(T, k, D).astype(jnp.float32)
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


def narrow(gate_up, E: int, F: int):
    """Returns gate_up as [2, E, D, F], however it is laid."""
    if not isinstance(gate_up, Wide):
        return gate_up
    return gate_up.values.reshape(-1, E, 2, F).transpose(2, 1, 0, 3)


def merged(gate_up):
    """Returns [2, E, D, F] as [E, D, 2F]: one product for gate and up."""
    def join(w):
        return w.transpose(1, 2, 0, 3).reshape(w.shape[1], w.shape[2], -1)

    return jax.tree.map(join, gate_up)


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
        one1, one2 = (_expert(w, e, dtype) for w in (w1, down))
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
         "filled": filled}
# Forms that read a `Wide` gate_up as it is.
TAKE_WIDE = ("sliced", "dense", "filled")

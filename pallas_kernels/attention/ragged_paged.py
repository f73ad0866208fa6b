"""Attention over a paged cache: rows of any number of queries, prefill and decode in one call.

The TPU form is jax's kernel behind an adapter: block sizes from data, what lies beyond the last
query zeroed, its cost told. Compiled for v4, v5e, v5p, v6e and tpu7x, not run; no interpreter takes
it (it reshapes references). The form for XLA visits the pages that are held, row by row.
"""

import math
import pathlib

import jax
import jax.numpy as jnp

from pallas_kernels import costs, dispatch, precision, tuning
from pallas_kernels.attention.operands import dtype_refusal
from pallas_kernels.attention.shares import NEG_INF

_SIZES = pathlib.Path(__file__).with_name("blocks.json")
QUERY_BLOCK = 128
KEY_BLOCK = 1024


def paged_attention(
    q_TNH: jax.Array,
    pages_PCJH: jax.Array,
    lengths_B: jax.Array,
    index_BP: jax.Array,
    starts_B: jax.Array,
    rows: jax.Array | int | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Causal softmax attention with grouped heads, scale 1/√H, over keys and values in pages.

    Row b has the queries `starts_B[b]` … `starts_B[b + 1] - 1`, the last of `lengths_B[b]` tokens.
    Its token s lies in page `index_BP[b, s // C]` at place s % C.

    Args:
      q_TNH: float32 or bfloat16 queries of all rows, one row after another.
      pages_PCJH: [pages, C tokens, 2·K, H] with key head k at 2·k and its values at 2·k + 1; q's
        dtype or a narrower one.
      lengths_B: int32 tokens that a row holds, its queries among them.
      index_BP: int32 pages of each row; entries beyond its length may be of any page.
      starts_B: int32 [B + 1].
      rows: how many rows there are; what stands behind them is not read. B if None.
      implementation: "reference" (all scores at once), "xla" (blocks), "pallas_tpu" (jax's kernel;
        TPU only), or None.

    Returns:
      Output [T, N, H] in q's dtype, zero for queries of no row. Forward only.

    Raises:
      ValueError: shapes that do not fit, or an implementation that is unknown or does not take
        these arguments or this platform.
    """
    T, N, H = q_TNH.shape
    B = index_BP.shape[0]
    J = pages_PCJH.shape[2]
    if (pages_PCJH.shape[3] != H or J % 2 or N % (J // 2) or lengths_B.shape != (B,)
            or starts_B.shape != (B + 1,)):
        raise ValueError(
            f"q {q_TNH.shape}, pages {pages_PCJH.shape}, lengths {lengths_B.shape}, index "
            f"{index_BP.shape} and starts {starts_B.shape} must be [T, N, H], [P, C, 2·K, H] with "
            "K dividing N, [B], [B, pages] and [B + 1].")
    fits = (dispatch.platform() == "tpu" and tuning.chip()
            and refusal(q_TNH, pages_PCJH) is None)
    run = dispatch.choose("paged_attention", _IMPLEMENTATIONS, implementation,
                          "pallas_tpu" if fits else "xla", (T, N, H, *pages_PCJH.shape, B))
    rows = jnp.asarray(B if rows is None else rows, jnp.int32)
    starts_B = jnp.where(jnp.arange(B + 1) <= rows, starts_B, starts_B[rows])
    return run(q_TNH, pages_PCJH, lengths_B, index_BP, starts_B, rows)


def refusal(q_TNH, pages_PCJH) -> str | None:
    """Says in a sentence why jax's kernel does not take these arguments; None if it does."""
    if dispatch.platform() != "tpu":
        return "attention over pages 'pallas_tpu' runs on a TPU only. Pass 'xla' or None."
    if sentence := dtype_refusal("pallas_tpu", q_TNH, pages_PCJH):
        return sentence
    J, H = pages_PCJH.shape[2:]
    rows, packing = divmod(J, 4 // pages_PCJH.dtype.itemsize)
    if H % 128 or packing or not (rows in (1, 2, 4) or rows % 8 == 0):
        return (f"attention over pages 'pallas_tpu' got {J // 2} heads of {H}. Heads must be a "
                "multiple of 128 and fill whole tiles: 1, 2, 4 or a multiple of 8 rows of 32 bits. "
                "Pass 'xla' or None.")
    return None


def _row_of(T: int, starts_B):
    """The row of each token; B or more beyond the last."""
    return jnp.searchsorted(starts_B[1:], jnp.arange(T), side="right")


def _reference(q_TNH, pages_PCJH, lengths_B, index_BP, starts_B, rows):
    """The definition itself: each token with a copy of its row."""
    T, N, H = q_TNH.shape
    B = index_BP.shape[0]
    row_T = jnp.minimum(_row_of(T, starts_B), B - 1)
    q, pages = q_TNH.astype(jnp.float32), pages_PCJH.astype(jnp.float32)
    kv_TSJH = pages[index_BP].reshape(B, -1, *pages.shape[2:])[row_T]
    k, v = (jnp.repeat(kv_TSJH[:, :, i::2], 2 * N // pages.shape[2], axis=2) for i in (0, 1))
    position_T = (lengths_B - starts_B[1:])[row_T] + jnp.arange(T)
    mask_TS = jnp.arange(k.shape[1]) <= position_T[:, None]
    scores = jnp.einsum("tnh,tsnh->tns", q, k, precision="highest") / jnp.sqrt(H)
    weights = jax.nn.softmax(jnp.where(mask_TS[:, None], scores, -jnp.inf), axis=-1)
    weights = jnp.where(mask_TS[:, None], weights, 0)
    out = jnp.einsum("tns,tsnh->tnh", weights, jnp.where(mask_TS[..., None, None], v, 0),
                     precision="highest")
    return _none_beyond(out, starts_B, rows).astype(q_TNH.dtype)


def _none_beyond(out_TNH, starts_B, rows):
    return jnp.where((jnp.arange(len(out_TNH)) < starts_B[rows])[:, None, None], out_TNH, 0)


def _xla(q_TNH, pages_PCJH, lengths_B, index_BP, starts_B, rows):
    T, N, H = q_TNH.shape
    C, J = pages_PCJH.shape[1:3]
    K = J // 2
    block, at_once = min(QUERY_BLOCK, T), max(1, KEY_BLOCK // C)
    index_BP = jnp.pad(index_BP, ((0, 0), (0, -index_BP.shape[1] % at_once)))
    blocks = -(-T // block)
    q = jnp.pad(q_TNH, ((0, blocks * block - T), (0, 0), (0, 0)))
    q_nKGTH = q.reshape(blocks, block, K, N // K, H).transpose(0, 2, 3, 1, 4)
    row_T = _row_of(blocks * block, starts_B).reshape(blocks, block)

    def query_block(inputs):
        i, q, row_t = inputs
        token = i * block + jnp.arange(block)

        def row(b, sums):
            mine = ((token >= starts_B[b]) & (token < starts_B[b + 1]))[:, None]
            position = (token - starts_B[b + 1] + lengths_B[b])[:, None]

            def keys(j, sums):
                out, total, peak = sums
                some = jax.lax.dynamic_slice(index_BP, (b, j * at_once), (1, at_once))[0]
                kv = pages_PCJH[some].reshape(at_once * C, J, H).astype(q.dtype)
                key = j * at_once * C + jnp.arange(at_once * C)
                kv = jnp.where((key < lengths_B[b])[:, None, None], kv, 0)
                mask = mine & (key <= position)
                scores = jnp.einsum("kgth,skh->kgts", q, kv[:, 0::2], precision=exact,
                                    preferred_element_type=jnp.float32) / math.sqrt(H)
                scores = jnp.where(mask, scores, NEG_INF)
                new_peak = jnp.maximum(peak, scores.max(-1, keepdims=True))
                weights = jnp.where(mask, jnp.exp(scores - new_peak), 0.0)
                rescale = jnp.exp(peak - new_peak)
                values = jnp.einsum("kgts,skh->kgth", weights.astype(q.dtype), kv[:, 1::2],
                                    precision=exact, preferred_element_type=jnp.float32)
                total = total * rescale + weights.sum(-1, keepdims=True)
                return out * rescale + values, total, new_peak

            # What the block's last query of the row sees.
            held = lengths_B[b] - jnp.maximum(starts_B[b + 1] - (i + 1) * block, 0)
            return jax.lax.fori_loop(0, -(-held // (at_once * C)), keys, sums)

        sums = (jnp.zeros(q.shape, jnp.float32), jnp.zeros((*q.shape[:3], 1), jnp.float32),
                jnp.full((*q.shape[:3], 1), NEG_INF, jnp.float32))
        last = jnp.minimum(row_t[-1] + 1, rows)
        out, total, _ = jax.lax.fori_loop(row_t[0], last, row, sums)
        return out / jnp.maximum(total, 1e-30)

    exact = precision.for_dtype(q_TNH.dtype)
    out = jax.lax.map(query_block, (jnp.arange(blocks), q_nKGTH, row_T))
    return out.transpose(0, 3, 1, 2, 4).reshape(-1, N, H)[:T].astype(q_TNH.dtype)


def _pallas_tpu(q_TNH, pages_PCJH, lengths_B, index_BP, starts_B, rows):
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library

    if sentence := refusal(q_TNH, pages_PCJH):
        raise ValueError(sentence)
    (T, _, H), C, (B, P) = q_TNH.shape, pages_PCJH.shape[1], index_BP.shape
    sizes = tuning.entry(_SIZES, "ragged_decode" if T <= B else "ragged")
    queries = min(sizes["queries"], T)
    scale = 1.0 if pages_PCJH.dtype != q_TNH.dtype else None  # without one it does not cast
    with costs.kernel_cost(*_cost(q_TNH, pages_PCJH, B, P, queries)):
        out = library.ragged_paged_attention(
            q_TNH, pages_PCJH, lengths_B, index_BP, starts_B, rows.reshape(1), sm_scale=H**-0.5,
            k_scale=scale, v_scale=scale, num_queries_per_block=queries,
            num_kv_pages_per_block=min(max(1, sizes["keys"] // C), P),
            vmem_limit_bytes=sizes["vmem_mib"] << 20)
    return _none_beyond(out, starts_B, rows)


def _cost(q_TNH, pages_PCJH, B: int, P: int, queries: int):
    """Operations and bytes of full rows: every block of queries meets each of its rows anew."""
    (T, N, H), (C, J) = q_TNH.shape, pages_PCJH.shape[1:3]
    passes = max(B, -(-T // queries))
    read = passes * P * C * J * H * pages_PCJH.dtype.itemsize
    return 4 * passes * queries * P * C * N * H, read + 2 * q_TNH.size * q_TNH.dtype.itemsize


_IMPLEMENTATIONS = {"reference": _reference, "xla": _xla, "pallas_tpu": _pallas_tpu}

"""cuDNN's paged attention as a reading in place: one query a row over the stack of several layers.

A stack [R, B, K, S, H] of caches is a pool of pages that lies as cuDNN wants it,
[R·B·K·S/128, 1, 128, H]: each key head of a row counts as a row, with S/128 pages. So nothing is
cut out in front of it. jax's public function takes no pool that is larger than what is read, so its
inner one is called.

On an H100, one layer of a stack, 64 rows of 8,192 keys and 8 of 65,536: cut out for cuDNN 2.20 and
2.20 ms, by pages 0.73 and 0.73, 99 % of the copy. Shares are tested by a stand-in, not run.
"""

import inspect
from functools import partial

import jax.numpy as jnp

from pallas_kernels.attention import cudnn
from pallas_kernels.grouped_matmul.stacked import stack

PAGE = 128


def refusal(q_BTNH, k_BSKH, offsets_B, packed) -> str | None:
    """Says in a sentence why cuDNN does not take these arguments by pages; None if it does."""
    if sentence := cudnn.refusal(q_BTNH, k_BSKH, packed):
        return sentence
    if offsets_B is None or q_BTNH.shape[1] != 1:
        return "attention 'cudnn_paged' takes one query a row, at offsets. Pass 'cudnn' or None."
    if k_BSKH.dtype != q_BTNH.dtype:
        return (f"attention 'cudnn_paged' got keys of {k_BSKH.dtype}, which would be cast whole. "
                f"They must be {q_BTNH.dtype}: pass 'cudnn' or None.")
    if k_BSKH.shape[1] % PAGE:
        return (f"attention 'cudnn_paged' got {k_BSKH.shape[1]} slots, which are no whole pages of "
                f"{PAGE}. Pass 'cudnn' or None.")
    return None


def attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, samples_BT):
    """As the public function, one query a row; keys and values may be `Stacked`."""
    if sentence := refusal(q_BTNH, k_BSKH, offsets_B, samples_BT):
        raise ValueError(sentence)
    run = partial(_by_pages, sums=False)
    return cudnn.cached(run, q_BTNH, k_BSKH, v_BSKH, jnp.asarray(offsets_B, jnp.int32))


def partial_attention(q_BTNH, k_BSKH, v_BSKH, offsets_B, stride, phase, own, apart, ends_BS):
    """As the public function, one query a row; keys and values may be `Stacked`."""
    if sentence := refusal(q_BTNH, k_BSKH, offsets_B, ends_BS):
        raise ValueError(sentence)
    run = partial(_by_pages, sums=True)
    return cudnn.share(run, q_BTNH, k_BSKH, v_BSKH, jnp.asarray(offsets_B, jnp.int32), stride,
                       phase, own)


def _by_pages(q_BTNH, k_BSKH, v_BSKH, lengths_B, *, sums):
    """Output [B, T, N, H], and log-sum-exp [B, T, N] float32 if `sums`."""
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    (k, _, layer_1), (v, _, _) = (stack(x.swapaxes(1, 2)) for x in (k_BSKH, v_BSKH))
    rows, pages = B * K, S // PAGE
    pool = [x.reshape(-1, 1, PAGE, H) for x in (k, v)]
    row_R1 = layer_1 * rows + jnp.arange(rows)[:, None]
    table = (row_R1 * pages + jnp.arange(pages)).astype(jnp.int32).reshape(rows, 1, pages, 1)
    q = q_BTNH.swapaxes(1, 2).reshape(rows, N // K, T, H)
    out, lse = _cudnn(q, *pool, jnp.repeat(lengths_B, K), table, sums)
    out = out.reshape(B, N, T, H).swapaxes(1, 2)
    return out, lse.reshape(B, N, T).swapaxes(1, 2) if sums else None


def _cudnn(q_BNTH, k_PKSH, v_PKSH, lengths_B, table_B1P1, sums):
    """Output [B, N, T, H], and log-sum-exp [B, N, T] float32 if `sums`; row b reads the pages
    `table_B1P1[b, 0, :, 0]` of the pools."""
    from jax._src.cudnn import fused_attention_stablehlo as flash

    B, _, T, H = q_BNTH.shape
    unused = jnp.zeros(0, q_BNTH.dtype)
    # From jax 0.12 on it takes a function that changes scores, and that one's arguments.
    changes = "score_mod" in inspect.signature(flash._dot_product_attention).parameters
    arguments, function = ([()], [None]) if changes else ([], [])
    found = flash._dot_product_attention(
        q_BNTH, k_PKSH, v_PKSH, unused, jnp.full(B, T, jnp.int32), lengths_B, unused, unused,
        table_B1P1, table_B1P1, *arguments, H**-0.5, 42, 0.0, (False, False),
        flash.MaskType.PADDING, flash.AttentionLayout.BNTH.value, None, *function,
        flash.check_cudnn_version(), sums)
    return found if sums else (found, None)

"""Attention over pages against attention row by row over the same keys laid end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, dispatch, paged_attention
from pallas_kernels.attention import ragged_paged
from tests.tolerances import assert_close

N, K, H, C = 6, 2, 16, 8
# Tokens held and queries of each row: decode, a chunk at an offset, a whole row, none, decode.
ROWS = ((33, 1), (100, 20), (17, 17), (5, 0), (64, 1))


def case(dtype="float32", heads=(N, K, H), spare=9):
    """A shuffled pool with NaN where no row has a token, a row too many, and what is expected."""
    n, k, h = heads
    rng = np.random.default_rng(0)
    lengths, counts = (np.array(x, np.int32) for x in zip(*ROWS, strict=True))
    B, P = len(ROWS), 16
    q = jnp.asarray(rng.standard_normal((counts.sum() + spare, n, h)), dtype)
    pages = np.full((B * P + 3, C, 2 * k, h), np.nan, np.float32)
    index = rng.permutation(B * P + 3)[:B * P].reshape(B, P).astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    wanted = np.zeros(q.shape)
    for b, length in enumerate(lengths):
        kv = np.asarray(jnp.asarray(rng.standard_normal((length, 2 * k, h)), dtype), np.float32)
        for s in range(length):
            pages[index[b, s // C], s % C] = kv[s]
        if counts[b]:
            row = slice(starts[b], starts[b + 1])
            wanted[row] = attention(
                q[None, row].astype(jnp.float32), kv[None, :, 0::2], kv[None, :, 1::2],
                offsets_B=jnp.array([length - counts[b]]), implementation="reference")[0]
    # A row that does not count has values which must not be read.
    lengths, index = np.append(lengths, 70), np.append(index, index[:1] * 0 + 10**6, axis=0)
    starts = np.append(starts, 10**6)
    arrays = (jnp.asarray(pages, dtype), *(jnp.asarray(x, jnp.int32)
                                           for x in (lengths, index, starts)))
    return (q, *arrays, len(ROWS)), wanted


@pytest.mark.parametrize("form, dtype, sizes", [
    ("xla", "float32", (128, 1024)), ("xla", "float32", (8, 24)), ("xla", "bfloat16", (8, 24)),
    ("reference", "float32", (128, 1024))], ids=str)
def test_rows_of_prefill_and_decode(monkeypatch, form, dtype, sizes):
    monkeypatch.setattr(ragged_paged, "QUERY_BLOCK", sizes[0])
    monkeypatch.setattr(ragged_paged, "KEY_BLOCK", sizes[1])
    arguments, wanted = case(dtype)
    got = jax.jit(lambda *x: paged_attention(*x, implementation=form))(*arguments)
    assert got.dtype == dtype
    assert_close(got, wanted, "kernel", dtype, form)
    assert not np.asarray(got[sum(count for _, count in ROWS):]).any()


def test_float8_pages():
    (q, pages, *rest), _ = case("bfloat16")
    narrow = pages.astype(jnp.float8_e4m3fn)
    got = paged_attention(q, narrow, *rest)
    same = paged_attention(q, narrow.astype(jnp.bfloat16), *rest)
    assert_close(got, same, "kernel", "bfloat16", "float8")


def test_the_adapter_says_the_same_to_jaxs_kernel(monkeypatch):
    """Which no interpreter takes: its own definition stands in for it here."""
    from jax.experimental.pallas.ops.tpu import ragged_paged_attention as library
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel

    seen = {}

    def definition(q, pages, *rest, num_queries_per_block, num_kv_pages_per_block,
                   vmem_limit_bytes, **kwargs):
        seen.update(queries=num_queries_per_block, pages=num_kv_pages_per_block)
        out = kernel.ref_ragged_paged_attention(q, pages, *rest, **kwargs)
        return jnp.pad(out, ((0, len(q) - len(out)), (0, 0), (0, 0)), constant_values=jnp.nan)

    monkeypatch.setattr(library, "ragged_paged_attention", definition)
    monkeypatch.setattr(ragged_paged.tuning, "chip", lambda: "v6e")
    arguments, wanted = case(heads=(16, 4, 128))
    with dispatch.compiling_for("tpu"):
        got = paged_attention(*arguments)  # not traced: the definition wants numbers
    assert_close(got, wanted, "kernel", "float32", "pallas_tpu")
    assert seen == {"queries": len(arguments[0]), "pages": 16}


def test_what_does_not_fit_is_refused():
    (q, pages, *rest), _ = case()
    with pytest.raises(ValueError, match="K dividing N"):
        paged_attention(q[:, :5], pages, *rest)
    with pytest.raises(ValueError, match="runs on a TPU only"):
        paged_attention(q, pages, *rest, implementation="pallas_tpu")
    with dispatch.compiling_for("tpu"):
        with pytest.raises(ValueError, match="2 heads of 16"):
            paged_attention(q, pages, *rest, implementation="pallas_tpu")
        with pytest.raises(ValueError, match="q of bfloat16 and k of float32"):
            paged_attention(q.astype("bfloat16"), pages, *rest, implementation="pallas_tpu")

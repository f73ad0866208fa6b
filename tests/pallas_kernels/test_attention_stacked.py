"""Attention over a layer's cache where it lies in the stack of several: the bits of one cut out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, partial_attention
from pallas_kernels.attention import cudnn, cudnn_paged
from pallas_kernels.grouped_matmul.stacked import Stacked
from tests.pallas_kernels import cudnn_stand_in
from tests.pallas_kernels.test_attention import draw, expected
from tests.tolerances import assert_close

FORMS = ("reference", "xla", "pallas_tpu", "cudnn")
LAYERS, LAYER = 3, 1


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(cudnn, "_cudnn", cudnn_stand_in.run)
    monkeypatch.setattr(cudnn, "refusal", lambda *arguments: None)
    monkeypatch.setattr(cudnn_paged, "_cudnn", cudnn_stand_in.run_paged)


def compare(run, k_BSKH, v_BSKH):
    """`run(k, v)` on a layer alone and on its stack, in which whoever reads another meets NaN."""
    alone = [x.swapaxes(1, 2) for x in (k_BSKH, v_BSKH)]  # as caches lie
    stacks = [jnp.full((LAYERS, *x.shape), jnp.nan, x.dtype).at[LAYER].set(x) for x in alone]

    def of_layer(k, v):
        return run(k.swapaxes(1, 2), v.swapaxes(1, 2))

    wanted = jax.jit(of_layer)(*alone)
    got = jax.jit(lambda k, v, r: of_layer(Stacked(k, r), Stacked(v, r)))(*stacks, LAYER)
    for have, want in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(have, want)
        assert not np.isnan(have).any()


@pytest.mark.parametrize("T, S, offsets, dtype", [
    (1, 1300, (1299, 7), "float32"), (1, 1300, (1299, 7), "float8_e4m3fn"),
    (40, 1300, (1260, 0), "float32"), (5, 96, (91, 3), "float32")], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_of_a_stack(form, T, S, offsets, dtype):
    q, k, v = draw(T, S, "gqa")
    compare(lambda k, v: attention(q, k, v, offsets_B=jnp.array(offsets), implementation=form),
            k.astype(dtype), v.astype(dtype))


@pytest.mark.parametrize("form", FORMS)
def test_a_share_of_a_layer_of_a_stack(form):
    q, k, v = draw(1, 1300, "gqa")
    compare(lambda k, v: partial_attention(q, k, v, offsets_B=jnp.array([2599, 40]), stride=2,
                                           phase=1, implementation=form), k, v)


@pytest.mark.parametrize("form", ["cudnn_paged", "cudnn_paged_128"])
def test_pages_are_rows_of_the_stack(form):
    """Rows of different lengths, one of a single key."""
    q, k, v = draw(1, 640, "gqa")
    offsets = (639, 0)
    compare(lambda k, v: attention(q, k, v, offsets_B=jnp.array(offsets), implementation=form),
            k, v)
    got = attention(q, k, v, offsets_B=jnp.array(offsets), implementation=form)
    assert_close(got, expected(q, k, v, offsets), "kernel", "float32", form)
    share = {"offsets_B": jnp.array([1279, 0]), "stride": 2, "phase": 1}  # a row without a key
    compare(lambda k, v: partial_attention(q, k, v, implementation=form, **share), k, v)
    for have, want in zip(partial_attention(q, k, v, implementation=form, **share),
                          partial_attention(q, k, v, implementation="cudnn", **share), strict=True):
        assert_close(have, want, "kernel", "float32", form)


def test_what_pages_do_not_take():
    zeros = jnp.zeros(2, jnp.int32)
    q, k, _ = draw(1, 100, "gqa")
    two, narrow = jnp.concatenate([q, q], 1), k.astype(jnp.bfloat16)
    for form, queries, keys, offsets, sentence in [
            ("cudnn_paged", two, k, zeros, "takes one query a row, at offsets"),
            ("cudnn_paged", q, k, None, "takes one query a row, at offsets"),
            ("cudnn_paged", q, narrow, zeros, "which would be cast whole"),
            ("cudnn_paged_128", q, k, zeros, "100 slots, which are no whole pages")]:
        with pytest.raises(ValueError, match=sentence):
            attention(queries, keys, keys, offsets_B=offsets, implementation=form)

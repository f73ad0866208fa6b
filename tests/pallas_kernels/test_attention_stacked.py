"""Attention over a layer's cache where it lies in the stack of several: the bits of one cut out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, dispatch, partial_attention
from pallas_kernels.attention import api, cudnn, cudnn_paged
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


def test_pages_are_read_in_the_stack():
    """Rows of different lengths, one of a single key."""
    form = "cudnn_paged"
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
    q, k, _ = draw(1, 128, "gqa")
    two, narrow = jnp.concatenate([q, q], 1), k.astype(jnp.bfloat16)
    for queries, keys, offsets, sentence in [
            (two, k, zeros, "takes one query a row, at offsets"),
            (q, k, None, "takes one query a row, at offsets"),
            (q, narrow, zeros, "which would be cast whole"),
            (q, k[:, :100], zeros, "100 slots, which are no whole pages of 128")]:
        with pytest.raises(ValueError, match=sentence):
            attention(queries, keys, keys, offsets_B=offsets, implementation="cudnn_paged")


def test_hopper_reads_a_stack_by_pages(monkeypatch):
    """What does not lie in whole pages of a stack, and a share of the keys, are cut out."""
    monkeypatch.setattr(api.tuning, "hopper", lambda: True)
    q = jax.ShapeDtypeStruct((1, 1, 4, 128), jnp.bfloat16)
    alone, ragged = (jax.ShapeDtypeStruct((1, S, 2, 128), jnp.bfloat16) for S in (256, 300))
    stacked, ragged = (Stacked(jax.ShapeDtypeStruct((3, *x.shape), x.dtype), 0)
                       for x in (alone, ragged))
    with dispatch.compiling_for("gpu"):
        chosen = [api._automatic(q, k, (), None) for k in (stacked, alone, ragged)]
        assert chosen == ["cudnn_paged", "cudnn", "cudnn"]
        assert api.partial_form(q, stacked) == "cudnn"

"""Floors by numbers worked out by hand, at the released geometry."""

import math

import jax
import pytest

from mmx.bench import arrays, floors
from mmx.bench.floors import Ceilings
from mmx.config import preset
from tests import tiny

# A copy of 4,243 GB/s and a product of 793 TFLOP/s.
H200 = Ceilings(4243e9, 793e12, "bfloat16")


def ms(work):
    return floors.floor(work, H200).seconds * 1e3


@pytest.mark.parametrize("B, T, train, expected", [
    # 4 passes (11 with the backward one) of B·T·64·128 numbers of 2 bytes.
    (1, 8192, False, 0.127), (8, 8192, False, 1.012), (1, 131072, False, 2.024),
    (1, 524288, False, 8.098), (1, 8192, True, 0.348)])
def test_lightning(B, T, train, expected):
    assert ms(floors.lightning(B, T, 64, 128, 2, train)) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("B, expected", [(1, 2.0e-3), (16, 31.6e-3), (64, 126.5e-3),
                                         (256, 506e-3)])
def test_lightning_step(B, expected):
    assert ms(floors.lightning_step(B, 64, 128)) == pytest.approx(expected, rel=0.02)


def test_grouped_is_bound_by_memory_for_few_rows_and_by_products_for_many():
    few = floors.floor(floors.grouped(64, 6144, 9216, 32, 2), H200)
    # 32·6144·9216 weights, 64 rows in and out, of 2 bytes.
    assert few.unit == "GB/s" and few.amount == 2 * (32 * 6144 * 9216 + 64 * (6144 + 9216))
    many = floors.floor(floors.grouped(32768, 6144, 9216, 32, 2, 2), H200)
    assert many.unit == "TFLOP/s" and many.amount == 2 * 2 * 32768 * 6144 * 9216
    assert many.seconds == pytest.approx(9.358e-3, rel=1e-3)
    assert many.rate(2 * many.seconds) == pytest.approx(793 / 2)


def test_attention():
    # 64 heads, half of 8192² scores, 2 products of 2·128 operations: 1.0995e12.
    assert floors.attention(1, 8192, 64, 8, 128, 2).flops == pytest.approx(1.0995e12, rel=1e-4)
    # 16 rows × 8,192 positions × 8 heads × 128 × (keys, values) × 2 bytes = 512 MiB.
    assert floors.attention_step(16, 8192, 64, 8, 128, 2).bytes == 512 << 20


def test_expected_experts():
    config = preset("text01")
    assert floors.expected_experts(config, 1) == pytest.approx(2)
    assert floors.expected_experts(config, 16) == pytest.approx(20.6, abs=0.05)
    assert floors.expected_experts(config, 10**4) == pytest.approx(32)


def test_prefill_counts_head_and_what_nobody_needs_of_the_last_layer_once():
    config = preset("period")
    tokens = 16384
    # 7·5·6144·8192 + 6144·128·144 + 8·(2·3·6144·9216 + 6144·32) weights, two operations each;
    # 4·(256·128 + 128²) per lightning head, 2·128·16384 per softmax head. Of the last layer, which
    # is the softmax layer, every token makes keys and values; the rest and the head are for one.
    experts = 6 * 6144 * 9216 + 6144 * 32
    body = 7 * 5 * 6144 * 8192 + 6144 * 128 * 16 + 7 * experts
    mixing = 64 * 7 * 4 * (256 * 128 + 128 * 128)
    last = 2 * (6144 * 128 * 128 + experts) + 64 * 2 * 128 * tokens
    expected = tokens * (2 * body + mixing) + last + 2 * 200064 * 6144
    work = floors.prefill(config, tokens)
    assert work.flops == pytest.approx(expected, rel=1e-12)
    assert work.flops / tokens == pytest.approx(8.396e9, rel=1e-3)
    # Where the last layer is a lightning layer, its state is made of keys and values.
    lightning = config.replace(layer_types=config.layer_types[:7])
    expected -= tokens * 2 * 6144 * 128 * 16 + last
    again = 2 * (3 * 6144 * 8192 + experts) + 64 * (4 * 256 * 128 + 2 * 128 * 128)
    expected -= (tokens - 1) * again
    assert floors.prefill(lightning, tokens).flops == pytest.approx(expected, rel=1e-12)


def test_decode_reads_what_is_hit():
    config = preset("period")
    experts = 8 * 32 * 3 * 6144 * 9216 * 2
    for batch, hit in ((1, 2.0), (16, 32 * (1 - (15 / 16) ** 16))):
        norms = (7 * (2 * 6144 + 8192) + 2 * 6144 + 6144) * 2
        dense = 2 * (7 * 5 * 6144 * 8192 + 6144 * 128 * 144 + 8 * 6144 * 32 + 200064 * 6144
                     + batch * 6144) + norms
        states = 2 * 7 * batch * 64 * 128 * 128 * 4
        keys = 2 * batch * 1024 * 8 * 128 * 2
        work = floors.decode(config, batch, 1024, "bfloat16", None)
        assert work.bytes == pytest.approx(dense + experts * hit / 32 + states + keys, rel=1e-12)
    # All experts of int8 are half of bfloat16's, up to their scales; head and embedding stay.
    whole, half = (floors.decode(config, 10**4, 1, "bfloat16", mode).bytes for mode in
                   (None, "int8"))
    assert whole - half == pytest.approx(experts / 2 + 7 * 5 * 6144 * 8192 + 6144 * 128 * 144,
                                         rel=1e-3)


def test_share():
    assert floors.share(4.0, 1.0) == 0.25 and math.isnan(floors.share(0.0, 1.0))


@pytest.mark.parametrize("mode", [None, "int8"])
def test_random_weights_are_as_the_loader_has_them(mode):
    from mmx.quant import abstract_params

    config = tiny.config()
    params = arrays.weights(config, 0, "bfloat16", mode)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), params)
    expected = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_params(config, "bfloat16", mode))
    assert shapes == expected
    again = arrays.weights(config, 0, "bfloat16", mode)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, again))


def test_pieces_are_all_drawn(monkeypatch):
    monkeypatch.setattr(arrays, "_PIECE", 64)
    arrays._program.cache_clear()
    x = arrays.values(jax.random.key(0), (8, 96), "float32")
    arrays._program.cache_clear()
    assert len(set(x.ravel().tolist())) == x.size and 0.8 < float(x.std()) < 1.2

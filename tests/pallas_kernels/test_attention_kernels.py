"""The hardware forms of softmax attention, interpreted, against the float64 definition."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import attention, dispatch, partial_attention
from pallas_kernels.attention import api, cudnn, pallas_tpu, splash
from pallas_kernels.grouped_matmul.stacked import Stacked
from tests.pallas_kernels import cudnn_stand_in
from tests.pallas_kernels.test_attention import B, draw, expected
from tests.tolerances import assert_close

SMALL = {"rows": 64, "keys": 128, "vmem_mib": 16}


def merged(shares):
    weighted, total, peak = (np.stack([np.asarray(x, np.float64) for x in part])
                             for part in zip(*shares, strict=True))
    scale = np.exp(peak - peak.max(0))
    return (weighted * scale[..., None]).sum(0) / (total * scale).sum(0)[..., None]


@pytest.mark.parametrize("T, S, offsets, heads", [
    (1, 257, (0, 256), "gqa"), (1, 63, (62, 5), "mqa"), (63, 300, (0, 237), "gqa"),
    (63, 256, (193, 70), "mha"), (257, 700, (443, 100), "gqa"), (257, 257, (0, 0), "mqa")], ids=str)
def test_cached(T, S, offsets, heads):
    """Blocks of several sizes; what a row's queries do not see must not matter."""
    q, k, v = draw(T, S, heads)
    wanted = expected(q, k, v, offsets)
    beyond = (np.arange(S)[None] >= np.array(offsets)[:, None] + T)[..., None, None]
    k, v = (jnp.where(beyond, 1e4, x) for x in (k, v))
    got = jax.jit(lambda *args: pallas_tpu._flash(*args, 1, 0, sums=False, sizes=SMALL))(
        q, k, v, jnp.array(offsets))
    assert_close(got, wanted, "kernel", "float32", "small blocks")


@pytest.mark.parametrize("T, S, offsets", [(1, 2500, (2499, 0)), (40, 2500, (2460, 1030))], ids=str)
def test_cached_with_the_blocks_of_a_chip(T, S, offsets):
    q, k, v = draw(T, S, "gqa")
    got = attention(q, k, v, offsets_B=jnp.array(offsets), implementation="pallas_tpu")
    assert_close(got, expected(q, k, v, offsets), "kernel", "float32", "pallas_tpu")


def test_blocks_beyond_a_rows_last_query_are_not_read():
    """Blocks of NaN, which a mask does not stop: 0 · NaN would reach the sum."""
    S, offsets = 1024, jnp.array([60, 500])
    q, k, v = draw(40, S, "gqa")
    wanted = expected(q, k, v, offsets)
    last = -(-(offsets + 40) // 128) * 128
    k, v = (jnp.where((jnp.arange(S)[None] >= last[:, None])[..., None, None], jnp.nan, x)
            for x in (k, v))
    got = pallas_tpu._flash(q, k, v, offsets, 1, 0, sums=False, sizes=SMALL)
    assert_close(got, wanted, "kernel", "float32", "NaN beyond")
    shape = pallas_tpu._Shape(B, 2, 3, 40, S, 16, 64, 128, 1, 16)
    assert [int(shape.visited(offset, 0, 1)) for offset in (60, 500, 984, 5000)] == [1, 5, 8, 8]


def test_races_and_bounds():
    q, k, v = draw(63, 300, "gqa")
    offsets = jnp.array([200, 3])
    params = pltpu.InterpretParams(detect_races=True)
    got = jax.jit(lambda *args: pallas_tpu._flash(
        *args, 1, 0, sums=False, sizes=SMALL, interpret=params))(q, k, v, offsets)
    assert_close(got, expected(q, k, v, offsets), "kernel", "float32", "simulated")
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("first", [0, 100, -40])
def test_packed_pieces(first):
    """A piece of queries begins `first` tokens after a piece of keys; samples end in and between.

    Later samples are told by where their keys cease to be seen.
    """
    T, S = 200, 256
    q, k, v = draw(T, S, "gqa")
    sample = np.cumsum(np.isin(np.arange(512), [50, 130, 131, 260]))
    rows = [sample[shift:] for shift in (0, 60)]
    keys = np.stack([row[50:50 + S] for row in rows])
    queries = np.stack([row[50 + first:50 + first + T] for row in rows])
    ends = (queries[:, :, None] <= keys[:, None]).sum(1).astype(np.int32)

    def run(form):
        return jax.jit(form)(q, k, v, jnp.full(B, first), jnp.asarray(ends))

    small = run(lambda *x: pallas_tpu._flash(*x[:4], 1, 0, x[4], sums=True, sizes=SMALL))
    named = {form: run(lambda *x, form=form: partial_attention(
        *x[:3], offsets_B=x[3], ends_BS=x[4], implementation=form))
        for form in ("reference", "xla", "pallas_tpu")}
    wanted, seen = named["reference"], np.asarray(named["reference"][1]) > 0
    assert seen.any() and (first >= 0 or not seen.all())
    for what, got in [("small blocks", small), *named.items()]:
        for have, want in zip(got[1:], wanted[1:], strict=True):
            have, want = (np.where(seen, x, 0) for x in (have, want))
            assert_close(have, want, "kernel", "float32", what)
        assert_close(got[0], wanted[0], "kernel", "float32", what)
    if first == 0:
        whole = expected(q, k[:, :T], v[:, :T], samples=queries)
        assert_close(merged([small]), whole, "kernel", "float32", "one share")


@pytest.mark.parametrize("form", ["xla", "pallas_tpu"])
@pytest.mark.parametrize("T, S", [(1, 1300), (63, 300)])
def test_a_narrower_cache_is_cast_inside(form, T, S):
    q, k, v = draw(T, S, "gqa", "bfloat16")
    k, v = (x.astype(jnp.float8_e4m3fn) for x in (k, v))
    offsets = (S - T, 17)
    got = attention(q, k, v, offsets_B=jnp.array(offsets), implementation=form)
    assert got.dtype == jnp.bfloat16
    k, v = (x.astype(jnp.float32) for x in (k, v))
    assert_close(got, expected(q, k, v, offsets), "kernel", "bfloat16", form)


@pytest.mark.parametrize("W, T, offsets", [(1, 63, (0, 193)), (3, 63, (0, 700)),
                                           (4, 1, (0, 1023))], ids=str)
def test_shares_of_spread_keys_merge_to_the_whole(W, T, offsets):
    """Position p lies on device p mod W; a device may hold no key that a row sees."""
    S = 1024 if W == 4 else 768 if W == 3 else 256
    q, k, v = draw(T, S, "gqa")
    share = jax.jit(lambda k, v, phase: partial_attention(
        q, k, v, offsets_B=jnp.array(offsets), stride=W, phase=phase,
        implementation="pallas_tpu"))
    shares = [share(k[:, phase::W], v[:, phase::W], phase) for phase in range(W)]
    assert_close(merged(shares), expected(q, k, v, offsets), "kernel", "float32", "merged")
    plain = partial_attention(q, k[:, W - 1::W], v[:, W - 1::W], offsets_B=jnp.array(offsets),
                              stride=W, phase=W - 1, implementation="xla")
    assert_close(shares[-1][1], plain[1], "kernel", "float32", "total weight")
    seen = np.asarray(plain[1]) > 0
    assert_close(np.where(seen, shares[-1][2], 0), np.where(seen, plain[2], 0), "kernel",
                 "float32", "peak")


def test_bfloat16_cache():
    q, k, v = draw(63, 257, "gqa", "bfloat16")
    offsets = (194, 17)
    got = attention(q, k, v, offsets_B=jnp.array(offsets), implementation="pallas_tpu")
    assert got.dtype == jnp.bfloat16
    assert_close(got, expected(q, k, v, offsets), "kernel", "bfloat16", "pallas_tpu")


@pytest.mark.parametrize("T, heads, dtype", [(1, "gqa", "float32"), (63, "mqa", "float32"),
                                             (257, "gqa", "float32"), (257, "gqa", "bfloat16")])
def test_splash(T, heads, dtype):
    q, k, v = draw(T, T, heads, dtype)
    got = attention(q, k, v, implementation="splash")
    assert got.dtype == q.dtype
    assert_close(got, expected(q, k, v), "kernel", dtype, "splash")


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_of_splash(packed):
    T = 257
    q, k, v = draw(T, T, "gqa")
    weight = draw(T, T, "gqa", seed=1)[0]
    samples = jnp.asarray(np.arange(T)[None] >= np.array([[100], [130]]), jnp.int32)
    samples = samples if packed else None

    def both(form):
        def scalar(*qkv):
            out = attention(*qkv, samples_BT=samples, implementation=form)
            return jnp.vdot(out, weight), out

        return jax.jit(jax.grad(scalar, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    gradients, out = both("splash")
    assert_close(out, expected(q, k, v, samples=None if samples is None else np.asarray(samples)),
                 "kernel", "float32", "splash")
    for name, have, want in zip("qkv", gradients, both("reference")[0], strict=True):
        assert_close(have, want, "gradient", "float32", f"d{name}")


def test_splash_takes_several_blocks(monkeypatch):
    """1,100 tokens become two blocks of 640, whose parts are not powers of two."""
    assert splash._block(1100, 1024) == 640 and splash._divisor(640, 512) == 128
    assert splash._block(4096, 1024) == 1024 and splash._divisor(1024, 512) == 512
    sizes = {"block": 128, "block_back": 128, "at_once": 128, "most_tokens": 1024}
    monkeypatch.setattr(splash, "_sizes", lambda dtype: sizes)
    q, k, v = draw(300, 300, "gqa")
    got = attention(q, k, v, implementation="splash")
    assert_close(got, expected(q, k, v), "kernel", "float32", "three blocks")
    with pytest.raises(ValueError, match="room for 1024"):
        attention(*draw(1025, 1025, "mqa"), implementation="splash")


@pytest.mark.parametrize("T, offsets", [(1, (0, 299)), (63, (0, 237)), (63, (100, 260))], ids=str)
def test_merge_of_past_and_chunk(T, offsets):
    """In the last case 23 tokens of padding stand beyond the cache."""
    q, k, v = draw(T, 300, "gqa")
    got = cudnn.cached(cudnn_stand_in.run, q, k, v, jnp.array(offsets))
    valid = min(T, 300 - max(offsets))
    assert_close(got[:, :valid], expected(q, k, v, offsets)[:, :valid], "kernel", "float32")


@pytest.mark.parametrize("W, T, offsets", [(4, 1, (0, 1022)), (4, 64, (0, 701)), (4, 64, (1, 960)),
                                           (3, 64, (2, 700)), (1, 63, (0, 193))], ids=str)
def test_shares_of_spread_keys_by_cudnn(W, T, offsets):
    """Chunks of eight pieces, two a device; three devices can not halve 64, and one counts it."""
    S = 1024 if W == 4 else 768 if W == 3 else 256
    q, k, v = draw(T, S, "gqa")
    own = cudnn.at_queries(k, v, jnp.array(offsets), T)
    share = jax.jit(lambda k, v, phase: cudnn.share(
        cudnn_stand_in.run, q, k, v, jnp.array(offsets), W, phase, own))
    # Only the chunk's own copies and the past may be looked at.
    later = (np.arange(S) >= np.array(offsets)[:, None] + (T == 1))[..., None, None]
    shares = [share(*(jnp.where(later, 1e4, x)[:, phase::W] for x in (k, v)), phase)
              for phase in range(W)]
    assert_close(merged(shares), expected(q, k, v, offsets), "kernel", "float32", "merged")


def test_causal_work_is_shared_out_evenly():
    """Scores that each of four devices computes of a chunk's own keys."""
    counts = []

    def run(q, k, v, lengths_B):
        B, T = q.shape[:2]
        counts[-1] += B * T * (T + 1) // 2 if lengths_B is None else T * int(lengths_B.sum())
        return cudnn_stand_in.run(q, k, v, lengths_B)

    q, k, v = draw(64, 64, "gqa")
    for phase in range(4):
        counts.append(0)
        cudnn.share(run, q, k[:, ::4] * 0, v[:, ::4], jnp.zeros(B, jnp.int32), 4, phase, (k, v))
    # The first piece has no key before it, and is given one.
    assert max(counts) == counts[0] == min(counts) + 8 * B


@pytest.fixture
def lowered(monkeypatch):
    """The text of a function lowered for a GPU: neither cuDNN nor a GPU is here."""
    from jax._src.cudnn import fused_attention_stablehlo
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "loaded", lambda: True)

    def text(function, *arrays):
        with dispatch.compiling_for("gpu"):
            return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()

    return text


@pytest.mark.parametrize("T", [1, 64])
def test_a_share_is_lowered_to_cudnns_calls(lowered, T):
    """Queries of all devices over the keys here, and two pieces of them over the chunk's own."""
    q, k, v = (jnp.tile(x, 4) for x in draw(T, 128, "gqa", "bfloat16"))
    own = tuple(jnp.tile(x, 4) for x in draw(T, T, "gqa", "bfloat16")[1:])
    N, K, H = q.shape[2], k.shape[2], q.shape[3]
    text = lowered(lambda q, k, v, own, phase: partial_attention(
        q, k, v, offsets_B=jnp.zeros(B, jnp.int32), stride=4, phase=phase, own=own,
        implementation="cudnn"), q, k, v, own, jnp.int32(0))
    calls = re.findall(r"cudnn\$fmhaSoftmax.*: \(tensor<([\dx]+)xbf16>, tensor<([\dx]+)x", text)

    def call(T, S):
        return f"{B}x{N}x{T}x{H}", f"{B}x{K}x{S}x{H}"

    chunk = [] if T == 1 else 2 * [call(8, 64), call(8, 8)]
    assert calls == [call(T, 128), *chunk]
    masks = ["PADDING", *["PADDING", "CAUSAL"] * (len(chunk) // 2)]
    assert re.findall("PADDING|CAUSAL", text) == masks


def test_a_share_that_cudnn_does_not_take(lowered):
    q, k, v = draw(64, 128, "gqa", "bfloat16")
    zeros = jnp.zeros(B, jnp.int32)
    for kwargs, sentence in [({"stride": 4}, "no mask for several queries over every 4th key"),
                             ({"ends_BS": jnp.zeros((B, 128), jnp.int32)}, "no packed rows")]:
        with pytest.raises(ValueError, match=sentence):
            lowered(lambda q, k, v, kwargs=kwargs: partial_attention(
                q, k, v, offsets_B=zeros, implementation="cudnn", **kwargs), q, k, v)


@pytest.mark.parametrize("offsets", [None, (5, 64)])
def test_cudnn_is_lowered_to_its_calls(lowered, offsets):
    """The cache keeps its layout."""
    q, k, v = (jnp.tile(x, 4) for x in draw(64, 128, "gqa", "bfloat16"))
    where = None if offsets is None else jnp.array(offsets)
    text = lowered(lambda q, k, v: attention(
        q, k, v, offsets_B=where, implementation="cudnn"), q, k, v)
    assert text.count("@__cudnn$fmhaSoftmax") == (1 if offsets is None else 2)
    assert "PADDING" in text if offsets else "CAUSAL" in text


def test_pages_of_a_stack_are_lowered_to_cudnns_call(lowered):
    """The stack itself goes in: nothing is cut out of it."""
    q, k, v = draw(1, 256, "gqa", "bfloat16")
    stacks = [jnp.stack([x.swapaxes(1, 2)] * 3) for x in (k, v)]

    def decode(q, k, v, r):
        return attention(q, *(Stacked(x, r).swapaxes(1, 2) for x in (k, v)),
                         offsets_B=jnp.array([255, 3]), implementation="cudnn_paged")

    text = lowered(decode, q, *stacks, jnp.int32(1))
    (N, H), K = q.shape[2:], k.shape[2]
    rows = B * K
    pool = f"tensor<{3 * rows * 2}x1x128x{H}xbf16>"
    lengths, table = f"tensor<{rows}xi32>", f"tensor<{rows}x1x2x1xi32>"
    operands = [f"tensor<{rows}x{N // K}x1x{H}xbf16>", pool, pool, lengths, lengths, table, table]
    assert re.findall(r"cudnn\$fmhaSoftmax.*: \((.*)\) ->", text) == [", ".join(operands)]
    assert "is_paged_attention\\22: true" in text and "dynamic_slice" not in text


def test_a_named_kernel_works_or_raises():
    q, k, v = draw(8, 8, "gqa")
    samples, zeros = jnp.zeros((B, 8), int), jnp.zeros(B, int)
    for form, kwargs, sentence in [
            ("splash", {"offsets_B": zeros}, "no offsets"),
            ("pallas_tpu", {"samples_BT": samples}, "no packed rows"),
            ("cudnn", {}, "needs a process that runs on an NVIDIA GPU")]:
        with pytest.raises(ValueError, match=sentence):
            attention(q, k, v, implementation=form, **kwargs)
    for form in ("splash", "pallas_tpu"):
        with pytest.raises(ValueError, match="q of float32 or bfloat16, and keys of that"):
            attention(q.astype(jnp.bfloat16), k, v, implementation=form)
        with dispatch.compiling_for("gpu"), pytest.raises(ValueError, match="runs on a TPU"):
            attention(q, k, v, implementation=form)
    with pytest.raises(ValueError, match="no implementation 'splash'"):
        partial_attention(q, k, v, offsets_B=zeros, implementation="splash")


@pytest.mark.parametrize("platform, T, H, offsets, form", [
    ("cpu", 512, 128, None, "xla"), ("cpu", 1, 128, True, "xla"),
    ("tpu", 512, 128, None, "splash"), ("tpu", 100, 128, None, "xla"),
    ("tpu", 512, 64, None, "xla"), ("tpu", 1 << 18, 128, None, "xla"),
    ("tpu", 512, 128, True, "pallas_tpu"), ("tpu", 1, 128, True, "pallas_tpu"),
    ("tpu", 1, 16, True, "xla"), ("gpu", 512, 128, None, "xla"), ("gpu", 1, 128, True, "xla")])
def test_automatic_choice(monkeypatch, platform, T, H, offsets, form):
    """A GPU's is XLA's here, as this process has no cuDNN."""
    monkeypatch.setattr(api.tuning, "chip", lambda: "v6e" if platform == "tpu" else "")
    x = jax.ShapeDtypeStruct((1, T, 8, H), jnp.bfloat16)
    with dispatch.compiling_for(platform):
        assert api._automatic(x, x, offsets, None) == form

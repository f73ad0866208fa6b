"""Numbered conformance tests of the model: published constants, closed forms, known traps.

Numbers follow the project's list of conformance tests; 9 (tensor names) stands in
tests/checkpoint, 10 belongs to the vision model.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mmx.parallel.ops
from mmx.checkpoint import load_params
from mmx.config import LIGHTNING, SOFTMAX, preset
from mmx.model import forward
from mmx.nn.block import Block, Tokens
from mmx.nn.lightning import decay_slopes, head_slopes, zero_state
from mmx.nn.moe import route
from mmx.nn.params import Factory
from mmx.nn.rope import apply_rope, inverse_frequencies
from mmx.parallel.ops import Ops
from mmx.text.chat import render
from pallas_kernels import lightning_attention
from tests import tiny
from tests.reference import lightning as f64
from tests.tolerances import assert_close, bound

LENGTHS = (1, 255, 256, 257, 511, 513, 1000)
SLOPES = np.stack([f64.slopes(64, layer, 80)[head] for layer, head in
                   ((0, 0), (0, 63), (40, 31), (78, 0), (78, 63))])
_attend = jax.jit(lightning_attention)


def test_conformance_01_slopes():
    slopes = decay_slopes(preset("text01"))
    assert slopes.shape == (80, 64) and slopes.dtype == np.float32
    for (layer, head), value in {(0, 0): 0.9170132132450, (0, 63): 0.0039062891,
                                 (40, 31): 0.0308550554, (78, 0): 0.0116168162,
                                 (78, 63): 4.94852650e-5}.items():
        assert_close(slopes[layer, head], value, "constant", what=f"layer {layer} head {head}")
    heads = head_slopes(64)
    for head, value in {0: 0.9170040, 1: 0.8408964, 7: 0.5, 15: 0.25, 31: 0.0625,
                        63: 0.00390625}.items():
        assert_close(heads[head], value, "constant", what=f"head {head}")
    for layer, factor in {0: 1.00001, 1: 0.9873517722, 6: 0.9240606329, 8: 0.8987441772,
                          40: 0.4936808861, 78: 0.0126682278}.items():
        assert_close(slopes[layer] / heads, np.full(64, factor), "constant", what=f"layer {layer}")
    half_life = np.log(2) / slopes
    assert_close(half_life[0, 0], 0.756, "three_digits")
    assert_close(half_life[78, 63], 14007.1, "five_digits")


@pytest.mark.parametrize("rule", ("official", "transformers"))
@pytest.mark.parametrize("heads", (1, 6, 8, 12, 20, 64))
def test_conformance_01_slopes_of_any_head_count(heads, rule):
    config = tiny.config(13, 8, num_heads=heads, num_kv_heads=1, decay_rule=rule)
    wanted = [f64.slopes(heads, layer, 13, rule) for layer in range(13)]
    assert_close(decay_slopes(config), np.stack(wanted), "constant")


def test_conformance_01_slopes_differ_between_rules_only_off_powers_of_two():
    official, native = (tiny.config(13, 8, num_heads=6, num_kv_heads=1, decay_rule=rule)
                        for rule in ("official", "transformers"))
    # ALiBi of 6 heads: four of the list of 4, then the first and third of the list of 8.
    listed = np.array([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]) * 1.00001
    assert_close(decay_slopes(official)[0], listed, "constant")
    geometric = 2.0 ** (-8 * np.arange(1, 7) / 6) * 1.00001
    assert_close(decay_slopes(native)[0], geometric, "constant")
    assert decay_slopes(tiny.config(1, layer_types=(LIGHTNING,)))[0, 0] > 0


def closed_form(slopes, T):
    """o_t = (1 - λ^t) / (1 - λ) for t = 1 … T, [1, T, N, 1]."""
    t = np.arange(1, T + 1.0)[:, None]
    return (np.expm1(-slopes * t) / np.expm1(-slopes))[None, :, :, None]


@pytest.mark.parametrize("T", LENGTHS)
def test_conformance_02_closed_form(T):
    """Width 1, q = k = v = 1, heads of layers from the fastest decay to the slowest."""
    slopes = SLOPES
    wanted = closed_form(slopes, T)
    ones = np.ones((1, T, len(slopes), 1), np.float32)
    out, state = _attend(ones, ones, ones, slopes.astype(np.float32))
    assert_close(state[0, :, 0, 0], wanted[0, -1, :, 0], "state", what="state")
    for n in range(len(slopes)):
        assert_close(out[:, :, n], wanted[:, :, n], "kernel", what=f"head {n}")


@pytest.mark.parametrize("T", (1, 256, 257, 512))
def test_conformance_02_decode_continues_prefill(T):
    slopes = SLOPES
    ones = np.ones((1, 600, len(slopes), 1), np.float32)
    _, carried = _attend(ones, ones, ones, slopes.astype(np.float32), lengths_B=np.array([T]))
    one = ones[:, :1]
    for t in (T, T + 1):
        out, carried = _attend(one, one, one, slopes.astype(np.float32), carried)
        assert_close(out[:, 0], closed_form(slopes, 600)[:, t], "kernel", what=f"token {t}")


def test_conformance_02_closed_form_published_values():
    values = {(0, 0): {1: 1.0, 2: 1.3997111118, 3: 1.5594800847, 300: 1.6658645857},
              (78, 63): {256: 254.3915867, 257: 255.3789984, 300: 297.7915099}}
    ones = jnp.ones((1, 300, 2, 1))
    slopes = decay_slopes(preset("text01"))[[0, 78], [0, 63]]
    out = np.asarray(_attend(ones, ones, ones, slopes)[0])[0, :, :, 0]
    for head, expected in enumerate(values.values()):
        for t, value in expected.items():
            assert_close(out[t - 1, head], value, "constant", what=f"o_{t}")
    # The known defect (one factor λ missing between blocks) would give 255.3915867 at 257.
    assert abs(out[256, 1] - 255.3915867) > 1e-2


@pytest.mark.parametrize("chunks", ((256, 256, 1), (1, 255, 257), (300, 213), (100,) * 5 + (13,)),
                         ids=str)
def test_conformance_02_chunks_with_carried_state(chunks):
    """513 tokens in chunks, each padded to 300 so that one program serves all."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 513, 4, 8)).astype(np.float32) for _ in "qkv")
    slopes = f64.slopes(64, 78, 80)[[0, 7, 31, 63]].astype(np.float32)
    wanted, last = f64.recurrent(q[0], k[0], v[0], slopes)
    state, outs, first = jnp.zeros((1, 4, 8, 8)), [], 0
    for length in chunks:
        part = [np.zeros((1, 300, 4, 8), np.float32) for _ in "qkv"]
        for padded, x in zip(part, (q, k, v), strict=True):
            padded[:, :length] = x[:, first:first + length]
        out, state = _attend(*part, slopes, state, lengths_B=jnp.array([length]))
        outs.append(out[0, :length])
        first += length
    assert_close(np.concatenate(outs), wanted, "kernel")
    assert_close(state[0], last, "state")


@pytest.mark.parametrize("size", (64, 100, 256))
@pytest.mark.parametrize("layer", (0, 40, 78))
def test_conformance_03_block_recurrent_and_dense_agree(layer, size):
    """In float64 to 1e-12, with the short last block; and the float32 chunks against them."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((700, 4, 8)) for _ in "qkv")
    slopes = f64.slopes(64, layer, 80)[[0, 7, 31, 63]]
    recurrent, last = f64.recurrent(q, k, v, slopes)
    block, block_last = f64.block(q, k, v, slopes, size=size)
    assert_close(block, recurrent, "kernel", "float64", "block against recurrent")
    assert_close(block_last, last, "state", "float64", "state")
    assert_close(f64.dense(q, k, v, slopes), recurrent, "kernel", "float64", "dense")
    inputs = [jnp.asarray(x[None], jnp.float32) for x in (q, k, v)]
    out, state = _attend(*inputs, slopes)
    assert_close(out[0], recurrent, "kernel", "float32", "chunks")
    assert_close(state[0], last, "state", "float32", "chunks' state")


def test_conformance_04_backward_closed_form_equals_finite_differences():
    """The closed form itself, in float64, against central differences of the recurrence."""
    rng = np.random.default_rng(2)
    q, k, v, weight = (rng.standard_normal((11, 2, 3)) for _ in range(4))
    state, slopes = rng.standard_normal((2, 3, 3)), np.array([0.3, 0.01])
    closed = f64.block_gradients(q, k, v, weight, slopes, state, size=4)
    inputs = [q, k, v, state]
    for which, gradient in enumerate(closed):
        direction = rng.standard_normal(gradient.shape)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * 1e-5 * direction if i == which else x
                     for i, x in enumerate(inputs)]
            out, _ = f64.recurrent(*moved[:3], slopes, moved[3])
            ends.append((out * weight).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        assert_close(slope, (gradient * direction).sum(), "finite_difference", "float64")


@partial(jax.jit, static_argnums=(5, 6))
def _lasp_plus(q, k, v, weight, slopes, ranks, split):
    """Output and gradients of <output, weight>, whole or over ranks that gather local states."""
    def attend(q, k, v):
        if not split:
            return lightning_attention(q, k, v, slopes)[0]
        ends = np.cumsum(ranks)
        starts = ends - ranks
        parts = [tuple(x[:, a:b] for x in (q, k, v)) for a, b in zip(starts, ends, strict=True)]
        local = [lightning_attention(*part, slopes)[1] for part in parts]
        outs = []
        for r, part in enumerate(parts):
            # What enters rank r: each earlier local state, decayed over the tokens in between.
            incoming = sum((local[j] * jnp.exp(-slopes * (starts[r] - ends[j]))[:, None, None]
                            for j in range(r)), jnp.zeros_like(local[0]))
            outs.append(lightning_attention(*part, slopes, incoming)[0])
        return jnp.concatenate(outs, axis=1)

    gradients = jax.grad(lambda *qkv: jnp.vdot(attend(*qkv), weight), argnums=(0, 1, 2))(q, k, v)
    return attend(q, k, v), gradients


def test_conformance_04_lasp_plus_with_unequal_ranks():
    """All-gathered local states with decay over token distances equal one sequence, both ways."""
    rng = np.random.default_rng(3)
    q, k, v, weight = (jnp.asarray(rng.standard_normal((1, 200, 3, 8)), jnp.float32)
                       for _ in range(4))
    slopes = jnp.asarray(f64.slopes(64, 40, 80)[[0, 31, 63]], jnp.float32)
    out, gradients = _lasp_plus(q, k, v, weight, slopes, (70, 1, 100, 29), True)
    arrays = [np.asarray(x[0]) for x in (q, k, v)]
    assert_close(out[0], f64.recurrent(*arrays, slopes)[0], "kernel", "float32", "output")
    wanted = f64.block_gradients(*arrays, np.asarray(weight[0]), np.asarray(slopes), size=256)
    for name, have, want in zip("qkv", gradients, wanted[:3], strict=True):
        assert_close(have[0], want, "gradient", "float32", f"d{name}")


def test_conformance_05_qkv_rows_are_per_head(tmp_path, monkeypatch):
    """Of the fused projection only row 3H·h + H + j is non-zero: only k_h[j] may respond."""
    config = tiny.config(1, layer_types=(LIGHTNING,))
    N, H, name = config.num_heads, config.head_dim, "model.layers.0.self_attn.qkv_proj.weight"
    seen = {}

    def capture(q, k, v, *args, **kwargs):
        seen.update(q=q, k=k, v=v)
        return lightning_attention(q, k, v, *args, **kwargs)

    def projections(params):
        with jax.disable_jit():  # what is seen inside a traced layer cannot leave it
            forward(config, params, jnp.arange(5)[None])
        return seen

    monkeypatch.setattr(mmx.parallel.ops, "lightning_attention", capture)
    weights = tiny.tensors(config)
    full = np.abs(weights[name]) + 0.1
    for h, j in ((0, 0), (1, 5), (N - 1, H - 1)):
        only = np.arange(3 * H * N)[:, None] == 3 * H * h + H + j
        weights[name] = np.where(only, full, 0).astype(np.float32)
        tiny.write_checkpoint(tmp_path / f"{h}", config, weights=weights)
        out = projections(load_params(tmp_path / f"{h}", dtype="float32")[1])
        assert not np.asarray(out["q"]).any() and not np.asarray(out["v"]).any()
        responds = np.zeros((N, H), bool)
        responds[h, j] = True
        assert ((np.asarray(out["k"]) != 0) == responds).all()


@pytest.mark.parametrize("kind", (LIGHTNING, SOFTMAX))
@pytest.mark.parametrize("postnorm", (True, False))
def test_conformance_06_residual_is_the_normalised_tensor(kind, postnorm):
    """Sublayers that output zero: a layer gives α·RMSNorm(α·RMSNorm(x)), whatever x's scale."""
    alpha = 3.5565588200778455
    config = tiny.config(1, layer_types=(kind,), lightning_alpha=alpha, softmax_alpha=alpha,
                         mlp_alpha=alpha, postnorm=postnorm)

    def create(spec):
        if spec.init == "ones":
            return jnp.ones(spec.shape)
        silent = spec.path.endswith(("attn/out", "moe/down"))
        return jnp.asarray(tiny.uniform(0, spec.path, spec.shape) * (not silent))

    block = Block(config, kind, Factory(create, "float32"))
    x = np.random.default_rng(1).standard_normal((1, 6, config.hidden_size)).astype(np.float32)
    tokens = Tokens(jnp.arange(6)[None], None, None, None, None, None)
    slopes = jnp.asarray(decay_slopes(config)[0])

    @jax.jit
    def layer(x):
        memory = zero_state(config, 1) if kind == LIGHTNING else None
        return block(x, slopes, memory, tokens, Ops())[0]

    def norm(x):
        return x / np.sqrt((np.asarray(x) ** 2).mean(-1, keepdims=True))

    if postnorm:
        for scale in (1.0, 30.0):
            out = np.asarray(layer(scale * x))
            assert_close(out, alpha * norm(x), "five_digits", what=f"scale {scale}")
            assert_close(np.sqrt((out**2).mean(-1)), np.full((1, 6), alpha), "five_digits")
    else:
        assert_close(layer(x), alpha**2 * x, "constant")


def test_conformance_07_rope():
    frequencies = inverse_frequencies(64, 1e7)
    assert frequencies.dtype == np.float32 and frequencies.shape == (32,)
    for j, value in {0: 1.0, 1: 0.6042964, 2: 0.36517414, 3: 0.2206734, 31: 1.6548171e-07}.items():
        assert_close(frequencies[j], value, "constant", what=f"frequency {j}")
    turn = jax.jit(apply_rope, static_argnums=(2, 3))
    x = np.random.default_rng(0).standard_normal((1, 3, 2, 128)).astype(np.float32)
    turned = np.asarray(turn(x, jnp.array([[0, 1, 9999]]), 64, 1e7))
    assert (turned[..., 64:] == x[..., 64:]).all()
    assert (turned[:, 0] == x[:, 0]).all()
    assert (turned[:, 1:, :, :64] != x[:, 1:, :, :64]).any(-1).all()
    for dim, partner, sign in ((0, 32, 1), (32, 0, -1)):
        basis = np.eye(128, dtype=np.float32)[dim].reshape(1, 1, 1, 128)
        out = turn(basis, jnp.array([[1]]), 64, 1e7)[0, 0, 0]
        wanted = np.zeros(128)
        wanted[dim], wanted[partner] = np.cos(1), sign * np.sin(1)
        assert_close(out, wanted, "constant", what=f"e_{dim} at position 1")


def test_conformance_08_router():
    logits = 3 * np.random.default_rng(0).standard_normal((500, 32)).astype(np.float32)
    choose = jax.jit(route, static_argnums=1)
    weights, experts, probabilities = (np.asarray(x) for x in choose(logits, 2))
    assert weights.dtype == probabilities.dtype == np.float32
    assert_close(weights.sum(-1), np.ones(500), "constant")
    assert_close(probabilities.sum(-1), np.ones(500), "constant")
    order = np.argsort(-logits, axis=-1)[:, :2]
    assert (experts == order).all()
    chosen = np.take_along_axis(logits.astype(np.float64), order, axis=-1)
    two = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    assert_close(weights, two, "constant", what="softmax over the two chosen logits")
    tied, experts, _ = choose(np.zeros((500, 32), np.float32), 2)
    assert experts[0].tolist() == [0, 1] and tied[0].tolist() == [0.5, 0.5]
    assert abs(float(weights.astype(jnp.bfloat16).astype(np.float32).sum(-1).max()) - 1) \
        <= bound("kernel", "bfloat16")


def test_conformance_11_chat_template():
    system = "You are a helpful assistant created by MiniMax based on MiniMax-Text-01 model."
    wanted = (f"<beginning_of_sentence>system ai_setting=assistant\n{system}<end_of_sentence>\n"
              "<beginning_of_sentence>user name=user\nHello!<end_of_sentence>\n"
              "<beginning_of_sentence>ai name=assistant\n")
    for content in (lambda text: text, lambda text: [{"type": "text", "text": text}]):
        messages = [{"role": "system", "content": content(system)},
                    {"role": "user", "content": content("Hello!")}]
        assert render(messages) == wanted
        assert render(messages, add_generation_prompt=False) == wanted[:wanted.rindex("<begin")]

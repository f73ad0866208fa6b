"""The model against the float64 reference: what transformers' class cannot check.

Partial RoPE, the official slopes at any head count, any layer pattern, un-normalised residuals,
and bfloat16.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.cache import init_cache
from mmx.config import LIGHTNING, SOFTMAX
from mmx.model import forward, step
from tests import tiny
from tests.parity.cases import LENGTHS, prompt
from tests.reference import Reference
from tests.tolerances import ROUTER_MARGIN, assert_close, bound, peak_ratio

SMALL = dict(vocab_size=96, hidden_size=40, head_dim=8, rotary_dim=4, expert_dim=24)
CONFIGS = {
    "8_layers_6_heads": tiny.config(8, 8, num_heads=6, num_kv_heads=2, **SMALL),
    "13_layers_8_heads": tiny.config(13, 8, num_heads=8, num_kv_heads=4, **SMALL),
    "16_layers_6_heads": tiny.config(16, 8, num_heads=6, num_kv_heads=6, num_experts=8, **SMALL),
    "pure_softmax": tiny.config(layer_types=(SOFTMAX,) * 3, num_heads=8, num_kv_heads=1,
                                **SMALL | dict(head_dim=12, rotary_dim=6)),
    "pure_lightning": tiny.config(layer_types=(LIGHTNING,) * 3, num_heads=12, **SMALL),
    "one_lightning_layer": tiny.config(1, layer_types=(LIGHTNING,), num_heads=6, **SMALL),
    "one_softmax_layer": tiny.config(1, layer_types=(SOFTMAX,), num_heads=6, **SMALL),
    "plain_residual": tiny.config(
        layer_types=(SOFTMAX, LIGHTNING, LIGHTNING, SOFTMAX), postnorm=False, num_heads=8,
        lightning_alpha=1.1, lightning_beta=0.9, softmax_alpha=0.8, softmax_beta=1.2,
        mlp_alpha=0.7, mlp_beta=1.3, **SMALL | dict(rotary_dim=0)),
}

# Both kinds of layer at a small compile cost, for what does not depend on the pattern.
SHORT = tiny.config(layer_types=(LIGHTNING, SOFTMAX, LIGHTNING), num_heads=6, num_kv_heads=2,
                    **SMALL)

_forward = jax.jit(forward, static_argnums=0, static_argnames="dtype")


def ragged(config, seeds=None):
    """(prompts, ids [B, T], lengths [B]); rows are padded at the right with arbitrary ids."""
    seeds = seeds or [0] * len(LENGTHS)
    prompts = [prompt(s, n, config.vocab_size) for s, n in zip(seeds, LENGTHS, strict=True)]
    ids = np.stack([np.resize(p, max(LENGTHS)) for p in prompts]).astype(np.int32)
    return prompts, ids, np.array(LENGTHS, np.int32)


def reference_logits(config, weights, length):
    """Float64 logits of the first prompt of `length` without near-ties among experts."""
    for seed in range(100):
        reference = Reference(config, weights)
        logits = reference.extend(prompt(seed, length, config.vocab_size))
        if reference.router_margin > ROUTER_MARGIN:
            return seed, logits
    raise AssertionError("every prompt has a near-tie among experts")


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_in_float32(name, record_property):
    config = CONFIGS[name]
    weights = tiny.tensors(config, 3)
    seeds, wanted = zip(*(reference_logits(config, weights, n) for n in LENGTHS), strict=True)
    _, ids, lengths = ragged(config, seeds)
    got, _ = _forward(config, tiny.params(config, weights), ids, lengths_B=lengths)
    for n, have, want in zip(LENGTHS, got, wanted, strict=True):
        error = assert_close(have[:n], want, "tiny_logits", "float32", f"prompt of {n}")
        record_property(f"error_{n}", error)


def test_packed_samples_are_independent():
    """Samples packed into one row give the logits that each gives alone."""
    config = SHORT
    weights = tiny.tensors(config, 3)
    lengths = (1, 70, 255, 129, 245)
    found = [reference_logits(config, weights, n) for n in lengths]
    ids = np.concatenate([prompt(s, n, config.vocab_size)
                          for n, (s, _) in zip(lengths, found, strict=True)])
    starts = np.zeros(len(ids), bool)
    starts[np.cumsum((0, *lengths[:-1]))] = True
    got, _ = _forward(config, tiny.params(config, weights), ids[None], starts_BT=starts[None])
    assert_close(got[0], np.concatenate([logits for _, logits in found]), "tiny_logits")


def bfloat16_weights(config):
    weights = tiny.tensors(config, 3)
    return {name: np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)
            for name, x in weights.items()}


def test_forward_in_bfloat16_with_every_expert(record_property):
    """All experts chosen: no choice can flip, so the whole array is comparable."""
    config = SHORT.replace(experts_per_token=4)
    weights = bfloat16_weights(config)
    prompts, ids, lengths = ragged(config)
    got, _ = _forward(config, tiny.params(config, weights, "bfloat16"), ids, lengths_B=lengths)
    assert got.dtype == jnp.float32
    for p, have in zip(prompts, got, strict=True):
        error = assert_close(have[:len(p)], Reference(config, weights).extend(p), "logits",
                             "bfloat16", f"prompt of {len(p)}")
        record_property(f"error_{len(p)}", error)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_chunks_then_decode_equal_reference(dtype, record_property):
    """Prefill chunks of 1, 64, 100 and 35, then 20 single tokens, through the cache."""
    config = SHORT.replace(experts_per_token=4)
    weights = bfloat16_weights(config)
    ids = prompt(0, 220, config.vocab_size).astype(np.int32)
    params = tiny.params(config, weights, dtype)
    run = jax.jit(partial(step, config, logits="all"))
    cache, pieces, first = init_cache(config, 1, 256, dtype), [], 0
    for length in (1, 64, 100, 35) + (1,) * 20:
        width = 100 if first < 200 else 1
        logits, cache = run(params, cache, np.resize(ids[first:first + length], (1, width)),
                            np.array([length]))
        pieces.append(np.asarray(logits[0, :length]))
        first += length
    reference = Reference(config, weights)
    got, wanted = np.concatenate(pieces), reference.extend(ids)
    kind = "tiny_logits" if dtype == "float32" else "logits"
    record_property("error", assert_close(got, wanted, kind, dtype))
    assert cache.lengths_B.tolist() == [220]
    layers = [memory for stack in cache.stacks for memory in stack]
    for memory, want in zip(layers, reference.states, strict=True):
        if "state" in memory:
            assert memory["state"].dtype == np.float32
            assert_close(memory["state"][0, 0], want, "model_state", dtype)
        else:
            for name, x in zip("kv", want, strict=True):
                got = memory[name][0, 0, :, :220].swapaxes(0, 1)
                assert_close(got, x, "model_state", dtype)


def test_reference_is_the_same_in_any_split():
    config = CONFIGS["plain_residual"]
    weights = tiny.tensors(config, 3)
    ids = prompt(0, 90, config.vocab_size)
    whole, split = Reference(config, weights), Reference(config, weights)
    parts = [split.extend(ids[a:b]) for a, b in ((0, 1), (1, 41), (41, 42), (42, 90))]
    assert_close(np.concatenate(parts), whole.extend(ids), "kernel", "float64")


def test_a_wrong_model_is_told_apart():
    """The measures would see the field's known mistakes: each moves logits far past the bound."""
    config = SHORT
    weights = tiny.tensors(config, 3)
    ids = prompt(0, 64, config.vocab_size)
    right = Reference(config, weights).extend(ids)
    mistakes = {"whole-head RoPE": config.replace(rotary_dim=config.head_dim),
                "geometric slopes": config.replace(decay_rule="transformers"),
                "un-normalised residual": config.replace(postnorm=False),
                "epsilon of the other norms": config.replace(lightning_norm_eps=1e-2)}
    for name, wrong in mistakes.items():
        error = peak_ratio(Reference(wrong, weights).extend(ids), right)
        assert error > 5 * bound("logits"), f"{name}: {error:.2g}"

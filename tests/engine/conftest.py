"""One tiny model and its engines, shared by the tests of this folder."""

import functools

import jax
import numpy as np
import pytest

from mmx import model
from mmx.config import LIGHTNING, SOFTMAX, ModelConfig, deepnorm_alpha
from mmx.engine.engine import Engine
from mmx.nn.params import initial_kind

FORBIDDEN = (0, 7, 90)
EOS = 5


def tiny_config(layer_types) -> ModelConfig:
    alpha = deepnorm_alpha(len(layer_types))
    return ModelConfig(
        vocab_size=96, hidden_size=32, layer_types=layer_types, num_heads=4, num_kv_heads=2,
        head_dim=8, rotary_dim=4, rope_theta=1e4, num_experts=4, experts_per_token=2,
        expert_dim=16, lightning_alpha=alpha, softmax_alpha=alpha, mlp_alpha=alpha, postnorm=True,
        eos_token_ids=(EOS,))


@functools.cache
def tiny_model(layer_types):
    """(config, float32 params); three head rows are zero, and the rest are far from ties."""
    config = tiny_config(layer_types)
    rng = np.random.default_rng(11)
    params = {}
    for path, spec in model.param_specs(config, "float32").items():
        kind, scale = initial_kind(spec)
        value = np.ones(spec.shape) if kind == "ones" else rng.uniform(-scale, scale, spec.shape)
        if path == "head/weight":
            value *= 4
            value[list(FORBIDDEN)] = 0
        params[path] = jax.numpy.asarray(value, jax.numpy.float32)
    return config, params


class Alphabet:
    """A tokenizer whose ids 32 … 95 are ASCII characters, and 10 … 13 the bytes of one emoji."""

    vocab_size = 96
    eos_ids = (EOS,)
    special_ids = frozenset({EOS})
    emoji = "🙂".encode()

    def encode(self, text: str) -> list[int]:
        return [ord(char) for char in text]

    def token_bytes(self, token: int) -> bytes:
        if 10 <= token < 14:
            return self.emoji[token - 10:token - 9]
        return bytes([token]) if 32 <= token < 96 else b""

    def decode(self, ids) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")


@pytest.fixture(scope="session")
def tiny():
    return tiny_model((LIGHTNING, SOFTMAX, LIGHTNING))


@pytest.fixture(scope="session")
def engine_of(tiny):
    """Engines by number of slots; capacity 128, chunks of 16."""
    @functools.cache
    def make(slots: int) -> Engine:
        engine = Engine(*tiny, Alphabet(), slots=slots, capacity=128, prefill_chunk=16)
        engine.warmup()
        return engine
    return make


def results(engine, requests) -> dict:
    """Runs `requests` and returns results by key, checking that the events add up to them."""
    texts, ids, done = {}, {}, {}
    for event in engine.run(requests):
        assert event.key not in done
        texts[event.key] = texts.get(event.key, "") + event.text_piece
        ids.setdefault(event.key, []).extend(event.new_ids)
        if event.result is not None:
            done[event.key] = event.result
    for key, result in done.items():
        assert (result.text, result.ids) == (texts[key], ids[key])
    return done

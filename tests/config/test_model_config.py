"""ModelConfig: layer stacks, checks, presets."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmx.config import LIGHTNING, SOFTMAX, ModelConfig, hybrid_pattern, preset
from mmx.errors import UserError


@given(st.lists(st.sampled_from([LIGHTNING, SOFTMAX]), min_size=1, max_size=40))
def test_stacks_cover_every_layer_once_in_order(types):
    config = ModelConfig(layer_types=types)
    seen = [(stack.layer_index(r, p), kind) for stack in config.stacks
            for r in range(stack.repeats) for p, kind in enumerate(stack.pattern)]
    assert seen == list(enumerate(types))
    assert sum(stack.num_layers for stack in config.stacks) == config.num_layers


@pytest.mark.parametrize("layers, stacks", [
    (80, [(0, 8, 10)]), (8, [(0, 8, 1)]), (13, [(0, 8, 1), (8, 1, 5)]), (16, [(0, 8, 2)])])
def test_stacks_of_the_release_pattern(layers, stacks):
    config = ModelConfig(layer_types=hybrid_pattern(layers))
    assert [(s.start, len(s.pattern), s.repeats) for s in config.stacks] == stacks


def test_pure_softmax_is_one_scan():
    assert [(s.pattern, s.repeats) for s in ModelConfig(layer_types=(SOFTMAX,) * 5).stacks] == [
        ((SOFTMAX,), 5)]


def test_config_is_hashable_with_lists_given():
    config = ModelConfig(layer_types=[SOFTMAX], eos_token_ids=[1])
    assert hash(config) == hash(config.replace()) and config.eos_token_ids == (1,)


@pytest.mark.parametrize("changes, named", [
    ({"vocab_size": 0}, "vocab_size"), ({"hidden_size": 1.5}, "hidden_size"),
    ({"num_heads": True}, "num_heads"), ({"layer_types": ()}, "layer_types"),
    ({"layer_types": ("mamba",)}, "layer_types"), ({"num_kv_heads": 3}, "num_kv_heads"),
    ({"rotary_dim": 130}, "rotary_dim"), ({"rotary_dim": 3}, "rotary_dim"),
    ({"experts_per_token": 9}, "experts_per_token"), ({"decay_rule": "none"}, "decay_rule")])
def test_checks_name_the_field(changes, named):
    with pytest.raises(UserError, match=named):
        ModelConfig(**changes)


def test_unknown_preset_lists_the_known():
    with pytest.raises(UserError, match="text01, m1, period, nano"):
        preset("text02")

"""Both `config.json` dialects, their defaults, and what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmx.config import LIGHTNING, SOFTMAX, ModelConfig, hybrid_pattern, preset, preset_names
from mmx.errors import UserError

DIALECTS = ("minimax_text_01", "minimax")
ALPHA = 3.5565588200778455

# The release's own config.json, as its dumps show it.
RELEASE = {
    "architectures": ["MiniMaxText01ForCausalLM"], "attention_dropout": 0.0,
    "attn_type_list": ([0] * 7 + [1]) * 10, "bos_token_id": None, "eos_token_id": None,
    "head_dim": 128, "hidden_act": "silu", "hidden_size": 6144, "initializer_range": 0.02,
    "intermediate_size": 9216, "layernorm_full_attention_alpha": ALPHA,
    "layernorm_full_attention_beta": 1.0, "layernorm_linear_attention_alpha": ALPHA,
    "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_alpha": ALPHA,
    "layernorm_mlp_beta": 1.0, "max_position_embeddings": 10240000,
    "model_type": "minimax_text_01", "num_attention_heads": 64, "num_experts_per_tok": 2,
    "num_hidden_layers": 80, "num_key_value_heads": 8, "num_local_experts": 32,
    "output_router_logits": False, "postnorm": True, "rms_norm_eps": 1e-05,
    "rope_theta": 10000000, "rotary_dim": 64, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid",
    "sliding_window": None, "tie_word_embeddings": False, "transformers_version": "4.45.2",
    "use_cache": True, "vocab_size": 200064,
}
# Its twin for transformers, with the leftovers that the class there ignores.
RELEASE_HF = {
    "architectures": ["MiniMaxForCausalLM"], "model_type": "minimax", "block_size": 256,
    "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
    "full_attn_alpha_factor": ALPHA, "full_attn_beta_factor": 1.0,
    "linear_attn_alpha_factor": ALPHA, "linear_attn_beta_factor": 1.0,
    "mlp_alpha_factor": ALPHA, "mlp_beta_factor": 1.0,
} | {key: RELEASE[key] for key in (
    "head_dim", "hidden_size", "intermediate_size", "max_position_embeddings",
    "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads",
    "num_local_experts", "postnorm", "rms_norm_eps", "rope_theta", "rotary_dim",
    "router_aux_loss_coef", "shared_intermediate_size", "shared_moe_mode", "vocab_size")}


def test_release_is_the_preset():
    assert ModelConfig.from_hf(RELEASE) == preset("text01")


def test_release_for_transformers_is_the_preset():
    assert ModelConfig.from_hf(RELEASE_HF) == preset("text01")


def test_written_release_has_the_published_values():
    written = preset("text01").to_hf()
    different = {key for key in RELEASE if written.get(key) != RELEASE[key]}
    # The end token is spelled out; the version is not ours to state.
    assert different == {"eos_token_id", "transformers_version"}


def test_vision_wrapper_is_unwrapped():
    text = RELEASE | {"shared_intermediate_size": [0], "max_position_embeddings": 8192}
    config = ModelConfig.from_hf({"model_type": "minimax_vl_01", "text_config": text})
    assert config == preset("text01").replace(max_position_embeddings=8192)
    bare = {k: v for k, v in text.items() if k not in ("model_type", "architectures")}
    assert ModelConfig.from_hf({"model_type": "minimax_vl_01", "text_config": bare}) == config


def test_original_defaults():
    config = ModelConfig.from_hf({"model_type": "MiniMaxText01", "num_hidden_layers": 2,
                                  "attn_type_list": [1, 0]})
    assert config == ModelConfig(layer_types=(SOFTMAX, LIGHTNING))
    assert (config.rotary_dim, config.rope_theta, config.postnorm) == (128, 1e6, False)


def test_native_defaults_alternate_from_softmax():
    config = ModelConfig.from_hf({"model_type": "minimax", "num_hidden_layers": 3})
    assert config == ModelConfig(layer_types=(SOFTMAX, LIGHTNING, SOFTMAX), postnorm=True,
                                 decay_rule="transformers", eos_token_ids=(2,))
    assert config.rotary_dim == config.head_dim == 128


@pytest.mark.parametrize("keys, rotary, rule", [
    ({}, 128, "transformers"),
    ({"rotary_dim": 64}, 64, "official"),
    ({"partial_rotary_factor": 0.5}, 64, "official"),
    ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, 32, "official"),
    ({"rotary_dim": 64, "rope_parameters": {"partial_rotary_factor": 0.5}}, 64, "official"),
    ({"rotary_dim": 64, "decay_rule": "transformers"}, 64, "transformers"),
    ({"decay_rule": "official"}, 128, "official"),
])
def test_native_rotary_width_and_slope_rule(keys, rotary, rule):
    config = ModelConfig.from_hf({"model_type": "minimax", "num_hidden_layers": 2} | keys)
    assert (config.rotary_dim, config.decay_rule) == (rotary, rule)


@pytest.mark.parametrize("keys, theta", [
    ({"rope_theta": 10000}, 1e4),
    ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5),
    ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, 5e5),
    ({"rope_scaling": None}, 1e6),
])
def test_rope_theta(keys, theta):
    for kind in ({"model_type": "minimax"}, {"model_type": "minimax_text_01",
                                             "attn_type_list": [0, 1]}):
        config = ModelConfig.from_hf(kind | {"num_hidden_layers": 2} | keys)
        assert config.rope_theta == theta


@pytest.mark.parametrize("eos, vocab, expected", [
    (None, 200064, (200020,)), (None, 500, ()), (7, 500, (7,)), ([7, 9], 500, (7, 9)),
    (7, 200064, (7,)), ([], 200064, ()),
])
def test_eos(eos, vocab, expected):
    base = {"model_type": "minimax_text_01", "attn_type_list": [0], "num_hidden_layers": 1}
    assert ModelConfig.from_hf(base | {"vocab_size": vocab, "eos_token_id": eos}
                               ).eos_token_ids == expected


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", preset_names())
def test_presets_round_trip(name, dialect):
    text = json.dumps(preset(name).to_hf(dialect))
    assert ModelConfig.from_hf(json.loads(text)) == preset(name)


number = st.floats(1e-6, 1e6, allow_nan=False)


@st.composite
def configs(draw):
    heads = draw(st.integers(1, 12))
    head_dim = 2 * draw(st.integers(1, 70))
    experts = draw(st.integers(1, 9))
    return ModelConfig(
        vocab_size=draw(st.sampled_from([17, 200064])), hidden_size=draw(st.integers(1, 999)),
        layer_types=tuple(draw(st.lists(st.sampled_from([LIGHTNING, SOFTMAX]), min_size=1,
                                        max_size=9))),
        num_heads=heads,
        num_kv_heads=draw(st.sampled_from([k for k in range(1, heads + 1) if heads % k == 0])),
        head_dim=head_dim, rotary_dim=2 * draw(st.integers(0, head_dim // 2)),
        rope_theta=draw(number), num_experts=experts,
        experts_per_token=draw(st.integers(1, experts)), expert_dim=draw(st.integers(1, 999)),
        block_size=draw(st.sampled_from([64, 256])), norm_eps=draw(number),
        lightning_norm_eps=draw(st.sampled_from([1e-6, 1e-5])), lightning_alpha=draw(number),
        lightning_beta=draw(number), softmax_alpha=draw(number), softmax_beta=draw(number),
        mlp_alpha=draw(number), mlp_beta=draw(number), postnorm=draw(st.booleans()),
        max_position_embeddings=draw(st.integers(1, 10**9)),
        decay_rule=draw(st.sampled_from(["official", "transformers"])),
        router_aux_loss_coef=draw(number), initializer_range=draw(number),
        eos_token_ids=tuple(draw(st.lists(st.integers(0, 16), max_size=3))))


@pytest.mark.parametrize("dialect", DIALECTS)
@settings(deadline=None, max_examples=60)
@given(config=configs())
def test_any_config_round_trips(dialect, config):
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf(dialect)))) == config


BAD = [
    ({"model_type": "llama"}, "model_type"),
    ({"model_type": None, "architectures": ["LlamaForCausalLM"]}, "model_type"),
    ({"hidden_size": "6144"}, "hidden_size"),
    ({"hidden_size": 61.5}, "hidden_size"),
    ({"num_local_experts": True}, "num_local_experts"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ({"layernorm_mlp_alpha": [1.0]}, "layernorm_mlp_alpha"),
    ({"postnorm": 1}, "postnorm"),
    ({"attn_type_list": None}, "attn_type_list"),
    ({"attn_type_list": "01"}, "attn_type_list"),
    ({"attn_type_list": [0, 2]}, "attn_type_list[1]"),
    ({"attn_type_list": [0, 1, 0]}, "num_hidden_layers"),
    ({"shared_intermediate_size": 512}, "shared_intermediate_size"),
    ({"shared_intermediate_size": [0, 512]}, "shared_intermediate_size"),
    ({"shared_intermediate_size": ["0"]}, "shared_intermediate_size"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_parameters": {"rope_theta": "big"}}, "rope_theta"),
    ({"rotary_dim": 8, "partial_rotary_factor": 1.0}, "rotary_dim"),
    ({"rotary_dim": 7}, "rotary_dim"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"eos_token_id": [1, -1]}, "eos_token_id"),
    ({"head_dim": None, "num_attention_heads": 7}, "head_dim"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads"),
    ({"decay_rule": "fast"}, "decay_rule"),
]


@pytest.mark.parametrize("keys, named", BAD, ids=lambda value: json.dumps(value)[:50])
def test_refusals_name_the_key(keys, named):
    base = {"model_type": "minimax_text_01", "num_hidden_layers": 2, "attn_type_list": [0, 1],
            "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 16}
    ModelConfig.from_hf(base)
    with pytest.raises(UserError) as caught:
        ModelConfig.from_hf(base | keys)
    assert named in str(caught.value)


@pytest.mark.parametrize("hf", [[], {"text_config": 3}, {"model_type": "minimax_vl_01"}])
def test_refuses_what_is_no_config(hf):
    with pytest.raises(UserError):
        ModelConfig.from_hf(hf)


def test_native_layer_types_are_checked():
    base = {"model_type": "minimax", "num_hidden_layers": 2}
    for kinds in (["sliding_attention", "full_attention"], ["full_attention"], [["x"], None]):
        with pytest.raises(UserError, match="layer_types"):
            ModelConfig.from_hf(base | {"layer_types": kinds})


def test_unknown_dialect():
    with pytest.raises(UserError, match="gpt2"):
        preset("nano").to_hf("gpt2")


@pytest.mark.parity
def test_transformers_takes_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    for config in (preset("nano"), preset("text01"),
                   ModelConfig(layer_types=hybrid_pattern(4), postnorm=True,
                               decay_rule="transformers", eos_token_ids=(2, 3))):
        theirs = transformers.MiniMaxConfig(**config.to_hf("minimax"))
        assert theirs.rope_parameters["rope_theta"] == config.rope_theta
        assert theirs.hidden_size == config.hidden_size
        theirs.save_pretrained(tmp_path)
        again = json.loads((tmp_path / "config.json").read_text())
        assert ModelConfig.from_hf(again) == config


@pytest.mark.parity
def test_reads_what_transformers_writes(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MiniMaxConfig(num_hidden_layers=5, num_attention_heads=6,
                                        num_key_value_heads=3, head_dim=16, mlp_alpha_factor=2)
    theirs.save_pretrained(tmp_path)
    config = ModelConfig.from_hf(json.loads((tmp_path / "config.json").read_text()))
    assert config.layer_types == (SOFTMAX, LIGHTNING, SOFTMAX, LIGHTNING, SOFTMAX)
    assert (config.rotary_dim, config.decay_rule, config.rope_theta) == (16, "transformers", 1e6)
    assert (config.mlp_alpha, config.softmax_alpha, config.postnorm) == (2.0, 1.0, True)
    assert config.eos_token_ids == (2,)

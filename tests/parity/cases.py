"""The tiny models and prompts of which transformers' own results are compared with ours.

A case is the content of a `config.json` as `MiniMaxForCausalLM` writes it; weights are
`tests.tiny.tensors` of it, prompts a function of a seed. All dims of a head turn and slopes are
geometric, as in that class.
"""

import numpy as np

LENGTHS = (1, 255, 256, 257, 700)
NEW_TOKENS = 64
WEIGHT_SEED = 7
# Positions whose logits the goldens keep, besides the last: both sides of the block boundary.
POSITIONS = (0, 1, 63, 64, 254, 255, 256, 257, 511, 512)

DEEPNORM_16 = 32**0.25
CASES = {
    "heads6_layers8_experts4": dict(heads=6, kv=2, layers=8, experts=4),
    "heads8_layers13_experts8": dict(
        heads=8, kv=4, layers=13, experts=8, linear_attn_alpha_factor=1.7,
        linear_attn_beta_factor=0.9, full_attn_alpha_factor=2.2, full_attn_beta_factor=1.3,
        mlp_alpha_factor=1.9, mlp_beta_factor=0.8),
    "heads6_layers16_experts8": dict(
        heads=6, kv=3, layers=16, experts=8, linear_attn_alpha_factor=DEEPNORM_16,
        full_attn_alpha_factor=DEEPNORM_16, mlp_alpha_factor=DEEPNORM_16),
    "heads8_layers16_experts4": dict(heads=8, kv=8, layers=16, experts=4, block_size=64,
                                    linear_attn_beta_factor=0.5, full_attn_beta_factor=0.7,
                                    mlp_beta_factor=0.6),
}


def hf_config(name: str) -> dict:
    """The `config.json` of case `name`, in the keys of transformers 5."""
    case = dict(CASES[name])
    heads, layers = case.pop("heads"), case.pop("layers")
    config = {
        "architectures": ["MiniMaxForCausalLM"],
        "attention_dropout": 0.0,
        "block_size": 256,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": None,
        "head_dim": 8,
        "hidden_act": "silu",
        "hidden_size": 40,
        "initializer_range": 0.02,
        "intermediate_size": 24,
        "layer_types": ["full_attention" if i % 8 == 7 else "linear_attention"
                        for i in range(layers)],
        "max_position_embeddings": 4096,
        "model_type": "minimax",
        "num_attention_heads": heads,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": case.pop("kv"),
        "num_local_experts": case.pop("experts"),
        "output_router_logits": False,
        "pad_token_id": None,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 96,
    }
    return config | case


def prompt(seed: int, length: int, vocab_size: int) -> np.ndarray:
    """Random ids; the raw bits of a counter-based generator are the same everywhere."""
    return (np.random.Philox(key=(seed << 32) + length).random_raw(length) % vocab_size).astype(int)


def kept_positions(length: int) -> list[int]:
    return [p for p in POSITIONS if p < length - 1] + [length - 1]

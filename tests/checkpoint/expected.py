"""Parameters put together by hand from tensors of the original layout, the slow and plain way."""

import numpy as np


def params(config, tensors) -> dict[str, np.ndarray]:
    """Flat parameters of `config`, one layer after the other, by indexing each head and expert."""
    N, K, H, D = config.num_heads, config.num_kv_heads, config.head_dim, config.hidden_size
    E, F = config.num_experts, config.expert_dim
    result = {"embed/weight": tensors["model.embed_tokens.weight"],
              "norm/weight": tensors["model.norm.weight"],
              "head/weight": tensors["lm_head.weight"]}
    for g, stack in enumerate(config.stacks):
        for p, kind in enumerate(stack.pattern):
            layers = []
            for r in range(stack.repeats):
                name = f"model.layers.{stack.start + r * len(stack.pattern) + p}."
                get = lambda key, name=name: tensors[f"{name}{key}.weight"]  # noqa: E731
                layer = {"attn_norm/weight": get("input_layernorm"),
                         "mlp_norm/weight": get("post_attention_layernorm")}
                if kind == "lightning":
                    qkv = np.zeros((D, N, 3, H), np.float32)
                    for n in range(N):
                        for t in range(3):
                            row = 3 * H * n + H * t
                            qkv[:, n, t] = get("self_attn.qkv_proj")[row:row + H].T
                    layer["attn/qkv"] = qkv
                    layer["attn/gate"] = _out_heads(get("self_attn.output_gate"), N, H)
                    layer["attn/norm/weight"] = get("self_attn.norm").reshape(N, H)
                    layer["attn/out"] = _in_heads(get("self_attn.out_proj"), N, H)
                else:
                    layer["attn/q"] = _out_heads(get("self_attn.q_proj"), N, H)
                    layer["attn/k"] = _out_heads(get("self_attn.k_proj"), K, H)
                    layer["attn/v"] = _out_heads(get("self_attn.v_proj"), K, H)
                    layer["attn/out"] = _in_heads(get("self_attn.o_proj"), N, H)
                layer["moe/router"] = get("block_sparse_moe.gate").T
                gate_up = np.zeros((2, E, D, F), np.float32)
                down = np.zeros((E, F, D), np.float32)
                for e in range(E):
                    gate_up[0, e] = get(f"block_sparse_moe.experts.{e}.w1").T
                    gate_up[1, e] = get(f"block_sparse_moe.experts.{e}.w3").T
                    down[e] = get(f"block_sparse_moe.experts.{e}.w2").T
                layer |= {"moe/gate_up": gate_up, "moe/down": down}
                layers.append(layer)
            for key in layers[0]:
                result[f"stack/{g}/{p}/{key}"] = np.stack([layer[key] for layer in layers])
    return result


def _out_heads(matrix, heads, H):
    return np.stack([matrix[H * n:H * n + H].T for n in range(heads)], axis=1)


def _in_heads(matrix, heads, H):
    return np.stack([matrix[:, H * n:H * n + H].T for n in range(heads)])

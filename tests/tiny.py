"""Tiny random checkpoints in both published layouts, and a byte-level tokenizer, without torch.

Weights come from the raw bits of a counter-based generator keyed by seed and tensor name, so they
are the same on every machine and NumPy version, whatever the order or the layout.
"""

import json
import zlib
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mmx.config import ModelConfig, deepnorm_alpha, hybrid_pattern

BEGIN, END, CALL = "<beginning_of_sentence>", "<end_of_sentence>", "<function_call>"
SPECIAL = (BEGIN, END, CALL, "<image>")  # ids from 256
END_ID = 257
DIALECTS = {"original": "minimax_text_01", "transformers": "minimax"}


def config(num_layers: int = 4, softmax_every: int = 4, **changes) -> ModelConfig:
    """A hybrid of the released kind in the small: partial RoPE, DeepNorm factors, top-2 experts."""
    alpha = deepnorm_alpha(num_layers)
    fields = dict(
        vocab_size=272, hidden_size=48, layer_types=hybrid_pattern(num_layers, softmax_every),
        num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8, rope_theta=1e4, num_experts=4,
        experts_per_token=2, expert_dim=32, block_size=256, lightning_alpha=alpha,
        softmax_alpha=alpha, mlp_alpha=alpha, postnorm=True, max_position_embeddings=65536,
        eos_token_ids=(END_ID,))
    return ModelConfig(**(fields | changes))


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the original layout, matrices [out, in]."""
    c, inner = config, config.num_heads * config.head_dim
    table = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for layer, kind in enumerate(c.layer_types):
        if kind == "lightning":
            attention = {"qkv_proj": (3 * inner, c.hidden_size),
                         "output_gate": (inner, c.hidden_size), "norm": (inner,),
                         "out_proj": (c.hidden_size, inner)}
        else:
            kv = c.num_kv_heads * c.head_dim
            attention = {"q_proj": (inner, c.hidden_size), "k_proj": (kv, c.hidden_size),
                         "v_proj": (kv, c.hidden_size), "o_proj": (c.hidden_size, inner)}
        block = {"input_layernorm": (c.hidden_size,), "post_attention_layernorm": (c.hidden_size,)}
        block |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        block["block_sparse_moe.gate"] = (c.num_experts, c.hidden_size)
        for e in range(c.num_experts):
            for name in ("w1", "w3"):
                block[f"block_sparse_moe.experts.{e}.{name}"] = (c.expert_dim, c.hidden_size)
            block[f"block_sparse_moe.experts.{e}.w2"] = (c.hidden_size, c.expert_dim)
        table |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return table | {"model.norm.weight": (c.hidden_size,),
                    "lm_head.weight": (c.vocab_size, c.hidden_size)}


def uniform(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 uniform of zero mean and unit variance, a function of seed, name and shape alone."""
    bits = np.random.Philox(key=(seed << 32) + zlib.crc32(name.encode()))
    words = bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
    return ((words * 2.0**-53 - 0.5) * 12**0.5).reshape(shape).astype(np.float32)


def tensors(config: ModelConfig, seed: int = 0, zero_rows=()) -> dict[str, np.ndarray]:
    """Random float32 weights in the original layout.

    Matrices keep unit variance from input to output; queries and routers are sharper, so that
    attention and routing are far from uniform. Larger gains make the map chaotic: two correct
    float32 forwards then differ by more than any useful tolerance. `zero_rows` are untrained
    token ids: their embedding and head rows are zero, as in the release.
    """
    result = {}
    for name, shape in shapes(config).items():
        x = uniform(seed, name, shape)
        if len(shape) == 1:
            x = 1 + 0.1 * x
        elif name != "model.embed_tokens.weight":
            gain = 2.0 if name.endswith(("q_proj.weight", "moe.gate.weight")) else 1.0
            x = x * np.float32(gain * shape[1] ** -0.5)
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            x[list(zero_rows)] = 0
        result[name] = x
    return result


def to_transformers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names that transformers ≥ 5 holds in memory: one fused tensor of all experts a layer."""
    result, experts = {}, {}
    for name, x in tensors.items():
        layer, found, rest = name.partition(".block_sparse_moe.")
        if found and rest.startswith("experts."):
            _, e, matrix, _ = rest.split(".")
            experts.setdefault(layer, {})[int(e), matrix] = x
        else:
            result[f"{layer}.mlp.{rest}" if found else name] = x
    for layer, parts in experts.items():
        count = 1 + max(e for e, _ in parts)
        result[f"{layer}.mlp.experts.gate_up_proj"] = np.stack(
            [np.concatenate([parts[e, "w1"], parts[e, "w3"]]) for e in range(count)])
        result[f"{layer}.mlp.experts.down_proj"] = np.stack(
            [parts[e, "w2"] for e in range(count)])
    return result


def params(config: ModelConfig, weights: dict[str, np.ndarray], dtype: str = "float32") -> dict:
    """The model's parameter dict from original-layout tensors; written apart from the importer."""
    import jax.numpy as jnp

    c, (D, N, H) = config, (config.hidden_size, config.num_heads, config.head_dim)
    # Per leaf: tensor name and the array [in …, out …] made from its [out, in] matrix.
    columns = {"attn/qkv": ("self_attn.qkv_proj", (D, N, 3, H)),
               "attn/gate": ("self_attn.output_gate", (D, N, H)),
               "attn/q": ("self_attn.q_proj", (D, N, H)),
               "attn/k": ("self_attn.k_proj", (D, c.num_kv_heads, H)),
               "attn/v": ("self_attn.v_proj", (D, c.num_kv_heads, H)),
               "moe/router": ("block_sparse_moe.gate", (D, c.num_experts)),
               "attn_norm/weight": ("input_layernorm", (D,)),
               "mlp_norm/weight": ("post_attention_layernorm", (D,)),
               "attn/norm/weight": ("self_attn.norm", (N, H))}

    def layer(i):
        def get(name):
            return weights[f"model.layers.{i}.{name}.weight"]

        leaves = {leaf: get(name).T.reshape(shape) for leaf, (name, shape) in columns.items()
                  if f"model.layers.{i}.{name}.weight" in weights}
        is_lightning = c.layer_types[i] == "lightning"
        out = get("self_attn.out_proj" if is_lightning else "self_attn.o_proj")
        w1, w2, w3 = (np.stack([get(f"block_sparse_moe.experts.{e}.{name}").T
                                for e in range(c.num_experts)]) for name in ("w1", "w2", "w3"))
        return leaves | {"attn/out": out.T.reshape(N, H, D), "moe/down": w2,
                         "moe/gate_up": np.stack([w1, w3])}

    result = {"embed/weight": weights["model.embed_tokens.weight"],
              "norm/weight": weights["model.norm.weight"], "head/weight": weights["lm_head.weight"]}
    for g, stack in enumerate(c.stacks):
        for p in range(len(stack.pattern)):
            layers = [layer(stack.layer_index(r, p)) for r in range(stack.repeats)]
            result |= {f"stack/{g}/{p}/{leaf}": np.stack([x[leaf] for x in layers])
                       for leaf in layers[0]}
    return {path: jnp.asarray(x, dtype) for path, x in result.items()}


def decay_buffers(config: ModelConfig) -> dict[str, np.ndarray]:
    """The tables that the transformers class may have saved; of the right shape, wrong values.

    A reader must ignore them, so the values are such that using one shows.
    """
    heads, size = config.num_heads, config.block_size
    table = {"slope_rate": (heads, 1, 1), "query_decay": (heads, size, 1),
             "key_decay": (heads, size, 1), "diagonal_decay": (1, heads, size, size)}
    return {f"model.layers.{layer}.self_attn.{name}": np.full(shape, 0.75, np.float32)
            for layer, kind in enumerate(config.layer_types) if kind == "lightning"
            for name, shape in table.items()}


def write_checkpoint(directory, config: ModelConfig, *, seed: int = 0, layout: str = "original",
                     dtype: str = "float32", shards: int = 1, weights=None, zero_rows=(),
                     buffers: bool = False, tokenizer: bool = True, hf_config=None) -> Path:
    """Writes config.json, weights (with an index when sharded) and tokenizer; returns the path.

    `weights` (original layout) and `hf_config` (content of config.json) replace the defaults;
    `buffers` adds the decay tables that readers must ignore.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = tensors(config, seed, zero_rows) if weights is None else weights
    if layout == "transformers":
        weights = to_transformers(weights)
    if buffers:
        weights = weights | decay_buffers(config)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    weights = {name: np.ascontiguousarray(x.astype(kind)) for name, x in weights.items()}
    hf_config = config.to_hf(DIALECTS[layout]) if hf_config is None else hf_config
    _write_json(directory / "config.json", hf_config)
    if shards == 1:
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
    else:
        names = list(weights)
        files = {}
        for shard in range(shards):
            file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
            part = names[shard * len(names) // shards:(shard + 1) * len(names) // shards]
            save_file({name: weights[name] for name in part}, directory / file, {"format": "pt"})
            files |= dict.fromkeys(part, file)
        total = sum(x.nbytes for x in weights.values())
        _write_json(directory / "model.safetensors.index.json",
                    {"metadata": {"total_size": total}, "weight_map": files})
    if tokenizer:
        write_tokenizer(directory)
    return directory


def write_tokenizer(directory) -> None:
    """A byte-level tokenizer.json without merges: id = byte, then the special tokens from 256."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    added = [{"id": 256 + i, "content": token, "single_word": False, "lstrip": False,
              "rstrip": False, "normalized": False, "special": True}
             for i, token in enumerate(SPECIAL)]
    bytelevel = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                 "use_regex": True}
    _write_json(directory / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": None, "pre_tokenizer": bytelevel, "post_processor": None,
        "decoder": bytelevel,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "merges": [],
                  "vocab": {letter: byte for byte, letter in enumerate(_byte_alphabet())}}})
    _write_json(directory / "tokenizer_config.json", {
        "tokenizer_class": "GPT2TokenizerFast", "bos_token": BEGIN, "eos_token": END,
        "add_prefix_space": False, "clean_up_tokenization_spaces": False,
        "model_max_length": 65536})
    _write_json(directory / "generation_config.json", {"eos_token_id": END_ID})


def _byte_alphabet() -> list[str]:
    """GPT-2's printable letter for each byte: itself where printable, else a letter from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def _write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

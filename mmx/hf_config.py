"""Translation between `ModelConfig` and the two published `config.json` dialects."""

import math
from collections.abc import Mapping
from typing import Any

from mmx.config import (
    DECAY_OFFICIAL,
    DECAY_TRANSFORMERS,
    DIALECT_NATIVE,
    DIALECT_ORIGINAL,
    LIGHTNING,
    SOFTMAX,
)
from mmx.errors import UserError

_ORIGINAL_TYPES = ("minimax_text_01", "MiniMaxText01", "minimax_m1", "MiniMaxM1")
_NATIVE_TYPES = ("minimax",)
_WRAPPER_TYPES = ("minimax_vl_01", "MiniMaxVL01")
_ARCHITECTURES = {
    "MiniMaxText01ForCausalLM": DIALECT_ORIGINAL,
    "MiniMaxM1ForCausalLM": DIALECT_ORIGINAL,
    "MiniMaxForCausalLM": DIALECT_NATIVE,
}
_RELEASE_VOCAB, _RELEASE_EOS = 200064, 200020  # the release's config.json leaves eos null
_OFFICIAL_BLOCK = 256  # a constant of the official code, not a key of its config
_LIGHTNING_EPS = 1e-6  # likewise

# (field, key in the original dialect, key in the native dialect); alphas and betas default to 1.
_RESIDUAL_KEYS = (
    ("lightning_alpha", "layernorm_linear_attention_alpha", "linear_attn_alpha_factor"),
    ("lightning_beta", "layernorm_linear_attention_beta", "linear_attn_beta_factor"),
    ("softmax_alpha", "layernorm_full_attention_alpha", "full_attn_alpha_factor"),
    ("softmax_beta", "layernorm_full_attention_beta", "full_attn_beta_factor"),
    ("mlp_alpha", "layernorm_mlp_alpha", "mlp_alpha_factor"),
    ("mlp_beta", "layernorm_mlp_beta", "mlp_beta_factor"),
)


def from_hf(cls, hf: Mapping[str, Any]):
    """Builds `cls` (ModelConfig) from a parsed `config.json`; see `ModelConfig.from_hf`.

    Absent keys take the defaults of the class that the dialect belongs to (the official
    configuration class, or `transformers.MiniMaxConfig`). The native class turns all head
    dimensions and uses geometric slopes; a file with a leftover `rotary_dim` or a
    `partial_rotary_factor` comes from the release, so it gets the official rules instead.
    """
    hf, dialect = _unwrap(hf)
    keys = _Keys(hf)
    _refuse_unsupported(keys)
    original = dialect == DIALECT_ORIGINAL
    hidden, heads = keys.int("hidden_size", 4096), keys.int("num_attention_heads", 32)
    if hf.get("head_dim") is None and (heads < 1 or hidden % heads):
        raise UserError(
            f"config.json has no head_dim, and hidden_size={hidden} does not divide by "
            f"num_attention_heads={heads}.", "Without head_dim it is their quotient.",
            "Add head_dim.")
    head_dim = keys.int("head_dim", hidden // max(heads, 1))
    num_layers = keys.int("num_hidden_layers", 32)
    rotary_dim, theta, is_partial = _rope(keys, head_dim)
    fields = dict(
        vocab_size=keys.int("vocab_size", 32000),
        hidden_size=hidden,
        layer_types=(_original_layers if original else _native_layers)(keys, num_layers),
        num_heads=heads,
        num_kv_heads=keys.int("num_key_value_heads", heads if "num_key_value_heads" in hf else 8),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        rope_theta=theta,
        num_experts=keys.int("num_local_experts", keys.int("num_experts", 8)),
        experts_per_token=keys.int("num_experts_per_tok", 2),
        expert_dim=keys.int("intermediate_size", 14336),
        block_size=keys.int("block_size", _OFFICIAL_BLOCK),
        norm_eps=keys.number("rms_norm_eps", 1e-5),
        lightning_norm_eps=keys.number("lightning_norm_eps", _LIGHTNING_EPS),
        postnorm=keys.bool("postnorm", not original),
        max_position_embeddings=keys.int("max_position_embeddings", 131072),
        router_aux_loss_coef=keys.number("router_aux_loss_coef", 0.001),
        initializer_range=keys.number("initializer_range", 0.02),
        eos_token_ids=_eos(keys, default=None if original else 2),
        decay_rule=keys.str("decay_rule", DECAY_OFFICIAL if original or is_partial
                            else DECAY_TRANSFORMERS),
    )
    for field, original_key, native_key in _RESIDUAL_KEYS:
        fields[field] = keys.number(original_key if original else native_key, 1.0)
    return cls(**fields)


def to_hf(config, dialect: str = DIALECT_ORIGINAL) -> dict[str, Any]:
    """Returns the `config.json` content of `config`; `from_hf` of it gives `config` back.

    Values that the dialect's own keys cannot hold (for instance the slope rule) are written as
    extra keys, and only where the dialect's default would lose them.
    """
    if dialect not in (DIALECT_ORIGINAL, DIALECT_NATIVE):
        raise UserError(f"There is no config dialect '{dialect}'.",
                        f"It is '{DIALECT_ORIGINAL}' or '{DIALECT_NATIVE}'.", "Name one of them.")
    original = dialect == DIALECT_ORIGINAL
    hf: dict[str, Any] = {
        "architectures": ["MiniMaxText01ForCausalLM" if original else "MiniMaxForCausalLM"],
        "model_type": dialect,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": _eos_value(config),
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.expert_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_heads,
        "num_experts_per_tok": config.experts_per_token,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "num_local_experts": config.num_experts,
        "output_router_logits": False,
        "rms_norm_eps": config.norm_eps,
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }
    for field, original_key, native_key in _RESIDUAL_KEYS:
        hf[original_key if original else native_key] = getattr(config, field)
    if config.lightning_norm_eps != _LIGHTNING_EPS:
        hf["lightning_norm_eps"] = config.lightning_norm_eps
    if original:
        hf.update(
            attn_type_list=[int(kind == SOFTMAX) for kind in config.layer_types],
            postnorm=config.postnorm, rope_theta=_plain(config.rope_theta),
            rotary_dim=config.rotary_dim, shared_intermediate_size=0, shared_moe_mode="sigmoid")
        if config.block_size != _OFFICIAL_BLOCK:
            hf["block_size"] = config.block_size
        if config.decay_rule != DECAY_OFFICIAL:
            hf["decay_rule"] = config.decay_rule
        return hf
    hf["layer_types"] = ["full_attention" if kind == SOFTMAX else "linear_attention"
                         for kind in config.layer_types]
    hf["block_size"] = config.block_size
    # Both spellings: transformers 4 reads the first, transformers 5 the second.
    hf["rope_theta"] = _plain(config.rope_theta)
    hf["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    is_partial = config.rotary_dim != config.head_dim
    if is_partial:
        hf["rotary_dim"] = config.rotary_dim
    if not config.postnorm:
        hf["postnorm"] = False
    if config.decay_rule != (DECAY_OFFICIAL if is_partial else DECAY_TRANSFORMERS):
        hf["decay_rule"] = config.decay_rule
    return hf


class _Keys:
    """Typed reading of a parsed config; null counts as absent."""

    def __init__(self, hf: Mapping[str, Any]):
        self.hf = hf

    def _get(self, key: str, default, accepted: tuple[type, ...], name: str):
        value = self.hf.get(key)
        if value is None:
            return default
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            raise _wrong_type(key, value, name)
        return value

    def int(self, key: str, default):
        value = self._get(key, default, (int, float), "an integer")
        if isinstance(value, float):
            if not value.is_integer():
                raise _wrong_type(key, value, "an integer")
            value = int(value)
        return value

    def number(self, key: str, default) -> float:
        value = float(self._get(key, default, (int, float), "a number"))
        if not math.isfinite(value):
            raise _wrong_type(key, value, "a finite number")
        return value

    def bool(self, key: str, default):
        return self._get(key, default, (bool,), "true or false")

    def str(self, key: str, default):
        return self._get(key, default, (str,), "a string")

    def list(self, key: str):
        return self._get(key, None, (list, tuple), "a list")

    def mapping(self, key: str) -> Mapping[str, Any]:
        return self._get(key, {}, (Mapping,), "an object")


def _wrong_type(key: str, value, name: str) -> UserError:
    return UserError(f"config.json: {key} is {value!r}.", f"It must be {name}.",
                     f"Correct {key} in config.json.")


def _unwrap(hf) -> tuple[Mapping[str, Any], str]:
    """The language model's keys and their dialect."""
    if not isinstance(hf, Mapping):
        raise UserError("config.json does not hold an object.", "Its top level must be {…}.",
                        "Take the config.json that came with the weights.")
    if hf.get("model_type") in _WRAPPER_TYPES or "text_config" in hf:
        hf = hf.get("text_config")
        if not isinstance(hf, Mapping):
            raise _wrong_type("text_config", hf, "an object with the language model's keys")
        if hf.get("model_type") is None and not hf.get("architectures"):
            return hf, DIALECT_NATIVE if "layer_types" in hf else DIALECT_ORIGINAL
    kind = hf.get("model_type")
    if kind in _ORIGINAL_TYPES:
        return hf, DIALECT_ORIGINAL
    if kind in _NATIVE_TYPES:
        return hf, DIALECT_NATIVE
    if kind is None and isinstance(hf.get("architectures"), list):
        for name in hf["architectures"]:
            if name in _ARCHITECTURES:
                return hf, _ARCHITECTURES[name]
    raise UserError(f"config.json: model_type is {kind!r}.",
                    "This software runs 'minimax_text_01', 'minimax_m1', 'minimax' and the text "
                    "part of 'minimax_vl_01'.", "Point at a checkpoint of one of these.")


def _refuse_unsupported(keys: _Keys):
    """Refuses keys that would change the computation into one that no released weights use."""
    shared = keys.hf.get("shared_intermediate_size")
    for size in shared if isinstance(shared, (list, tuple)) else [shared]:
        if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
            raise _wrong_type("shared_intermediate_size", shared, "an integer or a list of them")
        if size:
            raise UserError(f"config.json: shared_intermediate_size is {shared!r}.",
                            "Shared experts are not supported; every released model has 0.",
                            "Use weights without a shared expert.")
    if keys.str("hidden_act", "silu") not in ("silu", "swish"):
        raise UserError(f"config.json: hidden_act is {keys.hf['hidden_act']!r}.",
                        "Experts and lightning projections use 'silu'.",
                        "Use weights trained with silu.")
    if keys.bool("tie_word_embeddings", False):
        raise UserError("config.json: tie_word_embeddings is true.",
                        "Embedding and head are separate tensors in this model family.",
                        "Store lm_head.weight apart and set tie_word_embeddings to false.")
    if keys.int("sliding_window", 0):
        raise UserError(f"config.json: sliding_window is {keys.hf['sliding_window']!r}.",
                        "Softmax layers attend to the whole context; every released model has "
                        "null.", "Use weights trained without a window.")
    if keys.hf.get("quantization_config") is not None:
        raise UserError("config.json has a quantization_config.",
                        "Only bfloat16, float16 and float32 weights are read.",
                        "Load the unquantised weights with quantize='int8'.")


def _original_layers(keys: _Keys, num_layers: int) -> tuple[str, ...]:
    kinds = keys.list("attn_type_list")
    if kinds is None:
        raise UserError("config.json has no attn_type_list.",
                        "It says for each layer whether it is lightning (0) or softmax (1).",
                        "Add the list; the release has 1 at every eighth place.")
    for i, kind in enumerate(kinds):
        if isinstance(kind, bool) or kind not in (0, 1):
            raise UserError(f"config.json: attn_type_list[{i}] is {kind!r}.",
                            "Each entry is 0 (lightning) or 1 (softmax).", "Correct the entry.")
    _check_length("attn_type_list", kinds, keys, num_layers)
    return tuple(SOFTMAX if kind else LIGHTNING for kind in kinds)


def _native_layers(keys: _Keys, num_layers: int) -> tuple[str, ...]:
    kinds = keys.list("layer_types")
    if kinds is None:
        # transformers' default starts with a softmax layer and alternates.
        return tuple(LIGHTNING if i % 2 else SOFTMAX for i in range(num_layers))
    names = {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}
    for i, kind in enumerate(kinds):
        if not isinstance(kind, str) or kind not in names:
            raise UserError(f"config.json: layer_types[{i}] is {kind!r}.",
                            "Each entry is 'linear_attention' or 'full_attention'.",
                            "Correct the entry.")
    _check_length("layer_types", kinds, keys, num_layers)
    return tuple(names[kind] for kind in kinds)


def _check_length(key: str, kinds, keys: _Keys, num_layers: int):
    if keys.hf.get("num_hidden_layers") is not None and len(kinds) != num_layers:
        raise UserError(f"config.json: {key} has {len(kinds)} entries, num_hidden_layers is "
                        f"{num_layers}.", "There is one entry per layer.",
                        "Correct whichever does not match the weights.")


def _rope(keys: _Keys, head_dim: int) -> tuple[int, float, bool]:
    """(rotary_dim, theta, whether the file names a rotary width at all)."""
    nested = _Keys(keys.mapping("rope_parameters"))
    for key in ("rope_parameters", "rope_scaling"):
        scaling = keys.mapping(key)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            raise UserError(f"config.json: {key} has rope_type {kind!r}.",
                            "Only unscaled rotary embeddings ('default') exist in this model.",
                            "Remove the scaling.")
    theta = nested.number("rope_theta", keys.number("rope_theta", 1e6))
    if not theta > 0:
        raise _wrong_type("rope_theta", theta, "a positive number")
    widths = {}
    if keys.hf.get("rotary_dim") is not None:
        widths["rotary_dim"] = keys.int("rotary_dim", 0)
    for source, name in ((keys, "partial_rotary_factor"),
                         (nested, "rope_parameters.partial_rotary_factor")):
        if source.hf.get("partial_rotary_factor") is not None:
            widths[name] = int(head_dim * source.number("partial_rotary_factor", 1.0))
    if len(set(widths.values())) > 1:
        listing = ", ".join(f"{name} → {width}" for name, width in widths.items())
        raise UserError(f"config.json names different rotary widths: {listing}.",
                        "rotary_dim is partial_rotary_factor × head_dim.", "Keep one of them.")
    return next(iter(widths.values()), head_dim), theta, bool(widths)


def _eos(keys: _Keys, default: int | None) -> tuple[int, ...]:
    value = keys.hf.get("eos_token_id")
    if value is None:
        if keys.hf.get("vocab_size") == _RELEASE_VOCAB:
            return (_RELEASE_EOS,)
        return () if default is None or "eos_token_id" in keys.hf else (default,)
    ids = value if isinstance(value, (list, tuple)) else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise _wrong_type("eos_token_id", value, "a token id or a list of them")
    return tuple(ids)


def _eos_value(config) -> int | list[int] | None:
    ids = list(config.eos_token_ids)
    if len(ids) == 1:
        return ids[0]
    return ids if ids or config.vocab_size == _RELEASE_VOCAB else None


def _plain(value: float) -> int | float:
    """10000000 rather than 1e7, as the release writes it."""
    return int(value) if float(value).is_integer() else value

"""Model geometry: one frozen dataclass, its presets, and both published `config.json` dialects."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmx.errors import UserError

LIGHTNING = "lightning"
SOFTMAX = "softmax"

# Precision points. The names are used where the casts happen; tests fail when one slips.
STATE_DTYPE = "float32"  # a bfloat16 lightning state drops short words and repeats (vLLM #19592)
ROUTER_DTYPE = "float32"  # top-2 of 32 close logits flips under bfloat16
ROPE_DTYPE = "float32"  # angles reach 1e7; bfloat16 has 8 bits
HEAD_DTYPE = "float32"  # 200,064 logits summed over 6,144 products each

DIALECT_ORIGINAL = "minimax_text_01"
DIALECT_NATIVE = "minimax"
DECAY_OFFICIAL = "official"
DECAY_TRANSFORMERS = "transformers"


@dataclasses.dataclass(frozen=True)
class Stack:
    """Consecutive layers `start …` that repeat `pattern` `repeats` times; run as one scan."""

    start: int
    pattern: tuple[str, ...]
    repeats: int

    @property
    def num_layers(self) -> int:
        return len(self.pattern) * self.repeats

    def layer_index(self, repeat: int, position: int) -> int:
        """Global layer index, from zero, softmax layers counted."""
        return self.start + repeat * len(self.pattern) + position


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Geometry and constants of a MiniMax-Text-01-style model.

    Field defaults are the official configuration class's own where it has any. `decay_rule`
    chooses slopes: "official" is the ALiBi head rule with layer factor `1 - i/(L-1) + 1e-5`,
    "transformers" the native port's geometric rule with `1 - i/(L-1+1e-5) + 1e-5`; they agree to
    1e-5 when the number of heads is a power of two.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    layer_types: tuple[str, ...] = (LIGHTNING,) * 7 + (SOFTMAX,)
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    rotary_dim: int = 128
    rope_theta: float = 1e6
    num_experts: int = 8
    experts_per_token: int = 2
    expert_dim: int = 14336
    block_size: int = 256
    norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6
    lightning_alpha: float = 1.0
    lightning_beta: float = 1.0
    softmax_alpha: float = 1.0
    softmax_beta: float = 1.0
    mlp_alpha: float = 1.0
    mlp_beta: float = 1.0
    postnorm: bool = False
    max_position_embeddings: int = 131072
    decay_rule: str = DECAY_OFFICIAL
    router_aux_loss_coef: float = 0.001
    initializer_range: float = 0.02
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        # gin and JSON hand over lists; a hashable config can be a static jit argument.
        object.__setattr__(self, "layer_types", tuple(self.layer_types))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        for name in _POSITIVE_INTS:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"{name}={value!r} is out of range.",
                    "It must be an integer ≥ 1.",
                    f"Set {name} to a positive integer.",
                )
        if not self.layer_types or not set(self.layer_types) <= {LIGHTNING, SOFTMAX}:
            raise UserError(
                f"layer_types={self.layer_types!r} is not a layer pattern.",
                f"Each entry is '{LIGHTNING}' or '{SOFTMAX}', at least one.",
                "Give one entry per layer.",
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} does not divide by num_kv_heads={self.num_kv_heads}.",
                "Each key/value head serves the same number of query heads.",
                "Choose num_kv_heads among the divisors of num_heads.",
            )
        if not 0 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise UserError(
                f"rotary_dim={self.rotary_dim} is out of range.",
                f"It must be even and between 0 and head_dim={self.head_dim}.",
                "The released weights use head_dim / 2.",
            )
        if self.experts_per_token > self.num_experts:
            raise UserError(
                f"experts_per_token={self.experts_per_token} is more than "
                f"num_experts={self.num_experts}.",
                "A token is sent to distinct experts.",
                "Lower experts_per_token.",
            )
        if self.decay_rule not in (DECAY_OFFICIAL, DECAY_TRANSFORMERS):
            raise UserError(
                f"decay_rule={self.decay_rule!r} is unknown.",
                f"It is '{DECAY_OFFICIAL}' or '{DECAY_TRANSFORMERS}'.",
                "The released weights were trained with 'official'.",
            )

    @property
    def num_layers(self) -> int:
        return len(self.layer_types)

    @property
    def num_lightning_layers(self) -> int:
        return self.layer_types.count(LIGHTNING)

    @property
    def num_softmax_layers(self) -> int:
        return self.layer_types.count(SOFTMAX)

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The layers as patterns to scan over; any layer list is covered exactly once, in order."""
        types, start, stacks = self.layer_types, 0, []
        while start < len(types):
            stack = _longest_repeat(types, start)
            stacks.append(stack)
            start += stack.num_layers
        return tuple(stacks)

    def replace(self, **changes) -> "ModelConfig":
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Reads a `config.json` of dialect `minimax_text_01`, `minimax`, or a VL wrapper of them.

        Raises UserError for another model type, contradicting keys, or a shared expert (no
        released weights have one).
        """
        from mmx.hf_config import from_hf

        return from_hf(cls, hf)

    def to_hf(self, dialect: str = DIALECT_ORIGINAL) -> dict[str, Any]:
        """Returns the `config.json` content in `dialect` ("minimax_text_01" or "minimax")."""
        from mmx.hf_config import to_hf

        return to_hf(self, dialect)


_POSITIVE_INTS = (
    "vocab_size",
    "hidden_size",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "num_experts",
    "experts_per_token",
    "expert_dim",
    "block_size",
    "max_position_embeddings",
)


def _longest_repeat(types: tuple[str, ...], start: int) -> Stack:
    """The pattern from `start` that covers most layers by repetition; ties go to the shortest.

    Without a repetition, the run up to and including the next softmax layer is its own stack, so
    that a tail (13 layers: 8 + 5) does not swallow the period before it.
    """
    rest = types[start:]
    best = None
    for width in range(1, len(rest) // 2 + 1):
        repeats = 1
        while rest[repeats * width : (repeats + 1) * width] == rest[:width]:
            repeats += 1
        covers = width * repeats
        mixed = len(set(rest[:width])) > 1 or len(set(rest)) == 1
        if repeats > 1 and mixed and (best is None or covers > best.num_layers):
            best = Stack(start, rest[:width], repeats)
    if best is not None:
        return best
    end = rest.index(SOFTMAX) + 1 if SOFTMAX in rest else len(rest)
    return Stack(start, rest[:end], 1)


def hybrid_pattern(num_layers: int, softmax_every: int = 8) -> tuple[str, ...]:
    """Layer types with a softmax layer at every `softmax_every`-th place, as in the release."""
    return tuple(SOFTMAX if (i + 1) % softmax_every == 0 else LIGHTNING for i in range(num_layers))


def deepnorm_alpha(num_layers: int) -> float:
    """Residual factor (2L)^(1/4) (DeepNet, arXiv 2203.00555; 3.5566 at 80 layers)."""
    return (2 * num_layers) ** 0.25


def deepnorm_beta(num_layers: int) -> float:
    """Initialisation gain (8L)^(-1/4) for value, output and expert projections (DeepNet)."""
    return (8 * num_layers) ** -0.25


def _release(num_layers: int) -> ModelConfig:
    alpha = deepnorm_alpha(80)
    return ModelConfig(
        vocab_size=200064,
        hidden_size=6144,
        layer_types=hybrid_pattern(num_layers),
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=64,
        rope_theta=1e7,
        num_experts=32,
        experts_per_token=2,
        expert_dim=9216,
        lightning_alpha=alpha,
        softmax_alpha=alpha,
        mlp_alpha=alpha,
        postnorm=True,
        max_position_embeddings=10240000,
        eos_token_ids=(200020,),
    )


def _nano() -> ModelConfig:
    alpha = deepnorm_alpha(8)
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        layer_types=hybrid_pattern(8),
        num_heads=8,
        num_kv_heads=2,
        head_dim=32,
        rotary_dim=16,
        rope_theta=1e4,
        num_experts=8,
        experts_per_token=2,
        expert_dim=96,
        block_size=64,
        lightning_alpha=alpha,
        softmax_alpha=alpha,
        mlp_alpha=alpha,
        postnorm=True,
        max_position_embeddings=1048576,
        router_aux_loss_coef=0.01,
        eos_token_ids=(2,),
    )


_PRESETS = {
    "text01": lambda: _release(80),
    # M1 is a further-trained Text-01 of the same geometry with its own tokenizer and protocol.
    "m1": lambda: _release(80),
    "period": lambda: _release(8),
    "nano": _nano,
}


def preset_names() -> tuple[str, ...]:
    return tuple(_PRESETS)


def preset(name: str) -> ModelConfig:
    """Returns a named geometry: text01, m1, period (8 layers at true width) or nano (embedded)."""
    if name not in _PRESETS:
        raise UserError(
            f"There is no preset '{name}'.",
            f"Presets are {', '.join(_PRESETS)}.",
            "Name one of them, or give a directory with a config.json.",
        )
    return _PRESETS[name]()

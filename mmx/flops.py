"""Floating-point operations per token by the published accounting, and peaks of devices."""

from mmx.config import LIGHTNING, ModelConfig

# Dense bfloat16 operations per second per device, by the vendors' data sheets.
_PEAKS = {
    "h200": 989e12, "h100": 989e12, "a100": 312e12,
    "tpu v4": 275e12, "tpu v5 lite": 197e12, "tpu v5e": 197e12, "tpu v5p": 459e12,
    "tpu v5": 459e12, "tpu v6 lite": 918e12, "tpu v6e": 918e12,
}  # fmt: skip


def active_params(config: ModelConfig) -> int:
    """Parameters that one token is multiplied with: chosen experts and head, not the embedding."""
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    experts = config.experts_per_token * 3 * D * config.expert_dim + D * config.num_experts
    lightning = D * N * H * 5  # q, k, v, gate, out
    softmax = D * H * (2 * N + 2 * K)
    return (config.num_lightning_layers * lightning + config.num_softmax_layers * softmax
            + config.num_layers * experts + config.vocab_size * D)


def forward_flops(config: ModelConfig, context: int) -> float:
    """Operations per token of a forward pass over `context` tokens: 2 per active parameter, plus
    attention: 4·B·H + 4·H² per lightning head (blocks of B), 4·H·context/2 per causal head.
    """
    N, H = config.num_heads, config.head_dim
    mixing = sum(4 * (min(config.block_size, context) * H + H * H) if kind == LIGHTNING
                 else 2 * H * context for kind in config.layer_types)
    return 2.0 * active_params(config) + N * mixing


def train_flops(config: ModelConfig, context: int) -> float:
    """Operations per token of a training step: the backward pass counts twice the forward."""
    return 3.0 * forward_flops(config, context)


def peak_flops(device_kind: str) -> float:
    """Dense bfloat16 peak of one device in operations per second; 0 where it is not known."""
    kind = device_kind.lower()
    return next((peak for name, peak in _PEAKS.items() if name in kind), 0.0)

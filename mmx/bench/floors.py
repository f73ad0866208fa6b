"""Least times: bytes that must move, operations that must be done, over the rates measured here."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from mmx.config import LIGHTNING, ModelConfig
from mmx.flops import active_params, forward_flops
from mmx.quant import abstract_params

STATE_BYTES = 4  # lightning states are float32


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Rates of the device: bytes read and written by a copy, operations of a large product."""

    copy: float      # bytes per second
    product: float   # operations per second
    dtype: str       # of the product


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step must move and compute at least, each with its formula."""

    bytes: float = 0.0
    bytes_formula: str = ""
    flops: float = 0.0
    flops_formula: str = ""


@dataclasses.dataclass(frozen=True)
class Floor:
    """The longer of the two times, its formula, and the achieved rate that compares with it."""

    seconds: float
    formula: str
    amount: float    # bytes or operations, by `unit`
    unit: str        # "GB/s" or "TFLOP/s"

    def rate(self, seconds: float) -> float:
        """What a step of `seconds` achieves, in `unit`."""
        return self.amount / seconds / (1e9 if self.unit == "GB/s" else 1e12)


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """Returns the least time of `work`, and which ceiling sets it."""
    memory, compute = work.bytes / ceilings.copy, work.flops / ceilings.product
    if memory >= compute:
        return Floor(memory, f"{work.bytes_formula} = {work.bytes:.4g} B / "
                     f"{ceilings.copy / 1e9:.4g} GB/s", work.bytes, "GB/s")
    return Floor(compute, f"{work.flops_formula} = {work.flops:.4g} FLOP / "
                 f"{ceilings.product / 1e12:.4g} TFLOP/s", work.flops, "TFLOP/s")


def lightning(B: int, T: int, N: int, H: int, size: int, train: bool = False) -> Work:
    """Forward: q, k, v are read and the output is written once; 4·H² operations per token and head.

    Forward and backward: 4 passes, then q, k, v and the output's gradient are read and three
    gradients written, 11 passes in all; three times the operations. `size` is bytes per number.
    """
    passes, times = (11, 3) if train else (4, 1)
    shape = f"{B}·{T}·{N}"
    return Work(passes * B * T * N * H * size, f"{passes}·{shape}·{H}·{size}",
                times * 4 * B * T * N * H * H, f"{times}·4·{shape}·{H}²")


def lightning_step(B: int, N: int, H: int) -> Work:
    """A decode step: the float32 state is read and written."""
    return Work(2 * B * N * H * H * STATE_BYTES, f"2·{B}·{N}·{H}²·{STATE_BYTES}",
                4 * B * N * H * H, f"4·{B}·{N}·{H}²")


def grouped(M: int, D: int, F: int, groups: int, size: int, matrices: int = 1) -> Work:
    """M rows by their group's D × F matrix, or by `matrices` of them whose products end as one
    result (gate and up); `groups` are not empty.
    """
    moved = matrices * groups * D * F + M * D + M * F
    formula = f"({matrices}·{groups}·{D}·{F} + {M}·{D} + {M}·{F})·{size}"
    return Work(moved * size, formula,
                2 * matrices * M * D * F, f"2·{matrices}·{M}·{D}·{F}")


def attention(B: int, T: int, N: int, K: int, H: int, size: int) -> Work:
    """Causal: half of T² scores, two products of 2·H operations each."""
    return Work(2 * B * T * (N + K) * H * size, f"2·{B}·{T}·({N}+{K})·{H}·{size}",
                2 * B * N * T * T * H, f"4·{B}·{N}·{T}²/2·{H}")


def attention_step(B: int, S: int, N: int, K: int, H: int, size: int) -> Work:
    """A decode step: the keys and values of S positions are read."""
    return Work(2 * B * S * K * H * size, f"2·{B}·{S}·{K}·{H}·{size}",
                4 * B * N * S * H, f"4·{B}·{N}·{S}·{H}")


def prefill(config: ModelConfig, tokens: int) -> Work:
    """A prompt: `mmx.flops.forward_flops` per token, but the head, and all of the last layer save
    its keys and values (and a lightning layer's state), for the last token alone.
    """
    head = 2.0 * config.vocab_size * config.hidden_size
    once = head + _beyond_memory(config, tokens)
    flops = tokens * (forward_flops(config, tokens) - once) + once
    return Work(flops=flops, flops_formula=f"{tokens}·{flops / tokens:.4g}")


def _beyond_memory(config: ModelConfig, tokens: int) -> float:
    """Operations per token of the last layer that no later token needs."""
    D, N, H = config.hidden_size, config.num_heads, config.head_dim
    experts = config.experts_per_token * 3 * D * config.expert_dim + D * config.num_experts
    if config.layer_types[-1] == LIGHTNING:  # queries, gate, output; scores, reading the state
        block = min(config.block_size, tokens)
        return 2.0 * (3 * D * N * H + experts) + N * (4 * block * H + 2 * H * H)
    return 2.0 * (2 * D * N * H + experts) + 2.0 * N * H * tokens  # queries, output; scores


def expected_experts(config: ModelConfig, batch: int) -> float:
    """Experts of a layer that a step hits if each token chooses k of E evenly: E·(1 - (1 - k/E)^B).
    """
    E = config.num_experts
    return E * (1 - (1 - config.experts_per_token / E) ** batch)


def decode(config: ModelConfig, batch: int, context: int, dtype: str, quantize: str | None,
           kv_dtype: str | None = None) -> Work:
    """A step of the whole model.

    Read: every weight but experts that nobody chose and embedding rows of other tokens; states,
    which are also written; keys and values of `context` positions.
    """
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim
    hit = expected_experts(config, batch)
    dense = experts = 0.0
    for path, leaf in abstract_params(config, dtype, quantize).items():
        size = sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(leaf))
        if path.endswith(("moe/gate_up", "moe/down")):
            experts += size
        elif path == "embed/weight":
            dense += size * batch / config.vocab_size
        else:
            dense += size
    states = 2 * config.num_lightning_layers * batch * N * H * H * STATE_BYTES
    keys = (2 * config.num_softmax_layers * batch * context * K * H
            * jnp.dtype(kv_dtype or dtype).itemsize)
    read = experts * hit / config.num_experts
    return Work(dense + read + states + keys,
                f"weights {dense:.4g} + experts {experts:.4g}·{hit:.4g}/{config.num_experts} + "
                f"states {states:.4g} + keys and values {keys:.4g}",
                2.0 * batch * active_params(config), f"2·{batch}·{active_params(config)}")


def share(seconds: float, least: float) -> float:
    """How near a step is to its floor, from 0 to 1."""
    return least / seconds if seconds > 0 and math.isfinite(seconds) else math.nan

"""The whole model as pure functions over a flat parameter dict, and as one NNX module.

`forward` scores tokens without memory (training, evaluation); `step` consumes tokens into a cache
(prefill in chunks of any size, decode). Both run the same blocks: one scan per stack of repeated
layers, whose slopes come as data by global layer index.
"""

import math
import zlib
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmx.cache import Cache
from mmx.config import LIGHTNING, ModelConfig, Stack
from mmx.nn.block import Block
from mmx.nn.lightning import decay_slopes, zero_state
from mmx.nn.linear import Embedding, Head, RMSNorm
from mmx.nn.params import Factory, Params, ParamSpec, draw, initial_kind, initial_value
from mmx.nn.tokens import Tokens, last_token
from mmx.parallel.ops import NO_CHOICE, Ops
from pallas_kernels import dispatch, tuning
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.quantized import TurnedTensor


class Aux(NamedTuple):
    """Router statistics per layer, in layer order.

    expert_fraction_LE: share of valid tokens that chose each expert (sums to k).
    router_probability_LE: mean router probability (sums to 1).
    dropped_L: share of (token, choice) pairs beyond the experts' capacity.
    """

    expert_fraction_LE: jax.Array
    router_probability_LE: jax.Array
    dropped_L: jax.Array


class MiniMaxText01(nnx.Module):
    """Hybrid of lightning and softmax attention with routed experts (arXiv 2501.08313).

    Holds every parameter as an `nnx.Param`; block parameters lead with their stack's repeats.
    Calling it scores tokens: ids [B, T] to float32 logits [B, T, V].
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs | None = None, *, make: Factory = None):
        if make is None:
            key = rngs.params()
            make = Factory(partial(_draw, key=key), "float32")
        self.config = config
        self.embed = Embedding(config, make.at("embed"))
        self.stack = nnx.List(
            nnx.List(
                Block(config, kind, _replace_repeats(make.at(f"stack/{g}/{p}"), stack.repeats))
                for p, kind in enumerate(stack.pattern)
            )
            for g, stack in enumerate(config.stacks)
        )
        self.norm = RMSNorm((config.hidden_size,), ("embed",), config.norm_eps, make.at("norm"))
        self.head = Head(config, make.at("head"))

    def __call__(self, ids_BT: jax.Array, **kwargs) -> jax.Array:
        return forward(self.config, self.params(), ids_BT, **kwargs)[0]

    def params(self) -> dict[str, jax.Array]:
        """Returns the flat dict path -> value that the functions of this module take."""
        flat = nnx.to_flat_state(nnx.state(self, nnx.Param))
        return {"/".join(map(str, path)): leaf[...] for path, leaf in flat}


def _replace_repeats(make: Factory, repeats: int) -> Factory:
    return Factory(make.create, make.dtype, make.prefix, repeats)


def param_specs(config: ModelConfig, dtype: str = "bfloat16") -> dict[str, ParamSpec]:
    """Returns every parameter's description by path, allocating nothing."""
    specs: dict[str, ParamSpec] = {}

    def record(spec: ParamSpec):
        specs[spec.path] = spec
        return spec.abstract

    MiniMaxText01(config, make=Factory(record, str(jnp.dtype(dtype))))
    return specs


def param_count(config: ModelConfig) -> int:
    """Returns the number of parameters, allocating nothing."""
    return sum(spec.size for spec in param_specs(config).values())


def _draw(spec: ParamSpec, key: jax.Array) -> jax.Array:
    # Folding in the path makes each draw independent of every other parameter's existence.
    return initial_value(spec, jax.random.fold_in(key, _path_number(spec.path)))


def _path_number(path: str) -> int:
    return zlib.crc32(path.encode())


def init_params(
    config: ModelConfig,
    key: jax.Array,
    dtype: str = "float32",
    shardings: Mapping[str, Any] | None = None,
) -> dict[str, jax.Array]:
    """Draws all parameters: Xavier with the DeepNorm gain on value, output and expert matrices.

    With `shardings` (path -> Sharding) each parameter is born on its devices.
    """
    params = {}
    for path, spec in param_specs(config, dtype).items():
        kind, scale = initial_kind(spec)
        sharding = None if shardings is None else shardings[path]
        program = _draw_program(kind, spec.shape, spec.dtype, sharding)
        params[path] = program(key, np.uint32(_path_number(path)), np.float32(scale))
    return params


@lru_cache(maxsize=256)
def _draw_program(kind, shape, dtype, sharding):
    # A program per size, not one for all parameters, and of one dimension where nothing is sharded:
    # the threefry bits are the same, and XLA on a CPU compiles it 50 times faster.
    size = math.prod(shape)
    flat = sharding is None and size < 2**31

    def drawn(key, number, scale):
        key = jax.random.fold_in(key, number)
        return draw(key, scale, kind, (size,) if flat else shape, dtype).reshape(shape)

    return jax.jit(drawn, out_shardings=sharding)


def forward(
    config: ModelConfig,
    params: Params,
    ids_BT: jax.Array,
    *,
    starts_BT: jax.Array | None = None,
    lengths_B: jax.Array | None = None,
    dtype=None,
    remat: bool = False,
    hidden: bool = False,
    moe_capacity: float = 0.0,
    implementations: Mapping[str, str] = NO_CHOICE,
    ops: Ops | None = None,
) -> tuple[jax.Array, Aux]:
    """Scores tokens from an empty memory.

    Args:
      ids_BT: int32 token ids.
      starts_BT: bool, true where a packed sample begins; states, attention and positions restart.
      lengths_B: int32 valid tokens per row; the rest is right padding.
      dtype: dtype of activations; the parameters' own if None.
      remat: recompute blocks in the backward pass instead of storing their activations.
      hidden: return the normed hidden states [B, T, D] instead of logits, for a chunked loss.
      moe_capacity: each expert takes at most ceil(moe_capacity · k · tokens / E) of the batch's
        (token, choice) pairs, in the batch's order; the rest add nothing. 0: all.
      implementations: names for "lightning", "softmax", "moe"; automatic where absent.
      ops: where the arrays lie (`mmx.parallel.MeshOps`), with its own names; one device if None.

    Returns:
      float32 logits [B, T, V] (or hidden states), and Aux.
    """
    B, T = ids_BT.shape
    time_T = jnp.arange(T, dtype=jnp.int32)
    position_BT = jnp.broadcast_to(time_T, (B, T))
    samples_BT = None
    if starts_BT is not None:
        samples_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
        first_BT = jax.lax.cummax(jnp.where(starts_BT, time_T, 0), axis=1)
        position_BT = position_BT - first_BT
    valid_BT = None if lengths_B is None else time_T < lengths_B[:, None]
    tokens = Tokens(position_BT, starts_BT, samples_BT, lengths_B, valid_BT, None,
                    capacity=moe_capacity)
    ops = ops or Ops(implementations)
    x, _, aux = _run(config, params, ids_BT, tokens, None, dtype, remat, ops)
    return (x if hidden else logits_of(config, params, x)), aux


def step(
    config: ModelConfig,
    params: Params,
    cache: Cache,
    ids_BT: jax.Array,
    lengths_B: jax.Array,
    *,
    logits: str = "last",
    dtype=None,
    implementations: Mapping[str, str] = NO_CHOICE,
    ops: Ops | None = None,
) -> tuple[jax.Array | None, Cache]:
    """Consumes tokens into a cache: a prefill chunk of any size, or a decode step with T = 1.

    Row b consumes its first `lengths_B[b]` tokens; the rest is padding that reaches no state. A
    row of length 0 is unchanged. The cache must have room (its capacity is not checked here).

    Returns:
      Logits and the new cache. `logits` "last" gives float32 [B, V] after each row's last
      consumed token (arbitrary for rows of length 0), "all" [B, T, V], "none" None.

    Raises:
      ValueError: an unknown `logits`, or a chunk larger than the cache.
    """
    if logits not in ("last", "all", "none"):
        raise ValueError(f"logits='{logits}' is not one of 'last', 'all', 'none'.")
    B, T = ids_BT.shape
    offsets_B = cache.lengths_B
    time_T = jnp.arange(T, dtype=jnp.int32)
    lengths_B = lengths_B.astype(jnp.int32)
    tokens = Tokens(
        position_BT=offsets_B[:, None] + time_T,
        starts_BT=None,
        samples_BT=None,
        lengths_B=lengths_B,
        valid_BT=time_T < lengths_B[:, None],
        offsets_B=offsets_B,
        last_only=T > 1 and logits == "last",
    )
    ops = ops or Ops(implementations)
    x, stacks, _ = _run(config, params, ids_BT, tokens, cache.stacks, dtype, False, ops)
    cache = Cache(stacks, offsets_B + lengths_B)
    if logits == "none":
        return None, cache
    if logits == "all":
        return logits_of(config, params, x), cache
    x = x[:, 0] if x.shape[1] == 1 else last_token(x, lengths_B)[:, 0]
    # Multiplied where the head lies: else a compiler may gather its weights, not a row of logits.
    return ops.constrain(logits_of(config, params, x), None, "vocab"), cache


def logits_of(config: ModelConfig, params: Params, x: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of normed hidden states [..., D]."""
    return Head(config, _lookup(params, "head"))(x)


def _lookup(params: Params, prefix: str) -> Factory:
    """A factory that hands out existing parameters, so that modules are views of a dict."""
    return Factory(lambda spec: params[spec.path], "float32", f"{prefix}/" if prefix else "")


def _run(config, params, ids_BT, tokens, memories, dtype, remat, ops: Ops):
    """Embedding, all stacks, final norm. Returns (x, new memories, Aux)."""
    dtype = jnp.dtype(dtype or params["norm/weight"].dtype)
    embedding = Embedding(config, _lookup(params, "embed"))
    x = ops.look_up(lambda ids_BT: embedding(ids_BT, dtype), ids_BT)
    x = ops.constrain(x, "batch", "time", None)
    slopes_LN = decay_slopes(config)
    new_memories, stats = [], []
    for g, stack in enumerate(config.stacks):
        prefix = f"stack/{g}/"
        block_params = {
            path[len(prefix) :]: leaf for path, leaf in params.items() if path.startswith(prefix)
        }
        last = stack.start + stack.num_layers
        # A scan has one body for all its repeats, so only an unrolled stack may end narrow.
        narrow = tokens.last_only and last == config.num_layers and stack.repeats == 1
        slopes_RPN = slopes_LN[stack.start : last].reshape(
            stack.repeats, len(stack.pattern), config.num_heads
        )
        x, memory, stack_stats = _run_stack(
            config,
            stack,
            block_params,
            jnp.asarray(slopes_RPN),
            x,
            None if memories is None else memories[g],
            tokens._replace(last_only=narrow),
            remat,
            ops,
        )
        new_memories.append(memory)
        stats.append(stack_stats)
    x = RMSNorm((config.hidden_size,), ("embed",), config.norm_eps, _lookup(params, "norm"))(x)
    stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *stats)
    tokens_L1 = jnp.maximum(stats.tokens, 1)[:, None]
    pairs_L = config.experts_per_token * tokens_L1[:, 0]
    aux = Aux(stats.chosen_E / tokens_L1, stats.probability_E / tokens_L1, stats.dropped / pairs_L)
    return x, None if memories is None else tuple(new_memories), aux


def _run_stack(config, stack: Stack, params, slopes_RPN, x, memory, tokens, remat, ops: Ops):
    """Runs one stack; memory (if any) is carried whole and updated in place at each repeat.

    Keys and values are not cut out for their layer and put back, as a rule, nor, where
    `ops.keeps_states`, are states: a layer gets their stack and its place in it.
    """

    def block(kind, narrow, leaves, slopes_N, x, layer_memory):
        layer = Block(config, kind, _lookup(leaves, ""))
        return layer(x, slopes_N, layer_memory, tokens._replace(last_only=narrow), ops)

    if remat:
        block = jax.checkpoint(block, static_argnums=(0, 1))
    # Layers of a kind are one function of the program, traced and lowered once. The compiler makes
    # of it what it made of copies, but for TPUs, where copies of an exchange would share a channel.
    if dispatch.platform() != "tpu":
        block = jax.jit(block, static_argnums=(0, 1))

    def repeat(x, leaves, slopes_PN, layer_memories):
        new, stats = [], []
        for p, kind in enumerate(stack.pattern):
            given = layer_memories[p] if layer_memories is not None else None
            if given is None:
                given = zero_state(config, x.shape[0]) if kind == LIGHTNING else None
            else:
                given = given["state"] if kind == LIGHTNING else (given["k"], given["v"])
            narrow = tokens.last_only and p == len(stack.pattern) - 1
            own = {path.removeprefix(f"{p}/"): leaf for path, leaf in leaves.items()
                   if path.startswith(f"{p}/")}
            x, got, layer_stats = block(kind, narrow, own, slopes_PN[p], x, given)
            stats.append(layer_stats)
            if layer_memories is not None:
                new.append({"state": got} if kind == LIGHTNING else {"k": got[0], "v": got[1]})
        return x, tuple(new), jax.tree.map(lambda *s: jnp.stack(s), *stats)

    if stack.repeats == 1:
        first = partial(jax.tree.map, lambda leaf: leaf[0])
        held = None if memory is None else first(memory)
        x, new, stats = repeat(x, first(params), slopes_RPN[0], held)
        return x, jax.tree.map(lambda leaf: leaf[None], new), stats

    # A kernel reads weights where they lie in the stack; cut out by the scan, they would be copied.
    in_place = {path: leaf for path, leaf in params.items()
                if memory is not None and (dispatch.platform() == "tpu" or tuning.hopper())
                and (path.endswith(("moe/gate_up", "moe/down")) or isinstance(leaf, TurnedTensor))}
    params = {path: leaf for path, leaf in params.items() if path not in in_place}

    keeps = ops.keeps_states(x.shape[1], x.dtype, config.head_dim)

    def body(carry, inputs):
        x, memory = carry
        r, leaves, slopes_PN = inputs
        leaves = {**leaves, **{path: Stacked(leaf, r) for path, leaf in in_place.items()}}
        held = None
        if memory is not None:
            held = tuple({name: _of_repeat(leaf, r, name != "state" or keeps)
                          for name, leaf in one.items()} for one in memory)
        x, new, stats = repeat(x, leaves, slopes_PN, held)
        if memory is not None:
            memory = jax.tree.map(
                lambda leaf, got: got.whole if isinstance(got, Stacked)
                else jax.lax.dynamic_update_index_in_dim(leaf, got, r, 0), memory, new)
        return (x, memory), stats

    repeats = jnp.arange(stack.repeats, dtype=jnp.int32)
    (x, memory), stats = jax.lax.scan(body, (x, memory), (repeats, params, slopes_RPN))
    return x, memory, jax.tree.map(lambda s: s.reshape(-1, *s.shape[2:]), stats)


def _of_repeat(leaf, r, stays: bool):
    # To write a few narrow numbers, or to read some in a loop, XLA for CPUs casts all there are.
    wide = dispatch.platform() != "cpu" or leaf.dtype.itemsize > 2
    if stays and wide:
        return Stacked(leaf, r)
    return jax.lax.dynamic_index_in_dim(leaf, r, keepdims=False)


def load_balance(aux: Aux) -> jax.Array:
    """Returns E · Σ_e f_e P_e with f and P averaged over all layers (official code's loss).

    It is k when every expert gets an equal share. Multiply by `router_aux_loss_coef`.
    """
    f_E = jnp.mean(aux.expert_fraction_LE, axis=0)
    P_E = jnp.mean(aux.router_probability_LE, axis=0)
    return f_E.shape[0] * jnp.sum(f_E * P_E)


def load_balance_by_layer(aux: Aux) -> jax.Array:
    """Returns the layer mean of E · Σ_e f_e P_e: balance within each layer, k at best."""
    E = aux.expert_fraction_LE.shape[1]
    return E * jnp.mean(jnp.sum(aux.expert_fraction_LE * aux.router_probability_LE, axis=1))

"""The step functions of a job, compiled for a pod's devices from shapes alone."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mmx import cache as caches
from mmx import model, quant
from mmx.checkpoint.hf_import import scale_sharding_of
from mmx.config import ModelConfig
from mmx.engine import sampling
from mmx.errors import UserError
from mmx.parallel.mesh_ops import MeshOps
from mmx.sharding.rules import REGIMES, Rules, param_shardings
from pallas_kernels import dispatch, tuning
from pallas_kernels.attention.cudnn_paged import PAGE
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor

MODES = ("decode", "prefill", "long", "train")


@dataclasses.dataclass(frozen=True)
class Job:
    """What a pod is asked to do.

    Attributes:
      mode: "decode" (one token for each of `batch` sequences, with sampling), "prefill" (a chunk
        of `chunk` tokens of each of `batch` prompts), "long" (a chunk of few prompts whose time is
        shared out), "train" (one step over `batch` rows of `context` tokens).
      context: tokens that each sequence can hold.
      quantize: "int8" or None. turned: whether int8 matrices lie [out, in]; as `mmx.load` would
        lay them on those devices if None. kv_dtype: of cached keys and values.
      moe_capacity: of the experts in training, as in `TrainConfig`.
    """

    config: ModelConfig
    mode: str = "decode"
    batch: int = 32
    context: int = 8192
    chunk: int = 2048
    dtype: str = "bfloat16"
    quantize: str | None = None
    kv_dtype: str = "bfloat16"
    moe_capacity: float = 0.0
    turned: bool | None = None

    def __post_init__(self):
        if self.mode == "train" and self.quantize:
            raise UserError("Training does not use int8 weights.", "Parameters are float32.",
                            "Leave out --quantize.")
        if self.mode not in MODES:
            raise UserError(f"The mode '{self.mode}' is unknown.", f"It is {', '.join(MODES)}.",
                            "Correct --mode.")
        for name in ("batch", "context", "chunk"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} is out of range.",
                                "It is an integer ≥ 1.", f"Set --{name} to a positive integer.")

    @property
    def rules(self) -> Rules:
        return REGIMES[self.mode]

    @property
    def tokens(self) -> int:
        """Tokens that one step consumes."""
        each = {"decode": 1, "train": self.context}.get(self.mode, min(self.chunk, self.context))
        return self.batch * each


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device, as its share of each part of the arguments, and what the compiler adds.

    `total` is what the compiler counts: arguments, results that alias nothing, temporaries, code;
    on a Hopper GPU also what cuDNN, which is in no plan's program, gets cut out of a stack.
    """

    weights: int
    keys_values: int
    states: int
    optimizer: int
    other: int
    temporaries: int
    total: int


def compile_step(job: Job, mesh: Mesh) -> tuple[Any, Memory]:
    """Returns the compiled step and its memory per device; nothing is allocated or run.

    Raises UserError for a mesh on which the model does not lie. The compiler's own refusal of a
    program that exceeds a TPU's memory passes through.
    """
    ops = MeshOps(mesh, job.rules)
    build = _train if job.mode == "train" else _serve
    platform = "gpu" if _platform(mesh) == "cuda" else _platform(mesh)
    with dispatch.compiling_for(platform), \
            jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        params = _params(job, mesh)
        lowered, parts = build(job, ops, params)
        compiled = lowered.compile()
    parts = {"weights": share_bytes(params), **parts}
    return compiled, memory_of(compiled, parts)


def memory_of(compiled, parts: dict[str, int]) -> Memory:
    found = compiled.memory_analysis()
    arguments = found.argument_size_in_bytes
    total = (arguments + found.output_size_in_bytes - found.alias_size_in_bytes
             + found.temp_size_in_bytes + found.generated_code_size_in_bytes)
    known = {name: parts.get(name, 0)
             for name in ("weights", "keys_values", "states", "optimizer")}
    return Memory(**known, other=max(arguments - sum(known.values()), 0),
                  temporaries=total - arguments + parts.get("cut_out", 0),
                  total=total + parts.get("cut_out", 0))


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


def _params(job: Job, mesh: Mesh):
    specs = model.param_specs(job.config, job.dtype)
    shardings = param_shardings(specs, mesh, job.rules)
    dtype = "float32" if job.mode == "train" else job.dtype

    abstract = quant.abstract_params(job.config, dtype, job.quantize)
    return {path: place(specs[path], leaf, shardings[path], job.turned)
            for path, leaf in abstract.items()}


def place(spec, leaf, sharding, turned: bool | None = None):
    """An abstract parameter as `mmx.load` would lay it; `sharding` is that of the plain one.

    The device at hand, or that of the abstract mesh, tells whether an int8 leaf is turned.
    """
    if not isinstance(leaf, QuantizedTensor):
        return _abstract(leaf, sharding)
    axes = quant.contracted_axes(spec.path)
    if quant.turns(spec, sharding, turned):
        leaf = jax.eval_shape(partial(TurnedTensor.of, contracted=axes), leaf)
        places = quant.turned_sharding(sharding, leaf.shape, axes)
    else:
        places = QuantizedTensor(sharding, scale_sharding_of(sharding, leaf.shape, axes))
    return jax.tree.map(_abstract, leaf, places)


def _abstract(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def share_bytes(tree) -> int:
    """Bytes of one device's share of a tree of abstract arrays with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
               for leaf in jax.tree.leaves(tree))


def _cut_out(job: Job, memory) -> int:
    """Bytes of one layer's keys and values that a scan cuts out for cuDNN, as bfloat16 if they are
    narrower. By pages it reads those of a decode step where they lie, but for shares of them."""
    k = memory["k"]
    layers, _, _, slots, _ = k.sharding.shard_shape(k.shape)
    whole = slots == k.shape[3] and not slots % PAGE and k.dtype == jnp.bfloat16
    if layers == 1 or job.mode == "decode" and whole:
        return 0
    return jnp.dtype("bfloat16").itemsize * share_bytes(memory) // k.dtype.itemsize // layers


def _serve(job: Job, ops: MeshOps, params):
    config = job.config
    holders = math.prod(ops.mesh.shape.get(name, 1) for name in job.rules.cache_time)
    capacity = -(-job.context // holders) * holders
    shapes = caches.cache_shapes(config, job.batch, capacity, job.kv_dtype,
                                 ops.cache_kv_heads(config.num_kv_heads))
    axes = caches.cache_axes(shapes)
    cache = jax.tree.map(
        lambda leaf, names: _abstract(leaf, ops.sharding(leaf.shape, *names)), shapes, axes,
        is_leaf=lambda x: isinstance(x, jax.ShapeDtypeStruct))
    memories = [memory for stack in cache.stacks for memory in stack]
    states = share_bytes([memory for memory in memories if "state" in memory])
    parts = {"states": states, "keys_values": share_bytes(memories) - states}
    if tuning.hopper() and job.dtype == "bfloat16":
        parts["cut_out"] = max((_cut_out(job, memory) for memory in memories if "k" in memory),
                               default=0)

    def vector(dtype=jnp.int32):
        return jax.ShapeDtypeStruct((job.batch,), dtype, sharding=ops.sharding((job.batch,), None))

    places = jax.tree.map(lambda leaf: leaf.sharding, cache)
    whole = NamedSharding(ops.mesh, P())
    if job.mode == "decode":
        # Of one row: a state is NumPy's, which would take its bytes of this machine.
        row = jax.eval_shape(lambda: sampling.empty_state(1, config.vocab_size))
        state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(
            (job.batch, *leaf.shape[1:]), leaf.dtype, sharding=whole), row)
        forbidden = jax.ShapeDtypeStruct((config.vocab_size,), jnp.bool_, sharding=whole)

        def decode(params, cache, ids_B, active_B, forbidden_V, state):
            logits, cache = model.step(config, params, cache, ids_B[:, None], active_B, ops=ops)
            sampled, state = sampling.sample(logits, forbidden_V, state, active_B)
            return sampled, cache, state

        step = jax.jit(decode, donate_argnums=(1, 5), out_shardings=(whole, places, whole))
        return step.lower(params, cache, vector(), vector(), forbidden, state), parts
    chunk = min(job.chunk, capacity)
    ids = jax.ShapeDtypeStruct((job.batch, chunk), jnp.int32, sharding=ops.sharding(
        (job.batch, chunk), "batch", "time"))
    step = jax.jit(partial(model.step, config, ops=ops), donate_argnums=(1,),
                   out_shardings=(whole, places))
    return step.lower(params, cache, ids, vector()), parts


def _train(job: Job, ops: MeshOps, params):
    from mmx.data.pipeline import Batch
    from mmx.train.config import OptimizerConfig
    from mmx.train.optimizer import make_optimizer
    from mmx.train.step import StepConfig, gradients, init_state

    optimizer = make_optimizer(OptimizerConfig())
    how = StepConfig(dtype=job.dtype, remat=True, moe_capacity=job.moe_capacity)
    whole = NamedSharding(ops.mesh, P())

    def like_params(tree):
        # Moments lie as their parameters; counters everywhere.
        return {path: _abstract(leaf, params[path].sharding) for path, leaf in tree.items()}

    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    opt = jax.tree.map(lambda x: like_params(x) if isinstance(x, dict) else _abstract(x, whole),
                       state.opt, is_leaf=lambda x: isinstance(x, dict))
    state = state._replace(params=params, opt=opt, step=_abstract(state.step, whole))

    def rows(*shape, dtype=jnp.int32):
        names = ("batch", "time")[:len(shape)]
        return jax.ShapeDtypeStruct(shape, dtype, sharding=ops.sharding(shape, *names))

    B, T = job.batch, job.context
    batch = Batch(tokens_BS=jax.ShapeDtypeStruct((B, T + 1), jnp.int32, sharding=ops.sharding(
        (B, T + 1), "batch", None)), starts_BT=rows(B, T, dtype=jnp.bool_),
        weights_BT=rows(B, T, dtype=jnp.float32), source_B=rows(B))

    def train(state, batch):
        grads, metrics = gradients(job.config, how, state.params, batch, ops)
        updates, opt = optimizer.update(grads, state.opt, state.params)
        moved = {path: leaf + 1e-4 * updates[path] for path, leaf in state.params.items()}
        return state._replace(params=moved, opt=opt, step=state.step + 1), metrics

    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(train, donate_argnums=(0,), out_shardings=(places, whole))
    return step.lower(state, batch), {"optimizer": share_bytes(opt)}

"""Compares the model over eight simulated devices with the model on one; prints JSON.

As one of several processes (launch/local_pod.sh) it compares over the devices of all.
"""

import json
import os
import sys
from functools import partial

from mmx.sharding import distributed

if "MMX_PROCESSES" in os.environ:
    POD = distributed.start("on", silence_s=120)
else:
    POD = distributed.Pod()
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from mmx import cache as caches
from mmx import model, quant
from mmx.checkpoint.hf_import import scale_sharding_of
from mmx.config import LIGHTNING, SOFTMAX
from mmx.parallel.exchange import all_to_all_experts
from mmx.parallel.mesh_ops import MeshOps
from mmx.sharding.mesh import parse_mesh
from mmx.sharding.rules import REGIMES, param_shardings
from pallas_kernels.attention import cudnn
from pallas_kernels.quantized import QuantizedTensor
from tests.engine.conftest import tiny_model
from tests.pallas_kernels import cudnn_stand_in
from tests.tolerances import peak_ratio

CONFIG, PARAMS = tiny_model((LIGHTNING, SOFTMAX))
CHUNKS = (8, 8, 1, 1)
CAPACITY = 32


def host(array) -> np.ndarray:
    """All of an array, wherever it lies."""
    if getattr(array, "is_fully_addressable", True):
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def serve(params, batch: int, ops=None):
    """Logits of every valid token and the last states, through chunks of uneven rows."""
    kv_heads = ops and ops.cache_kv_heads(CONFIG.num_kv_heads)
    cache = jax.tree.map(
        np.asarray, caches.init_cache(CONFIG, batch, CAPACITY, "float32", kv_heads))
    step = jax.jit(partial(model.step, CONFIG, logits="all", ops=ops), donate_argnums=(1,))
    random, logits = np.random.default_rng(1), []
    for T in CHUNKS:
        ids = random.integers(1, CONFIG.vocab_size, (batch, T)).astype(np.int32)
        lengths = np.full(batch, T, np.int32)
        if T > 1:
            lengths[0] = T - 3
        out, cache = step(params, cache, ids, lengths)
        out = host(out)
        logits += [out[row, :length] for row, length in enumerate(lengths)]
    states = [host(memory["state"]) for stack in cache.stacks for memory in stack
              if "state" in memory]
    return logits + states


def train(params, ops=None):
    """Loss and gradients over packed rows."""
    random = np.random.default_rng(2)
    ids = random.integers(1, CONFIG.vocab_size, (4, 16)).astype(np.int32)
    starts = np.zeros((4, 16), bool)
    starts[:, 0] = starts[1, 5] = starts[1, 8] = starts[2, 15] = starts[3, 4] = True

    def loss(params):
        logits, aux = model.forward(CONFIG, params, ids, starts_BT=starts, ops=ops)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=2)
        return -jnp.mean(picked) + 0.01 * model.load_balance(aux)

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return [host(value)[None], *(host(grads[path]) for path in sorted(grads))]


def place(params, mesh, rules):
    shardings = param_shardings(model.param_specs(CONFIG), mesh, rules)

    def put(path, leaf):
        sharding = shardings[path]
        if isinstance(leaf, QuantizedTensor):
            scale = scale_sharding_of(sharding, leaf.shape, quant.contracted_axes(path))
            sharding = QuantizedTensor(sharding, scale)
        return jax.device_put(jax.tree.map(np.asarray, leaf), sharding)

    return {path: put(path, leaf) for path, leaf in params.items()}


def skewed():
    """Tokens that nearly all want one device's experts: many rounds, none lost."""
    mesh, E, T, D = parse_mesh("expert=8"), 16, 512, 4
    random = np.random.default_rng(3)
    g = random.standard_normal((T, D)).astype(np.float32)
    weight = random.uniform(0.1, 1, (T, 2)).astype(np.float32)
    expert = np.where(random.uniform(size=(T, 2)) < 0.9, 5, random.integers(0, E, (T, 2)))
    scale = np.arange(1, E + 1, dtype=np.float32)

    def island(g, weight, expert, scale):
        def run(x, weight, ids):
            return x * weight * jnp.append(scale, jnp.nan)[ids]  # an empty row must not be read

        return all_to_all_experts(run, g, weight, expert, E // 8, ("expert",), ("expert",))

    lie = jax.sharding.PartitionSpec("expert")
    got = jax.jit(jax.shard_map(island, mesh=mesh, in_specs=lie, out_specs=lie, check_vma=False))(
        g, weight, expert.astype(np.int32), scale)
    return peak_ratio(got, (g[:, None] * weight[..., None] * scale[expert][..., None]).sum(1))


def main(cases):
    cudnn_stand_in.install(cudnn)
    int8 = quant.quantize_params(PARAMS)
    references, report = {}, {"skewed": skewed()} if POD.count == 1 else {}
    for case in cases:
        text, regime, *rest = case.split("/")
        batch, given = int(rest[0]), int8 if "int8" in rest else PARAMS
        mesh, rules = parse_mesh(text), REGIMES[regime]
        names = dict(word.split("=") for word in rest[1:] if "=" in word)
        ops = MeshOps(mesh, rules, names)
        key = (regime == "train", batch, "int8" in rest)
        if key not in references:
            references[key] = train(given) if key[0] else serve(given, batch)
        params = place(given, mesh, rules)
        got = train(params, ops) if key[0] else serve(params, batch, ops)
        assert all(a.shape == b.shape for a, b in zip(got, references[key], strict=True))
        report[case] = max(peak_ratio(a, b) for a, b in zip(got, references[key], strict=True))
    if POD.is_main:
        # A line of its own: the wire's libraries write to stdout, too.
        print("\n" + json.dumps(report), flush=True)
    POD.finish()


if __name__ == "__main__":
    main(sys.argv[1:])

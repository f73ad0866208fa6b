"""Compares the model over eight simulated devices with the model on one; prints JSON.

As one of several processes (launch/local_pod.sh) it compares over the devices of all.
"""

import json
import os
import sys
from contextlib import nullcontext
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
from mmx.parallel.exchange import exchange_experts
from mmx.parallel.mesh_ops import MeshOps
from mmx.sharding.mesh import parse_mesh
from mmx.sharding.rules import REGIMES, param_shardings
from pallas_kernels.attention import cudnn
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor
from tests.engine.conftest import tiny_model
from tests.pallas_kernels import cudnn_stand_in
from tests.parallel import ragged, states_stand_in
from tests.tolerances import peak_ratio

CONFIG, PARAMS = tiny_model((LIGHTNING, SOFTMAX) * 2)  # a scan of two repeats
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
    for number, T in enumerate(CHUNKS, 1):
        ids = random.integers(1, CONFIG.vocab_size, (batch, T)).astype(np.int32)
        lengths = np.full(batch, T, np.int32)
        if T > 1:
            lengths[0] = T - 3
        elif number == len(CHUNKS) and batch > 1:
            lengths[-1] = 0  # an inert row
        out, cache = step(params, cache, ids, lengths)
        out = host(out)
        logits += [out[row, :length] for row, length in enumerate(lengths) if length]
    states = [host(memory["state"]) for stack in cache.stacks for memory in stack
              if "state" in memory]
    return logits + states


def train(params, capacity=0.0, ops=None):
    """Loss, logits, dropped shares and gradients over packed rows."""
    random = np.random.default_rng(2)
    ids = random.integers(1, CONFIG.vocab_size, (4, 16)).astype(np.int32)
    starts = np.zeros((4, 16), bool)
    starts[:, 0] = starts[1, 5] = starts[1, 8] = starts[2, 15] = starts[3, 4] = True

    def loss(params):
        logits, aux = model.forward(CONFIG, params, ids, starts_BT=starts, moe_capacity=capacity,
                                    ops=ops)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[..., None], axis=2)
        value = -jnp.mean(picked) + 0.01 * model.load_balance(aux)
        return value, (logits, aux.dropped_L)

    (value, more), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    return [host(value)[None], *(host(x) for x in more),
            *(host(grads[path]) for path in sorted(grads))]


def place(params, mesh, rules):
    shardings = param_shardings(model.param_specs(CONFIG), mesh, rules)

    def put(path, leaf):
        sharding = shardings[path]
        if isinstance(leaf, QuantizedTensor):
            scale = scale_sharding_of(sharding, leaf.shape, quant.contracted_axes(path))
            sharding = QuantizedTensor(sharding, scale)
        return jax.device_put(jax.tree.map(np.asarray, leaf), sharding)

    return {path: put(path, leaf) for path, leaf in params.items()}


def skewed(form: str, rows: str, groups: int, tensor: int):
    """Tokens that nearly all want one device's experts: many rounds, none lost, and gradients."""
    mesh, E, T, D = parse_mesh(f"expert={8 // tensor},tensor={tensor}"), 16, 504, 4
    random = np.random.default_rng(3)
    g = random.standard_normal((T, D)).astype(np.float32)
    weight = random.uniform(0.1, 1, (T, 2)).astype(np.float32)
    expert = np.where(random.uniform(size=(T, 2)) < 0.9, 5, random.integers(0, E, (T, 2)))
    scale = np.arange(1, E + 1, dtype=np.float32)
    local = E * tensor // 8

    def island(inference, g, weight, expert, scale):
        def run(x, weight, ids):
            part = x * weight / tensor
            return part * jnp.append(scale, jnp.nan)[ids]  # an empty row must not be read

        return exchange_experts(run, g, weight, expert, local, ("expert",), ("expert", "tensor"),
                                width=("tensor",) * (tensor > 1), split=rows == "part",
                                form=form, groups=groups, inference=inference)

    def over(inference):
        lie = jax.sharding.PartitionSpec("expert")
        return jax.shard_map(partial(island, inference), mesh=mesh, in_specs=lie, out_specs=lie,
                             check_vma=False)

    def whole(g, weight, expert, scale):
        return (g[:, None] * weight[..., None] * scale[expert][..., None]).sum(1)

    def square(function):
        return jax.grad(lambda g, weight, scale: jnp.sum(
            function(g, weight, expert.astype(np.int32), scale) ** 2), (0, 1, 2))

    got = jax.jit(over(True))(g, weight, expert.astype(np.int32), scale)
    errors = [peak_ratio(got, whole(g, weight, expert, scale))]
    gradients = jax.jit(square(over(False)))(g, weight, scale)
    errors += map(peak_ratio, gradients, square(whole)(g, weight, scale))
    return max(errors)


def main(cases):
    cudnn_stand_in.install(cudnn)
    jax.lax.ragged_all_to_all = ragged.all_to_all
    int8 = quant.quantize_params(PARAMS)
    references, report = {}, {}
    for case in cases:
        if case.startswith("skewed"):
            _, form, rows, groups, tensor = case.split("/")
            report[case] = skewed(form, rows, int(groups), int(tensor))
            continue
        text, regime, *rest = case.split("/")
        batch, given = int(rest[0]), int8 if "int8" in rest else PARAMS
        mesh, rules = parse_mesh(text), REGIMES[regime]
        names = dict(word.split("=") for word in rest[1:] if "=" in word)
        capacity = float(names.pop("capacity", 0))
        ops = MeshOps(mesh, rules, names)
        key = (regime == "train", batch, "int8" in rest, capacity)
        if key not in references:
            references[key] = train(given, capacity) if key[0] else serve(given, batch)
        params = place(given, mesh, rules)
        if "turned" in rest:
            params = quant.lay(model.param_specs(CONFIG), params, True)
            assert any(isinstance(leaf, TurnedTensor) for leaf in params.values())
        with states_stand_in.installed() if "in_place" in rest else nullcontext([1]) as calls:
            got = train(params, capacity, ops) if key[0] else serve(params, batch, ops)
        assert calls
        assert all(a.shape == b.shape for a, b in zip(got, references[key], strict=True))
        report[case] = max(peak_ratio(a, b) for a, b in zip(got, references[key], strict=True))
    if POD.is_main:
        # A line of its own: the wire's libraries write to stdout, too.
        print("\n" + json.dumps(report), flush=True)
    POD.finish()


if __name__ == "__main__":
    main(sys.argv[1:])

"""Runs or compiles the Hopper kernel of a decode step's experts in a process of its own.

`python -m tests.pallas_kernels.hit_mosaic_gpu_worker interpret CASE...` prints error ratios against
the reference, `... compile CASE...` the memory of what was compiled, as one line of JSON. The
interpreter needs more threads than cores: each warpgroup waits in one.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.experts import hit_mosaic_gpu, reference
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.quantized import QuantizedTensor
from tests.pallas_kernels import hopper
from tests.tolerances import norm_ratio

E, K, D, F = 4, 2, 128, 256


def route(kind):
    rng = np.random.default_rng(2)
    T = {"one_token": 1, "one_nobody": 1, "skewed": 40}.get(kind, 9)
    expert = np.stack([rng.permutation(E)[:K] for _ in range(T)])
    if kind == "skewed":  # more rows than one block has
        expert[:, 0] = 3
        expert[:, 1] = np.where(np.arange(T) < 3, 0, 1)
    if kind == "one_nobody":
        expert[0, 0] = E  # the other one is of another device
    if kind == "nobody":
        expert[rng.random((T, K)) < 0.5] = E
        expert[0] = -1
    weight = rng.dirichlet(np.ones(K), size=T)
    return jnp.asarray(weight, jnp.float32), jnp.asarray(expert, jnp.int32)


def weights(dtype):
    rng = np.random.default_rng(1)
    gate_up = rng.standard_normal((3, 2, E, D, F)) / np.sqrt(D)
    down = rng.standard_normal((3, E, F, D)) / np.sqrt(F)
    if dtype == "bfloat16":
        return jnp.asarray(gate_up, dtype), jnp.asarray(down, dtype)

    def quantise(w):
        scale = np.abs(w).max(axis=-2, keepdims=True) / 127
        return QuantizedTensor(jnp.asarray(np.rint(w / scale), jnp.int8),
                               jnp.asarray(scale, jnp.float32))

    return quantise(gate_up), quantise(down)


def interpret(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    weight, expert = route(case)
    g = jnp.asarray(np.random.default_rng(0).standard_normal((len(weight), D)), jnp.bfloat16)
    stacked = [Stacked(w, jnp.int32(1)) for w in weights("bfloat16")]
    got = hit_mosaic_gpu.hit_experts(
        g, weight, expert, *stacked, interpret=plgpu.InterpretGPUParams(detect_races=True))
    return norm_ratio(got, reference.experts(g, weight, expert, *stacked))


def compile_one(case):
    mesh, array = hopper.h200()

    T, layers, experts, hidden, width = int(case), 2, 32, 6144, 9216
    leaves = [array((layers, 2, experts, hidden, width), "bfloat16"),
              array((layers, experts, width, hidden), "bfloat16")]

    def run(g, weight, expert, gate_up, down, layer):
        return hit_mosaic_gpu.hit_experts(
            g, weight, expert, Stacked(gate_up, layer), Stacked(down, layer))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(run).lower(
            array((T, hidden), "bfloat16"), array((T, 2), "float32"), array((T, 2), "int32"),
            *leaves, array((), "int32"))
    return lowered.compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    run = {"interpret": interpret, "compile": compile_one}[sys.argv[1]]
    results = {}
    for case in sys.argv[2:]:
        # The assembler's report goes to this stream too: a line tells whose it is.
        print("case", case, flush=True)
        results[case] = run(case)
    print(json.dumps(results))

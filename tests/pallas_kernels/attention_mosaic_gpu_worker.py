"""Interprets or compiles the Hopper kernel of attention's decode step in a process of its own.

`python -m tests.pallas_kernels.attention_mosaic_gpu_worker interpret CASE...` prints error ratios
against the reference, `... compile CASE...` the memory of what was compiled, as one line of JSON.
"""

import json
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import mosaic_gpu, reference
from pallas_kernels.grouped_matmul.stacked import Stacked
from tests.pallas_kernels import hopper
from tests.tolerances import norm_ratio

# Rows, slots, query heads, heads of keys, their width, lengths, parts.
INTERPRETED = {"one_part": (2, 192, 16, 2, 128, (192, 70), 1),
               "parts": (2, 320, 6, 1, 64, (1, 257), 3)}
COMPILED = {"b64": (64, 65_536, 32, 4, 128), "b1": (1, 1 << 20, 64, 8, 128)}


def interpret(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    B, S, N, K, H, lengths, parts = INTERPRETED[case]
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16)
               for shape in ((B, 1, N, H), (3, B, K, S, H), (3, B, K, S, H)))
    k, v = k.at[0].set(jnp.nan), v.at[2].set(jnp.nan)  # other layers are not read
    weighted, total, _ = mosaic_gpu.decode(
        q, *(Stacked(x, jnp.int32(1)).swapaxes(1, 2) for x in (k, v)), jnp.asarray(lengths),
        parts=parts, interpret=plgpu.InterpretGPUParams(detect_races=True))
    expected = reference.attention(q.astype(jnp.float32), *(
        x[1].swapaxes(1, 2).astype(jnp.float32) for x in (k, v)), jnp.asarray(lengths) - 1, None)
    return norm_ratio(weighted / total[..., None], expected)


def compile_one(case):
    mesh, array = hopper.h200()
    B, S, N, K, H = COMPILED[case]

    def run(q, k, v, lengths, layer):
        k, v = (Stacked(x, layer).swapaxes(1, 2) for x in (k, v))
        return mosaic_gpu.decode(q, k, v, lengths)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(run).lower(
            array((B, 1, N, H)), *[array((2, B, K, S, H))] * 2, array((B,), "int32"),
            array((), "int32"))
    return lowered.compile().memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    run = {"interpret": interpret, "compile": compile_one}[sys.argv[1]]
    results = {}
    for case in sys.argv[2:]:
        # The assembler's report goes to this stream too: a line tells whose it is.
        print("case", case, flush=True)
        results[case] = run(case)
    print(json.dumps(results))

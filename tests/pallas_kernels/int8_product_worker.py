"""Runs or compiles the Hopper kernel for int8 matrices in a process of its own.

`python -m tests.pallas_kernels.int8_product_worker interpret CASE...` prints errors as one line of
JSON, `... compile CASE...` the temporary memory of what was compiled. Cases are named in
test_int8_product.py.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"  # the interpreter needs more threads than cores

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.experts import hit_int8_mosaic_gpu, reference
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.int8_product import api, mosaic_gpu, rows
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor
from tests.pallas_kernels import hit_mosaic_gpu_worker as hit
from tests.pallas_kernels import hopper
from tests.tolerances import norm_ratio

# Where the contracted axis is not split, SiLU happens in the kernel.
CONFIGS = {"experts": None, "one_pass": mosaic_gpu.Config(splits=1, stages=2),
           "narrow": mosaic_gpu.Config(splits=1, columns=64)}


def interpret(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    how = plgpu.InterpretGPUParams(detect_races=True)
    what, kind = case.split("/")
    if what in ("dense", "rows"):
        return {"dense": dense, "rows": gathered}[what](int(kind), how)
    return experts(kind, CONFIGS[what], how)


def gathered(K, how):
    """How far rows cut by the kernel are from those that XLA cuts."""
    rng = np.random.default_rng(K)
    x = rng.standard_normal((4, K)) * np.exp(rng.standard_normal((4, 1)))
    x = jnp.asarray(x, jnp.bfloat16).at[1].set(0).at[3, 5].set(jnp.nan)
    source = jnp.array([2, 0, 0, 3, 1, 2])
    (parts, peaks), wanted = rows.two_parts_of(x, source, interpret=how), rows.two_parts(x[source])
    alone = rows.two_parts_of(x, interpret=how)
    assert (np.asarray(alone[0])[:, 2] == np.asarray(parts)[:, 0]).all() and alone[1][1] == 0
    assert np.isnan(peaks[3]) and np.isfinite(np.delete(peaks, 3)).all(), peaks
    kept = np.array([0, 1, 2, 4, 5])  # integers of a row that is no number may be any
    return max(float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())
               for a, b in ((parts[:, kept], wanted[0][:, kept]),
                            (peaks[kept], wanted[1][kept])))


def dense(M, how):
    rng = np.random.default_rng(M)
    x = rng.standard_normal((M, 256)) * np.exp(rng.standard_normal((M, 1)))  # rows of any size
    weight = QuantizedTensor(
        jnp.asarray(rng.integers(-127, 128, (2, 2, 128, 256)), jnp.int8),
        jnp.asarray(rng.random((2, 1, 1, 256)) + 0.5, jnp.float32))
    x = jnp.asarray(x, jnp.bfloat16)
    got = api._mosaic_gpu(x, Stacked(TurnedTensor.of(weight, (1, 2)), jnp.int32(1)), how)
    whole = np.asarray(weight.values[1], np.float64) * np.asarray(weight.scale[1])
    return norm_ratio(got, np.asarray(x, np.float64) @ whole.reshape(256, 256))


def experts(kind, config, how):
    weight, expert = hit.route(kind)
    g = np.random.default_rng(0).standard_normal((len(weight), hit.D))
    g = jnp.asarray(g, jnp.bfloat16)
    plain = hit.weights("int8")
    turned = [Stacked(TurnedTensor.of(w, (axis,)), jnp.int32(1))
              for w, axis in zip(plain, (3, 2), strict=True)]
    got = hit_int8_mosaic_gpu.hit_experts(g, weight, expert, *turned, config=config, interpret=how)
    stacked = [Stacked(w, jnp.int32(1)) for w in plain]
    return norm_ratio(got, reference.experts(g, weight, expert, *stacked))


def compile_one(case):
    mesh, array = hopper.h200()

    def turned(*lead, inner, outer):
        return TurnedTensor(array((2, *lead, outer, inner), "int8"),
                            array((2, *lead, outer), "float32"))

    what, T = case.split("/")
    T, D, F = int(T), 6144, 9216
    if what == "dense":
        arguments = array((T, D), "bfloat16"), turned(inner=D, outer=24576), array((), "int32")

        def run(x, weight, layer):
            return api._mosaic_gpu(x, Stacked(weight, layer))
    else:
        arguments = (array((T, D), "bfloat16"), array((T, 2), "float32"), array((T, 2), "int32"),
                     turned(2, 32, inner=D, outer=F), turned(32, inner=F, outer=D),
                     array((), "int32"))

        def run(g, weight, expert, gate_up, down, layer):
            return hit_int8_mosaic_gpu.hit_experts(
                g, weight, expert, Stacked(gate_up, layer), Stacked(down, layer))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), dispatch.compiling_for("gpu"):
        compiled = jax.jit(run).lower(*arguments).compile()
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    run = {"interpret": interpret, "compile": compile_one}[sys.argv[1]]
    results = {}
    for case in sys.argv[2:]:
        # The assembler's report goes to this stream too: a line tells whose it is.
        print("case", case, flush=True)
        results[case] = run(case)
    print(json.dumps(results))

"""Runs or compiles the grouped products for Hopper in a process of its own.

`python -m tests.pallas_kernels.grouped_mosaic_gpu_worker interpret CASE...` prints error ratios
against float32, `... compile CASE...` the memory of what was compiled, as one line of JSON. The
interpreter needs more threads than cores: each warpgroup waits in one.
"""

import json
import os
import sys
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import api, mosaic_gpu_kernel, mosaic_gpu_vjp, reference
from pallas_kernels.grouped_matmul.mosaic_gpu_kernel import Config
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.quantized import TurnedTensor
from tests.pallas_kernels import hopper
from tests.tolerances import norm_ratio

SMALL = {  # name -> M, group sizes, D, F, config, inside a stack
    "ragged": (300, (70, 0, 131, 1, 65), 128, 256, Config(blocks=2), False),
    "full": (256, (128, 128), 128, 256, Config(blocks=2, stages=2), False),
    "nothing": (64, (0, 0), 64, 256, Config(blocks=2), False),
    "few_rows": (3, (1, 2), 64, 256, Config(blocks=1), False),
    "wide_rows": (700, (300, 61, 190, 100), 64, 128, Config(rows=256, columns=64, blocks=2), False),
    "in_stack": (140, (0, 139), 128, 256, Config(blocks=2, stages=3), True),
    "blocks_of_tiles": (520, (390, 130), 64, 256,
                        Config(columns=128, blocks=3, together=2), False),
    "cluster": (200, (70, 129), 128, 256, Config(columns=128, blocks=2, cluster=2), False),
    "cluster_rows": (700, (3, 390, 0, 270, 30), 64, 256,
                     Config(rows=256, columns=64, blocks=4, cluster=2, shared="w"), False),
    # Each matrix lies [F, D].
    "turned": (140, (1, 138), 192, 256, Config(columns=128, blocks=2, stages=3), True),
    "turned_cluster": (200, (70, 129), 128, 256, Config(columns=128, blocks=2, cluster=2), False),
}


def interpret(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    kind, name = case.split("/")
    if kind == "gradient":
        return gradient(name, plgpu.InterpretGPUParams())
    M, sizes, D, F, config, stacked = SMALL[name]
    rng = np.random.default_rng(M)
    parts = 2 if kind == "swiglu" else 1
    x = jnp.asarray(rng.standard_normal((M, D)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((3, 2, len(sizes), D, F)) * D**-0.5, jnp.bfloat16)
    if parts == 1:
        w = w[:, 0]
    run = mosaic_gpu_kernel.grouped_swiglu if parts == 2 else mosaic_gpu_kernel.grouped_matmul
    lies, w64 = w, np.asarray(w[1], np.float64)
    if name.startswith("turned"):
        scale = rng.random((*w64.shape[:-2], w64.shape[-1])).astype(np.float32) + 0.5
        w64 = w64 * scale[..., None, :]
        run = partial(run, turned=True, **{"scale_EF" if parts == 1 else "scale_2EF": scale})
        lies = w.swapaxes(-1, -2)
    weight = Stacked(lies, jnp.int32(1)) if stacked else lies[1]
    got = run(x, weight, jnp.array(sizes, jnp.int32), config=config,
              interpret=plgpu.InterpretGPUParams(detect_races=True))
    total = sum(sizes)
    wanted = np.zeros((M, F))
    x64 = np.asarray(x, np.float64)
    for e, (start, size) in enumerate(zip(np.cumsum(sizes) - sizes, sizes, strict=True)):
        rows = x64[start:start + size]
        if parts == 2:
            gate, up = rows @ w64[0, e], rows @ w64[1, e]
            wanted[start:start + size] = gate / (1 + np.exp(-gate)) * up
        else:
            wanted[start:start + size] = rows @ w64[e]
    got = np.asarray(got.astype(jnp.float32))
    found = {}
    if total:
        found["out"] = norm_ratio(jnp.asarray(got[:total]), wanted[:total])
    if parts == 1:
        found["zeros_beyond"] = not got[total:].any()
    return found


def gradient(kind, params):
    """Gradients in x and w against those of the reference in float32, rows beyond included."""
    for name in ("grouped_matmul", "grouped_swiglu"):
        kernel = partial(getattr(mosaic_gpu_kernel, name), config=Config(blocks=2),
                         interpret=params)
        setattr(mosaic_gpu_kernel, name, kernel)
    mosaic_gpu_vjp._check = lambda: None
    rng = np.random.default_rng(0)
    x, dout = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
               for shape in ((150, 128), (150, 256)))
    w = jnp.asarray(rng.standard_normal((2, 3, 128, 256)) / 8, jnp.bfloat16)
    sizes = jnp.array([70, 0, 71], jnp.int32)
    dout = dout.at[141:].set(0)

    def wanted(x, w):
        y = [reference.grouped_matmul(x, w[c], sizes) for c in range(2)]
        return y[0] if kind == "matmul" else jax.nn.silu(y[0]) * y[1]

    run = api.grouped_matmul if kind == "matmul" else api.grouped_swiglu
    first = (lambda w: w[0]) if kind == "matmul" else (lambda w: w)
    _, back = jax.vjp(lambda x, w: run(x, first(w), sizes, implementation="hopper"), x, w)
    _, true_back = jax.vjp(wanted, x.astype(jnp.float32), w.astype(jnp.float32))
    pairs = zip(("dx", "dw"), back(dout), true_back(dout.astype(jnp.float32)), strict=True)
    return {name: norm_ratio(jnp.asarray(a, jnp.float32), b) for name, a, b in pairs}


REAL = {  # kind/rows -> config; the model's widths, a stack of two layers
    "default": None,
    "three_stages": Config(stages=3),
    "cluster": Config(cluster=2),
    "cluster_rows": Config(rows=256, cluster=2, shared="w"),
    "wide_rows": Config(rows=256),
    "narrow": Config(columns=128, stages=5),
}


def compile_one(case):
    mesh, array = hopper.h200()

    kind, rows, name = case.split("/")
    M, E, D, F = int(rows), 32, 6144, 9216
    if kind == "swiglu":
        x, w = array((M, D)), array((2, 2, E, D, F))
    else:
        x, w = array((M, F)), array((2, E, F, D))

    if name == "int8":
        matrices = w.shape[:-2]
        w = TurnedTensor(array((*matrices, *w.shape[:-3:-1]), "int8"),
                         array((*matrices, w.shape[-1]), "float32"))

    def function(x, w, layer, sizes):
        if name == "scanned":  # layers of a training step
            def loss(x):
                def layer_of(x, w):
                    public = api.grouped_swiglu if kind == "swiglu" else api.grouped_matmul
                    return x, jnp.sum(public(x, w, sizes).astype(jnp.float32))
                return jnp.sum(jax.lax.scan(layer_of, x, w.swapaxes(0, 1) if kind == "swiglu"
                                            else w)[1])
            return jax.grad(loss)(x)
        public = api.grouped_swiglu if kind == "swiglu" else api.grouped_matmul
        if name in ("public", "int8"):  # the automatic choice
            return public(x, Stacked(w, layer), sizes)
        if name == "gradient":
            return jax.grad(lambda x, w: jnp.sum(public(x, w[0], sizes).astype(jnp.float32)),
                            argnums=(0, 1))(x, w)
        kernel = mosaic_gpu_kernel.grouped_swiglu if kind == "swiglu" else (
            mosaic_gpu_kernel.grouped_matmul)
        return kernel(x, Stacked(w, layer), sizes, config=REAL[name])

    with dispatch.compiling_for("gpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function).trace(x, w, array((), jnp.int32), array((E,), jnp.int32))
        if name == "scanned":
            return {"products": str(traced.jaxpr).count("name=_call")}
        lowered = traced.lower()
    return {"temp": lowered.compile().memory_analysis().temp_size_in_bytes,
            "paced": "inline_mgpu" in str(traced.jaxpr)}


if __name__ == "__main__":
    act = {"interpret": interpret, "compile": compile_one}[sys.argv[1]]
    results = {}
    for case in sys.argv[2:]:
        # The assembler's report goes to this stream too: a line tells whose it is.
        print("case", case, flush=True)
        results[case] = act(case)
    print(json.dumps(results))

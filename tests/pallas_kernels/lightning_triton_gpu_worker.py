"""Interprets, runs or compiles the Triton kernels of lightning attention in its own process.

`python -m tests.pallas_kernels.lightning_triton_gpu_worker interpret CASE...` prints error ratios
against float64, `... run CASE...` those of the GPU at hand, `... compile CASE...` what Triton's
assembler says of each kernel, as one line of JSON. `triton` decides at its import whether kernels
are interpreted.
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

if sys.argv[1:2] != ["run"]:
    os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1:2] == ["interpret"] else "0"

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import tuning
from pallas_kernels.lightning_attention import triton_gpu, triton_gpu_decode, triton_gpu_vjp
from tests.pallas_kernels.lightning_spans import expected
from tests.reference import lightning as f64
from tests.tolerances import norm_ratio

DEVICES = {"80": tuning.Nvidia(80, 108), "86": tuning.Nvidia(86, 72), "89": tuning.Nvidia(89, 142),
           "90": tuning.Nvidia(90, 132), "100": tuning.Nvidia(100, 148)}
LAYERS = (0, 40, 78)  # a head of each

# name -> T, H, options: packed samples, ragged lengths, parts of a sequence, capability
LENGTHS = (1, 63, 64, 65, 255, 256, 257, 4097)
SMALL = {
    **{f"T{T}": (T, 32, {}) for T in LENGTHS},
    "heads_of_16": (65, 16, dict(packed=True)),
    "heads_of_64": (70, 64, dict(packed=True)),
    "heads_of_128": (70, 128, dict(lengths=True)),
    "hopper": (130, 64, dict(packed=True, lengths=True, capability="90")),
    "packed": (200, 32, dict(packed=True)),
    "lengths": (200, 32, dict(lengths=True)),
    "packed_lengths": (200, 32, dict(packed=True, lengths=True)),
    "parts": (200, 32, dict(parts=3)),
    "parts_packed": (200, 32, dict(parts=2, packed=True)),
    "parts_lengths": (300, 32, dict(parts=3, lengths=True)),
    "parts_packed_lengths": (200, 32, dict(parts=3, packed=True, lengths=True)),
    # A fast head forgets within a part.
    "parts_forget": (640, 16, dict(parts=2)),
}


def inputs(T, H, dtype, packed, lengths):
    """Two rows of one head per layer; the second row begins without a state."""
    rng = np.random.default_rng(T)
    B, N = 2, len(LAYERS)
    tensors = [jnp.asarray(rng.standard_normal((B, T, N, H)), dtype) for _ in "qkvo"]
    state, dstate = (jnp.asarray(rng.standard_normal((B, N, H, H)), jnp.float32) for _ in "sd")
    state = state.at[1].set(0.0)
    slopes = np.array([f64.slopes(64, layer, 80)[31 if layer else 0] for layer in LAYERS])
    starts = None
    if packed:
        starts = np.zeros((B, T), bool)
        starts[0, [t for t in (3, 40, 64, 127, 128, 200, 290) if t < T]] = True
        starts[1, [0, T // 2]] = True
    lengths = (T - T // 3, T // 4) if lengths else None
    if lengths is not None:  # padding holds what would spoil all it meets
        padding = np.arange(T)[None, :] >= np.array(lengths)[:, None]
        tensors = [jnp.where(padding[..., None, None], jnp.nan, x) for x in tensors]
    return tensors, state, dstate, slopes, starts, lengths


def errors_of(case):
    dtype, name = case.split("/")
    if name.startswith("decode"):
        return decode(dtype)
    T, H, options = SMALL[name]
    tensors, state, dstate, slopes, starts, lengths = inputs(
        T, H, dtype, options.get("packed", False), options.get("lengths", False))
    config = triton_gpu.Config(parts=options.get("parts"),
                               device=DEVICES[options.get("capability", "80")])
    triton_gpu.forward = functools.partial(FORWARD, config=config)
    triton_gpu_vjp.backward = functools.partial(BACKWARD, config=config)
    samples = None if starts is None else jnp.cumsum(jnp.asarray(starts), axis=1, dtype=jnp.int32)
    lengths_B = None if lengths is None else jnp.asarray(lengths, jnp.int32)

    def attention(q, k, v, state):
        slopes_N = jnp.asarray(slopes, jnp.float32)
        return triton_gpu_vjp.attention(q, k, v, slopes_N, state, samples, lengths_B)

    results, back = jax.vjp(attention, *tensors[:3], state)
    got = dict(zip(("out", "state", "dq", "dk", "dv", "dstate"),
                   (*results, *back((tensors[3], dstate))), strict=True))
    truth = tensors, state, dstate, slopes, starts, lengths
    wanted = dict(zip(got, (*expected("forward", *truth), *expected("backward", *truth)),
                      strict=True))
    errors = {}
    for what, array in got.items():
        axis = 1 if "state" in what else 2
        for head, layer in enumerate(LAYERS):
            pair = (np.take(np.asarray(x, np.float64), head, axis) for x in (array, wanted[what]))
            errors[f"{what} of layer {layer}"] = norm_ratio(*pair)
    return errors


FORWARD, BACKWARD = triton_gpu.forward, triton_gpu_vjp.backward


def decode(dtype):
    """Rows with their own slots; the states of no row stay as they were."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 3, 128)), dtype) for _ in "qkv")
    old = rng.standard_normal((4, 3, 128, 128)).astype(np.float32)
    slopes = f64.slopes(64, 78, 80)[[0, 31, 63]]
    out, new = triton_gpu_decode.decode(
        q, k, v, slopes, jnp.asarray(old), jnp.array([2, 0]), device=DEVICES["80"])
    wanted, wanted_out = old.astype(np.float64), np.zeros(q.shape)
    for b, slot in enumerate((2, 0)):
        one = [np.asarray(x[b:b + 1], np.float64) for x in (q, k, v)]
        wanted_out[b:b + 1], wanted[slot] = f64.recurrent(*one, slopes, wanted[slot])
    return {"out": norm_ratio(out, wanted_out), "state": norm_ratio(new, wanted),
            "untouched": bool((np.asarray(new)[[1, 3]] == old[[1, 3]]).all())}


# name -> B, T, N, H, packed, lengths
REAL = {
    "1x8192": (1, 8192, 64, 128, False, False),
    "1x4194304": (1, 1 << 22, 64, 128, False, False),
    "8_heads_1x131072": (1, 1 << 17, 8, 128, False, False),
    "packed_lengths_8_heads_2x8193": (2, 8193, 8, 128, True, True),
    "1x1": (1, 1, 64, 128, False, False),
    "heads_of_64_1x8192": (1, 8192, 64, 64, False, False),
    "heads_of_64_packed_lengths_2x8193": (2, 8193, 8, 64, True, True),
    "heads_of_32_packed_lengths_2x8193": (2, 8193, 8, 32, True, True),
    "heads_of_16_packed_lengths_2x8193": (2, 8193, 8, 16, True, True),
}


def compile_one(case):
    """What is known of each kernel of a program for one GPU; no GPU and no XLA takes part."""
    from jax_triton import triton_lib

    capability, dtype, kind, name = case.split("/")
    device, f32, i32 = DEVICES[capability], jnp.float32, jnp.int32
    array = jax.ShapeDtypeStruct
    donate = ()
    if kind == "decode":
        B, N, H = int(name), 64, 128
        x = array((B, N, H), dtype)
        arguments = (x, x, x, array((N,), f32), array((2 * B, N, H, H), f32), array((B,), i32))
        function, donate = functools.partial(triton_gpu_decode.decode, device=device), (4,)
    else:
        B, T, N, H, packed, lengths = REAL[name]
        x, state = array((B, T, N, H), dtype), array((B, N, H, H), f32)
        arguments = (x, x, x, array((N,), f32), state, array((B, T), i32) if packed else None,
                     array((B,), i32) if lengths else None)
        config = triton_gpu.Config(device=device)
        function = functools.partial(FORWARD, config=config)
        if kind == "backward":
            arguments = (*arguments, x, state)
            function = functools.partial(BACKWARD, config=config)
    binaries.clear()
    triton_lib._COMPILED_KERNEL_CACHE.clear()
    traced = jax.jit(function, donate_argnums=donate).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = [{"name": made.name, "shared": made.shared_mem_bytes, **assembled(made.binary)}
               for made in binaries]
    return {"kernels": kernels, "calls": text.count("@triton_kernel_call"),
            "aliased": "output_operand_aliases = [#stablehlo" in text}


binaries = []


def record_binaries():
    from jax_triton import triton_lib

    compile_ttir = triton_lib.compile_ttir_inplace

    def recorded(*arguments):
        binaries.append(compile_ttir(*arguments))
        return binaries[-1]

    triton_lib.compile_ttir_inplace = recorded


def assembled(ptx):
    """Registers and bytes spilled, as Triton's own assembler reports them."""
    import triton

    arch = re.search(r"\.target (\w+)", ptx)[1]
    name = "ptxas-blackwell" if arch.startswith("sm_10") else "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [Path(triton.__file__).parent / "backends/nvidia/bin" / name, "-v",
             f"--gpu-name={arch}", file.name, "-o", os.devnull],
            capture_output=True, text=True, check=True)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)
    # Copies from main to shared memory that do not wait, of 16 bytes each and of fewer.
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", ptx)
    return {"arch": arch, "registers": int(re.search(r"Used (\d+) registers", done.stderr)[1]),
            "spilled": sum(map(int, spills)), "wide_copies": copies.count("0x10"),
            "copies": len(copies)}


if __name__ == "__main__":
    function = errors_of
    if sys.argv[1] == "interpret":
        from tests.pallas_kernels import triton_interpreter

        triton_interpreter.install()
    elif sys.argv[1] == "run":
        DEVICES = dict.fromkeys(DEVICES)  # whatever GPU is here
    else:
        record_binaries()
        function = compile_one
    print(json.dumps({case: function(case) for case in sys.argv[2:]}))

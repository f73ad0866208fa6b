"""Runs or compiles the Hopper kernels of lightning attention in a process of its own.

`python -m tests.pallas_kernels.lightning_mosaic_gpu_worker interpret CASE...` prints error ratios
against float64, `... compile CASE...` the memory of what was compiled, as one line of JSON. The
interpreter needs more threads than cores: each warpgroup waits in one.
"""

import json
import os
import re
import sys
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["NPROC"] = "16"

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import gpu_lightning
from pallas_kernels import (
    dispatch,
    lightning_attention,
    lightning_decode_slots,
    lightning_state,
)
from pallas_kernels.grouped_matmul.stacked import Stacked
from pallas_kernels.lightning_attention import (
    mosaic_gpu,
    mosaic_gpu_backward,
    mosaic_gpu_decode,
    mosaic_gpu_state,
)
from pallas_kernels.lightning_attention import pieces as pieces_of
from pallas_kernels.lightning_attention.decode import lightning_decode_stacked
from tests.pallas_kernels import hopper
from tests.pallas_kernels.lightning_spans import expected
from tests.reference import lightning as f64
from tests.tolerances import norm_ratio

Config = mosaic_gpu.Config
STARTS = {0: (3, 40, 64, 127, 128, 200), 1: (0, 130)}
SMALL = {  # name -> B, T, N, H, layer, config, packed, lengths
    "one_token": (1, 1, 2, 64, 78, None, False, None),
    "one_chunk": (1, 64, 1, 128, 0, None, False, None),
    "tail": (1, 257, 1, 64, 78, None, False, None),
    "fast_decay": (1, 130, 1, 64, 0, None, False, None),
    "whole_head": (1, 130, 1, 128, 40, Config(value_splits=1),
                   False, None),
    "packed": (2, 257, 2, 64, 78, None, True, None),
    "lengths": (3, 200, 1, 64, 40, None, False, (0, 64, 200)),
    "packed_lengths": (2, 257, 1, 64, 78, None, True, (200, 63)),
    "parts": (1, 300, 1, 64, 78, Config(sequence_splits=3), False, None),
    "parts_packed_lengths": (2, 300, 1, 64, 78, Config(sequence_splits=3), True, (290, 130)),
    # A boundary in some chunks, others of one sample each; fast heads forget within a part.
    "packed_long": (1, 640, 1, 128, 40, Config(sequence_splits=2), True, None),
    "parts_fast": (1, 640, 1, 64, 0, Config(sequence_splits=2), False, None),
    "parts_fast_lengths": (2, 640, 1, 64, 0, Config(sequence_splits=2), False, (600, 321)),
    # What lasts in a part, in several pieces: less than the part, all of it, all and undecayed.
    "pieces_fast": (1, 1152, 2, 64, 0, Config(sequence_splits=2), False, None),
    "pieces_packed_lengths": (2, 650, 1, 64, 78, Config(sequence_splits=2), True, (600, 321)),
    "pieces_no_decay": (1, 500, 1, 128, None, Config(sequence_splits=2), False, None),
    "separate": (1, 130, 1, 64, 78, Config(joint=False), False, None),
}


def inputs(case):
    B, T, N, H, layer, config, packed, lengths = SMALL[case]
    rng = np.random.default_rng(T)
    q, k, v, dout = (jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.bfloat16) for _ in "qkvo")
    state, dstate = (jnp.asarray(rng.standard_normal((B, N, H, H)), jnp.float32) for _ in "sd")
    slopes = np.zeros(N) if layer is None else f64.slopes(64, layer, 80)[[0, 31]][:N]
    starts = None
    if packed:
        starts = np.zeros((B, T), bool)
        for b in range(B):
            starts[b, list(STARTS[b])] = True
    if lengths is not None:  # padding holds noise, and starts there count for nothing
        padding = np.arange(T)[None, :] >= np.array(lengths)[:, None]
        q, k, v, dout = (jnp.where(padding[..., None, None], 1e2, x).astype(x.dtype)
                         for x in (q, k, v, dout))
    return (q, k, v, dout), state, dstate, slopes, starts, lengths, config


def interpret(case):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    params = plgpu.InterpretGPUParams(detect_races=True)
    kind, name = case.split("/")
    if kind == "decode":
        return stacked(params) if name == "stacked" else decode(params, int(name))
    if kind == "unread":
        return unread(params, name == "reverse")
    if kind == "benchmark":
        return splits(params)
    if name.startswith("pieces"):
        mosaic_gpu._PIECE = 2
    (q, k, v, dout), state, dstate, slopes, starts, lengths, config = inputs(name)
    if kind == "state":
        return states(params, k, v, slopes, starts, lengths)
    samples = None if starts is None else jnp.cumsum(jnp.asarray(starts), axis=1, dtype=jnp.int32)
    lengths_B = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    marks, options = (samples, lengths_B), dict(config=config, interpret=params)
    slopes_N = jnp.asarray(slopes, jnp.float32)
    if kind == "forward":
        got = mosaic_gpu.forward(q, k, v, slopes_N, state, *marks, **options)
        names = "out", "state"
    else:
        got = mosaic_gpu_backward.backward(
            q, k, v, slopes_N, state, *marks, dout, dstate, **options)
        names = "dq", "dk", "dv", "dstate"
    wanted = expected(kind, (q, k, v, dout), state, dstate, slopes, starts, lengths)
    return {what: norm_ratio(jnp.asarray(a, jnp.float32), b)
            for what, a, b in zip(names, got, wanted, strict=True)}


def states(params, k, v, slopes, starts, lengths):
    """The state alone, both ways, each head's tokens shared out to parts of few chunks."""
    mosaic_gpu_state._CHUNKS = 2
    forms = sys.modules["pallas_kernels.lightning_attention.state"]._FORMS
    forms["mosaic_gpu"] = partial(mosaic_gpu_state.state, interpret=params)
    run = partial(lightning_state, slopes_N=slopes, starts_BT=starts,
                  lengths_B=None if lengths is None else jnp.asarray(lengths, jnp.int32))
    exact = [x.astype(jnp.float32) for x in (k, v)]
    return {str(reverse): norm_ratio(
        run(k, v, reverse=reverse, implementation="mosaic_gpu"),
        run(*exact, reverse=reverse, implementation="reference")) for reverse in (False, True)}


def unread(params, reverse):
    """States of two parts in pieces; what is forgotten at a part's end holds NaN, if not read."""
    T, N, H, pieces, C = 1152, 2, 64, 4, 64
    first, end = (jnp.array([x], jnp.int32) for x in ([0, 576], [576, 1100]))
    slopes = f64.slopes(64, 0, 80)[[0, 31]]  # 31 and 449 tokens last
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.standard_normal((1, T, N, H)), jnp.bfloat16) for _ in "kv")
    table = pieces_of.share_out(jnp.asarray(slopes, jnp.float32), first, end, pieces, T=T, C=C,
                                reverse=reverse)
    read = np.zeros((1, T, N, 1), bool)
    for piece in np.asarray(table)[0].reshape(-1, N, 4):
        for n, (begin, stop, _, _) in enumerate(piece):
            read[0, begin * C:stop * C, n] = True
    (got,) = mosaic_gpu.local_states(
        [jnp.where(read, x, jnp.nan) for x in (k, v)], ((0, 0, 1),),
        jnp.asarray(slopes, jnp.float32), first, end, span=576, pieces=pieces, reverse=reverse,
        interpret=params)
    wanted = []
    for a, b in zip(first[0].tolist(), end[0].tolist(), strict=True):
        steps = np.arange(1, b - a + 1) if reverse else np.arange(b - a)[::-1]
        decayed = np.exp(-slopes * steps[:, None])[..., None] * np.asarray(k, np.float64)[0, a:b]
        wanted.append(np.einsum("tnh,tng->nhg", decayed, np.asarray(v, np.float64)[0, a:b]))
    return {"state": norm_ratio(got, np.stack(wanted)[None]), "less": bool(read.mean() < 0.6)}


def splits(params):
    """The benchmark's sweep of parts at a small shape, its clock left out."""
    mosaic_gpu._PIECE = 2
    run = gpu_lightning.Run(600, 4243)
    gpu_lightning.time_splits(
        run, {(1, 520, 1): gpu_lightning.HALVES_AND_PARTS}, lambda call: 1.0, params)
    assert not run.failures, run.failures
    return {"checked": [x["ok"] for x in run.checks] == [True, True],
            "timed": [x["kind"] for x in run.times] == ["layer 40", "layer 78"] * 2,
            **{name: max(x[name] for x in run.checks) for name in ("out", "state")}}


def decode(params, H):
    """Rows with their own slots, one of them inert; the states of no row stay as they were."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 2, H)), jnp.bfloat16) for _ in "qkv")
    old = rng.standard_normal((4, 2, H, H)).astype(np.float32)
    slopes = f64.slopes(64, 78, 80)[[0, 31]]
    out, new = mosaic_gpu_decode.decode(
        q, k, v, slopes, jnp.asarray(old), jnp.array([2, -1, 0]), interpret=params)
    wanted, wanted_out = old.astype(np.float64), np.zeros(q.shape)
    for b, slot in ((0, 2), (2, 0)):
        one = [np.asarray(x[b:b + 1], np.float64) for x in (q, k, v)]
        wanted_out[b:b + 1], wanted[slot] = f64.recurrent(*one, slopes, wanted[slot])
    untouched = bool((np.asarray(new)[[1, 3]] == old[[1, 3]]).all())
    inert = not np.asarray(out[1], np.float32).any()
    return {"out": norm_ratio(jnp.asarray(out, jnp.float32), wanted_out),
            "state": norm_ratio(new, wanted), "untouched": untouched, "inert": inert}


def stacked(params):
    """One layer's states of three, its second row inert."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((3, 1, 2, 128)), jnp.bfloat16) for _ in "qkv")
    old = rng.standard_normal((3, 3, 2, 128, 128)).astype(np.float32)
    slopes = f64.slopes(64, 40, 80)[[0, 31]]
    out, new = lightning_decode_stacked(
        q, k, v, slopes, Stacked(jnp.asarray(old), jnp.int32(1)), jnp.array([1, 0, 1]),
        interpret=params)
    wanted, wanted_out = old.astype(np.float64), np.zeros(q.shape)
    for b in (0, 2):
        one = [np.asarray(x[b], np.float64) for x in (q, k, v)]
        wanted_out[b], wanted[1, b] = f64.recurrent(*one, slopes, wanted[1, b])
    untouched = (np.asarray(new.whole)[[0, 2]] == old[[0, 2]]).all()
    return {"out": norm_ratio(jnp.asarray(out, jnp.float32), wanted_out),
            "state": norm_ratio(new.whole, wanted), "untouched": bool(untouched),
            "inert": bool((np.asarray(new.whole)[1, 1] == old[1, 1]).all())}


# name -> B, T, N, H, config, packed, lengths: the shapes of the model and the edges of TMA
REAL = {
    "1x8192": (1, 8192, 64, 128, None, False, False),
    "8x8192": (8, 8192, 64, 128, None, False, False),
    "1x524288": (1, 1 << 19, 64, 128, None, False, False),
    "1x1048576": (1, 1 << 20, 64, 128, None, False, False),
    "8_heads_1x131072": (1, 1 << 17, 8, 128, None, False, False),
    "packed_8_heads_1x131072": (1, 1 << 17, 8, 128, None, True, False),
    "whole_heads_in_two_1x16384": (1, 1 << 14, 64, 128,
                                   Config(value_splits=1, sequence_splits=2), False, False),
    "packed_1x131072": (1, 1 << 17, 64, 128, None, True, False),
    "packed_lengths_2x4097": (2, 4097, 8, 128, None, True, True),
    "1x1": (1, 1, 64, 128, None, False, False),
    "1x63": (1, 63, 64, 128, None, False, False),
    "whole_head_8x8192": (8, 8192, 64, 128, Config(value_splits=1), False, False),
    "packed_1x8192": (1, 8192, 64, 128, None, True, False),
    "packed_8x8192": (8, 8192, 64, 128, None, True, False),
    "packed_registers_1x131072": (1, 1 << 17, 64, 128, Config(queries_in_registers=True),
                                  True, False),
    "packed_one_1x131072": (1, 1 << 17, 64, 128, Config(output_warpgroups=1), True, False),
    "one_warpgroup_1x8192": (1, 8192, 64, 128,
                             Config(output_warpgroups=1, queries_in_registers=True), False, False),
}


def compile_one(case):
    mesh, array = hopper.h200()

    kind, name = case.split("/")
    bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
    donate = ()
    if kind == "decode":
        (B, H), N = map(int, name.split("x")), 64
        x = array((B, N, H), bf16)
        arguments = (x, x, x, array((N,), f32), array((B, N, H, H), f32), array((B,), i32))
        function, donate = mosaic_gpu_decode.decode, (4,)
    elif kind != "public":
        B, T, N, H, config, packed, lengths = REAL[name]
        x, state = array((B, T, N, H), bf16), array((B, N, H, H), f32)
        marks = (array((B, T), i32) if packed else None, array((B,), i32) if lengths else None)
        arguments = (x, x, x, array((N,), f32), state, *marks)
        function = mosaic_gpu.forward
        if kind == "backward":
            arguments, function = (*arguments, x, state), mosaic_gpu_backward.backward
        one = function
        function = lambda *a: one(*a, config=config)  # noqa: E731
    if kind == "state":
        arguments = (x, x, array((N,), f32), array((B,), i32), array((B,), i32))
        function = partial(mosaic_gpu_state.state, reverse=packed)
    if kind == "public":  # what the public functions choose where an H200 is the target
        B, N, H = int(name), 64, 128
        x, state = array((B, 128, N, H), bf16), array((B, N, H, H), f32)
        slopes = array((N,), f32)
        arguments = (x, x, x, slopes, state, array((B,), i32))
        donate = (4,)

        def function(q, k, v, slopes, states, slots):
            rows = (y[:, 0] for y in (q, k, v))
            out = lightning_attention(q, k, v, slopes)[0], lightning_state(k, v, slopes)
            return out, lightning_decode_slots(*rows, slopes, states, slots)
    with dispatch.compiling_for("gpu"), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
    kernels = sorted(set(re.findall(r"lightning_(?:forward_states|forward|decode)",
                                    lowered.as_text())))
    memory = lowered.compile().memory_analysis()
    return {"temp": memory.temp_size_in_bytes, "alias": memory.alias_size_in_bytes,
            "kernels": kernels}


if __name__ == "__main__":
    run = {"interpret": interpret, "compile": compile_one}[sys.argv[1]]
    results = {}
    for case in sys.argv[2:]:
        # The assembler's report goes to this stream too: a line tells whose it is.
        print("case", case, flush=True)
        results[case] = run(case)
    print(json.dumps(results))

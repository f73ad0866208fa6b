"""The Hopper kernel of attention's decode step, interpreted on a CPU and compiled for an H200."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import attention, dispatch
from pallas_kernels.attention import api, cudnn, mosaic_gpu
from pallas_kernels.grouped_matmul.stacked import Stacked
from tests.pallas_kernels import hopper
from tests.tolerances import bound

INTERPRETED = ["one_part", "parts"]
COMPILED = ["b64", "b1"]
work = partial(hopper.work, "attention_mosaic_gpu_worker")


@pytest.fixture(scope="module")
def interpreted():
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the GPU interpreter came with jax 0.11")
    return json.loads(work("interpret", INTERPRETED).splitlines()[-1])


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_equals_the_reference(interpreted, case):
    assert interpreted[case] <= bound("kernel", jnp.bfloat16)


@pytest.mark.gpu_aot
def test_compiles_for_h200_without_spills_or_copies_of_the_cache():
    output = work("compile", COMPILED, MOSAIC_GPU_DUMP_PTXAS="1")
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill", output)]
    assert output.count("attention_decode") >= len(COMPILED) and not any(spills)
    temporary = json.loads(output.splitlines()[-1])
    # Shares of the parts, where one layer's keys are 4 and 2 GiB.
    assert all(size < 32 << 20 for size in temporary.values()), temporary


def test_another_platform_is_refused():
    q, k = jnp.zeros((1, 1, 4, 128), jnp.bfloat16), jnp.zeros((1, 64, 2, 128), jnp.bfloat16)
    with pytest.raises(ValueError, match="runs on NVIDIA GPUs of the Hopper generation"):
        attention(q, k, k, offsets_B=jnp.zeros(1, jnp.int32), implementation="mosaic_gpu")


@pytest.mark.parametrize("T, N, H, S, dtype, offsets, message", [
    (2, 4, 128, 64, "bfloat16", (), "one query a row"),
    (1, 4, 128, 64, "bfloat16", None, "one query a row"),
    (1, 4, 128, 64, "float32", (), "Both must be bfloat16"),
    (1, 4, 32, 64, "bfloat16", (), "got heads of 32"),
    (1, 256, 128, 64, "bfloat16", (), "128 of them over one of keys"),
    (1, 4, 128, 96, "bfloat16", (), "96 slots"), (1, 4, 128, 64, "bfloat16", (), None)], ids=str)
def test_what_the_kernel_does_not_take(monkeypatch, T, N, H, S, dtype, offsets, message):
    """And what takes its place where it is the automatic choice."""
    monkeypatch.setattr(api.tuning, "hopper", lambda: True)
    monkeypatch.setattr(cudnn, "loaded", lambda: True)
    monkeypatch.setattr(api, "HOPPER_DECODE", "mosaic_gpu")
    q = jax.ShapeDtypeStruct((1, T, N, H), dtype)
    k = jax.ShapeDtypeStruct((1, S, 2, H), dtype)
    sentence = mosaic_gpu.refusal(q, k, offsets, None)
    assert sentence is None if message is None else message in sentence
    if offsets is not None:
        with dispatch.compiling_for("gpu"):
            stacked = Stacked(jax.ShapeDtypeStruct((3, *k.shape), dtype), 0)
            chosen = [api._automatic(q, one, offsets, None) for one in (k, stacked)]
            share = api.partial_form(q, stacked)
        other = "xla" if dtype == "float32" else "cudnn"
        assert chosen == [other, "mosaic_gpu" if message is None else other] and share == other

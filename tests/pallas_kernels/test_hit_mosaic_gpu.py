"""The Hopper kernel of a decode step's experts, interpreted on a CPU and compiled for an H200."""

import json
import re
from functools import partial

import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.experts.api import hit_experts
from tests.pallas_kernels import hopper
from tests.tolerances import bound

INTERPRETED = ["even", "skewed", "nobody", "one_token", "one_nobody"]
COMPILED = ["1", "64", "256"]
work = partial(hopper.work, "hit_mosaic_gpu_worker")


@pytest.fixture(scope="module")
def interpreted():
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the GPU interpreter came with jax 0.11")
    return json.loads(work("interpret", INTERPRETED).splitlines()[-1])


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_equals_the_reference(interpreted, case):
    assert interpreted[case] <= bound("kernel", jnp.bfloat16)


@pytest.mark.gpu_aot
def test_compiles_for_h200_without_spills_or_copies_of_weights():
    output = work("compile", COMPILED, MOSAIC_GPU_DUMP_PTXAS="1")
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill", output)]
    assert len(spills) >= 4 * len(COMPILED) and not any(spills)
    temporary = json.loads(output.splitlines()[-1])
    # Rows and hidden activations of up to 32 + 15 blocks, where one expert has 340 MB.
    assert all(size < 100 << 20 for size in temporary.values()), temporary


@pytest.mark.parametrize("dtype, width, message", [
    ("float32", 256, "runs on NVIDIA GPUs of the Hopper generation; this is a cpu")], ids=str)
def test_another_platform_is_refused(dtype, width, message):
    g, up, down = jnp.zeros((2, 128)), jnp.zeros((2, 4, 128, width)), jnp.zeros((4, width, 128))
    with pytest.raises(ValueError, match=message):
        hit_experts(g, jnp.ones((2, 2)), jnp.zeros((2, 2), jnp.int32), up, down,
                    implementation="mosaic_gpu")


@pytest.mark.parametrize("dtype, width, message", [
    ("float32", 256, "tokens of float32"), ("int8", 256, "turned int8 weights"),
    ("bfloat16", 192, "multiples of 128")], ids=str)
def test_what_the_kernel_does_not_take_is_refused(dtype, width, message):
    from pallas_kernels.experts import hit_mosaic_gpu

    g, up = jnp.zeros((2, 128), dtype), jnp.zeros((2, 4, 128, width), dtype)
    with pytest.raises(ValueError, match=message):
        hit_mosaic_gpu.hit_experts(g, None, None, up, None)

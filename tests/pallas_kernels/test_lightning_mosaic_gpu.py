"""The Hopper kernels of lightning attention, interpreted on a CPU and compiled for an H200."""

import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.lightning_attention import mosaic_gpu, mosaic_gpu_backward, mosaic_gpu_decode
from tests.pallas_kernels import hopper
from tests.tolerances import bound

if not hasattr(plgpu, "InterpretGPUParams"):
    pytest.skip("the GPU interpreter came with jax 0.11", allow_module_level=True)

MOST_SHARED_MEMORY = 232448  # bytes a block of an H200 may have
FORWARD = ("one_token", "one_chunk", "tail", "fast_decay", "whole_head", "packed", "lengths",
           "packed_lengths", "packed_long", "parts", "parts_fast", "parts_fast_lengths",
           "parts_packed_lengths", "pieces_fast", "pieces_packed_lengths", "pieces_no_decay")
BACKWARD = ("tail", "lengths", "packed_lengths", "packed_long", "parts_fast_lengths",
            "parts_packed_lengths", "separate", "pieces_packed_lengths")
STATE = ("one_token", "tail", "packed_lengths", "parts_fast_lengths", "lengths", "packed_long")
INTERPRETED = [*(f"forward/{x}" for x in FORWARD), *(f"backward/{x}" for x in BACKWARD),
               *(f"state/{x}" for x in STATE), "unread/forward", "unread/reverse",
               "benchmark/splits", "decode/stacked", "decode/64", "decode/128"]
COMPILED = [*(f"forward/{x}" for x in (
    "1x8192", "8x8192", "1x1048576", "8_heads_1x131072", "packed_1x131072",
    "packed_1x8192", "packed_8x8192", "packed_registers_1x131072", "packed_one_1x131072",
    "packed_lengths_2x4097", "1x1", "1x63", "whole_head_8x8192", "one_warpgroup_1x8192",
    "packed_8_heads_1x131072", "whole_heads_in_two_1x16384")),
    *(f"backward/{x}" for x in (
        "1x8192", "8x8192", "packed_1x8192", "packed_1x131072", "packed_lengths_2x4097",
        "8_heads_1x131072", "packed_8_heads_1x131072")),
    *(f"state/{x}" for x in ("8x8192", "1x524288", "packed_1x131072", "packed_lengths_2x4097")),
    "decode/1x128", "decode/256x128", "decode/16x64", "public/2"]
work = partial(hopper.work, "lightning_mosaic_gpu_worker")


@pytest.fixture(scope="module")
def interpreted():
    return json.loads(work("interpret", INTERPRETED, 300).splitlines()[-1])


@pytest.fixture(scope="module")
def compiled():
    """Per case: memory, and what the assembler says of each of its kernels."""
    output = work("compile", COMPILED, 900, MOSAIC_GPU_DUMP_PTXAS="1")
    cases = json.loads(output.splitlines()[-1])
    for section in output.split("\ncase ")[1:] + output.split("case ", 1)[1:2]:
        name = section.split("\n", 1)[0].strip()
        section = section.split("\ncase ")[0]
        cases[name]["spills"] = [int(x) for x in re.findall(r"(\d+) bytes spill", section)]
        cases[name]["warnings"] = re.findall(r".*wgmma.*serialized.*", section)
    return cases


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_equals_float64(interpreted, case):
    for what, error in interpreted[case].items():
        if isinstance(error, bool):
            assert error, what
        else:
            # Tighter than the table's bound for gradients: these passes are the forward's.
            assert error <= bound("kernel", jnp.bfloat16), (what, error)


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_for_h200_without_spills(compiled, case):
    assert compiled[case]["spills"] and not any(compiled[case]["spills"]), compiled[case]
    assert not compiled[case]["warnings"]


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", [
    x for x in COMPILED if x.startswith(("forward/", "state/"))])
def test_forward_copies_no_tensor(compiled, case):
    """No transpose or padding of q, k, v: states between parts and marks are all there is."""
    parts = 16 if case in ("state/1x524288", "state/packed_1x131072") else 0
    assert compiled[case]["temp"] < (24 << 20) + parts * (4 << 20), compiled[case]


@pytest.mark.gpu_aot
@pytest.mark.parametrize("batch", (1, 256))
def test_decode_updates_states_in_place(compiled, batch):
    case = compiled[f"decode/{batch}x128"]
    assert case["alias"] == batch * 64 * 128 * 128 * 4 and case["temp"] < 1 << 20


@pytest.mark.gpu_aot
def test_public_functions_choose_the_kernels_for_an_h200(compiled):
    assert compiled["public/2"]["kernels"] == [
        "lightning_decode", "lightning_forward", "lightning_forward_states"]


@pytest.mark.parametrize("heads, tokens, whole", [
    (8, 8192, False), (64, 8192, False), (66, 8192, False), (128, 8192, True), (192, 8192, False),
    (512, 8192, True), (64, 32768, False), (64, 65536, True), (8, 65536, False),
    (8, 131072, True)], ids=str)
def test_whole_heads_where_they_fill_the_multiprocessors_or_sequences_are_long(
        heads, tokens, whole):
    assert mosaic_gpu._whole_heads(heads, tokens // 64) == whole


@pytest.mark.parametrize("H, dtype, message", [
    (128, "float32", "takes bfloat16; got float32"), (96, "bfloat16", "heads of 64 or 128; got 96"),
], ids=str)
def test_what_the_kernels_do_not_take_is_refused(H, dtype, message):
    x, state = jnp.zeros((1, 64, 2, H), dtype), jnp.zeros((1, 2, H, H))
    slopes = jnp.ones(2)
    with pytest.raises(ValueError, match=message):
        mosaic_gpu.forward(x, x, x, slopes, state)
    with pytest.raises(ValueError, match=message):
        mosaic_gpu_backward.backward(x, x, x, slopes, state, None, None, x, state)
    with pytest.raises(ValueError, match=message):
        mosaic_gpu_decode.decode(x[:, 0], x[:, 0], x[:, 0], slopes, state, jnp.zeros(1, jnp.int32))


@pytest.mark.parametrize("config", [
    dict(value_splits=3), dict(output_warpgroups=3), dict(stages=3)], ids=str)
def test_configurations_that_do_not_fit_are_refused(config):
    x, state = jax.ShapeDtypeStruct((1, 64, 2, 128), jnp.bfloat16), jnp.zeros((1, 2, 128, 128))
    with pytest.raises(ValueError, match="value_splits must leave"):
        jax.eval_shape(lambda x: mosaic_gpu.forward(
            x, x, x, jnp.ones(2), state, config=mosaic_gpu.Config(**config)), x)

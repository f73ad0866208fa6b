"""Our grouped products for Hopper, interpreted on a CPU and compiled for an H200."""

import json
import re
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul import mosaic_gpu_kernel
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.mosaic_gpu_items import items_of
from pallas_kernels.lightning_attention.mosaic_gpu_block import IN_PLACE
from tests.pallas_kernels import hopper
from tests.tolerances import bound

NAMES = ("ragged", "full", "nothing", "few_rows", "wide_rows", "in_stack", "blocks_of_tiles",
         "cluster", "cluster_rows")
INTERPRETED = [*(f"{kind}/{name}" for kind in ("matmul", "swiglu") for name in NAMES),
               *(f"{kind}/turned{x}" for kind in ("matmul", "swiglu") for x in ("", "_cluster")),
               "gradient/matmul", "gradient/swiglu"]
COMPILED = ["matmul/4096/public", "swiglu/4096/public", "matmul/32768/cluster",
            "swiglu/32768/cluster", "matmul/32768/cluster_rows", "swiglu/32768/cluster_rows",
            "matmul/32768/wide_rows", "swiglu/32768/wide_rows"]
PUBLIC = ["matmul/32768/public", "swiglu/32768/public"]
INT8 = ["matmul/32768/int8", "swiglu/32768/int8"]
SCANNED = ["matmul/32768/scanned", "swiglu/32768/scanned"]
work = partial(hopper.work, "grouped_mosaic_gpu_worker")


@pytest.fixture(scope="module")
def interpreted():
    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip("the GPU interpreter came with jax 0.11")
    return json.loads(work("interpret", INTERPRETED, 300).splitlines()[-1])


@pytest.fixture(scope="module")
def compiled():
    """Per case: memory, and what the assembler says of the kernel."""
    output = work("compile", [*COMPILED, *PUBLIC, *INT8, *SCANNED], 600, MOSAIC_GPU_DUMP_PTXAS="1")
    cases = json.loads(output.splitlines()[-1])
    for section in re.split(r"^case ", output, flags=re.MULTILINE)[1:]:
        name = section.split("\n", 1)[0].strip()
        cases[name]["spills"] = [int(x) for x in re.findall(r"(\d+) bytes spill", section)]
        cases[name]["warnings"] = re.findall(r".*wgmma.*serialized.*", section)
    return cases


@pytest.mark.parametrize("case", INTERPRETED)
def test_interpreted_equals_float64(interpreted, case):
    kind = "gradient" if case.startswith("gradient") else "kernel"
    for what, error in interpreted[case].items():
        assert error if isinstance(error, bool) else error <= bound(kind, jnp.bfloat16), what


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case, paced", [
    ("matmul/4096/public", False), ("matmul/32768/public", True), ("swiglu/32768/public", True),
    ("swiglu/32768/cluster", False)], ids=str)
def test_many_rows_of_the_models_widths_keep_pace(compiled, case, paced):
    assert compiled[case]["paced"] == (paced and IN_PLACE)


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", SCANNED)
def test_gradients_through_a_scan_of_layers(compiled, case):
    """The counter of programs that keep pace changes in place, which no scan differentiates."""
    assert compiled[case]["products"] >= 2  # forward and in x


# Where programs cannot keep pace, the choice is the kernel of "cluster_rows", assembled once.
@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", COMPILED + PUBLIC * IN_PLACE)
def test_compiles_for_h200_without_spills_or_copies(compiled, case):
    """No weight is cut out of its stack: the list of items is all there is beside the arrays."""
    assert compiled[case]["spills"] and not any(compiled[case]["spills"]), compiled[case]
    assert not compiled[case]["warnings"] and compiled[case]["temp"] < 1 << 20, compiled[case]


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", INT8)
def test_turned_int8_is_cast_once_as_it_lies(compiled, case):
    """In bfloat16 the matrices of one product of every expert, and of activations its result."""
    assert compiled[case]["spills"] and not any(compiled[case]["spills"]), compiled[case]
    cast, rows = 32 * 6144 * 9216 * 2 * (1 + case.startswith("swiglu")), 32768 * 9216 * 2
    assert cast <= compiled[case]["temp"] < cast + rows, compiled[case]


@pytest.mark.parametrize("rest", (False, True))
@pytest.mark.parametrize("unit, programs", [(64, 132), (128, 3)])
@pytest.mark.parametrize("sizes", [(0, 0, 0), (5, 0, 300), (256, 1, 127), (0, 700, 0)], ids=str)
def test_items_cover_every_row_and_band_once(sizes, rest, unit, programs):
    M, rows, bands = 700, 128 * (1 + (unit > 64)), 3
    items, count = items_of(jnp.array(sizes, jnp.int32), M, rows, bands, 2, rest, unit, programs)
    seen = np.zeros((M, bands), int)
    group_of_row = np.repeat(np.arange(4), [*sizes, M - sum(sizes)])
    listed = np.asarray(items).reshape(-1, 4)
    assert count <= len(listed)
    for group, start, length, band in listed[:int(count)]:
        assert 0 < length <= rows
        assert (group_of_row[start:start + length] == group).all()
        seen[start:start + length, band] += 1
    own = listed[:int(count)]
    for group in set(own[:, 0]):
        # But for what its last tile lacks of whole units.
        units = -(-own[own[:, 0] == group][:, 2] // unit)
        assert units.max() - units.min() <= 1
    total = M if rest else sum(sizes)
    assert (seen[:total] == 1).all() and not seen[total:].any()


def test_programs_take_long_tiles_and_short_ones_in_turn():
    """192 and 128 rows alternate in the list; of two programs neither gets all of one kind."""
    items, count = items_of(jnp.array([320], jnp.int32), 320, 256, 6, 4, False, 64, 2)
    heights = np.asarray(items).reshape(-1, 4)[:int(count), 2]
    assert list(heights[::2]) == [192, 128] * 3 and list(heights[1::2]) == [128, 192] * 3


@pytest.mark.parametrize("dtype, F, config, message", [
    ("float32", 256, {}, "takes bfloat16; got x of float32"),
    ("bfloat16", 200, {}, "It takes multiples of"),
    ("bfloat16", 256, {"stages": 1}, "does not fit: rows are"),
    ("bfloat16", 256, {"rows": 256, "columns": 256}, "does not fit: rows are"),
], ids=str)
def test_what_the_kernel_does_not_take_is_refused(dtype, F, config, message):
    x, w = jnp.zeros((64, 64), dtype), jnp.zeros((1, 64, F), dtype)
    with pytest.raises(ValueError, match=message):
        mosaic_gpu_kernel.grouped_matmul(x, w, jnp.array([64]),
                                         config=mosaic_gpu_kernel.Config(**config))


def test_another_platform_is_refused():
    x, w = jnp.zeros((64, 64), jnp.bfloat16), jnp.zeros((1, 64, 256), jnp.bfloat16)
    with pytest.raises(ValueError, match="'hopper' runs on an NVIDIA GPU"):
        grouped_matmul(x, w, jnp.array([64]), implementation="hopper")

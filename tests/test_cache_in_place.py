"""A step's programs hold no copy of a layer's cache, for devices that are not here.

Of states decode steps hold none (on a Hopper GPU where jax is 0.11 or newer); a prompt's chunks cut
a layer's out.

Run as a module it compiles for the pods with their meshes that are its arguments, as in
`v6e:2x2/expert=2,tensor=2`, and prints what it finds.
"""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx import cache as caches
from mmx import model
from pallas_kernels.lightning_attention import mosaic_gpu_decode
from tests import tiny

ROOT = Path(__file__).parent.parent
# Four repeats of a scan; heads as wide as the kernels want them.
CONFIG = tiny.config(8, softmax_every=2, num_heads=8, head_dim=128, rotary_dim=64,
                     hidden_size=256, expert_dim=128)
BATCH, CONTEXT = 8, 65_536
TPUS = ["v5p:2x2x1/expert=2,tensor=2", "v6e:2x2/sequence=2,tensor=2"]
GPUS = ["h200:1x2/tensor=2", "h200:1x2/sequence=2"]


def test_temporaries_do_not_grow_with_what_a_cache_holds():
    """Nor with a layer of it."""
    def temporaries(context):
        params = {path: spec.abstract for path, spec in model.param_specs(CONFIG).items()}
        cache = caches.cache_shapes(CONFIG, 2, context, "float32")
        ids, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((2, 1), (2,)))
        step = jax.jit(partial(model.step, CONFIG), donate_argnums=1)
        return step.lower(params, cache, ids, lengths).compile().memory_analysis()

    small, large = (temporaries(context) for context in (4096, 8192))
    held = caches.cache_bytes(CONFIG, 2, 8192, "float32")
    assert large.alias_size_in_bytes >= held
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < held // 100


@pytest.mark.parametrize("stride", [1, 2])
def test_tokens_are_written_into_the_stack(stride):
    from mmx.parallel.ops import write_rows
    from pallas_kernels.grouped_matmul.stacked import Stacked

    random = np.random.default_rng(0)
    whole = jnp.asarray(random.standard_normal((3, 2, 4, 16, 8)), jnp.float32)
    x = jnp.asarray(random.standard_normal((2, 5, 4, 8)), jnp.float32)
    offsets, lengths = jnp.array([3, 9]), jnp.array([5, 2])
    got = jax.jit(lambda whole, r: write_rows(
        Stacked(whole, r), x, offsets, lengths, stride, stride - 1))(whole, 1)
    alone = write_rows(whole[1], x, offsets, lengths, stride, stride - 1)
    assert not np.array_equal(alone, whole[1])
    np.testing.assert_array_equal(got.whole, np.stack([whole[0], alone, whole[2]]))


@pytest.fixture(scope="module")
def compiled():
    def of(pods):
        # Programs for devices that are not here cannot be loaded from the cache of compiled ones.
        env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
        done = subprocess.run([sys.executable, "-m", "tests.test_cache_in_place", *pods], cwd=ROOT,
                              env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                              timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return of


def check(found, pods):
    assert list(found) == pods
    for pod, modes in found.items():
        for mode, one in modes.items():
            assert one["made"] == [], (pod, mode)
            if mode == "decode" and (pod in TPUS or mosaic_gpu_decode.AVAILABLE):
                assert one["states"] == [], pod
            assert one["written"] == 2, (pod, mode)
            assert one["growth"] < one["layer"] // 8, (pod, mode)
            # What cuDNN, which is not in these programs, gets cut out: all but a decode step's keys
            # that no two devices share.
            cuts = pod in GPUS and (mode != "decode" or "sequence" in pod)
            cut = 2 * one["layer"] if cuts else 0
            assert cut <= one["besides"] < cut + one["layer"] // 2, (pod, mode)


@pytest.mark.tpu_aot
def test_no_copy_of_a_layers_cache_on_tpu(compiled):
    check(compiled(TPUS), TPUS)


@pytest.mark.gpu_aot
def test_no_copy_of_a_layers_cache_on_gpu(compiled):
    check(compiled(GPUS), GPUS)


def main(arguments):
    from mmx.plan import topology

    topology.prepare_environment()
    from mmx.plan import programs
    from mmx.plan.pods import parse_pod

    report = {}
    for argument in arguments:
        pod, _, axes = argument.partition("/")
        mesh = topology.make_mesh(parse_pod(pod), {
            name: int(size) for name, _, size in (part.partition("=") for part in axes.split(","))})
        report[argument] = {}
        for mode in ("decode", "prefill"):
            def step(context, mode=mode, mesh=mesh):
                return programs.compile_step(programs.Job(
                    CONFIG, mode=mode, batch=BATCH, context=context, chunk=256), mesh)

            (half, _), (program, memory) = step(CONTEXT // 2), step(CONTEXT)
            small, large = (one.memory_analysis().temp_size_in_bytes for one in (half, program))
            layer = memory.keys_values // 8  # of keys, or of values
            made, written, states = [], 0, []
            for line in program.as_text().splitlines():
                held = re.match(r" +(?:ROOT )?%\S+ = \(?f32\[([\d,]*),128,128\]\S* (copy|copy-start"
                                r"|fusion|dynamic-slice|dynamic-update-slice)\(", line)
                if held:
                    states.append(line[:200])
                found = re.match(r" +(?:ROOT )?%(\S+) = bf16\[([\d,]+)\]\S* (copy|copy-start|fusion"
                                 r"|dynamic-slice|dynamic-update-slice|transpose)\(", line)
                if found and 2 * np.prod([int(n) for n in found[2].split(",")]) >= layer:
                    if "scatter" in found[1]:
                        written += 1
                    else:
                        made.append(line[:200])
            report[argument][mode] = {"made": made, "written": written, "layer": layer,
                                      "states": states, "growth": large - small,
                                      "besides": memory.temporaries - large}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1:])

"""Steps of int8 models on Hopper GPUs as plans compile them: matrices turned, copies counted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = r"""
import dataclasses, json, sys
from mmx.plan import topology
topology.prepare_environment()
from mmx.config import preset
from mmx.plan.pods import parse_pod
from mmx.plan import hlo
from mmx.plan.programs import Job, compile_step
from mmx.sharding.mesh import parse_axes

# Two repeats of two layers, as a scan, at the released widths.
config = preset("period").replace(layer_types=("lightning", "softmax") * 2)
found = {}
for case in sys.argv[1:]:
    pod, axes, mode, size, how = case.split("/")
    rows, chunk = (1, int(size)) if mode == "prefill" else (int(size), 1)
    job = Job(config, mode, rows, max(chunk, 1024), chunk, quantize="int8",
              turned=None if how == "turned" else False)
    program, memory = compile_step(job, topology.make_mesh(parse_pod(pod), parse_axes(axes)))
    text = program.as_text()
    found[case] = dataclasses.asdict(memory) | {
        "bytes": hlo.bytes_accessed(text), "kernels": dict(hlo.kernels(text))}
print(json.dumps(found))
"""
CASES = [f"h200:1x1/data=1/{step}/{how}" for how in ("turned", "plain")
         for step in ("decode/1", "decode/64", "prefill/16384")]
CASES += [f"h200:1x2/{mesh}/decode/64/{how}" for mesh in ("tensor=2", "expert=2")
          for how in ("turned", "plain")]
MATRIX = 32 * 6144 * 9216 * 2  # one of every expert's three, in bfloat16


@pytest.fixture(scope="module")
def steps():
    env = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-c", WORKER, *CASES], cwd=ROOT, text=True,
                          env=env | {"PYTHONPATH": str(ROOT)}, capture_output=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", CASES)
def test_what_is_turned_meets_the_kernel_for_integers(steps, case):
    kernels = steps[case]["kernels"]
    products = kernels.get("int8_product", 0)
    if case.endswith("plain") or "prefill" in case:
        assert not products, kernels
    else:
        # Two of a layer's experts, and attention's: 3 of a lightning layer, else 4.
        assert products == 4 * 2 + 2 * 3 + 2 * 4, kernels


@pytest.mark.gpu_aot
@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("turned")])
def test_turned_weights_cost_no_copies(steps, case):
    turned, plain = steps[case], steps[case.replace("turned", "plain")]
    assert turned["weights"] == plain["weights"]
    assert turned["bytes"] < 1.03 * plain["bytes"]
    if "prefill" in case:
        # Gate and up of every expert are cast together (plain ones, one after the other), which
        # leaves a little more than half a matrix for activations.
        assert turned["temporaries"] < min(2.7 * MATRIX, plain["temporaries"] + MATRIX)
    else:
        # Rows in two parts, and sums that the product leaves in float32.
        assert turned["temporaries"] < 1.01 * plain["temporaries"] + (128 << 20)

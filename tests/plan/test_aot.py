"""The real compilers, without their hardware: a small sharded scan, and what is read from it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plan.test_live import LAYERS

ROOT = Path(__file__).parent.parent.parent
ROWS, WIDTH = 256, 1024
TPUS = ["v5e:2x2/expert=2,tensor=2", "v6e:4x4/expert=4,tensor=4",
        "2*v6e:2x4/slice=2,expert=2,tensor=4", "tpu7x:2x2x1/expert=2,tensor=4",
        "v5p:4x4x4/expert=8,tensor=8", "v4:2x2x2/expert=2,tensor=4"]
GPUS = ["h200:1x8/expert=2,tensor=4", "h200:2x8/slice=2,expert=2,tensor=4"]


def compile_all(pods):
    # Programs for devices that are not here cannot be loaded from the cache of compiled ones.
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-m", "tests.plan.aot_worker", *pods], cwd=ROOT,
                          env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tpu():
    return compile_all(TPUS)


@pytest.fixture(scope="module")
def gpu():
    return compile_all(GPUS)


def check(found, most):
    axes = found["axes"]
    expert, tensor = axes["expert"], axes["tensor"]
    assert found["devices"] == expert * tensor * axes.get("slice", 1)
    rows = ROWS // expert
    # What the program says: per layer a sum over tensor, a gather, two exchanges and one step of a
    # ring over expert and tensor; the bytes are those of the arrays on a device.
    shard = 2 * rows * WIDTH
    assert found["counts"] == {
        "all-reduce tensor": [LAYERS, shard],
        "all-gather expert": [LAYERS, 2 * WIDTH * WIDTH],
        "all-to-all expert": [2 * LAYERS, shard],
        "collective-permute tensor": [LAYERS, shard]}
    products = 2 * 4 * WIDTH // tensor + WIDTH
    assert found["flops"] == LAYERS * 2 * rows * WIDTH * products
    assert found["open"] == {}
    weights = LAYERS * WIDTH * (2 * 4 * WIDTH // tensor + WIDTH // expert) * 2
    assert weights + shard <= found["argument_bytes"] <= 1.02 * (weights + shard)
    # A TPU may keep all that is temporary on the chip.
    assert 0 <= found["temp_bytes"] < 2**24
    assert found["argument_bytes"] < found["peak_bytes"] < found["argument_bytes"] + 2**26
    # Weights are read at least once a step; how much else leaves the chip is the compiler's.
    assert weights < found["bytes"] < most * weights
    assert found["bound"] in ("compute", "memory", "network") and 0 < found["step"] < 1


@pytest.mark.tpu_aot
@pytest.mark.parametrize("pod", TPUS)
def test_tpu(tpu, pod):
    # These keep all but the weights on the chip.
    check(tpu[pod], 1.1 if pod.startswith(("v4", "v5e", "v6e")) else 4)


@pytest.mark.gpu_aot
@pytest.mark.parametrize("pod", GPUS)
def test_gpu(gpu, pod):
    check(gpu[pod], 12)

"""A lightning layer over two H200s and four v6e chips, as the real compilers make it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
STATE = 64 * 128 * 128 * 4  # of one row and piece
SHORT, LONG = 16384, 32768


def compile_layer(pod, devices):
    cases = [f"{pod}/{tokens}/{what}" for what, tokens in (
        ("forward", SHORT), ("forward", LONG), ("gradient", SHORT), ("gradient", LONG))]
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-m", "tests.parallel.sequence_aot_worker", *cases],
                          cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return [found[case] for case in cases], devices


@pytest.fixture(scope="module")
def tpu():
    return compile_layer("v6e:2x2", 4)


@pytest.fixture(scope="module")
def gpu():
    return compile_layer("h200:1x2", 2)


def check_traffic(compiled):
    """One gather of states, for gradients one reduce-scatter more, at any length."""
    (short, long, short_grad, long_grad), devices = compiled
    assert short["collectives"] == long["collectives"] == [
        ["all-gather", devices * STATE, 1]]
    assert short_grad["collectives"] == long_grad["collectives"]
    # The rest are the sums of the weights' gradients.
    assert [entry for entry in long_grad["collectives"] if entry[0] != "all-reduce"] == [
        ["all-gather", devices * STATE, 1], ["reduce-scatter", devices * STATE, 1]]


def check_products(compiled):
    """Nothing but the kernels and the layer's bfloat16 products: none in float32."""
    (short, long, _, _), _ = compiled
    assert set(long["flops"]) == {"bf16", "kernel"}
    assert long["flops"]["kernel"] == pytest.approx(2 * short["flops"]["kernel"], rel=0.01)


@pytest.mark.tpu_aot
def test_tpu(tpu):
    check_traffic(tpu)
    check_products(tpu)
    for layer in tpu[0][:2]:  # the gate's product hides the gather
        assert any("btd,dnh->btnh" in line for line in layer["behind"]), layer["behind"]


@pytest.mark.gpu_aot
def test_gpu(gpu):
    check_traffic(gpu)
    check_products(gpu)

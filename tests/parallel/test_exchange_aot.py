"""Experts' exchange at the model's size by the real compilers: it compiles, and sends no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
TOKENS, D, K = 4096, 6144, 2
BYTES = TOKENS * D * 2  # of a device's tokens
WAYS = ("sum", "all_to_all/rows=all", "ragged/rows=all", "ragged/rows=part")
POD = f"v6e:4x8/expert=8,tensor=4/{TOKENS}/dispatch="
GROUPS = POD.replace(str(TOKENS), "16384") + "ragged/rows=all/groups=2"
TRAIN = POD + "ragged/train/capacity=1.25"
V5E = "v5e:8x8/expert=8,tensor=8/1024/groups=1"
GPU = f"h200:1x8/expert=4,tensor=2/{TOKENS}/dispatch=ragged/rows=all"


def compile_all(cases):
    # Programs for devices that are not here cannot be loaded from the cache of compiled ones.
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.exchange_aot_worker", *cases], cwd=ROOT,
        env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def tpu():
    return compile_all([*(POD + way for way in WAYS), GROUPS, TRAIN, V5E])


def close(sent, bytes):
    return 0.98 * bytes < sent < 1.05 * bytes


@pytest.mark.tpu_aot
def test_a_ragged_exchange_sends_what_there_is(tpu):
    """There and back: k rows a token; padded twice that; in part, a quarter of them."""
    padded, whole, part = (tpu[POD + way]["sent"] for way in WAYS[1:])
    share = 2 * K * BYTES * 7 / 8
    assert close(padded["all-to-all expert"], 2 * share)
    assert close(whole["ragged-all-to-all expert"], share)
    assert close(part["ragged-all-to-all expert"], share / 4)


@pytest.mark.tpu_aot
def test_the_choice_for_a_long_axis_takes_least(tpu):
    *others, whole, part = (tpu[POD + way]["network_s"] for way in WAYS)
    assert part < whole < min(others)


@pytest.mark.tpu_aot
def test_a_group_travels_while_another_is_computed(tpu):
    """Of two groups' ways there and back, the second way there and the first back."""
    flights = tpu[GROUPS]["flights"]
    assert len(flights) == 4 and sum(products > 0 for _, products in flights) == 2


@pytest.mark.tpu_aot
def test_training_with_capacity_compiles(tpu):
    found = tpu[TRAIN]
    # There and back, forward and backward.
    assert close(found["sent"]["ragged-all-to-all expert"], 4 * K * BYTES * 7 / 8 / 4)


@pytest.mark.tpu_aot
def test_the_choice_compiles_where_the_ragged_form_does_not(tpu):
    assert set(tpu[V5E]["sent"]) >= {"all-to-all expert"}
    assert not any("ragged" in name for name in tpu[V5E]["sent"])


@pytest.mark.gpu_aot
def test_a_gpu_has_the_ragged_form():
    found = compile_all([GPU])[GPU]
    assert close(found["sent"]["ragged-all-to-all expert"], 2 * K * BYTES * 3 / 4)

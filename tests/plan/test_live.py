"""Programs compiled here for eight simulated devices: what is known of them is read from them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAYERS, ROWS, WIDTH, EXPERT, TENSOR = 5, 16, 64, 2, 4
SHARD = 4 * ROWS * WIDTH // (EXPERT * TENSOR)  # bytes of the carried array on a device


@pytest.fixture(scope="module")
def report():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
           "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, "-m", "tests.plan.cpu_worker"], cwd=ROOT, env=env,
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


# name -> axes, bytes, devices of a group, distance
EXCHANGES = {
    "all-reduce": (["tensor"], SHARD, 4, 0),
    "all-reduce both": (["expert", "tensor"], SHARD, 8, 0),
    "all-gather": (["tensor"], 4 * SHARD, 4, 0),
    "reduce-scatter": (["tensor"], 4 * SHARD, 4, 0),
    "all-to-all": (["expert"], SHARD, 2, 0),
    "collective-permute": (["tensor"], SHARD, 4, 1),
    "collective-permute 2": (["tensor"], SHARD, 4, 2),
}


@pytest.mark.multidevice
@pytest.mark.parametrize("name", EXCHANGES)
def test_an_exchange_in_a_scan_counts_as_often_as_it_runs(report, name):
    axes, size, group, shift = EXCHANGES[name]
    kind = name.split()[0]
    assert report[name]["collectives"] == [
        {"kind": kind, "axes": axes, "bytes": size, "count": LAYERS, "group": group,
         "shift": shift}]
    assert report[name]["open"] == {}
    assert report[name]["network"] > 0


@pytest.mark.multidevice
@pytest.mark.parametrize("name, count", [("once", 1), ("nested", 12)])
def test_an_exchange_outside_and_in_nested_scans(report, name, count):
    assert [one["count"] for one in report[name]["collectives"]] == [count]


@pytest.mark.multidevice
def test_a_loop_of_unknown_length_is_named(report):
    assert list(report["search"]["open"].values()) == [1]
    assert {one["count"] for one in report["search"]["collectives"]} == {1}


@pytest.mark.multidevice
def test_a_sharded_stack_of_layers(report):
    """Width over tensor: one sum per layer over it; products on a device are a share of all."""
    found = report["layers"]
    assert [(one["kind"], one["axes"], one["count"], one["bytes"])
            for one in found["collectives"]] == [
                ("all-reduce", ["tensor"], LAYERS, 4 * ROWS * WIDTH // EXPERT)]
    assert found["flops"] == LAYERS * 2 * 2 * ROWS * WIDTH * 4 * WIDTH / (EXPERT * TENSOR)


@pytest.mark.multidevice
def test_stacked_weights_are_read_once(report):
    whole = LAYERS * 2 * 512 * 512 * 4
    assert report["weights"]["flops"] == LAYERS * 2 * 2 * 8 * 512 * 512
    assert whole < report["weights"]["bytes"] < 3.5 * whole
    assert report["weights"]["collectives"] == [] and report["weights"]["network"] == 0


@pytest.mark.multidevice
def test_the_heavier_branch_counts(report):
    assert report["branches"]["flops"] == 2 * 2 * 32 * 64 * 64

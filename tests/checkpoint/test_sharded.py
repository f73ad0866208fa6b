"""Two processes of four devices: each reads only the byte ranges that its devices need."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    config = tiny.config(2, 2, num_experts=8)
    checkpoint = tiny.write_checkpoint(folder / "in", config, shards=3)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    workers = [subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint.sharded_worker", str(i), str(port),
         str(checkpoint), str(folder)], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE) for i in range(2)]
    outputs = []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=240)
            assert worker.returncode == 0, err[-3000:]
            outputs.append(json.loads(out.splitlines()[-1]))
    finally:
        for worker in workers:
            worker.kill()
    return config, outputs


CASES = [f"{rules} {how}" for rules in ("rows", "columns")
         for how in ("None", "int8", "int8 turned")]


@pytest.mark.multidevice
@pytest.mark.parametrize("case", CASES)
def test_every_shard_holds_its_values(reports, case):
    _, outputs = reports
    assert all(report[case]["same"] and report[case]["placed"] for report in outputs)


@pytest.mark.multidevice
@pytest.mark.parametrize("case", CASES)
def test_each_process_reads_exactly_what_it_needs(reports, case):
    _, outputs = reports
    for report in outputs:
        assert report[case]["read"] == report[case]["wanted"]


@pytest.mark.multidevice
def test_two_processes_share_the_reading(reports):
    config, outputs = reports
    whole = 4 * sum(x.size for x in tiny.tensors(config).values())
    # Experts are split over the processes, and they are most of the bytes.
    assert all(report["rows None"]["read"] < 0.8 * whole for report in outputs)


@pytest.mark.multidevice
def test_orbax_and_export_from_two_processes(reports):
    _, outputs = reports
    for report in outputs:
        assert report["orbax"] == {"same": True, "tree": True}
        assert report["export"] == {"same": True}


@pytest.mark.multidevice
def test_orbax_reads_a_processs_own_bytes(reports):
    """Half of a checkpoint each, beside orbax's own notes; all of it where all devices want it."""
    _, outputs = reports
    shares = [report["orbax bytes"] for report in outputs]
    assert all(0.5 <= share["own"] < 0.55 and share["all"] >= 0.99 for share in shares), shares

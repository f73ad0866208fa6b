"""A decode step over a mesh sends rows, never a table of all words (read from the program)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = r"""
import json, re, sys
import jax
from mmx.bench.sides import Side
from mmx.bench.whole import Job
from mmx.config import preset
from mmx.sharding.mesh import parse_mesh

found = {}
for mesh in sys.argv[1:]:
    side = Side(preset("nano"), parse_mesh(mesh), "float32")
    def compiled(program, *arguments):
        text = program.lower(side.shapes, *arguments).compile().as_text()
        found[mesh] = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)
        return None, {}
    side._compiled = compiled
    side.compile(Job("decode", 4, 64))
print(json.dumps([side.config.vocab_size, side.config.hidden_size, found]))
"""


@pytest.mark.multidevice
def test_decode_gathers_logits_and_not_the_head():
    done = subprocess.run(
        [sys.executable, "-c", WORKER, "expert=2", "tensor=2"], cwd=ROOT, capture_output=True,
        text=True, timeout=240, env={
            **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    assert done.returncode == 0, done.stderr[-2000:]
    vocab, hidden, found = json.loads(done.stdout.splitlines()[-1])
    for mesh, gathered in found.items():
        assert f"4,{vocab}" in gathered, mesh
        assert f"{vocab},{hidden}" not in gathered, mesh


@pytest.mark.gpu_aot
def test_one_row_gathers_neither_table():
    """One id and one row of logits: what XLA for GPUs would make a slice and a vector product."""
    done = subprocess.run(
        [sys.executable, "-m", "mmx", "plan", "--model=period", "--pod=h200:1x2", "--mesh=tensor=2",
         "--batch=1", "--context=2048", "--json"], cwd=ROOT, capture_output=True, text=True,
        timeout=300, env={name: value for name, value in os.environ.items()
                          if not name.startswith("JAX_")} | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    # A row of logits is 0.8 MB, a table 2.5 GB.
    assert max(one["bytes"] for one in found["collectives"]) < 1 << 20
    assert found["bytes_per_device"]["temporaries"] < 1 << 28

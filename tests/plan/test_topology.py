"""Meshes over pods: what is refused before any compiler is asked, and what a missing one says."""

import configparser
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmx.errors import UserError
from mmx.plan import topology
from mmx.plan.pods import parse_pod

ROOT = Path(__file__).parent.parent.parent


def test_axes_come_in_their_order():
    axes = topology.check_axes(parse_pod("2*v6e:4x4"), {"tensor": 4, "slice": 2, "expert": 4})
    assert list(axes.items()) == [("slice", 2), ("expert", 4), ("tensor", 4)]


@pytest.mark.parametrize("pod, axes", [
    ("2*v6e:4x4", {"data": 2, "tensor": 16}), ("h200:2x8", {"slice": 2, "tensor": 8}),
    ("h200:4x8", {"slice": 2, "tensor": 16}), ("h200:2x8", {"tensor": 16}),
    ("v5e:1x1", {"tensor": 1}),
], ids=str)
def test_axes_that_fit(pod, axes):
    assert topology.check_axes(parse_pod(pod), axes) == axes


@pytest.mark.parametrize("pod, axes, part", [
    ("v6e:4x8", {"expert": 4, "tensor": 4}, "has 16 devices"),
    ("v6e:4x8", {}, "v6e:4x8 has 32"),
    ("v6e:4x8", {"model": 32}, "'model=32' is unknown"),
    ("v6e:4x8", {"expert": 0, "tensor": 32}, "'expert=0'"),
    ("v6e:4x8", {"slice": 2, "tensor": 16}, "Leave the axis 'slice' out"),
    ("4*v6e:2x2", {"slice": 2, "tensor": 8}, "Write slice=4"),
    ("2*v6e:4x4", {"expert": 1, "tensor": 32}, "Begin with slice=2"),
    ("h200:2x8", {"slice": 4, "tensor": 4}, "2 hosts"),
], ids=str)
def test_axes_that_do_not_fit(pod, axes, part):
    with pytest.raises(UserError) as refusal:
        topology.check_axes(parse_pod(pod), axes)
    assert part in str(refusal.value)


@pytest.mark.parametrize("pod, extra", [("v5e:2x2", "plan-tpu"), ("h200:1x8", "plan-gpu")])
def test_a_missing_compiler_names_its_extra(monkeypatch, pod, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as refusal:
        topology.devices(parse_pod(pod))
    assert f"pip install -e '.[{extra}]' in the clone" in str(refusal.value)


def test_what_the_compiler_is_told_of_a_gpu_is_packaged():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "plan/*.textproto" in setup["options.package_data"]["mmx"]
    assert {"plan-tpu", "plan-gpu"} <= set(setup["options.extras_require"])
    assert "NVIDIA H200" in (ROOT / "mmx" / "plan" / "h200.textproto").read_text()


def test_the_environment_can_be_set_first():
    code = ("import sys, mmx.plan.topology, mmx.plan.hlo, mmx.plan.roofline\n"
            "sys.exit('jax' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_environment_is_set_before_jax(monkeypatch):
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES",
                 "TPU_WORKER_ID", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(name, "kept")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    topology.prepare_environment()
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    assert os.environ["TPU_SKIP_MDS_QUERY"] == os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "1"
    assert os.environ["TPU_ACCELERATOR_TYPE"] == "kept"

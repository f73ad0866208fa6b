"""launch/env.sh: what it sets, and that the compilers know every flag of it."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from tests.launch.launchers import LAUNCH, environment, launch

PLATFORMS = ["v5e", "v5p", "v6e", "tpu7x", "cuda", "cpu"]
TOPOLOGY = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def variables(platform, **env):
    code, out, err = launch("env.sh", platform, "--list", env=env)
    assert code == 0 and not err
    return dict(line.split("=", 1) for line in out.splitlines())


@pytest.mark.parametrize("platform", PLATFORMS)
def test_listed_shown_and_set_are_the_same(platform):
    env = {"MMX_SHARED": "/mnt/a b/", "MMX_SLICES": "2", "MMX_CPU_DEVICES": "4"}
    listed = variables(platform, **env)
    assert listed["JAX_COMPILATION_CACHE_DIR"] == "/mnt/a b/compiled"
    assert listed["JAX_PLATFORMS"].startswith({"cuda": "cuda", "cpu": "cpu"}.get(platform, "tpu"))
    _, shown, _ = launch("env.sh", platform, "--dry-run", env=env)
    assert dict(shlex.split(line)[1].split("=", 1) for line in shown.splitlines()) == listed
    # Under the strict settings of a caller, and twice: flags do not pile up.
    code = f"set -euo pipefail; . {LAUNCH}/env.sh {platform}; . {LAUNCH}/env.sh {platform}; env -0"
    done = subprocess.run(["bash", "-c", code], env=environment(**env), capture_output=True,
                          text=True, check=True)
    assert {name: value for name, value in
            (entry.split("=", 1) for entry in done.stdout.split("\0") if entry)
            if name in listed} == listed


def test_what_is_set_already_wins():
    mine = {"XLA_FLAGS": "--xla_dump_to=/tmp/x", "NCCL_DEBUG": "INFO",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    found = variables("cuda", **mine)
    assert found["NCCL_DEBUG"] == "INFO" and found["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
    assert found["XLA_FLAGS"].endswith(" --xla_dump_to=/tmp/x")


@pytest.mark.parametrize("name", ["MMX_SLICES", "MMX_CPU_DEVICES"])
def test_numbers_are_checked(name):
    code, _, err = launch("env.sh", "cpu", env={name: "two"})
    assert code == 2 and name in err


def test_a_refusal_does_not_end_the_shell_that_sources_it():
    done = subprocess.run(["bash", "-c", f". {LAUNCH}/env.sh nope; echo code $?"],
                          env=environment(), capture_output=True, text=True)
    assert done.stdout == "code 2\n" and "'nope'" in done.stderr


def test_every_flag_has_a_reason():
    lines = (LAUNCH / "env.sh").read_text().splitlines()
    for number, line in enumerate(lines):
        if re.search(r"^ *(flags\+=\(|_mmx_set [A-Z])", line):
            assert lines[number - 1].lstrip().startswith("#"), line


def _xla(flags, code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env=environment(JAX_PLATFORMS="cpu", XLA_FLAGS=flags))


def test_xla_knows_the_flags():
    """jaxlib ends the process at the first flag that it does not know, whatever the platform."""
    flags = [variables(platform, MMX_CPU_DEVICES="4")["XLA_FLAGS"] for platform in ("cuda", "cpu")]
    done = _xla(" ".join(flags), "import jax; print(len(jax.devices()))")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "4\n"


def test_xla_refuses_a_flag_that_is_none():
    done = _xla("--xla_gpu_enable_wings=true", "from jaxlib import _jax; _jax.CompileOptions()")
    assert done.returncode != 0 and "xla_gpu_enable_wings" in done.stderr


_COMPILE = """
import sys
import jax, numpy as np
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
mesh = Mesh(np.array(devices), ("x",))
spread = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P("x")))
jax.jit(lambda a, b: a @ b).lower(spread, spread).compile()
"""


def _libtpu(flags, topology):
    return subprocess.run(
        [sys.executable, "-c", _COMPILE, topology], capture_output=True, text=True, timeout=300,
        env=environment(JAX_PLATFORMS="cpu", LIBTPU_INIT_ARGS=flags, TPU_SKIP_MDS_QUERY="1",
                        ALLOW_MULTIPLE_LIBTPU_LOAD="1", HOME=os.environ.get("HOME", "/")))


@pytest.mark.tpu_aot
@pytest.mark.parametrize("platform", TOPOLOGY)
def test_libtpu_knows_the_flags(platform):
    flags = variables(platform, MMX_SLICES="2")["LIBTPU_INIT_ARGS"]
    done = _libtpu(flags, TOPOLOGY[platform])
    assert done.returncode == 0, done.stderr


@pytest.mark.tpu_aot
def test_libtpu_refuses_a_flag_that_is_none():
    done = _libtpu("--xla_tpu_enable_wings=true", "v6e:2x2")
    assert done.returncode != 0 and "xla_tpu_enable_wings" in done.stderr + done.stdout

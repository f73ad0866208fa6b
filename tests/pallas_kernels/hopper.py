"""What tests of Hopper kernels share: workers in their own processes, an H200 that is not there."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def work(worker: str, what: str, cases, timeout: int = 600, **environment) -> str:
    """What the worker of that name prints for `what` ("interpret" or "compile") and the cases."""
    # The persistent cache cannot reload what was compiled for a machine that is not there.
    env = {key: value for key, value in os.environ.items()
           if what == "interpret" or not key.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.pallas_kernels.{worker}", what, *cases],
        cwd=ROOT, env={**env, "PYTHONPATH": str(ROOT), **environment}, capture_output=True,
        text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def h200():
    """A mesh of one H200 for the compiler, and `array(shape, dtype)` that lies on it."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from mmx.plan import topology
    from mmx.plan.pods import parse_pod

    mesh = jax.sharding.Mesh(np.array(topology.devices(parse_pod("h200:1x1"))), ("x",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=everywhere)

    return mesh, array

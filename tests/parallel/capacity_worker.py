"""Shares of pairs dropped by global and by local routers over eight simulated devices, as JSON.

Fails where a global router keeps other pairs than one device.
"""

import json
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from mmx.parallel.mesh_ops import MeshOps
from mmx.parallel.ops import Ops
from mmx.sharding.mesh import parse_mesh
from mmx.sharding.rules import TRAIN

E, B, T = 8, 8, 32
MESHES = ("data=2,expert=4", "data=4,sequence=2", "expert=2,sequence=4", "sequence=8")


def main():
    random = np.random.default_rng(0)
    # Row b wants expert b for half of its pairs; lengths are uneven.
    expert = np.where(random.uniform(size=(B, T, 2)) < 0.5, np.arange(B)[:, None, None],
                      random.integers(0, E, (B, T, 2))).astype(np.int32)
    valid = np.arange(T) < random.integers(T // 2, T + 1, B)[:, None]
    report = {}
    for factor in (0.75, 1.0, 1.25):
        def dropped(ops, valid, factor=factor):
            kept = np.asarray(jax.jit(lambda expert, valid: ops.within_capacity(
                expert, valid, E, factor))(expert, valid))
            seen = np.broadcast_to(True if valid is None else valid[..., None], kept.shape)
            return kept, float((~kept & seen).sum() / seen.sum())

        for name, some in (("even", None), ("uneven", valid)):
            kept, share = dropped(Ops(), some)
            for text in MESHES:
                got, _ = dropped(MeshOps(parse_mesh(text), TRAIN), some)
                np.testing.assert_array_equal(got, kept, err_msg=text)
            local = MeshOps(parse_mesh(MESHES[0]), TRAIN, {"router": "local"})
            report[f"{name} {factor}"] = {"global": share, "local": dropped(local, some)[1]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()

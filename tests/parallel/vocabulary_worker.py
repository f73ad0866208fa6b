"""A vocabulary that divides over no axis, on eight simulated devices; prints JSON."""

import dataclasses
import json
import math
import tempfile
from pathlib import Path

from tests.parallel import regimes_worker as regimes  # first: it sets the devices

import jax  # isort: skip
import numpy as np

from mmx import model, quant
from mmx.checkpoint import load_params, orbax_io, save_hf
from mmx.parallel.mesh_ops import MeshOps
from mmx.sharding.mesh import parse_mesh
from mmx.sharding.rules import REGIMES, param_shardings
from tests.tolerances import peak_ratio

TABLES = ("embed/weight", "head/weight")
CASES = (("expert=2,tensor=4", "decode", True), ("data=2,expert=2,tensor=2", "train", False))
WORDS = 91  # odd

regimes.CONFIG = dataclasses.replace(regimes.CONFIG, vocab_size=WORDS)
regimes.PARAMS = {path: leaf[:WORDS] if path in TABLES else leaf
                  for path, leaf in regimes.PARAMS.items()}


def main():
    config, report = regimes.CONFIG, {"errors": {}, "parts": {}, "bytes_kept": {}}
    for text, regime, int8 in CASES:
        given = quant.quantize_params(regimes.PARAMS) if int8 else regimes.PARAMS
        mesh, rules = parse_mesh(text), REGIMES[regime]
        ops, lying = MeshOps(mesh, rules), regimes.place(given, mesh, rules)
        if regime == "train":
            got, wanted = regimes.train(lying, ops=ops), regimes.train(given)
        else:
            got, wanted = regimes.serve(lying, 4, ops), regimes.serve(given, 4)
        assert all(a.shape == b.shape for a, b in zip(got, wanted, strict=True))
        report["errors"][f"{text}/{regime}"] = max(
            peak_ratio(a, b) for a, b in zip(got, wanted, strict=True))
        report["parts"][f"{text}/{regime}"] = [
            math.prod(leaf.shape) / math.prod(leaf.sharding.shard_shape(leaf.shape))
            for leaf in (jax.tree.leaves(lying[path])[0] for path in TABLES)]
    # The last mesh's parameters through both kinds of checkpoint: to one device, and back.
    shardings = param_shardings(model.param_specs(config, "float32"), mesh, rules)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "orbax"), Path(folder, "hf")
        orbax_io.save_model(ours, config, lying)
        save_hf(theirs, config, lying, dtype="float32")
        for name, path in (("orbax", ours), ("hf", theirs)):
            for where, lie in (("one", None), ("mesh", lambda config: shardings)):
                _, found = load_params(path, dtype="float32", shardings=lie)
                report["bytes_kept"][f"{name}/{where}"] = all(
                    np.array_equal(found[key], leaf) for key, leaf in regimes.PARAMS.items())
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""One of two processes with four devices each that load the same checkpoint onto one mesh.

    python -m tests.checkpoint.sharded_worker INDEX PORT CHECKPOINT SHARED_FOLDER

Prints JSON: bytes read with each set of rules, and what was compared.
"""

import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402

from mmx.checkpoint import hf_files, load_config, load_params, orbax_io, save_hf  # noqa: E402
from mmx.checkpoint.hf_import import import_params  # noqa: E402
from mmx.checkpoint.hf_source import HfSource  # noqa: E402
from mmx.model import param_specs  # noqa: E402
from mmx.quant import abstract_params, contracted_axes, turn, turned_sharding  # noqa: E402
from pallas_kernels.quantized import TurnedTensor  # noqa: E402

# "rows" splits only what lies in one piece in a file; "columns" splits the other side too.
RULES = {
    "rows": {"vocab": ("p", "d"), "expert": "p", "heads": "d", "mlp": None, "embed": None},
    "columns": {"vocab": "d", "embed": "p", "expert": None, "heads": None, "mlp": "d"},
}


def addressable_bytes(shape, sharding, itemsize, whole_axes=()) -> int:
    """Bytes of the distinct regions of this process's devices, `whole_axes` taken whole."""
    regions = set()
    for index in sharding.addressable_devices_indices_map(shape).values():
        regions.add(tuple((0, n) if i in whole_axes else part.indices(n)[:2]
                          for i, (part, n) in enumerate(zip(index, shape, strict=True))))
    return sum(int(np.prod([b - a for a, b in region])) * itemsize for region in regions)


def lies(path, leaf, sharding):
    if isinstance(leaf, TurnedTensor):
        return turned_sharding(sharding, leaf.shape, contracted_axes(path)).values
    return sharding


def same_shards(array, whole) -> bool:
    return all(np.array_equal(np.asarray(shard.data), np.asarray(whole)[shard.index])
               for shard in array.addressable_shards)


def bytes_read() -> int:
    """Bytes that this process has asked the kernel to read."""
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("rchar:"))


def orbax_reads(mesh, shared) -> dict[str, float]:
    """Share of a checkpoint's bytes (an array of 8 MiB) that restoring it reads.

    By a process that wants half of the rows, and by one that wants all.
    """
    whole = np.random.default_rng(0).standard_normal((2048, 1024)).astype(np.float32)
    spread = NamedSharding(mesh, PartitionSpec("p", "d"))
    orbax_io.save(f"{shared}/rows", {"x": jax.device_put(whole, spread)})
    size = sum(path.stat().st_size for path in Path(shared, "rows").rglob("*") if path.is_file())
    found = {}
    for name, spec in {"own": PartitionSpec("p", "d"), "all": PartitionSpec()}.items():
        wanted = jax.ShapeDtypeStruct(whole.shape, whole.dtype, sharding=NamedSharding(mesh, spec))
        before = bytes_read()
        tree, _ = orbax_io.restore(f"{shared}/rows", {"x": wanted})
        found[name] = (bytes_read() - before) / size
        assert same_shards(tree["x"], whole)
    return found


def main(index: int, port: str, checkpoint: str, shared: str):
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    hf_files._PAGE = 0  # in tensors this small everything lies within a page of everything
    config = load_config(checkpoint)
    specs = param_specs(config, "float32")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("p", "d"))
    report = {}
    for name, rules in RULES.items():
        shardings = {path: NamedSharding(mesh, PartitionSpec(
            *(rules.get(axis) for axis in spec.axes))) for path, spec in specs.items()}
        for quantize, turned in ((None, None), ("int8", None), ("int8", True)):
            local = {path: jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
                     for path in specs}
            _, whole = load_params(checkpoint, dtype="float32", quantize=quantize, shardings=local)
            with HfSource(config, checkpoint) as source:
                params = import_params(source, dtype="float32", quantize=quantize,
                                       shardings=shardings, turned=turned)
                read = source.reader.bytes_read
            wanted = sum(addressable_bytes(
                spec.shape, shardings[path], 4, contracted_axes(path) if quantize else ())
                for path, spec in specs.items())
            places = {path: lies(path, x, shardings[path]) for path, x in params.items()}
            # Of one device's leaves those that are turned on the mesh, by the same rule.
            held = {path: turn(path, x) if isinstance(params[path], TurnedTensor) else x
                    for path, x in whole.items()}
            same = all(same_shards(a, b) for a, b in zip(
                jax.tree.leaves(params), jax.tree.leaves(held), strict=True))
            placed = all((x if isinstance(x, jax.Array) else x.values).sharding == places[path]
                         for path, x in params.items())
            placed &= bool(turned) == any(isinstance(x, TurnedTensor) for x in params.values())
            report[f"{name} {quantize}" + " turned" * bool(turned)] = {
                "read": read, "wanted": wanted, "same": same, "placed": placed}
    # `params` is int8, experts turned, and split over both processes here: save, restore, export
    # together.
    orbax_io.save_model(f"{shared}/orbax", config, params)
    _, back = load_params(f"{shared}/orbax", config, dtype="float32", shardings=shardings)
    report["orbax"] = {"same": all(
        same_shards(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(whole),
                                          strict=True)),
        "tree": jax.tree.structure(dict(back)) == jax.tree.structure(
            abstract_params(config, "float32", "int8"))}
    report["orbax bytes"] = orbax_reads(mesh, shared)
    save_hf(f"{shared}/hf", config, params, "transformers", "float32")
    with HfSource(config, f"{shared}/hf") as source:
        found = import_params(source, dtype="float32", quantize="int8", shardings=local)
    # Quantising again what was quantised changes no integer.
    report["export"] = {"same": all(
        np.array_equal(np.asarray(found[path].values), np.asarray(whole[path].values))
        for path in specs if contracted_axes(path))}
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])

"""Memory of the engine's programs on GPUs, beside what `mmx plan` says before they run.

    python benchmarks/memory_vs_plan.py --output=FILE.json          # both, on the GPU's machine
    python benchmarks/memory_vs_plan.py --plan_only --output=A      # no GPU; extra plan-gpu
    python benchmarks/memory_vs_plan.py --measured_only --output=B  # on the GPU
    python benchmarks/memory_vs_plan.py --join A B --output=FILE.json
    python benchmarks/memory_vs_plan.py --pod=h200:1x2 --mesh=sequence=2 --rows=prefill:32768 ...

Rows: decode steps at batch 1, 16 and 64 with 1,024 tokens cached (room for 2,048, as the engine
doubles it), and a prompt of 16,384 tokens in one chunk; 8 layers at the released widths, bfloat16.
`long:N` is a chunk whose time lies over the expert axis too. With --mesh the model lies over
several GPUs, of which the fullest counts; rows are named with it, as in decode:64/expert=2.

plan: arguments, results and temporaries by the compiler's analysis, ahead of time for --pod.
compiled: the same count for the engine's program, compiled for the device itself.
measured: the allocator's peak. Each row has a process of its own, since a peak cannot be reset.
It compiles from shapes before anything is allocated, as the compiler tries kernels out on memory
of the same allocator, and draws its weights by a hash that needs no temporaries. `before` is the
peak just before the program first runs: where `measured` is no larger, it says nothing of it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONTEXT, CHUNK = 1024, 16384
ROWS = ("decode:1", "decode:16", "decode:64", f"prefill:{CHUNK}")
# Decode steps that run; more than one, so that a result and its successor live side by side.
STEPS = 4
MIB = 2**20


def dims(row: str) -> tuple[str, int, int, int]:
    """Mode, batch, cached tokens before the step and the cache's capacity of a row's name."""
    from mmx.bench.whole import STEPS as room
    from mmx.bench.whole import capacity

    mode, number = row.partition("/")[0].split(":")
    if mode == "decode":
        return mode, int(number), CONTEXT, capacity(CONTEXT + room)
    return mode, 1, 0, capacity(int(number))


def plan(rows: Sequence[str], geometry: str, pod_name: str) -> dict[str, Any]:
    """What `mmx plan` counts for each row; the process must not have started jax before."""
    from mmx.plan import topology

    topology.prepare_environment()
    from mmx.config import preset
    from mmx.plan import fit, meshes
    from mmx.plan.pods import parse_pod
    from mmx.plan.programs import Job
    from mmx.sharding.mesh import parse_axes

    pod, found = parse_pod(pod_name), {}
    for row in rows:
        mode, batch, _, capacity = dims(row)
        job = Job(preset(geometry), mode, batch, capacity, chunk=capacity)
        mesh = row.partition("/")[2]
        axes = parse_axes(mesh) if mesh else meshes.candidates(job, pod)[0].axes
        found[row] = fit.compile_fit(job, pod, axes).to_json()
        print(f"planned {row} for {pod_name}: "
              f"{found[row]['bytes_per_device']['total'] / MIB:,.0f} MiB", flush=True)
    return found


def measure(row: str, geometry: str) -> dict[str, Any]:
    """Runs a row's program on devices of this process; bytes of each moment, the fullest's."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

    from mmx import cache as caches
    from mmx import model
    from mmx.cache import Cache
    from mmx.config import preset
    from mmx.parallel.mesh_ops import MeshOps
    from mmx.parallel.ops import Ops
    from mmx.plan.programs import memory_of, share_bytes
    from mmx.sharding.mesh import parse_mesh
    from mmx.sharding.rules import REGIMES, param_shardings

    config, dtype = preset(geometry), "bfloat16"
    mode, batch, held, capacity = dims(row)
    tokens = 1 if mode == "decode" else capacity
    specs = model.param_specs(config, dtype)
    if mesh_text := row.partition("/")[2]:
        mesh, rules = parse_mesh(mesh_text), REGIMES[mode]
        devices, ops = list(mesh.devices.flat), MeshOps(mesh, rules)
        places, whole = param_shardings(specs, mesh, rules), NamedSharding(mesh, PartitionSpec())
    else:
        devices, ops = jax.local_devices()[:1], Ops()
        whole = SingleDeviceSharding(devices[0])
        places = dict.fromkeys(specs, whole)

    def abstract(leaf, place):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    def program(params, cache, ids_BT, lengths_B):
        logits_BV, cache = model.step(config, params, cache, ids_BT, lengths_B, ops=ops)
        return ops.whole(logits_BV), caches.lay(cache, ops)

    shapes = {path: abstract(spec, places[path]) for path, spec in specs.items()}
    heads = ops.cache_kv_heads(config.num_kv_heads)
    make = jax.jit(lambda: caches.lay(
        caches.init_cache(config, batch, capacity, dtype, heads), ops))
    empty = jax.tree.map(abstract, jax.eval_shape(make), make.lower().compile().output_shardings)
    ids_BT = jax.ShapeDtypeStruct((batch, tokens), jnp.int32, sharding=whole)
    lengths_B = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=whole)
    # The engine's own programs (mmx/engine/steps.py), held as compiled objects.
    step = jax.jit(program, donate_argnums=(1,)).lower(shapes, empty, ids_BT, lengths_B).compile()
    counted = memory_of(step, {"weights": share_bytes(shapes)})

    params = {path: _hashed(spec.shape, str(jnp.dtype(spec.dtype)), places[path])(
        jnp.uint32(zlib.crc32(path.encode()))) for path, spec in specs.items()}
    jax.block_until_ready(params)
    weights = _most(devices)
    cache = make()
    cache = Cache(cache.stacks, jax.device_put(np.full(batch, held, np.int32),
                                               cache.lengths_B.sharding))
    ids_BT = jax.device_put(np.random.default_rng(0).integers(
        0, config.vocab_size, (batch, tokens)).astype(np.int32), whole)
    lengths_B = jax.device_put(np.full(batch, tokens, np.int32), whole)
    jax.block_until_ready((cache, ids_BT, lengths_B))
    before = _most(devices)
    for _ in range(STEPS if mode == "decode" else 1):
        logits_BV, cache = step(params, cache, ids_BT, lengths_B)
    finite = bool(jnp.isfinite(logits_BV.sum()))
    after = _most(devices)
    return {"device": devices[0].device_kind, "devices": len(devices), "jax": jax.__version__,
            "finite": finite, "compiled_bytes": counted.total,
            "compiled_temporaries": counted.temporaries,
            "weights_in_use": weights.get("bytes_in_use"),
            "held_in_use": before.get("bytes_in_use"), "before": before.get("peak_bytes_in_use"),
            "measured": after.get("peak_bytes_in_use"), "limit": after.get("bytes_limit")}


def _most(devices) -> Mapping[str, int]:
    """Each figure of the allocators, on the device where it is largest."""
    found: dict[str, int] = {}
    for device in devices:
        for name, size in (device.memory_stats() or {}).items():
            found[name] = max(size, found.get(name, 0))
    return found


def _hashed(shape, dtype, place):
    """A program that fills `shape` with small numbers by a hash of the place: one fusion."""
    import jax
    import jax.numpy as jnp

    def program(seed):
        mixed = jnp.zeros(shape, jnp.uint32) + seed
        for axis, stride in zip(range(len(shape)), (2654435761, 40503, 2246822519, 3266489917,
                                                    668265263), strict=False):
            mixed += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
        mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(2246822519)
        mixed = (mixed ^ (mixed >> 13)) * jnp.uint32(3266489917)
        unit = (mixed >> 8).astype(jnp.float32) * 2.0**-23 - 1.0
        return (0.02 * unit).astype(dtype)

    return jax.jit(program, out_shardings=place)


def child(*words: str, **environment: str) -> dict[str, Any]:
    """Runs this script anew with `words` and returns what it wrote; the error's end on failure."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "found.json"
        done = subprocess.run(
            [sys.executable, __file__, *words, f"--output={target}"],
            env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
        if done.returncode or not target.is_file():
            lines = [one for one in done.stderr.strip().splitlines() if one.strip()]
            return {"error": lines[-1][:300] if lines else f"exit code {done.returncode}"}
        return json.loads(target.read_text())


def table(report: Mapping[str, Any]) -> str:
    """Markdown: MiB of the plan, of the device's own compilation and of the peak."""
    lines = ["| row | plan, MiB | of it temporaries | compiled on the device | measured peak "
             "| plan / measured - 1 | peak before the run |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for row in report["rows"]:
        planned, seen = report["plan"].get(row, {}), report["measured"].get(row, {})
        told = planned.get("bytes_per_device", {})
        total, peak = told.get("total"), seen.get("measured")
        share = f"{100 * (total / peak - 1):+.1f} %" if total and peak else "-"
        cells = [_mib(total), _mib(told.get("temporaries")), _mib(seen.get("compiled_bytes")),
                 _mib(peak), share, _mib(seen.get("before"))]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
        lines += [f"\n{row}: {part['error']}\n" for part in (planned, seen) if "error" in part]
    return "\n".join(lines)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / MIB:,.0f}"


def write(target: str | None, found: Mapping[str, Any]) -> None:
    if target:
        path = Path(target)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_ = path.with_name(f".{path.name}.partial")
        partial_.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(partial_, path)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", default="period")
    parser.add_argument("--pod", default="h200:1x1")
    parser.add_argument("--mesh", default="", help="as in sequence=2; one GPU if empty")
    parser.add_argument("--rows", default=",".join(ROWS), help="of the kind decode:16,prefill:4096")
    parser.add_argument("--output")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--plan_only", action="store_true")
    which.add_argument("--measured_only", action="store_true")
    which.add_argument("--join", nargs=2, metavar=("PLAN", "MEASURED"))
    which.add_argument("--child", choices=("plan", "measure"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    rows = [f"{row}/{args.mesh}" if args.mesh else row for row in args.rows.split(",")]
    if not (args.child or args.plan_only or args.join) and shutil.which("nvidia-smi") is None:
        parser.error("there is no nvidia-smi, so no GPU to measure. --plan_only does without one.")
    if args.child == "plan":
        write(args.output, plan(rows, args.geometry, args.pod))
        return 0
    if args.child == "measure":
        write(args.output, measure(rows[0], args.geometry))
        return 0
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/memory_vs_plan.py", *argv]),
        "geometry": args.geometry, "pod": args.pod, "rows": rows, "plan": {}, "measured": {}}
    if args.join:
        parts = [json.loads(Path(one).read_text()) for one in args.join]
        report["rows"] = list(dict.fromkeys(row for one in parts for row in one["rows"]))
        report["commands"] = [one["command"] for one in parts]
        for one in parts:
            report["plan"] |= one["plan"]
            report["measured"] |= one["measured"]
    common = (f"--geometry={args.geometry}", f"--pod={args.pod}", f"--mesh={args.mesh}")
    if not args.join and not args.measured_only:
        found = child("--child=plan", f"--rows={args.rows}", *common, JAX_PLATFORMS="cpu")
        report["plan"] = dict.fromkeys(rows, found) if "error" in found else found
    if not args.join and not args.plan_only:
        # Weights alone take more than the three quarters that jax takes of a device by itself.
        room = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
        for row in rows:
            print(f"running {row} ...", flush=True)
            report["measured"][row] = child(
                "--child=measure", f"--rows={row.partition('/')[0]}", *common,
                XLA_PYTHON_CLIENT_MEM_FRACTION=room)
    write(args.output, report)
    print(table(report))
    failed = [row for part in ("plan", "measured") for row in report[part].values()
              if "error" in row]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

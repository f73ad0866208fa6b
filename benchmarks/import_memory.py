"""Peak host memory of importing a synthetic bfloat16 checkpoint as int8.

Writes a sharded checkpoint in the original layout, streamed to disk; imports it in a fresh process;
prints the resident result, the peak over the process's size before the import, and the bound
(result + 2 × max_host_bytes). Exits 1 when the bound is broken.

    python -m benchmarks.import_memory --gigabytes 6.2 --max_host_mib 256
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from mmx.checkpoint.hf_export import header_bytes, plan_shards, shard_names
from mmx.checkpoint.hf_files import INDEX
from mmx.checkpoint.hf_names import ORIGINAL, entries
from mmx.config import ModelConfig, hybrid_pattern

_CHUNK = 8 << 20


def geometry(gigabytes: float) -> ModelConfig:
    """Eight layers of the released kind whose bfloat16 weights take about `gigabytes`."""
    config = ModelConfig(
        vocab_size=32000, hidden_size=2048, layer_types=hybrid_pattern(8), num_heads=16,
        num_kv_heads=4, head_dim=128, rotary_dim=64, num_experts=16, expert_dim=512, postnorm=True)
    if gigabytes < 1:
        config = config.replace(vocab_size=2048, hidden_size=512, num_heads=4, num_kv_heads=2,
                                num_experts=8, expert_dim=128)
    fixed = sum(entry.size for entry in entries(config) if ".experts." not in entry.name)
    per_width = 3 * config.hidden_size * config.num_experts * config.num_layers
    width = max(1, round((gigabytes * 1e9 / 2 - fixed) / per_width / 64)) * 64
    return config.replace(expert_dim=width)


def write_synthetic(directory: Path, config: ModelConfig, shard_bytes: int) -> int:
    """Writes random finite bfloat16 weights without holding a shard; returns their bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config.to_hf()))
    shards = plan_shards(entries(config), 2, shard_bytes)
    names = shard_names(len(shards), ORIGINAL)
    rng, total, weight_map = np.random.default_rng(0), 0, {}
    for name, shard in zip(names, shards, strict=True):
        weight_map |= {entry.name: name for entry in shard}
        left = 2 * sum(entry.size for entry in shard)
        total += left
        with open(directory / name, "wb") as file:
            file.write(header_bytes(shard, "bfloat16"))
            while left:
                words = np.frombuffer(rng.bytes(min(left, _CHUNK)), np.uint16)
                # Random sign and mantissa, exponents of 2^-7 and 2^-6.
                file.write(((words & 0x80FF) | 0x3C00).tobytes())
                left -= words.nbytes
    if len(shards) > 1:
        (directory / INDEX).write_text(json.dumps(
            {"metadata": {"total_size": total}, "weight_map": weight_map}))
    return total


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def measure(directory: str, max_host_bytes: int, quantize: str | None = "int8") -> dict:
    """Imports in this process and returns byte figures; call it in a fresh one."""
    import jax

    from mmx.checkpoint import load_params

    jax.block_until_ready(jax.numpy.zeros(8))
    before = _status("VmRSS")
    began = time.monotonic()
    _, params = load_params(directory, dtype="bfloat16", quantize=quantize,
                            max_host_bytes=max_host_bytes)
    jax.block_until_ready(params)
    seconds = time.monotonic() - began
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    peak = _status("VmHWM") - before
    return {"result_bytes": result, "peak_bytes": peak, "max_host_bytes": max_host_bytes,
            "bound_bytes": result + 2 * max_host_bytes, "seconds": round(seconds, 1),
            "before_bytes": before, "jax": jax.__version__, "cpus": os.cpu_count()}


def run(gigabytes: float, max_host_bytes: int, directory: Path, shard_bytes: int = 1 << 30,
        quantize: str | None = "int8") -> dict:
    """Writes the checkpoint and measures the import in a fresh process."""
    total = write_synthetic(directory, geometry(gigabytes), shard_bytes)
    code = ("import json, sys; from benchmarks.import_memory import measure; "
            "print(json.dumps(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3] or None)))")
    done = subprocess.run(
        [sys.executable, "-c", code, str(directory), str(max_host_bytes), quantize or ""],
        capture_output=True, text=True, cwd=Path(__file__).parent.parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return {"checkpoint_bytes": total} | json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=6.2)
    parser.add_argument("--max_host_mib", type=int, default=256)
    parser.add_argument("--dir", default=None, help="where to put the checkpoint (deleted after)")
    args = parser.parse_args()
    directory = Path(tempfile.mkdtemp(dir=args.dir, prefix="mmx-import-"))
    try:
        figures = run(args.gigabytes, args.max_host_mib << 20, directory)
    finally:
        shutil.rmtree(directory)
    print(json.dumps(figures))
    gib = {key: value / 2**30 for key, value in figures.items() if key.endswith("bytes")}
    print(f"checkpoint {gib['checkpoint_bytes']:.2f} GiB, result {gib['result_bytes']:.2f} GiB, "
          f"peak {gib['peak_bytes']:.2f} GiB, bound {gib['bound_bytes']:.2f} GiB "
          f"in {figures['seconds']} s")
    sys.exit(figures["peak_bytes"] > figures["bound_bytes"])


if __name__ == "__main__":
    main()

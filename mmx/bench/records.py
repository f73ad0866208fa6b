"""A measurement as one flat JSON object, with all that is needed to repeat and to judge it."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mmx.bench import floors
from mmx.bench.floors import Ceilings, Work
from mmx.bench.timing import Method, Timing

_PACKAGES = ("mmx", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin",
             "jax-triton", "triton")
# Keys that all records of a run share.
FACTS = ("bench", "model", "command", "commit", "seed", "versions", "device", "method", "geometry",
         "ceilings")
_PEER_PACKAGES = ("torch", "transformers", "flash-linear-attention")


def record(operation: str, shape: str, dims: Mapping[str, int], dtype: str, implementation: str,
           timing: Timing | str, floor: floors.Floor | None, tokens: int | None = None,
           rate: float | None = None, rate_unit: str = "", **more) -> dict[str, Any]:
    """One row: a Timing with its floor and rate, or the sentence of a failure.

    `tokens` are those of a step, for tokens per second; `rate` is given where there is no floor.
    """
    row: dict[str, Any] = {
        "operation": operation, "shape": shape, "dims": dict(dims), "dtype": dtype,
        "implementation": implementation}
    if isinstance(timing, str):
        return {**row, **more, "error": timing}
    row |= {"median_ms": timing.median * 1e3, "spread": timing.spread,
            "samples_ms": [one * 1e3 for one in timing.seconds], "inner": timing.inner}
    if floor is not None:
        rate, rate_unit = floor.rate(timing.median), floor.unit
        row |= {"floor_ms": floor.seconds * 1e3, "floor_formula": floor.formula,
                "share_of_floor": floors.share(timing.median, floor.seconds)}
    row |= {"rate": rate, "rate_unit": rate_unit}
    if tokens is not None:
        row["tokens_per_s"] = tokens / timing.median
    return {**row, **more}


def measured(row: Mapping[str, Any]) -> Timing | str:
    """The Timing of a row, or its error: the way back from `record`."""
    if "error" in row:
        return row["error"]
    return Timing(tuple(one / 1e3 for one in row["samples_ms"]), row["inner"])


def of_work(operation: str, shape: str, dims, dtype: str, implementation: str,
            timing: Timing | str, work: Work, ceilings: Ceilings, tokens: int | None = None,
            **more) -> dict[str, Any]:
    """A row whose floor is reckoned from its work."""
    return record(operation, shape, dims, dtype, implementation, timing,
                  floors.floor(work, ceilings), tokens, **more)


def command() -> str:
    """The command line of this process."""
    return shlex.join(["mmx", *sys.argv[1:]])


def facts(bench: str, model: str, seed: int, method: Method, peers: Sequence[str]
          ) -> dict[str, Any]:
    """What all records of a run share: command, versions, device, method. Starts the backend."""
    import jax

    devices = jax.devices()
    return {
        "bench": bench, "model": model, "command": command(),
        "commit": commit(), "seed": seed,
        "versions": versions(devices[0].client.platform_version, peers),
        "device": {"kind": device_kind(devices[0]), "platform": devices[0].platform,
                   "count": len(devices), "used": 1},
        "method": {
            "warm_up": "twice or more", "rounds": method.rounds, "figure": "median of rounds",
            "at_least_ms": method.at_least_s * 1e3, "spread": "(longest - shortest) / median",
            "inner": "steps between two readings of the clock",
            "order": "implementations in turns", "inputs": "random normal"}}


def device_kind(device) -> str:
    """The device's name; of a CPU, which jax calls 'cpu', the model and cores that are used."""
    if device.platform != "cpu":
        return device.device_kind
    name = platform.processor() or platform.machine()
    try:
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[1] if found else name}, {cores} cores"


def versions(backend: str, peers: Sequence[str] = ()) -> dict[str, str]:
    """Versions of what takes part; `backend` is the platform's own word (CUDA, libtpu)."""
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *(_PEER_PACKAGES if peers else ())):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    told = " ".join(backend.split())
    return found | ({"backend": told} if told and told != "<unknown>" else {})


def commit() -> str:
    """The git commit of this source tree, marked when files differ; "unknown" outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return "unknown"

    def git(*words):
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True,
                              timeout=20, check=True).stdout.strip()
    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"

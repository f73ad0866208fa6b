"""Two libraries that cannot hold their models on one device at once: processes in turns.

Each side has a process of its own in each turn, which ends before the next starts: A, B, A, B.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mmx.bench.timing import Method
from mmx.bench.whole import Job
from mmx.config import DIALECT_NATIVE, ModelConfig
from mmx.errors import UserError
from mmx.obs import log

TURNS = 2


def ours(config_gin: str) -> list[dict]:
    """Runs `mmx bench` by a configuration (gin text), without peers; returns its records."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.gin"
        path.write_text(config_gin)
        return _lines([sys.executable, "-m", "mmx", "bench", f"--gin_file={path}",
                       "--gin_param=bench.peers=None", "--gin_param=bench.output=None",
                       "--gin_param=bench.json=True"], None, "mmx")


def transformers(config: ModelConfig, dtype: str, seed: int, method: Method,
                 jobs: Sequence[Job]) -> list[dict]:
    """Runs the peer's process; returns its records."""
    asked = {"config": config.to_hf(DIALECT_NATIVE), "dtype": dtype, "seed": seed,
             "method": vars(method), "jobs": [vars(job) for job in jobs]}
    return _lines([sys.executable, "-m", "mmx.bench.transformers_peer"], json.dumps(asked),
                  "transformers")


def _lines(command: list[str], stdin: str | None, side: str) -> list[dict]:
    log.note(f"turn of {side} …")
    places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(command, input=stdin, stdout=subprocess.PIPE, text=True, env=env)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise UserError(f"The process of {side} ended with code {done.returncode} and no figure.",
                        "Its own words are above.", "Leave out --peers to measure mmx alone.")
    return rows

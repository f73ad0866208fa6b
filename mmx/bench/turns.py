"""Two libraries that cannot hold their models on one device at once: processes in turns.

Each side has a process of its own in each turn, which ends before the next starts: A, B, A, B. Its
records join a list as they are told, so that an interrupt loses none.
"""

import contextlib
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


def ours(config_gin: str, into: list[dict]) -> None:
    """Runs `mmx bench` by a configuration (gin text), without peers."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.gin"
        path.write_text(config_gin)
        _lines([sys.executable, "-m", "mmx", "bench", f"--gin_file={path}",
                "--gin_param=bench.peers=None", "--gin_param=bench.output=None",
                "--gin_param=bench.json=True"], None, "mmx", into)


def transformers(config: ModelConfig, dtype: str, seed: int, method: Method,
                 jobs: Sequence[Job], into: list[dict]) -> None:
    """Runs the peer's process."""
    asked = {"config": config.to_hf(DIALECT_NATIVE), "dtype": dtype, "seed": seed,
             "method": vars(method), "jobs": [vars(job) for job in jobs]}
    _lines([sys.executable, "-m", "mmx.bench.transformers_peer"], json.dumps(asked),
           "transformers", into)


def _lines(command: list[str], stdin: str | None, side: str, into: list[dict]) -> None:
    log.note(f"turn of {side} …")
    places = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    before = len(into)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                          env=env) as process:
        try:
            with contextlib.suppress(BrokenPipeError):  # one that ends before it has read all
                process.stdin.write(stdin or "")
                process.stdin.close()
            for line in process.stdout:
                if line.startswith("{"):
                    into.append(json.loads(line))
        except BaseException:
            process.kill()  # or leaving would wait for it
            raise
    if process.returncode:
        log.note(f"the process of {side} ended with code {process.returncode}")
    if len(into) == before:
        raise UserError(f"The process of {side} ended with code {process.returncode} and no "
                        "figure.", "Its own words are above.",
                        "Leave out --peers to measure mmx alone.")

"""A pod in a box under test: started by launch/local_pod.sh, one of its processes killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


class LocalPod:
    """`mmx ARGV…` in `processes` processes, all with the file `stdin`; its log goes to a file."""

    def __init__(self, processes: int, argv, log: Path, devices: int = 1,
                 stdin: Path | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with open(log, "w") as file, open(stdin or os.devnull) as given:
            self.process = subprocess.Popen(
                ["bash", str(ROOT / "launch" / "local_pod.sh"), str(processes),
                 f"--devices={devices}", f"--port={self.port}", "--", sys.executable, "-m", "mmx",
                 *map(str, argv)], cwd=ROOT, env=env, stdin=given, stdout=file,
                stderr=subprocess.STDOUT)

    def said(self) -> str:
        return self.log.read_text()

    def wait(self, seconds: float = 300) -> int:
        try:
            return self.process.wait(seconds)
        finally:
            self.process.terminate()

    def until(self, condition, seconds: float = 240) -> None:
        """Waits for `condition()` while the pod runs."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.01)

    def kill(self, index: int, number: int = signal.SIGKILL) -> None:
        os.kill(self._pid(index), number)

    def _pid(self, index: int) -> int:
        wanted = {f"MMX_COORDINATOR=127.0.0.1:{self.port}", f"MMX_PROCESS_ID={index}"}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                env = path.joinpath("environ").read_bytes().decode().split("\0")
                command = path.joinpath("cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if wanted <= set(env) and command[1:3] == ["-m", "mmx"]:
                return int(path.name)
        raise AssertionError(f"process {index} is not there\n{self.said()}")


def write_records(path: Path, count: int) -> Path:
    path.write_text("".join(
        json.dumps({"id": f"r{i}", "prompt": "abc def " * (i % 5 + 1), "max_tokens": 4 + i % 7,
                    "temperature": float(i % 3)}) + "\n" for i in range(count)))
    return path


def journalled(output: Path) -> int:
    """Records that all journals of an unfinished batch hold."""
    return sum(path.read_bytes().count(b"\n")
               for path in output.parent.glob(f"{output.name}.partial-*"))

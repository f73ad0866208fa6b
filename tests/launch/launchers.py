"""Runs the launchers as a user does, with stand-ins for the tools that they call."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
# Words that a careless script splits, expands or drops.
AWKWARD = ["--prompt=it's \"quoted\" $HOME `id` $(id) *", "--stop=a\nb\tc\\n", "--system=",
           "é 日本 &;|"]
# Variables that would change what the scripts say.
_OWN = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_", "MMX_", "NCCL_", "SLURM_", "XLA_PYTHON")


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OWN)}
    return {**kept, **more}


def launch(script, *words, env=None, path=None):
    """(exit code, stdout, stderr) of a launcher."""
    given = environment(**(env or {}))
    if path is not None:
        given["PATH"] = f"{path}:{given['PATH']}"
    done = subprocess.run(["bash", str(LAUNCH / script), *words], capture_output=True, text=True,
                          env=given, timeout=60)
    return done.returncode, done.stdout, done.stderr


def commands(text):
    """The commands that a dry run printed, as lists of words read by bash itself."""
    code = ("while IFS= read -r line; do case $line in '#'*) continue ;; esac; "
            "eval \"set -- $line\"; printf '%s\\0' \"$@\"; printf '\\0\\0'; done")
    done = subprocess.run(["bash", "-c", code], input=text.encode(), capture_output=True,
                          check=True)
    return [[word.decode() for word in command.split(b"\0")]
            for command in done.stdout.split(b"\0\0\0") if command]


def stand_in(folder, name, body="0"):
    """Puts a program into `folder` that notes its words and stdin, then runs Python `body`."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"words = [{name!r}, *sys.argv[1:]]\n"
        "stdin = '' if sys.stdin.isatty() or os.environ.get('NO_STDIN') else sys.stdin.read()\n"
        f"with open({str(folder / 'calls')!r}, 'a') as calls:\n"
        "    calls.write(json.dumps([words, stdin]) + '\\n')\n"
        f"{body}\n")
    program.chmod(0o755)
    return folder


def calls(folder):
    """The [words, stdin] of every call of the stand-ins in `folder`, in order."""
    notes = folder / "calls"
    if not notes.exists():
        return []
    return [json.loads(line) for line in notes.read_text().splitlines()]


def example(script):
    """The first example in a launcher's help, as words; its lines may be continued."""
    _, text, _ = launch(script, "--help")
    lines = text.replace("\\\n", " ").splitlines()
    line = next(line for line in lines if f"launch/{script}" in line and not line.startswith("-"))
    words = shlex.split(line, comments=True)
    return words[next(i for i, word in enumerate(words) if word.endswith(script)) + 1:]

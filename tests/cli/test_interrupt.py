"""Ctrl-C while a compiler has its thread: a sentence and 130, at once."""

import os
import signal
import subprocess
import sys

import pytest

from mmx.cli.interrupt import interruptible
from mmx.errors import UserError

# A compilation that no interrupt ends, as that of C++: Python's own would raise in it.
STUBBORN = """
import signal, sys, time
from mmx.cli.main import main
from mmx.plan import fit
signal.signal(signal.SIGINT, signal.default_int_handler)

def compile_fit(job, pod, axes):
    print("begun", flush=True)
    while True:
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass

fit.compile_fit = compile_fit
sys.exit(main(["plan", "--model=nano", "--pod=v5e:2x2"]))
"""


def test_an_interrupt_ends_a_compilation():
    child = subprocess.Popen([sys.executable, "-c", STUBBORN], text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    try:
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=10)
    finally:
        child.kill()
    assert child.returncode == 130
    assert told.endswith("\nmmx: Interrupted while compiling, so there is no answer.\n")


def test_what_the_work_gives_or_raises_comes_through():
    assert interruptible(lambda: 3, "") == 3

    def refuse():
        raise UserError("No.")

    with pytest.raises(UserError, match="No."):
        interruptible(refuse, "")

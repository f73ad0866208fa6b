"""Ctrl-C while a compiler has the process: a sentence and 130, at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mmx.cli import interrupt
from mmx.cli.interrupt import Interrupted, interruptible
from mmx.errors import UserError

# Work that no interrupt ends, as a compilation in C++: Python loses those in a callback.
STUBBORN = """
import gc, importlib, signal, sys, time
from mmx.cli.main import console
signal.signal(signal.SIGINT, signal.default_int_handler)

def work(*args, **kwargs):
    gc.callbacks.append(lambda *args: time.sleep(60))
    print("begun", flush=True)
    while True:
        gc.collect()

module, name = sys.argv.pop(1), sys.argv.pop(1)
setattr(importlib.import_module(module), name, work)
console()
"""
TRAIN = ("mmx.train.loop", "train", "train", "--model=nano", "--data=in")
BATCH = ("mmx.cli.batch", "run_batch", "batch", "--input=in")


@pytest.mark.parametrize("argv, checkpoints, sentence", [
    (("mmx.plan.fit", "compile_fit", "plan", "--model=nano", "--pod=v5e:2x2"), (),
     "Interrupted while compiling, so there is no answer."),
    ((*TRAIN, "--run=new"), (),
     "Interrupted before the first checkpoint, so no step is kept. The same command starts anew; "
     "--save_every=N keeps a checkpoint every N steps."),
    ((*TRAIN, "--run=old"), (900, 1200),
     "Interrupted; the checkpoint of step 1,200 is kept in 'old'. The same command goes on from "
     "there."),
    ((*BATCH, "--output=new.jsonl"), (),
     "Interrupted; 0 records are done. The same command goes on."),
    ((*BATCH, "--output=old.jsonl"), (),
     "Interrupted; 2 records are done. The same command goes on from there."),
    ((*BATCH, "--output=old.jsonl", "--restart"), (),
     "Interrupted; 2 records are done. The same command without --restart goes on from there."),
], ids=lambda value: " ".join(value[2:]) if isinstance(value, tuple) else "")
def test_an_interrupt_ends_what_takes_none(tmp_path, argv, checkpoints, sentence):
    for step in checkpoints:
        (tmp_path / "old/checkpoints" / str(step)).mkdir(parents=True)
        (tmp_path / "old/checkpoints" / str(step) / "extra.json").touch()
    (tmp_path / "old.jsonl.partial-0").write_text('{"index": 0}\n{"index": 2}\n{"index": 1')
    root = os.path.dirname(os.path.dirname(interrupt.__file__))
    child = subprocess.Popen(
        [sys.executable, "-c", STUBBORN, *argv], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.path.dirname(root)})
    try:
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGINT)
        _, told = child.communicate(timeout=10)
    finally:
        child.kill()
    assert child.returncode == 130
    assert told.endswith(f"\nmmx: {sentence}\n") and "Traceback" not in told


def test_an_interrupt_between_instructions_ends_in_order(mmx, monkeypatch):
    from mmx.cli import inspect

    monkeypatch.setattr(interrupt.os, "_exit", None)  # its call would fail, and be seen
    monkeypatch.setattr(interrupt, "GRACE_S", 0.1)
    left = []

    def run(call):
        with interruptible(lambda: "Interrupted; all is well."):
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                left.append("in order")

    monkeypatch.setattr(inspect, "run", run)
    code, _, err = mmx("inspect")
    time.sleep(0.3)
    assert (code, err, left) == (130, "\nmmx: Interrupted; all is well.\n", ["in order"])


def test_what_the_work_raises_comes_through():
    with pytest.raises(UserError, match="No."):
        with interruptible(lambda: ""):
            raise UserError("No.")
    with pytest.raises(Interrupted, match="Kept."):
        with interruptible(lambda: "Kept."):
            raise KeyboardInterrupt
    assert signal.set_wakeup_fd(-1) == -1

"""Processes in turns: records are kept as they come."""

import subprocess
import sys

import pytest

from mmx.bench import turns
from mmx.errors import UserError

TELL = "print('not a record'); print('{\"n\": 1}', flush=True); print('{\"n\": 2}', flush=True);"


def told(code, into):
    turns._lines([sys.executable, "-c", code], "asked", "a side", into)
    return [row["n"] for row in into]


def test_records_are_kept_of_a_process_that_fails_later():
    assert told(TELL + "raise SystemExit(3)", [{"n": 0}]) == [0, 1, 2]


def test_a_process_without_a_record_is_an_error():
    with pytest.raises(UserError, match="ended with code 3 and no figure"):
        told("raise SystemExit(3)", [{"n": 0}])


def test_an_interrupt_keeps_what_was_told_and_ends_the_process(monkeypatch):
    begun = []

    class Begun(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            begun.append(self)

    class Interrupted(list):
        def append(self, row):
            if self:
                raise KeyboardInterrupt
            super().append(row)

    monkeypatch.setattr(subprocess, "Popen", Begun)
    into = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        told(TELL + "import time; time.sleep(600)", into)
    assert into == [{"n": 1}] and begun[0].returncode is not None

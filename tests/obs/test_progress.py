import io
import time

import pytest

from mmx.obs import log, memory, progress
from mmx.obs.progress import Progress, Waiting, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_log_lines_come_at_intervals_and_at_the_end(clock):
    out = io.StringIO()
    with Progress(200, "records", title="batch", done=100, every_s=10, stream=out) as bar:
        for _ in range(50):
            clock[0] += 1
            bar.update(1, **{"tok/s": "5"})
        bar.update(50)
    lines = out.getvalue().splitlines()
    assert lines[0] == "batch: 110 of 200 records (55 %)  1.0 records/s  1 min 30 s left  5 tok/s"
    assert len(lines) == 6 and lines[-1].startswith("batch: 200 of 200 records (100 %)")


def test_a_short_loop_says_nothing(clock):
    out = io.StringIO()
    with Progress(3, "records", stream=out) as bar:
        bar.update(3)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_that_goes_away(monkeypatch):
    monkeypatch.setattr(progress, "_REDRAW_SECONDS", 0)
    out = Terminal()
    with Progress(None, "parameters", title="load", stream=out) as bar:
        assert progress.active_bar() is not None
        bar.reach(1_000_000, 4_000_000)
        bar.update(0, **{"tok/s": "7"})
    assert progress.active_bar() is None
    shown = out.getvalue()
    assert "load:  25%" in shown and "1.00M/4.00M" in shown and "7 tok/s" in shown
    assert shown.endswith("\r") and not shown.rstrip("\r").split("\r")[-1].strip()


def test_lines_are_written_above_the_bar(capsys):
    out = Terminal()
    with Progress(3, "records", stream=out) as bar:
        bar.update()
        log.warn("line 3 is broken")
    assert "warning: line 3 is broken\n" in capsys.readouterr().err


def test_only_process_0_speaks_except_for_warnings(capsys):
    out = Terminal()
    log.set_process(1)
    try:
        with Progress(3, "records", stream=out, every_s=0) as bar:
            bar.update()
        log.note("hello")
        log.warn("mine")
    finally:
        log.set_process(0)
    assert out.getvalue() == "" and capsys.readouterr().err == "warning: mine\n"


@pytest.mark.parametrize("seconds, text", [
    (0.2, "0 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("size, text", [
    (512, "512 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (912 << 40, "912.0 TiB")])
def test_bytes(size, text):
    assert memory.human(size) == text


def test_memory_summary():
    before = memory.host_peak_bytes()
    block = bytearray(64 << 20)
    block[::4096] = b"x" * len(block[::4096])
    assert memory.host_peak_bytes() >= before
    assert memory.summary().startswith("peak memory ")


def test_a_wait_counts_up_on_a_terminal_and_is_a_line_elsewhere(capsys):
    out = Terminal()
    with Waiting("compiling …", stream=out):
        while "compiling … 0 s" not in out.getvalue():
            time.sleep(0.01)
    assert out.getvalue().endswith("\r\x1b[K")
    with Waiting("compiling …", stream=io.StringIO()):
        pass
    assert capsys.readouterr().err == "compiling …\n"

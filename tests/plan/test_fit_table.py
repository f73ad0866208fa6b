"""The table of pods: a crash is told in its row, and the page tells how it was made."""

import importlib.util
import stat
from pathlib import Path

import pytest

ROW = "--pod=v6e:4x8 --batch=32"
FOUND = {
    "pod": "v6e:4x8", "devices": 32, "mesh": {"expert": 4, "tensor": 8}, "mode": "decode",
    "fits": True, "limit_bytes": 31 << 30, "bound": "memory", "step_s": 0.0194,
    "kernels": {"hit_experts": 80}, "versions": {"jax": "0.10.2", "libtpu": "0.0.42"},
    "bytes_per_device": {"total": 27 << 30, "weights": 26 << 30, "keys_values": 1 << 29,
                         "states": 1 << 28, "optimizer": 0, "other": 0, "temporaries": 1 << 28},
    "wall_s": 30.0, "cpu_s": 12.0, "date": "2026-11-25", "commit": "0123456789"}


@pytest.fixture
def table():
    path = Path(__file__).parents[2] / "benchmarks" / "fit_table.py"
    spec = importlib.util.spec_from_file_location("fit_table", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_has_thirty_rows_and_each_once(table):
    rows = [row for rows in table.TABLE.values() for row in rows]
    assert len(rows) == len(set(rows)) >= 30


@pytest.mark.parametrize("script, why", [
    ("kill -ABRT $$", "the compiler ended by signal SIGABRT: a word before"),
    ("exit 7", "the compiler ended with exit code 7: a word before"),
    ("echo 'mmx: The pod is unknown.' >&2; exit 2", "mmx: The pod is unknown.")])
def test_a_row_tells_how_it_ended(table, tmp_path, monkeypatch, script, why):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/bash\necho 'a word before' >&2\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(table.sys, "executable", str(program))
    row, found = table.plan(ROW)
    assert row == ROW and found["refused"] == why and found["cpu_s"] >= 0
    assert f"| `{ROW}` | {why} |" in table.page({ROW: found}, None)


def test_the_page_tells_commit_versions_kernels_and_time(table):
    text = table.page({ROW: FOUND}, {"wall_s": 900, "cores": 2, "command": "python it --fresh"})
    for word in ("commit 0123456789 on 2026-11-25 with jax 0.10.2 libtpu 0.0.42",
                 "took 0.2 core-minutes", "last took 15.0 minutes on 2 cores: `python it --fresh`",
                 "- TPU, decode: `hit_experts`", "27.00 of 31.00", "| 19.4 ms | memory | 12 s |"):
        assert word in text, word

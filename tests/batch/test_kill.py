"""The main promise of a batch: killed at any point and resumed, it ends as if never killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from mmx.batch import journal
from mmx.cli.main import main
from tests import tiny

RECORDS = 500


def records():
    draw = random.Random(7)
    for index in range(RECORDS):
        record = {"id": f"r{index}", "max_tokens": draw.randint(1, 10),
                  "prompt": "".join(draw.choices("abc def", k=draw.randint(1, 40)))}
        if index % 3 == 0:
            record["temperature"] = 1.5
        if index % 50 == 7:
            record["seed"] = index
        yield record


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill")
    tiny.write_checkpoint(path / "model", tiny.config())
    (path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records()))
    return path


def argv(place, output):
    return ["batch", f"--model={place / 'model'}", f"--input={place / 'in.jsonl'}",
            f"--output={output}", "--slots=4"]


def run_until(place, output, count):
    """Starts a batch and kills it, without warning, once its journal has `count` records."""
    process = subprocess.Popen([sys.executable, "-m", "mmx", *argv(place, output)],
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    path = journal.journal_path(output, 0)
    until = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < until:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    told = process.communicate()[0].decode()
    assert process.returncode == -signal.SIGKILL, told


def test_500_records_killed_three_times(place, capsys):
    whole, output = place / "whole.jsonl", place / "out.jsonl"
    assert main(argv(place, whole)) == 0
    draw, done = random.Random(11), 0
    for _ in range(3):
        run_until(place, output, done + draw.randint(5, 140))
        assert not output.exists()
        left = len(journal.finished(output))
        assert left > done
        done = left
    # What a kill in the middle of a write leaves behind.
    with open(journal.journal_path(output, 0), "ab") as file:
        file.write(b'{"index": 499, "record": {"id": "r4')
    capsys.readouterr()
    assert main([*argv(place, output), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["resumed"], summary["answered"]) == (done, RECORDS - done)
    assert output.read_bytes() == whole.read_bytes()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["id"] for one in answers] == [f"r{index}" for index in range(RECORDS)]
    assert all(one["usage"]["completion_tokens"] >= 1 for one in answers)
    assert len({one["text"] for one in answers}) > RECORDS // 4

"""A job of two processes: one is killed, the other ends by name, the same command resumes."""

import json
import time

import pytest

from mmx.cli.main import main
from tests import tiny
from tests.faults.pod import LocalPod, journalled, write_records

RECORDS = 400


@pytest.mark.multidevice
def test_a_batch_of_two_loses_one_and_resumes_alone(tmp_path, capfd):
    model = tiny.write_checkpoint(tmp_path / "model", tiny.config(2, 2))
    output = tmp_path / "out.jsonl"
    argv = ["batch", f"--model={model}", "--slots=4", f"--output={output}",
            f"--input={write_records(tmp_path / 'in.jsonl', RECORDS)}", "--json"]
    pod = LocalPod(2, argv, tmp_path / "log")
    pod.until(lambda: journalled(output) >= 2)
    pod.kill(1)
    began = time.monotonic()
    assert pod.wait(60) == 137, pod.said()
    assert time.monotonic() - began < 30
    said = pod.said()
    assert "[0] mmx: [process 0 on " in said and "process 1 on " in said
    assert "ended without a word" in said and "[0] ended with code 75" in said
    assert "Traceback" not in said and "[1] config" not in said
    assert not output.exists() and 2 <= (done := journalled(output)) < RECORDS
    capfd.readouterr()
    assert main(argv) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["merged"] and done - 1 <= summary["resumed"] <= done
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert ids == [f"r{i}" for i in range(RECORDS)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl", "log", "model", "out.jsonl", "out.jsonl.config.gin", "out.jsonl.state.json"]


@pytest.mark.multidevice
def test_one_model_over_two_processes_answers_as_one(tmp_path, capfd):
    """Four devices in two processes hold one model; each record once, as from one device."""
    model = tiny.write_checkpoint(tmp_path / "model", tiny.config(2, 2))
    records = write_records(tmp_path / "in.jsonl", 12)
    output, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    argv = ["batch", f"--model={model}", "--slots=4", f"--input={records}"]
    pod = LocalPod(2, [*argv, f"--output={output}", "--mesh=expert=2,tensor=2"],
                   tmp_path / "log", devices=2)
    assert pod.wait(120) == 0, pod.said()
    assert main([*argv, f"--output={alone}"]) == 0
    assert output.read_text() == alone.read_text()
    assert not list(tmp_path.glob("out.jsonl.partial-*"))

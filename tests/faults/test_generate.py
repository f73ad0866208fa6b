"""`mmx generate` in two processes: one answer, told once; a lost process ends it by name."""

import json
import sys
import time

import pytest

from mmx.cli import generate
from mmx.cli.main import Call, main
from mmx.errors import UserError
from mmx.sharding.distributed import Pod
from tests import tiny
from tests.faults.pod import LocalPod

MESH = "--mesh=expert=2,tensor=2"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_checkpoint(tmp_path_factory.mktemp("pod") / "model", tiny.config(2, 2))


@pytest.mark.multidevice
def test_two_processes_answer_as_one(model, tmp_path, capfd):
    """A prompt of several chunks that process 0 alone can read, drawn tokens, one report."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("abc def " * 40)
    argv = ["generate", f"--model={model}", "--max_tokens=12", "--temperature=1", "--seed=3",
            "--prefill_chunk=64", "--json"]
    pod = LocalPod(2, [*argv, MESH, f"--output={tmp_path / 'answer.json'}"], tmp_path / "log",
                   devices=2, stdin=prompt)
    assert pod.wait(120) == 0, pod.said()
    assert main([*argv, f"--prompt_file={prompt}"]) == 0
    alone = json.loads(capfd.readouterr().out)
    report = json.loads((tmp_path / "answer.json").read_text())
    assert report["ids"] == alone["ids"] and report["usage"] == alone["usage"]
    said = pod.said().splitlines()
    assert [line for line in said if line.startswith("[0] {")] == [
        "[0] " + (tmp_path / "answer.json").read_text().rstrip("\n")]
    assert not [line for line in said if line.startswith("[1]")], pod.said()
    assert (tmp_path / "answer.json.config.gin").exists()


@pytest.mark.slow
@pytest.mark.multidevice
def test_a_lost_process_ends_an_answer_by_name(model, tmp_path):
    argv = ["generate", f"--model={model}", "--prompt=abc", "--max_tokens=100000", "--ignore_eos",
            "--capacity=100100", MESH]
    pod = LocalPod(2, argv, tmp_path / "log", devices=2)
    # Two lines come before the answer's, which random bytes break soon.
    pod.until(lambda: pod.said().count("\n[0] ") >= 3)
    pod.kill(1)
    began = time.monotonic()
    assert pod.wait(60) == 137, pod.said()
    assert time.monotonic() - began < 30
    said = pod.said()
    assert "process 1 on " in said and "[0] ended with code 75" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("given, words", [
    ({}, "there is no --mesh"), ({"mesh": "tensor=1"}, "--mesh=tensor=1 lies within one")])
def test_a_model_per_process_is_refused(given, words):
    call = Call("generate", generate.GenerateSettings(prompt="abc", **given), "")
    with pytest.raises(UserError, match=words):
        generate._answer(call, Pod(0, ["a", "b"]))


def test_a_chat_of_two_processes_is_refused(monkeypatch):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(generate, "_check_mesh", lambda *_: None)
    with pytest.raises(UserError, match="A chat on a terminal is held by one process"):
        generate._answer(Call("generate", generate.GenerateSettings(), ""), Pod(0, ["a", "b"]))


def test_one_of_two_does_not_convert(tmp_path, monkeypatch, capfd):
    for name, value in dict(MMX_COORDINATOR="a:1", MMX_PROCESSES="2", MMX_PROCESS_ID="1").items():
        monkeypatch.setenv(name, value)
    assert main(["convert", "--model=nano", f"--output={tmp_path / 'new'}"]) == 2
    assert "is the work of one process, and 2 were started" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())

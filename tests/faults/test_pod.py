"""Pods of four processes: one is killed, all end by name, the same command resumes; on two also."""

import json
import time

import jax
import numpy as np
import pytest

from mmx.checkpoint import orbax_io
from tests import tiny
from tests.faults.pod import LocalPod, journalled, write_records
from tests.tolerances import assert_close

RECORDS, STEPS, SAVE_EVERY = 300, 60, 20
pytestmark = [pytest.mark.slow, pytest.mark.multidevice]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("pod")
    tiny.write_checkpoint(path / "model", tiny.config(2, 2))
    write_records(path / "in.jsonl", RECORDS)
    words = "the river ran under an old bridge and the birds sang over it".split()
    draw = np.random.default_rng(0)
    (path / "text.jsonl").write_text("".join(
        json.dumps({"text": " ".join(draw.choice(words, draw.integers(3, 40)))}) + "\n"
        for _ in range(80)))
    return path


def batch(place, name):
    return ["batch", f"--model={place / 'model'}", f"--input={place / 'in.jsonl'}", "--slots=4",
            f"--output={place / name}"]


def train(place, name):
    return ["train", f"--model={place / 'model'}", f"--data={place / 'text.jsonl'}",
            f"--run={place / name}", f"--cache={place / 'cache'}", f"--steps={STEPS}", "--batch=8",
            "--seq_len=32", "--dtype=float32", "--log_every=5", f"--save_every={SAVE_EVERY}",
            "--eval_every=0", "--keep=9", "--export=never", "--workers=0"]


def run(place, processes, argv, log, devices=1):
    pod = LocalPod(processes, argv, place / log, devices)
    assert pod.wait() == 0, pod.said()
    return pod


def lost(pod, victim, processes=4):
    """Kills one process; checks that the others end in time and name it."""
    pod.kill(victim)
    began = time.monotonic()
    assert pod.wait(90) == 137, pod.said()
    seconds = time.monotonic() - began
    assert seconds < 60
    said = pod.said()
    for i in set(range(processes)) - {victim}:
        assert f"[{i}] ended with code 75" in said, said
        told = [line for line in said.splitlines() if line.startswith(f"[{i}] mmx: ")]
        assert len(told) == 1 and f"process {victim} on " in told[0], said
    print(f"process {victim} killed: all had ended {seconds:.1f} s later")
    return said


@pytest.fixture(scope="module")
def whole_batch(place):
    run(place, 1, batch(place, "whole.jsonl"), "log.whole")
    return (place / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("victim, processes", [(2, 4), (0, 4), (3, 2)])
def test_a_batch_loses_one_of_four_and_resumes(place, whole_batch, victim, processes):
    name = f"out.{victim}.{processes}"
    output = place / name
    pod = LocalPod(4, batch(place, name), place / f"log.{name}")
    pod.until(lambda: (output.with_name(f"{name}.partial-{victim}").exists()
                       and journalled(output) >= 4))
    lost(pod, victim)
    assert not output.exists() and journalled(output) < RECORDS
    run(place, processes, batch(place, name), f"log.{name}.again")
    assert output.read_bytes() == whole_batch
    assert not list(place.glob(f"{name}.partial-*")) and not list(place.glob(f"{name}*.tmp-*"))


def arrays(place, name, step=STEPS):
    directory = place / name / "checkpoints" / str(step)
    wanted = {key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
              for key, leaf in orbax_io._metadata(directory).items()}
    return {key: np.asarray(leaf) for key, leaf in orbax_io._load(directory, wanted).items()}


@pytest.fixture(scope="module")
def whole_run(place):
    run(place, 4, train(place, "whole"), "log.train")
    return arrays(place, "whole")


@pytest.mark.parametrize("victim", [1, 0])
def test_training_loses_one_of_four_and_resumes_to_the_same_bits(place, whole_run, victim):
    name = f"killed.{victim}"
    pod = LocalPod(4, train(place, name), place / f"log.{name}")
    pod.until((place / name / "checkpoints" / str(SAVE_EVERY)).exists)
    lost(pod, victim)
    assert not (place / name / "checkpoints" / str(STEPS)).exists()
    again = run(place, 4, train(place, name), f"log.{name}.again")
    assert "resuming" in again.said()
    state = arrays(place, name)
    assert state.keys() == whole_run.keys()
    for key, leaf in state.items():
        np.testing.assert_array_equal(leaf, whole_run[key], err_msg=key)
    steps = [json.loads(line)["step"] for line in
             (place / name / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(5, STEPS + 1, 5))


@pytest.mark.parametrize("devices", [1, 2])
def test_training_of_four_goes_on_with_two(place, whole_run, devices):
    name = f"fewer.{devices}"
    pod = LocalPod(4, train(place, name), place / f"log.{name}")
    pod.until((place / name / "checkpoints" / str(SAVE_EVERY)).exists)
    lost(pod, 3)
    again = run(place, 2, train(place, name), f"log.{name}.again", devices)
    assert "resuming" in again.said() and f"on {2 * devices} × cpu" in again.said()
    state = arrays(place, name)
    worst = max(assert_close(leaf, whole_run[key], "training", what=key)
                for key, leaf in state.items())
    print(f"2 × {devices} devices after 4 × 1: largest difference {worst:.1e} of the largest value")

"""Whole runs of a tiny model: learning, exact resume, clean stops, refusals."""

import dataclasses
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest

from mmx.errors import UserError
from mmx.train import loop, saving
from mmx.train.config import EvalConfig, OptimizerConfig, SourceConfig, TrainConfig
from mmx.train.report import Reporter
from tests.data.byte_tokenizer import ByteTokenizer, tokenizer_dir, write_jsonl
from tests.train import tiny

WORDS = "the river ran under an old bridge and the birds sang over it".split()


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Settings of a run of 20 steps, all sharing one compiled step."""
    folder = tmp_path_factory.mktemp("train")
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 40))) for _ in range(80)]
    train = write_jsonl(folder / "train.jsonl", texts)
    held = write_jsonl(folder / "held.jsonl", texts[:20])
    return TrainConfig(
        model="tiny", tokenizer=str(tokenizer_dir(folder / "tok")), run=str(folder / "whole"),
        cache=str(folder / "cache"), sources=(SourceConfig(files=str(train)),),
        evals=(EvalConfig(files=str(held), rows=4),), steps=20, batch=4, seq_len=48,
        dtype="float32", workers=0, log_every=5, eval_every=10, save_every=6, export="never",
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=5))


def train(config, model=tiny.CONFIG, tokenizer=None, on_start=None):
    return loop.train(config, model, tokenizer or ByteTokenizer(), on_start)


@pytest.fixture(scope="module")
def whole(settings):
    """An uninterrupted run: its outcome, and the state of its last checkpoint."""
    return train(settings), last_state(settings)


def last_state(config):
    run = loop._Run(config, tiny.CONFIG, ByteTokenizer())
    return jax.device_get(run.initial_state())


def assert_bits_equal(state, other):
    (one, rows), (two, other_rows) = state, other
    assert rows == other_rows and jax.tree.structure(one) == jax.tree.structure(two)
    for leaf, twin in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_array_equal(leaf, twin)


def records(config):
    return [json.loads(line) for line in open(f"{config.run}/metrics.jsonl")]


def test_a_run_learns_reports_and_keeps_its_last_checkpoints(settings, whole):
    outcome, (state, rows) = whole
    assert (outcome.why, outcome.step) == ("finished", 20) and rows == 80 and state.step == 20
    lines = records(settings)
    assert [line["step"] for line in lines] == [5, 10, 10, 15, 20, 20]
    assert lines[-1]["heldout/bits_per_byte"] < 0.8 * lines[2]["heldout/bits_per_byte"]
    assert lines[-1]["heldout/loss"] == pytest.approx(outcome.evaluation["heldout/loss"], rel=1e-4)
    assert lines[-2]["text/loss"] < lines[0]["text/loss"] and lines[-2]["tokens_per_second"] > 0
    kept = sorted(os.listdir(f"{settings.run}/checkpoints"), key=int)
    assert kept == ["18", "20"]
    assert train(settings).step == 20  # nothing is left to do


def test_a_terminated_run_resumes_to_the_same_bits(settings, whole, tmp_path, monkeypatch):
    config = dataclasses.replace(settings, run=str(tmp_path / "run"))
    write = Reporter.write

    def write_and_terminate(self, record):
        write(self, record)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "write", write_and_terminate)
        outcome = train(config)
    assert (outcome.why, outcome.step) == ("terminated", 5)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert train(config).why == "finished"
    assert_bits_equal(last_state(config), whole[1])
    drop = ("tokens_per_second", "tokens_left", "mfu")
    trim = lambda lines: [{k: v for k, v in line.items() if k not in drop}  # noqa: E731
                          for line in lines]
    assert [line["step"] for line in records(config)] == [5, 10, 10, 15, 20, 20]
    assert trim(records(config))[2:] == trim(records(settings))[2:]


def test_a_killed_run_resumes_from_its_last_whole_checkpoint(settings, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(settings.run, run)
    shutil.rmtree(run / "checkpoints" / "20")
    (run / "checkpoints" / ".20.tmp").mkdir()  # what a kill during a save leaves
    (run / "checkpoints" / ".20.tmp" / "half").write_text("x")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 2')
    config = dataclasses.replace(settings, run=str(run))
    assert saving.latest(run) == 18
    assert train(config).step == 20
    assert_bits_equal(last_state(config), whole[1])
    assert [line["step"] for line in records(config)] == [5, 10, 10, 15, 20, 20]


def test_settings_that_change_between_parts_are_told(settings, whole, tmp_path, capsys):
    config = dataclasses.replace(settings, run=str(tmp_path / "run"))
    shutil.copytree(settings.run, config.run)
    faster = dataclasses.replace(settings.optimizer, peak_lr=2e-2)
    assert train(dataclasses.replace(config, steps=21, batch=8, optimizer=faster)).step == 21
    told = [line for line in capsys.readouterr().err.splitlines() if " was " in line]
    assert told == ["batch was 4 and is 8 from step 21 on",
                    "steps was 20 and is 21 from step 21 on",
                    "Optimizer.peak_lr was 0.01 and is 0.02 from step 21 on"]
    with pytest.raises(UserError, match="is at step 21, beyond steps=20"):
        train(config)


def test_a_run_out_of_minutes_saves_and_goes_on(settings, whole, tmp_path, capsys):
    config = dataclasses.replace(settings, run=str(tmp_path / "run"), max_minutes=1e-6)
    outcome = train(config)
    assert capsys.readouterr().err.count("compiling the step …\n") == 1
    assert (outcome.why, outcome.step) == ("out of time", 1)
    assert saving.latest(tmp_path / "run") == 1
    assert train(dataclasses.replace(config, max_minutes=0.0)).why == "finished"
    assert_bits_equal(last_state(config), whole[1])


def test_export_loads_as_a_model_and_starts_another_run(settings, whole, tmp_path):
    from mmx.checkpoint import load_config, load_params

    config = dataclasses.replace(settings, run=str(tmp_path / "run"), export="end")
    shutil.copytree(settings.run, config.run)
    export = train(config).export
    assert load_config(str(export)) == tiny.CONFIG
    _, params = load_params(str(export), dtype="float32")
    for path, leaf in whole[1][0].params.items():
        rounded = np.asarray(leaf.astype("bfloat16"), np.float32)
        np.testing.assert_array_equal(np.asarray(params[path]), rounded)
    assert (export / "tokenizer.json").exists()
    again = dataclasses.replace(settings, run=str(tmp_path / "again"), init_from=str(export))
    state, rows = last_state(again)
    assert rows == 0 and state.step == 0
    np.testing.assert_array_equal(state.params["head/weight"], params["head/weight"])


def test_an_export_that_would_take_foreign_files_is_refused_at_the_start(settings, tmp_path):
    notes = tmp_path / "run" / "export" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(UserError, match="holds 'notes.txt'"):
        train(dataclasses.replace(settings, run=str(tmp_path / "run"), export="end"))
    assert notes.read_text() == "mine" and os.listdir(tmp_path / "run") == ["export"]


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(settings, tmp_path):
    rule = OptimizerConfig(peak_lr=1e38, warmup_steps=0)
    config = dataclasses.replace(settings, run=str(tmp_path / "run"), optimizer=rule)
    with pytest.raises(UserError, match=r"of step 2 is (nan|inf)"):
        train(config)
    assert saving.latest(tmp_path / "run") is None


def test_a_run_refuses_other_data_and_wrong_shapes(settings, whole, tmp_path):
    started = []
    with pytest.raises(UserError, match="another seq_len"):
        train(dataclasses.replace(settings, seq_len=32), on_start=lambda: started.append("other"))
    with pytest.raises(UserError, match="another data"):
        train(dataclasses.replace(settings, sources=(
            dataclasses.replace(settings.sources[0], weight=2.0),)))
    with pytest.raises(UserError, match="260 ids and the model 100"):
        train(settings, tiny.CONFIG.replace(vocab_size=100))
    with pytest.raises(UserError, match="No file matches"):
        train(dataclasses.replace(settings, sources=(SourceConfig(files="nowhere/*.txt"),)))

    class NoEnd(ByteTokenizer):
        eos_ids = ()

    with pytest.raises(UserError, match="end-of-sentence"):
        train(settings, tokenizer=NoEnd())
    with pytest.raises(UserError, match="no model"):
        loop.load_config(str(tmp_path / "nothing"))
    train(settings, on_start=lambda: started.append("same"))
    assert started == ["same"]

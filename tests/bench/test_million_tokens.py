"""benchmarks/million_tokens.py at small lengths: what it records, and that needles start anew."""

import json

import numpy as np
import pytest

import mmx
from benchmarks import million_tokens
from mmx.bench.timing import Method
from tests.tolerances import assert_close

LENGTHS = (512, 1024)


@pytest.fixture(scope="module")
def study_and_rows():
    # A reach below the longer length, so that it has a haystack before the needles.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(million_tokens, "REACH", 512)
        texts = million_tokens.prepare(LENGTHS, 2, 0)
        study = million_tokens.Study("float32", 256, texts, 0)
        study.compile(LENGTHS)
        yield study, [study.measure(length, Method(1, 0.001)) for length in LENGTHS]


def test_rows_tell_needles_speed_and_memory(study_and_rows):
    _, rows = study_and_rows
    for row, length in zip(rows, LENGTHS, strict=True):
        assert row["found"] == row["asked"] == 2
        assert all(0 < one["back"] <= 512 for one in row["needles"])
        assert row["prefill_tokens_per_s"] > 0
        for name in ("whole", "lightning", "softmax"):
            assert row[f"{name}_ms"] > 0, row[f"{name}_told"]
        # keys and values of one layer: 2 heads of 32, float32
        assert row["kv_bytes"] == 2 * 2 * 32 * 4 * (length + million_tokens.SPARE)
    assert rows[0]["state_bytes"] == rows[1]["state_bytes"] == 7 * 8 * 32 * 32 * 4
    # answers end within the length that they are counted for
    assert rows[1]["prefill_tokens"] > 512


def test_a_needle_read_after_others_is_as_if_read_alone(study_and_rows):
    study, _ = study_and_rows
    lm = mmx.load("nano", dtype="float32")
    prompt = np.asarray(lm.tokenizer.encode("The special magic Lisbon number is"))
    got_V = np.asarray(study._read(prompt.astype(np.int32)))[0]
    whole = np.concatenate([study._hay[:study._done], prompt])
    wanted_V = np.asarray(lm.logits(whole))[0, -1]
    assert_close(got_V, wanted_V, "split", "float32")


def test_the_command_writes_figures_table_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    # No time: lengths between the first and the last are left out.
    words = ["--lengths=256,272,288", "--chunk=256", "--needles=1", "--rounds=1", "--seconds=0",
             f"--output={tmp_path}"]
    assert million_tokens.main(words) == 0
    report = json.loads((tmp_path / "million_tokens.json").read_text())
    assert [row["tokens"] for row in report["rows"]] == [256, 288] and report["left_out"] == [272]
    (tmp_path / "million_tokens.png").unlink()
    assert million_tokens.main(["--plot", f"--output={tmp_path}"]) == 0
    assert million_tokens.HEAD.splitlines()[0] in (tmp_path / "million_tokens.md").read_text()
    assert (tmp_path / "million_tokens.png").stat().st_size > 10_000
    assert "1 of 1" in capsys.readouterr().out

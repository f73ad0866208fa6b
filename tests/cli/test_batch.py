"""`mmx batch` as a command: what a resume may change, and what is refused at the start."""

import json

import pytest


@pytest.fixture
def batch(mmx, checkpoint, tmp_path):
    """Runs it on three records in a folder of its own."""
    lines = [json.dumps({"id": i, "prompt": f"ab{i}", "max_tokens": 3}) for i in range(3)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")

    def run(*argv, output="out.jsonl"):
        return mmx("batch", f"--model={checkpoint}", f"--input={tmp_path / 'in.jsonl'}",
                   f"--output={tmp_path / output}", *argv)

    return run


def test_fewer_slots_go_on_and_another_dtype_does_not(batch, tmp_path):
    assert batch("--slots=4")[0] == 0
    code, _, err = batch("--slots=2", "--prefill_chunk=64", "--capacity=32")
    assert code == 0 and "slots was 4 and is 2" in err and "(3 before)" in err
    assert batch("--dtype=float32")[0] == 0  # what a CPU takes by itself
    code, _, err = batch("--dtype=bfloat16")
    assert code == 2 and "dtype was 'float32' and is 'bfloat16'" in err


def test_slots_that_no_memory_holds_are_refused_before_the_first_record(batch, tmp_path):
    code, _, err = batch("--slots=100000000")
    assert code == 2 and "of cache for 100000000 slot(s)" in err and "warning" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_errors_alone_end_with_1(batch, tmp_path):
    code, _, err = batch("--capacity=1")
    assert code == 1 and err.count("warning") == 2 and "3 errors" in err
    assert (tmp_path / "out.jsonl").exists()


def test_a_host_tells_its_own_share(batch, mmx, tmp_path):
    assert batch("--host=1", "--hosts=2")[0] == 0
    code, _, err = batch("--host=0", "--hosts=2")
    assert code == 0 and "answered 2 by this host, of 3 by all" in err
    assert f"wrote {tmp_path / 'out.jsonl'}: 3 records" in err
    code, _, err = batch("--host=0", "--hosts=2", "--distributed=on")
    assert code == 2 and "--host and --distributed=on exclude each other" in err

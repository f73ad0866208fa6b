import json

import pytest

from mmx.batch import journal
from mmx.errors import UserError


def fill(path, indexes):
    book = journal.Journal(path)
    for index in indexes:
        book.append(index, {"id": index, "text": f"ü{index}\n"})
    book.close()


def test_merge_is_in_input_order_and_takes_each_once(tmp_path):
    out = tmp_path / "out.jsonl"
    fill(journal.journal_path(out, 0), [4, 0, 2])
    fill(journal.journal_path(out, 1), [3, 1, 2])
    journal.merge(out, range(5))
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert "ü" in out.read_text()


def test_merge_of_a_missing_record_leaves_no_file(tmp_path):
    out = tmp_path / "out.jsonl"
    fill(journal.journal_path(out, 0), [0])
    with pytest.raises(KeyError):
        journal.merge(out, range(2))
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl.partial-0"]


def test_every_cut_of_the_last_line_is_recovered(tmp_path):
    out = tmp_path / "out.jsonl"
    path = journal.journal_path(out, 0)
    fill(path, [0, 1])
    first = path.read_bytes().index(b"\n") + 1
    whole = path.read_bytes()
    for cut in range(first, len(whole)):
        path.write_bytes(whole[:cut])
        fill(path, [2])
        assert journal.finished(out) == {0, 2}, cut


def test_lines_after_a_damaged_one_are_done_again(tmp_path):
    out = tmp_path / "out.jsonl"
    path = journal.journal_path(out, 0)
    fill(path, [0, 1, 2])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0" * len(lines[1]) + lines[2])
    assert journal.finished(out) == {0}
    fill(path, [1, 2])
    assert journal.finished(out) == {0, 1, 2}


def test_a_second_writer_is_refused(tmp_path):
    path = journal.journal_path(tmp_path / "out.jsonl", 0)
    book = journal.Journal(path)
    with pytest.raises(UserError, match="Another process is writing"):
        journal.Journal(path)
    book.close()
    journal.Journal(path).close()


def state(**settings):
    return {"input_sha256": "abc", "settings": {"model": "nano", "stop": ("x",), **settings}}


def test_claim_gives_the_first_state_to_all(tmp_path):
    out = tmp_path / "out.jsonl"
    first = journal.claim(out, {**state(), "started": 1})
    assert journal.claim(out, {**state(), "started": 2}) == first


@pytest.mark.parametrize("change, words", [
    ({"input_sha256": "abd"}, "input is not the one"),
    (state(model="other"), "model was 'nano' and is 'other'"),
    (state(seed=1), "seed was None and is 1"),
])
def test_claim_refuses_other_work(tmp_path, change, words):
    out = tmp_path / "out.jsonl"
    journal.claim(out, state())
    with pytest.raises(UserError, match=words) as caught:
        journal.claim(out, {**state(), **change})
    assert "--restart" in str(caught.value)


def test_claim_refuses_a_foreign_output(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine\n")
    with pytest.raises(UserError, match="exists and no batch state"):
        journal.claim(out, state())
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_claim_refuses_a_broken_state(tmp_path, text):
    out = tmp_path / "out.jsonl"
    journal.state_path(out).write_text(text)
    with pytest.raises(UserError, match="not a batch's state"):
        journal.claim(out, state())


def test_discard_leaves_other_files_alone(tmp_path):
    out = tmp_path / "out[1].jsonl"
    other = tmp_path / "out1.jsonl"
    other.write_text("")
    fill(journal.journal_path(other, 0), [0])
    fill(journal.journal_path(out, 0), [0])
    journal.claim(out, state())
    out.write_text("")
    (tmp_path / "out[1].jsonl.tmp-0123").write_text("half")
    journal.discard(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out1.jsonl", "out1.jsonl.partial-0"]

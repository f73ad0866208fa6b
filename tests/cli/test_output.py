"""Every verb looks at its output before it works: one sentence, and nothing left behind."""

import pytest

VERBS = {
    "generate": ("--prompt=a", "--max_tokens=2"),
    "batch": ("--input=IN",),
    "convert": (),
    "bench": ("kernels",),
}


def call(mmx, tmp_path, checkpoint, verb, output):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    words = [word.replace("IN", str(tmp_path / "in.jsonl")) for word in VERBS[verb]]
    model = [] if verb == "bench" else [f"--model={checkpoint}"]
    return mmx(verb, *words, *model, f"--output={output}")


@pytest.mark.parametrize("verb", VERBS)
def test_a_place_where_no_file_can_be_made(mmx, checkpoint, tmp_path, verb):
    code, out, err = call(mmx, tmp_path, checkpoint, verb, "/proc/new/x.jsonl")
    assert code == 2 and out == "" and "of --output cannot be written to" in err
    assert "ceiling" not in err and "loaded" not in err


@pytest.mark.parametrize("verb, words", [
    ("generate", "is not a file"), ("batch", "is not a file"), ("bench", "is not a folder"),
    ("convert", "is a file")])
def test_a_place_of_the_other_kind(mmx, checkpoint, tmp_path, verb, words):
    place = tmp_path / "taken"
    place.mkdir() if verb in ("generate", "batch") else place.write_text("mine")
    code, out, err = call(mmx, tmp_path, checkpoint, verb, place)
    assert code == 2 and out == "" and words in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "taken"]


def test_a_run_of_training(mmx, tmp_path):
    (tmp_path / "taken").write_text("mine")
    for run, words in ((tmp_path / "taken", "--run="), ("/proc/new", "of --run cannot be")):
        code, _, err = mmx("train", "--model=nano", f"--data={tmp_path / 'taken'}", f"--run={run}")
        assert code == 2 and words in err and "Errno" not in err

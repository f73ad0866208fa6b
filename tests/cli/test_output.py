"""Every verb looks at its output before it works: one sentence, and nothing left behind."""

import pytest

from mmx.errors import UserError

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


@pytest.mark.parametrize("flags, words", [
    (("--data=nowhere/*.txt",), "No file matches 'nowhere/*.txt'"),
    (("--data=broken.jsonl",), "broken.jsonl"),
    (("--data=text.txt", "--heldout=nowhere.txt"), "No file matches 'nowhere.txt'"),
    (("--data=text.txt", "--model=nano", "--tokenizer=none"), "none"),
    (("--data=text.txt", "--init_from=none"), "There is no model at 'none'"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_a_training_that_is_refused_leaves_nothing(mmx, checkpoint, tmp_path, monkeypatch, flags,
                                                   words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the river ran under an old bridge")
    (tmp_path / "broken.jsonl").write_text('{"text": 3}\n')
    before = sorted(tmp_path.iterdir())
    code, _, err = mmx("train", f"--model={checkpoint}", "--run=run", "--seq_len=16", *flags)
    left = [path for path in tmp_path.rglob("*") if path not in before]
    assert code == 2 and words in err
    if "--init_from=none" in flags:  # by then the text is tokenised, which is kept
        assert {path.relative_to(tmp_path).parts[:2] for path in left} == {("run",),
                                                                          ("run", "tokens")}
    else:
        assert left == []


def test_the_configuration_of_a_training_is_saved_when_it_starts(mmx, checkpoint, tmp_path,
                                                                 monkeypatch):
    saved = tmp_path / "run/config.gin"

    def train(config, model_config, tokenizer, on_start):
        assert not saved.exists()
        saved.parent.mkdir()
        on_start()
        raise UserError("The tiny run stops here.")

    monkeypatch.setattr("mmx.train.loop.train", train)
    (tmp_path / "text.txt").write_text("the river")
    code, _, _ = mmx("train", f"--model={checkpoint}", f"--data={tmp_path / 'text.txt'}",
                     f"--run={tmp_path / 'run'}", "--seq_len=16")
    assert code == 2 and "train.seq_len = 16" in saved.read_text()

"""What users get wrong: one sentence naming the thing, exit code 2, nothing half-written."""

import json
import os
import shutil

import numpy as np
import pytest

from tests import tiny


@pytest.fixture
def model(tmp_path):
    """A checkpoint of its own, to be damaged."""
    return tiny.write_checkpoint(tmp_path / "model", tiny.config(), shards=3)


def refused(mmx, model, *words, argv=("--prompt=ab",)):
    code, out, err = mmx("generate", f"--model={model}", "--max_tokens=2", *argv)
    assert code == 2 and out == "", (out, err)
    for word in words:
        assert word in err


def test_truncated_shard(mmx, model):
    shard = model / "model-00001-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    refused(mmx, model, shard.name)


def test_truncated_header(mmx, model):
    shard = model / "model-00002-of-00003.safetensors"
    os.truncate(shard, 20)
    refused(mmx, model, shard.name)


def test_missing_shard(mmx, model):
    (model / "model-00002-of-00003.safetensors").unlink()
    refused(mmx, model, "model-00002-of-00003.safetensors")


def test_wrong_dtype(mmx, tmp_path):
    path = tiny.write_checkpoint(tmp_path / "model", tiny.config(), dtype="int32")
    refused(mmx, path, "model.embed_tokens.weight: I32, not one of BF16, F16, F32")


def test_wrong_shape_and_missing_tensor_are_listed_together(mmx, tmp_path):
    config = tiny.config()
    weights = tiny.tensors(config)
    weights["model.norm.weight"] = weights["model.norm.weight"][:-1]
    del weights["lm_head.weight"]
    weights["model.extra.weight"] = np.zeros(3, np.float32)
    path = tiny.write_checkpoint(tmp_path / "model", config, weights=weights)
    refused(mmx, path, "model.norm.weight", "lm_head.weight", "model.extra.weight")


def test_missing_tokenizer(mmx, model):
    (model / "tokenizer.json").unlink()
    refused(mmx, model, "tokenizer")


def test_broken_tokenizer(mmx, model):
    (model / "tokenizer.json").write_text("{")
    refused(mmx, model, "tokenizer.json")


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama"}'])
def test_broken_config(mmx, model, text):
    (model / "config.json").write_text(text)
    refused(mmx, model)


@pytest.mark.parametrize("name, words", [
    ("/no/such/dir", "There is no model at '/no/such/dir'"),
    ("text01", "The preset 'text01' has no weights"),
    ("nanoo", "There is no model at 'nanoo'. A model is 'nano', a directory, or a hub id "
              "'org/name'. Did you mean 'nano'?"),
    ("text-01", "Did you mean 'text01'?"),
])
def test_no_model(mmx, name, words):
    refused(mmx, name, words)


def test_a_hub_that_gives_nothing(mmx, monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("Got: no such host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    refused(mmx, "org/name", "'org/name' is no directory here, and the hub did not give it: "
                             "no such host. A hub id needs the network,")


def test_unreadable_directory(mmx, model):
    (model / "config.json").unlink()
    (model / "config.json").mkdir()
    refused(mmx, model, "config.json")


def test_empty_prompt_file(mmx, model, tmp_path):
    (tmp_path / "p").write_text("\n")
    refused(mmx, model, "The prompt is empty.", argv=(f"--prompt_file={tmp_path / 'p'}",))


def test_prompt_that_is_not_utf8(mmx, model, tmp_path):
    (tmp_path / "p").write_bytes(b"ab\xff")
    refused(mmx, model, "not UTF-8 (byte 2)", argv=(f"--prompt_file={tmp_path / 'p'}",))


def test_prompt_beyond_the_set_capacity(mmx, model):
    refused(mmx, model, "The prompt has 40 tokens.", "16",
            argv=("--prompt=" + "x" * 40, "--capacity=16"))


def test_prompt_beyond_memory(mmx, model):
    refused(mmx, model, "of cache", "max_tokens", argv=("--prompt=ab", f"--max_tokens={10**12}"))


@pytest.mark.parametrize("argv", [(), ("--quantize=int8",)])
def test_weights_beyond_memory(mmx, argv):
    refused(mmx, "text01", "The weights of text01 need 1.82 TB in float32.", "are available",
            argv=("--prompt=ab", "--random_weights", *argv))


def test_checkpoint_beyond_memory(mmx, model, monkeypatch):
    monkeypatch.setattr("mmx.engine.memory.available_bytes", lambda devices=None: 10_000)
    refused(mmx, model, f"The weights of {model} need", "10 kB are available.")


def test_chat_with_a_tokenizer_without_turns(mmx, model):
    text = json.loads((model / "tokenizer.json").read_text())
    text["added_tokens"] = [one for one in text["added_tokens"]
                            if one["content"] != tiny.BEGIN]
    (model / "tokenizer.json").write_text(json.dumps(text))
    refused(mmx, model, tiny.BEGIN, argv=("--prompt=ab", "--chat"))


def test_inspect_lists_what_is_wrong(mmx, model):
    shard = model / "model-00001-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    code, out, err = mmx("inspect", f"--model={model}", "--check")
    assert code == 2 and out == "" and shard.name in err
    code, out, _ = mmx("inspect", f"--model={model}", "--check", "--json")
    assert code == 2 and json.loads(out)["problems"]


def test_failed_conversion_leaves_nothing(mmx, model, tmp_path):
    shard = model / "model-00001-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1000)
    before = sorted(tmp_path.iterdir())
    code, _, err = mmx("convert", f"--model={model}", f"--output={tmp_path / 'out'}")
    assert code == 2 and shard.name in err and sorted(tmp_path.iterdir()) == before


def test_conversion_onto_other_files(mmx, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    code, _, err = mmx("convert", f"--model={model}", f"--output={tmp_path / 'out'}")
    assert code == 2 and "not empty" in err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_output_that_cannot_be_written(mmx, model):
    refused(mmx, model, "The folder '/no/such/dir' of --output",
            argv=("--prompt=ab", "--output=/no/such/dir/x"))


def test_batch_with_a_broken_line(mmx, model, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": \n'
                      '{"id": "c", "prompt": "y", "top_k": -1}\n{"id": "d", "prompt": "z"}\n'
                      '{"id": "e", "prompt": ""}\n')
    code, _, err = mmx("batch", f"--model={model}", f"--input={source}", f"--output={target}",
                       "--max_tokens=3", "--capacity=16")
    assert code == 0
    for words in ("warning: line 2: The line is not JSON", "warning: line 3: top_k=-1",
                  "warning: line 5: The prompt is empty", "3 errors"):
        assert words in err
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", None, "c", "d", "e"]
    assert ["error" in line for line in lines] == [False, True, True, False, True]


def test_batch_of_a_missing_model_leaves_nothing_to_resume_wrongly(mmx, model, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "x", "max_tokens": 2}\n')
    moved = shutil.move(model, tmp_path / "elsewhere")
    argv = ("batch", f"--model={model}", f"--input={source}", f"--output={target}")
    code, _, err = mmx(*argv)
    assert code == 2 and "There is no model" in err and not target.exists()
    shutil.move(moved, model)
    assert mmx(*argv)[0] == 0 and target.exists()

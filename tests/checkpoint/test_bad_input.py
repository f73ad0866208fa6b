"""What is wrong with a checkpoint is said once, in whole, in sentences."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mmx.checkpoint import hf_files, load_config, load_params, locate
from mmx.checkpoint.hf_files import read_header
from mmx.errors import UserError
from tests import tiny


@pytest.fixture
def directory(tmp_path, config):
    return tiny.write_checkpoint(tmp_path / "model", config, shards=4)


def message(directory, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_params(directory, **kwargs)
    assert caught.value.fix and caught.value.rule
    return str(caught.value)


def rewrite(directory, change):
    """Applies `change` to all tensors and stores them as one file."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_everything_wrong_is_in_one_error(directory):
    def change(tensors):
        del tensors["model.norm.weight"]
        del tensors["model.layers.3.self_attn.q_proj.weight"]
        tensors["model.layers.0.self_attn.extra"] = np.ones(2, np.float32)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].copy()
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].astype(np.int32)
        tensors["model.layers.1.mlp.gate.weight"] = np.ones((4, 48), np.float32)

    rewrite(directory, change)
    text = message(directory)
    assert "missing: model.norm.weight" in text
    assert "missing: model.layers.3.self_attn.q_proj.weight" in text
    assert "unknown: model.layers.0.self_attn.extra" in text
    assert "wrong shape: lm_head.weight: [271, 48] in the file, [272, 48] by the config" in text
    assert "wrong dtype: model.embed_tokens.weight: I32" in text
    assert "twice: " in text and "model.layers.1.mlp.gate.weight" in text
    assert str(directory) in text


def test_many_are_counted(directory):
    rewrite(directory, lambda tensors: [tensors.pop(name) for name in list(tensors)
                                        if ".experts." in name])
    text = message(directory)
    assert text.count("missing: ") == 21 and "and 88 more" in text


def test_truncated_shard(directory):
    shard = sorted(directory.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1000])
    text = message(directory)
    assert f"{shard.name}: truncated" in text and "missing" not in text


def test_header_of_a_shard_is_cut(directory):
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:200])
    assert f"{shard.name}: it ends within its header" in message(directory)


def test_missing_shard(directory):
    shard = sorted(directory.glob("*.safetensors"))[0]
    shard.unlink()
    assert f"{shard.name}: the file is missing" in message(directory)


def test_index_that_lies(directory):
    index = directory / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    files = sorted(set(content["weight_map"].values()))
    content["weight_map"]["lm_head.weight"] = files[0]
    index.write_text(json.dumps(content))
    assert f"lm_head.weight: model.safetensors.index.json places it in {files[0]}" in message(
        directory)


def test_same_tensor_in_two_loose_shards(directory):
    rewrite(directory, lambda tensors: None)
    save_file({"model.norm.weight": np.ones(48, np.float32)}, directory / "other.safetensors")
    assert "model.norm.weight: in both" in message(directory)


@pytest.mark.parametrize("field, value", [("num_layers", 8), ("expert_dim", 16)])
def test_config_of_another_model(directory, config, field, value):
    other = (config.replace(layer_types=config.layer_types[:value]) if field == "num_layers"
             else config.replace(**{field: value}))
    text = message(directory, config=other)
    assert ("unknown: model.layers.8." if field == "num_layers" else "wrong shape: ") in text


def test_no_weights(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    assert "holds no weights" in message(tmp_path)


def test_no_config(tmp_path):
    save_file({"x": np.ones(1, np.float32)}, tmp_path / "model.safetensors")
    assert "is not a model directory" in message(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_config_that_is_not_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="config.json"):
        load_config(tmp_path)


def test_a_file_instead_of_a_directory(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="Give its directory"):
        locate(tmp_path / "x")


@pytest.mark.parametrize("name", ["no-such-model", "./no/such", "/no/such", "a b/c", ""])
def test_nothing_there(name):
    with pytest.raises(UserError, match="no model at|not a model directory"):
        locate(name)


def test_presets_without_weights():
    with pytest.raises(UserError, match="preset 'text01' has no weights"):
        locate("text01")


def test_hub_without_network(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def refuse(*args, **kwargs):
        raise OSError("no route to the hub\nmore")

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=r"'org/name' is no directory.*no route to the hub\. A hub"):
        locate("org/name")


def test_hub_gets_only_what_is_needed(monkeypatch, tmp_path, config):
    hub = pytest.importorskip("huggingface_hub")
    tiny.write_checkpoint(tmp_path, config)
    asked = {}

    def download(repo, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert load_config("org/name@abc123") == config
    assert asked["repo"] == "org/name" and asked["revision"] == "abc123"
    assert "*.safetensors" not in asked["patterns"] and "config.json" in asked["patterns"]
    assert locate("org/name") == tmp_path and "*.safetensors" in asked["patterns"]


def test_unreadable_directory(directory, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(type(directory), "is_dir", refuse)
    assert "cannot be read (Permission denied)" in message(directory)


def test_unreadable_shard(directory, monkeypatch):
    """Opened as root everything is readable, so the system's answer is put in its mouth."""
    shard = sorted(directory.glob("*.safetensors"))[1]

    def refuse(path):
        if path == shard:
            raise PermissionError(13, "Permission denied", str(path))
        return read_header(path)

    monkeypatch.setattr(hf_files, "read_header", refuse)
    assert f"{shard.name}: it cannot be read (Permission denied)" in message(directory)

"""Writing the published layouts, and converting between them."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from mmx.checkpoint import convert, hf_export, load_config, load_params, orbax_io, save_hf
from mmx.checkpoint.hf_export import plan_shards, shard_names
from mmx.checkpoint.hf_names import LAYOUTS, entries
from mmx.config import ModelConfig
from mmx.errors import UserError
from mmx.quant import dequantize_params
from tests import tiny
from tests.checkpoint.test_import import assert_same

INDEX = "model.safetensors.index.json"


def stored(directory) -> dict:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def assert_bits(actual, wanted):
    assert set(actual) == set(wanted)
    for name, x in wanted.items():
        assert actual[name].dtype == x.dtype and actual[name].shape == x.shape, name
        assert actual[name].tobytes() == np.ascontiguousarray(x).tobytes(), name


def in_layout(tensors, layout, dtype):
    tensors = tiny.to_transformers(tensors) if layout == "transformers" else tensors
    return {name: x.astype(dtype) for name, x in tensors.items()}


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 100_000])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_is_bit_exact(checkpoints, config, tensors, tmp_path, layout, max_shard_bytes):
    _, params = load_params(checkpoints["original"], dtype="float32")
    save_hf(tmp_path / "out", config, params, layout, "float32", max_shard_bytes=max_shard_bytes)
    assert_bits(stored(tmp_path / "out"), in_layout(tensors, layout, np.float32))
    found, again = load_params(tmp_path / "out", dtype="float32")
    assert found == config
    assert_same(again, params)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bfloat16_is_the_cast(checkpoints, config, tensors, tmp_path, layout):
    _, params = load_params(checkpoints["original"], dtype="bfloat16")
    save_hf(tmp_path / "out", config, params, layout)
    assert_bits(stored(tmp_path / "out"), in_layout(tensors, layout, ml_dtypes.bfloat16))
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["torch_dtype"] == "bfloat16" and hf["model_type"] == tiny.DIALECTS[layout]


def test_int8_is_multiplied_out(checkpoints, config, tmp_path):
    _, params = load_params(checkpoints["original"], dtype="float32", quantize="int8")
    save_hf(tmp_path / "out", config, params, "transformers", "float32")
    _, again = load_params(tmp_path / "out", dtype="float32")
    assert_same(again, dequantize_params(params, "float32"))


def test_shards_index_and_texts(checkpoints, config, tmp_path):
    _, params = load_params(checkpoints["original"])
    for layout, first in (("original", 0), ("transformers", 1)):
        out = save_hf(tmp_path / layout, config, params, layout, max_shard_bytes=100_000,
                      tokenizer_dir=checkpoints["original"])
        shards = sorted(path.name for path in out.glob("*.safetensors"))
        count = len(shards)
        assert count > 3
        assert shards == [f"model-{first + i:05d}-of-{count:05d}.safetensors"
                          for i in range(count)]
        index = json.loads((out / INDEX).read_text())
        for name, file in index["weight_map"].items():
            assert name in load_file(out / file)
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in stored(out).values())
        assert all((out / name).stat().st_size <= 100_000 + 20_000 or len(load_file(out / name))
                   == 1 for name in shards)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (out / name).read_bytes() == (checkpoints["original"] / name).read_bytes()
        assert json.loads((out / "generation_config.json").read_text()) == {
            "eos_token_id": tiny.END_ID}


def test_release_is_cut_into_shards_as_named():
    names = shard_names(413, "original")
    assert (names[0], names[-1]) == ("model-00000-of-00413.safetensors",
                                     "model-00412-of-00413.safetensors")
    assert shard_names(1, "transformers") == ["model.safetensors"]
    shards = plan_shards(entries(ModelConfig(layer_types=("softmax",) * 3)), 2, 10**9)
    assert sum(map(len, shards)) == len(entries(ModelConfig(layer_types=("softmax",) * 3)))


def test_writing_needs_little_memory(checkpoints, config, tmp_path, monkeypatch):
    """The blocks asked for stay within a sixteenth of the bound, whatever the tensor's size."""
    _, params = load_params(checkpoints["original"], dtype="float32")
    read, sizes = hf_export.ArrayReader.__call__, []

    def counting(self, path, region):
        block = read(self, path, region)
        sizes.append(block.size)
        return block

    monkeypatch.setattr(hf_export.ArrayReader, "__call__", counting)
    monkeypatch.setattr(hf_export, "check_host_bytes", lambda value: None)
    save_hf(tmp_path / "out", config, params, "transformers", "float32", max_host_bytes=16 * 500)
    assert max(sizes) <= 500 and len(sizes) > 500
    assert_same(load_params(tmp_path / "out", dtype="float32")[1], params)


def test_an_interrupted_writer_leaves_nothing(checkpoints, config, tmp_path):
    _, params = load_params(checkpoints["original"])
    calls = []

    def stop(done, total):
        calls.append(done)
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_hf(tmp_path / "out", config, params, progress=stop)
    assert calls and not list(tmp_path.iterdir())


def test_targets_that_are_taken(checkpoints, config, tmp_path):
    _, params = load_params(checkpoints["original"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        save_hf(tmp_path / "file", config, params)
    out = tmp_path / "out"
    out.mkdir()
    save_hf(out, config, params)
    with pytest.raises(UserError, match="not empty"):
        save_hf(out, config, params)
    stale = out / "model-00007-of-00009.safetensors"
    stale.write_text("")
    save_hf(out, config, params, "transformers", overwrite=True)
    assert not stale.exists() and load_config(out) == config
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


@pytest.mark.parametrize("layout", [*LAYOUTS, "orbax"])
def test_only_a_checkpoint_is_overwritten(checkpoints, tmp_path, layout):
    """Whatever a writer makes is replaced; anything else beside it is kept, and nothing is read."""
    out = tmp_path / "out"
    for _ in range(2):
        convert(checkpoints["original"], out, layout=layout, max_shard_bytes=100_000,
                overwrite=True)
    for name in ("notes.txt", "adapter.safetensors", "arrays/x.npy", "src/main.py"):
        path = out / name
        if layout == "orbax" and name.startswith("arrays"):
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = sorted(out.rglob("*"))
        with pytest.raises(UserError, match=f"holds '{name.split('/')[0]}', which is no part"):
            convert("no/such/model", out, layout=layout, overwrite=True)
        assert sorted(out.rglob("*")) == before
        path.unlink()
        if path.parent != out:
            path.parent.rmdir()


def test_the_folder_that_one_is_in_is_not_overwritten(checkpoints, config, tmp_path, monkeypatch):
    _, params = load_params(checkpoints["original"])
    home, work = tmp_path / "home", tmp_path / "project" / "work"
    home.mkdir()
    work.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    for target in (".", "..", "../work", work, tmp_path, "/", home):
        with pytest.raises(UserError, match="(working|home) directory, or above it"):
            save_hf(target, config, params, overwrite=True)
        with pytest.raises(UserError, match="(working|home) directory, or above it"):
            orbax_io.save_model(target, config, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "project"]
    assert not list(work.iterdir()) and not list(home.iterdir())


def test_place_that_cannot_be_written(checkpoints, config, tmp_path):
    _, params = load_params(checkpoints["original"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_hf(tmp_path / "file" / "out", config, params)


@pytest.mark.parametrize("kwargs, named", [({"layout": "keras"}, "keras"),
                                           ({"dtype": "int8"}, "int8")])
def test_what_cannot_be_written(checkpoints, config, tmp_path, kwargs, named):
    _, params = load_params(checkpoints["original"])
    with pytest.raises(UserError, match=named):
        save_hf(tmp_path / "out", config, params, **kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conversion_is_bit_exact_and_loads_nothing(checkpoints, tensors, tmp_path, monkeypatch,
                                                   source, layout):
    monkeypatch.setattr("mmx.checkpoint.conversion.load_params", None)
    summary = convert(checkpoints[source], tmp_path / "out", layout=layout)
    assert_bits(stored(tmp_path / "out"), in_layout(tensors, layout, np.float32))
    assert summary["dtype"] == "float32" and summary["parameters"] == sum(
        x.size for x in tensors.values())
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_conversion_through_orbax(checkpoints, tensors, tmp_path, config):
    convert(checkpoints["transformers"], tmp_path / "orbax", layout="orbax")
    convert(tmp_path / "orbax", tmp_path / "out", layout="original")
    assert_bits(stored(tmp_path / "out"), in_layout(tensors, "original", np.float32))
    assert load_config(tmp_path / "orbax") == load_config(tmp_path / "out") == config
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_conversion_to_int8_orbax(checkpoints, tmp_path):
    convert(checkpoints["original"], tmp_path / "int8", layout="orbax", quantize="int8")
    _, params = load_params(tmp_path / "int8", dtype="float32")
    assert_same(params, load_params(checkpoints["original"], dtype="float32", quantize="int8")[1])


@pytest.mark.parametrize("kwargs, named", [
    ({"layout": "gguf"}, "gguf"), ({"quantize": "int8"}, "cannot hold int8"),
    ({"quantize": "int3", "layout": "orbax"}, "int3")])
def test_conversions_that_are_refused(checkpoints, tmp_path, kwargs, named):
    with pytest.raises(UserError, match=named):
        convert(checkpoints["original"], tmp_path / "out", **kwargs)
    assert not list(tmp_path.iterdir())


def test_conversion_of_a_broken_checkpoint_leaves_nothing(config, tmp_path):
    source = tiny.write_checkpoint(tmp_path / "in", config)
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]

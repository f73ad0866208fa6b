"""Tensor tables, with and without weights."""

import json

import pytest

from mmx.checkpoint.inspect import inspect, tensor_table
from mmx.config import preset
from mmx.errors import UserError
from tests import tiny


@pytest.mark.parametrize("layout, count", [("original", 8243), ("transformers", 723)])
def test_release_needs_no_weights(layout, count):
    report = inspect("text01", layout)
    assert not report.checked and len(report.tensors) == count
    assert report.parameters == 456_089_655_296 and report.bytes == 912_179_310_592
    assert report.config == preset("text01")
    json.dumps(report.to_json())


def test_table_of_a_preset_by_name():
    table = tensor_table("period", "transformers", "float32")
    by_name = {tensor.name: tensor for tensor in table}
    gate = by_name["model.layers.7.mlp.gate.weight"]
    assert (gate.shape, gate.dtype, gate.bytes, gate.layer) == ((32, 6144), "float32",
                                                                32 * 6144 * 4, 7)
    assert by_name["lm_head.weight"].layer is None


@pytest.mark.parametrize("layout", tiny.DIALECTS)
def test_files_are_listed_as_they_are(checkpoints, config, layout):
    report = inspect(checkpoints[layout])
    assert report.checked and not report.problems
    plain = [tensor for tensor in report.tensors if not tensor.name.endswith(
        ("slope_rate", "query_decay", "key_decay", "diagonal_decay"))]
    assert {(t.name, t.shape, t.dtype, t.bytes, t.layer) for t in plain} == {
        (t.name, t.shape, t.dtype, t.bytes, t.layer)
        for t in tensor_table(config, layout, "float32")}
    assert len(report.tensors) == len(plain) + 4 * config.num_lightning_layers
    assert any("decay" in note for note in report.notes)


def test_directory_in_another_layout(checkpoints, config):
    report = inspect(checkpoints["original"], "transformers")
    assert report.tensors == tensor_table(config, "transformers") and not report.checked


def test_problems_are_listed_not_raised(tmp_path, config):
    weights = tiny.tensors(config)
    del weights["model.norm.weight"]
    weights["extra"] = weights["lm_head.weight"]
    tiny.write_checkpoint(tmp_path, config, weights=weights)
    report = inspect(tmp_path)
    assert report.problems == {"missing": ["model.norm.weight"], "unknown": ["extra"]}
    assert json.loads(json.dumps(report.to_json()))["problems"] == report.problems


def test_orbax_checkpoint(checkpoints, tmp_path, config):
    from mmx.checkpoint import convert

    convert(checkpoints["original"], tmp_path / "o", layout="orbax", quantize="int8")
    report = inspect(tmp_path / "o")
    kinds = {tensor.name: tensor.dtype for tensor in report.tensors}
    assert kinds["embed/weight"] == "float32"
    assert kinds["stack/0/0/attn/qkv/values"] == "int8"
    assert kinds["stack/0/0/attn/qkv/scale"] == "float32"
    assert report.checked and not report.problems
    other = config.replace(vocab_size=7).to_hf()
    (tmp_path / "o" / "mmx_config.json").write_text(json.dumps(other))
    assert list(inspect(tmp_path / "o").problems) == ["wrong shape"]


def test_nothing_there():
    with pytest.raises(UserError, match="no model at"):
        inspect("text02")

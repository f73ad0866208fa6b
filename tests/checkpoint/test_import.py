"""Loading: right values in every layout, dtype and sharding; int8 on the way; bounded memory."""

import json
import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import import_memory
from mmx.checkpoint import hf_import, load_config, load_params
from mmx.checkpoint.hf_source import HfSource
from mmx.errors import UserError
from mmx.model import param_specs
from mmx.quant import contracted_axes, quantize_params, turned_back
from pallas_kernels.quantized import QuantizedTensor
from tests import tiny
from tests.checkpoint import expected


def assert_same(actual, wanted):
    assert set(actual) == set(wanted)
    for path, value in wanted.items():
        for a, b in zip(jax.tree.leaves(actual[path]), jax.tree.leaves(value), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, path
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


@pytest.mark.parametrize("layout", tiny.DIALECTS)
def test_values_are_those_put_together_by_hand(checkpoints, config, tensors, layout):
    found, params = load_params(checkpoints[layout], dtype="float32")
    assert found == config and list(params) == list(param_specs(config))
    assert_same(params, expected.params(config, tensors))


@pytest.mark.parametrize("stored, dtype", [("float32", "bfloat16"), ("bfloat16", "float32"),
                                           ("float16", "float32"), ("bfloat16", "bfloat16")])
def test_dtypes_are_cast(tmp_path, config, tensors, stored, dtype):
    tiny.write_checkpoint(tmp_path, config, seed=3, dtype=stored)
    _, params = load_params(tmp_path, dtype=dtype)
    kind = {"bfloat16": ml_dtypes.bfloat16}
    assert_same(params, {
        path: x.astype(kind.get(stored, stored)).astype(kind.get(dtype, dtype))
        for path, x in expected.params(config, tensors).items()})


def test_wrapped_and_mixed_names(tmp_path, config, tensors, caplog):
    """A vision wrapper's prefix, one fused layer among per-expert ones, tables, a vision tower."""
    fused = tiny.to_transformers(tensors)
    mixed = {name: x for name, x in tensors.items() if not name.startswith("model.layers.2.")}
    mixed |= {name: x for name, x in fused.items() if name.startswith("model.layers.2.")}
    mixed |= tiny.decay_buffers(config)
    mixed = {f"language_model.{name}": x for name, x in mixed.items()}
    mixed["vision_tower.vision_model.pre_layrnorm.bias"] = np.ones(3, np.float32)
    mixed["image_newline"] = np.ones(3, np.float32)
    save_file(mixed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(
        {"model_type": "minimax_vl_01", "text_config": config.to_hf()}))
    with caplog.at_level(logging.INFO):
        _, params = load_params(tmp_path, dtype="float32")
    assert_same(params, expected.params(config, tensors))
    assert "2 tensors of the vision tower" in caplog.text and "decay" in caplog.text


def test_int8_equals_quantising_the_loaded_weights(checkpoints):
    _, whole = load_params(checkpoints["original"], dtype="float32")
    for layout in tiny.DIALECTS:
        _, params = load_params(checkpoints[layout], dtype="float32", quantize="int8")
        assert_same(params, quantize_params(whole))


@pytest.mark.parametrize("on_host", [True, False], ids=["host buffers", "device buffers"])
@pytest.mark.parametrize("quantize, turned", [(None, None), ("int8", None), ("int8", True)])
def test_pieces_of_any_size_give_the_same(tmp_path, monkeypatch, on_host, quantize, turned):
    """Even row by row, and written into device memory piece by piece, as on an accelerator."""
    tiny.write_checkpoint(tmp_path, tiny.config(2, 2, vocab_size=40, num_experts=2),
                          layout="transformers")
    _, whole = load_params(tmp_path, dtype="float32", quantize=quantize)
    make = hf_import._jobs
    monkeypatch.setattr(hf_import, "lives_on_host", lambda device: on_host)
    monkeypatch.setattr(hf_import, "_jobs", lambda *args: make(*args[:-1], 3000))
    _, params = load_params(tmp_path, dtype="float32", quantize=quantize, turned=turned)
    assert_same(turned_back(params), whole)


def test_progress_counts_every_element_once(checkpoints, config):
    seen = []
    load_params(checkpoints["original"], progress=lambda done, total: seen.append((done, total)))
    total = sum(spec.size for spec in param_specs(config).values())
    assert seen[-1] == (total, total) and seen == sorted(seen)


def test_each_byte_is_read_once(checkpoints, config):
    with HfSource(config, checkpoints["original"]) as source:
        hf_import.import_params(source, dtype="bfloat16")
        assert source.reader.bytes_read == 4 * sum(s.size for s in param_specs(config).values())


def test_shardings_may_be_a_function_of_the_config(checkpoints, config):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    _, params = load_params(checkpoints["original"],
                            shardings=lambda c: {"embed/weight": device} if c == config else None)
    assert params["embed/weight"].sharding == device


def test_end_tokens_come_from_the_generation_config(tmp_path, config):
    tiny.write_checkpoint(tmp_path, config.replace(eos_token_ids=()))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert load_config(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "5"}')
    with pytest.raises(UserError, match="eos_token_id"):
        load_config(tmp_path)


def test_int8_of_what_is_not_finite_is_refused(tmp_path, config):
    weights = tiny.tensors(config)
    name = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    weights[name][3, 4] = np.inf
    tiny.write_checkpoint(tmp_path, config, weights=weights)
    with pytest.raises(UserError, match="experts.2.w2.weight"):
        load_params(tmp_path, quantize="int8")


@pytest.mark.parametrize("max_host_mib, gigabytes", [(16, 0.2)])
def test_import_stays_within_its_memory(tmp_path, max_host_mib, gigabytes):
    """Peak over the process's size before: at most the int8 result + 2 × max_host_bytes."""
    figures = import_memory.run(gigabytes, max_host_mib << 20, tmp_path, shard_bytes=50_000_000)
    assert figures["checkpoint_bytes"] > 0.9e9 * gigabytes
    assert figures["result_bytes"] < 0.6 * figures["checkpoint_bytes"]
    assert figures["peak_bytes"] <= figures["bound_bytes"], figures


@pytest.mark.parametrize("value", [0, 1 << 20])
def test_too_little_memory_is_refused(checkpoints, value):
    with pytest.raises(UserError, match="max_host_bytes"):
        load_params(checkpoints["original"], max_host_bytes=value)


def test_unknown_quantisation_is_refused(checkpoints):
    with pytest.raises(UserError, match="int4"):
        load_params(checkpoints["original"], quantize="int4")


def test_int8_error_is_at_most_half_a_step(checkpoints):
    _, whole = load_params(checkpoints["original"], dtype="float32")
    _, params = load_params(checkpoints["original"], dtype="float32", quantize="int8")
    quantized = {path for path, x in params.items() if isinstance(x, QuantizedTensor)}
    assert quantized == {path for path in whole if contracted_axes(path)}
    assert not any(path.endswith(("router", "norm/weight")) or path.startswith(("embed", "head"))
                   for path in quantized)
    for path in quantized:
        scale = np.asarray(params[path].scale)
        error = np.asarray(params[path].values) * scale - np.asarray(whole[path])
        assert (np.abs(error) <= 0.5001 * scale).all()
        assert scale.shape == tuple(1 if i in contracted_axes(path) else n
                                    for i, n in enumerate(whole[path].shape))
        assert jnp.asarray(params[path].values).max() == 127



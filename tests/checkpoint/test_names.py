"""The table of parameters and published tensors (conformance test 9 of the specification)."""

import hashlib

import numpy as np
import pytest

from mmx.checkpoint.hf_names import LAYOUTS, canonical, entries, layer_of, match
from mmx.config import hybrid_pattern, preset
from mmx.errors import UserError
from mmx.model import param_specs
from tests import tiny

# SHA-256 of the sorted tensor names of MiniMax-VL-01, joined by newlines.
VL_DIGEST = "d0caf1b714cdfc4caa65b56cbec591668d77b0e2a5d6cf3b5af169531311c886"


def vision_names():
    tower = "vision_tower.vision_model."
    names = [f"{tower}embeddings.{name}" for name in (
        "class_embedding", "patch_embedding.weight", "position_embedding.weight")]
    both = ("weight", "bias")
    names += [f"{tower}pre_layrnorm.{part}" for part in both]
    names += [f"{tower}encoder.layers.{i}.{name}.{part}" for i in range(24) for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
        "layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2") for part in both]
    names += [f"multi_modal_projector.linear_{i}.{part}" for i in (1, 2) for part in both]
    return [*names, "image_newline"]


def test_release_has_8243_names_and_the_published_digest():
    text = [entry.name for entry in entries(preset("text01"))]
    assert len(text) == len(set(text)) == 8243
    names = [f"language_model.{name}" for name in text] + vision_names()
    assert len(names) == 8637
    assert hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest() == VL_DIGEST


def test_vision_wrapper_matches_whole():
    names = [f"language_model.{entry.name}" for entry in entries(preset("text01"))]
    found = match(preset("text01"), names + vision_names())
    assert len(found.found) == 8243 and len(found.vision) == 394
    assert not (found.missing or found.unknown or found.ignored or found.doubled)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_release_has_456_billion_parameters(layout):
    assert sum(entry.size for entry in entries(preset("text01"), layout)) == 456_089_655_296
    assert sum(spec.size for spec in param_specs(preset("text01")).values()) == 456_089_655_296


def test_release_shapes():
    shapes = {entry.name: entry.shape for entry in entries(preset("text01"))}
    assert shapes["model.embed_tokens.weight"] == (200064, 6144)
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (24576, 6144)
    assert shapes["model.layers.0.self_attn.out_proj.weight"] == (6144, 8192)
    assert shapes["model.layers.7.self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)
    fused = {entry.name: entry.shape for entry in entries(preset("text01"), "transformers")}
    assert fused["model.layers.3.mlp.experts.gate_up_proj"] == (32, 18432, 6144)
    assert fused["model.layers.3.mlp.experts.down_proj"] == (32, 6144, 9216)
    assert fused["model.layers.3.mlp.gate.weight"] == (32, 6144)


PATTERNS = {"hybrid16": hybrid_pattern(16), "hybrid13": hybrid_pattern(13),
            "softmax": ("softmax",) * 3, "alternating": ("softmax", "lightning") * 2,
            "irregular": ("lightning", "softmax", "softmax", "lightning", "lightning")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("types", PATTERNS.values(), ids=PATTERNS)
def test_every_element_of_every_parameter_is_in_one_tensor(types, layout):
    config = tiny.config(num_layers=len(types), layer_types=types, num_heads=6, num_kv_heads=3)
    counts = {path: np.zeros(spec.shape, np.int8) for path, spec in param_specs(config).items()}
    for entry in entries(config, layout):
        place = tuple(entry.at.get(axis, slice(None)) for axis in entry.param_axes)
        part = counts[entry.path][place]
        assert sorted(part.shape) == sorted(entry.view)
        assert part.size == entry.size
        part += 1
    assert all((count == 1).all() for count in counts.values())


def test_layouts_may_be_mixed_layer_by_layer():
    config = tiny.config()
    original, fused = (entries(config, layout) for layout in LAYOUTS)
    names = [e.name for e in original if e.layer != 2] + [e.name for e in fused if e.layer == 2]
    found = match(config, names)
    assert not (found.missing or found.unknown or found.doubled)
    assert {name for name, _ in found.found} == set(names)


def test_native_wrapper_prefix():
    assert canonical("model.language_model.layers.1.mlp.gate.weight") == canonical(
        "language_model.model.layers.1.block_sparse_moe.gate.weight") == (
        "model.layers.1.block_sparse_moe.gate.weight")


def test_missing_names_come_in_the_layout_of_the_rest():
    config = tiny.config()
    for layout, name in (("original", "model.layers.1.block_sparse_moe.experts.3.w3.weight"),
                         ("transformers", "model.layers.1.mlp.experts.gate_up_proj")):
        names = [e.name for e in entries(config, layout) if not (
            e.layer == 1 and e.path.endswith("gate_up"))]
        assert name in match(config, names).missing
        assert all(n.startswith("model.layers.1.") for n in match(config, names).missing)


def test_unknown_layout():
    with pytest.raises(UserError, match="original, transformers"):
        entries(tiny.config(), "megatron")


@pytest.mark.parametrize("name, layer", [
    ("model.layers.12.input_layernorm.weight", 12), ("lm_head.weight", None),
    ("vision_tower.vision_model.encoder.layers.3.layer_norm1.bias", None)])
def test_layer_of(name, layer):
    assert layer_of(name) == layer

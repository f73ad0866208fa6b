"""Orbax checkpoints: any tree, exact, atomic, onto any device, without what is not needed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmx.checkpoint import load_params, orbax_io
from mmx.errors import UserError
from mmx.quant import quantize_params
from tests import tiny
from tests.checkpoint import expected
from tests.checkpoint.test_import import assert_same


class State(NamedTuple):
    params: dict
    opt: Any
    step: jax.Array


@pytest.fixture(scope="module")
def small():
    return tiny.config(2, 2)


@pytest.fixture(scope="module")
def state(small):
    params = jax.tree.map(jnp.asarray, expected.params(small, tiny.tensors(small)))
    return State(params, optax.adamw(1e-3).init(params), jnp.int32(7))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def assert_trees_equal(actual, wanted):
    assert jax.tree.structure(actual) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_training_state_comes_back_exactly(state, small, tmp_path):
    extra = {"rows": 12, "iterator": {"a": [1, 2]}}
    orbax_io.save(tmp_path / "7", state, extra, small)
    restored, found = orbax_io.restore(tmp_path / "7", abstract(state))
    assert_trees_equal(restored, state)
    assert found == extra
    config, params = load_params(tmp_path / "7", dtype="float32")
    assert config == small
    assert_same(params, state.params)


def test_int8_leaves_stay_int8(state, small, tmp_path):
    quantized = quantize_params(state.params)
    orbax_io.save_model(tmp_path / "m", small, quantized)
    assert_same(load_params(tmp_path / "m", dtype="float32")[1], quantized)
    orbax_io.save_model(tmp_path / "f", small, state.params)
    assert_same(load_params(tmp_path / "f", dtype="float32", quantize="int8")[1], quantized)


def test_dtype_of_a_loaded_model(state, small, tmp_path):
    orbax_io.save_model(tmp_path / "m", small, state.params)
    assert orbax_io.params_dtype(tmp_path / "m") == "float32"
    _, params = load_params(tmp_path / "m", dtype="bfloat16")
    assert_same(params, {path: x.astype(jnp.bfloat16) for path, x in state.params.items()})


def test_saving_again_replaces(tmp_path):
    for value in (1.0, 2.0):
        orbax_io.save(tmp_path / "3", {"x": jnp.full(4, value)}, {"value": value})
    restored, extra = orbax_io.restore(tmp_path / "3", {"x": jax.ShapeDtypeStruct((4,), "float32")})
    assert extra == {"value": 2.0} and restored["x"].tolist() == [2.0] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_only_whole_checkpoints_count(tmp_path):
    tree = {"x": jnp.zeros(2)}
    assert orbax_io.latest_step(tmp_path / "none") is None
    for step in (2, 10, 9):
        orbax_io.save(tmp_path / str(step), tree)
    (tmp_path / "11").mkdir()  # a writer that died before its rename leaves no number; this is junk
    (tmp_path / ".12.tmp").mkdir()
    assert orbax_io.latest_step(tmp_path) == 10
    orbax_io.keep_last(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir() if path.name.isdigit()} == {"9", "10", "11"}
    orbax_io.keep_last(tmp_path, 1)
    assert orbax_io.latest_step(tmp_path) == 10


def test_a_writer_that_dies_leaves_the_old_one(tmp_path, monkeypatch):
    orbax_io.save(tmp_path / "1", {"x": jnp.zeros(2)}, {"n": 1})

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax_io.ocp, "save_checkpointables", die)
    with pytest.raises(KeyboardInterrupt):
        orbax_io.save(tmp_path / "1", {"x": jnp.ones(2)}, {"n": 2})
    restored, extra = orbax_io.restore(tmp_path / "1", {"x": jax.ShapeDtypeStruct((2,), "float32")})
    assert extra == {"n": 1} and restored["x"].tolist() == [0.0, 0.0]


def test_another_tree_is_refused_by_name(tmp_path):
    orbax_io.save(tmp_path / "1", {"params": {"a": jnp.zeros(2)}, "opt": jnp.zeros((2, 3))})
    shape = jax.ShapeDtypeStruct
    with pytest.raises(UserError) as caught:
        orbax_io.restore(tmp_path / "1", {"params": {"b": shape((2,), "float32")},
                                          "opt": shape((3, 2), "float32")})
    text = str(caught.value)
    assert "missing: params|b" in text and "unknown: params|a" in text
    assert "wrong shape: opt is [2, 3], [3, 2] is needed" in text


def test_broken_files_are_told_in_a_sentence(tmp_path, small, state):
    orbax_io.save_model(tmp_path / "m", small, state.params)
    for path in (tmp_path / "m" / "arrays" / "params").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(b"")
    with pytest.raises(UserError, match="checkpoint .*/m"):
        load_params(tmp_path / "m")
    with pytest.raises(UserError, match="not a checkpoint|cannot be read"):
        orbax_io.restore(tmp_path, {})

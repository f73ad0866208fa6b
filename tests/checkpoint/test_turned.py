"""int8 matrices that lie [out, in]: loaded, saved, exported and run as plain ones are."""

import jax
import numpy as np
import pytest

import mmx
from mmx import model, quant
from mmx.checkpoint import load_params, orbax_io, save_hf
from mmx.config import preset
from mmx.sharding.rules import DECODE, param_shardings
from pallas_kernels import tuning
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor
from tests import tiny
from tests.checkpoint.test_import import assert_same
from tests.tolerances import assert_close


@pytest.fixture(scope="module")
def plain(checkpoints):
    return load_params(checkpoints["original"], dtype="float32", quantize="int8")[1]


def turned_ones(params) -> set[str]:
    return {path for path, leaf in params.items() if isinstance(leaf, TurnedTensor)}


def int8_ones(params) -> set[str]:
    return {path for path, leaf in params.items()
            if isinstance(leaf, QuantizedTensor | TurnedTensor)}


@pytest.mark.parametrize("layout", tiny.DIALECTS)
def test_import_lays_every_matrix_turned(checkpoints, plain, layout):
    _, turned = load_params(checkpoints[layout], dtype="float32", quantize="int8", turned=True)
    assert turned_ones(turned) == int8_ones(plain) and list(turned) == list(plain)
    assert_same(quant.turned_back(turned), plain)
    for path in turned_ones(turned):
        assert_same({path: turned[path]}, {path: quant.turn(path, plain[path])})


def test_none_is_turned_on_a_cpu_by_itself(plain):
    assert int8_ones(plain) and not turned_ones(plain)


def test_int8_checkpoints_hold_plain_leaves(plain, config, tmp_path):
    turned = quant.lay(model.param_specs(config, "float32"), dict(plain), True)
    orbax_io.save_model(tmp_path / "m", config, turned)
    for wanted, how in ((plain, None), (turned, True)):
        _, found = load_params(tmp_path / "m", dtype="float32", turned=how)
        assert jax.tree.structure(dict(found)) == jax.tree.structure(wanted)
        assert_same(found, wanted)


def test_a_float_checkpoint_of_our_own_is_turned_while_it_is_quantised(
        checkpoints, plain, config, tmp_path):
    _, floats = load_params(checkpoints["original"], dtype="float32")
    orbax_io.save_model(tmp_path / "m", config, floats)
    _, found = load_params(tmp_path / "m", dtype="float32", quantize="int8", turned=True)
    assert turned_ones(found) == int8_ones(plain)
    assert_same(quant.turned_back(found), plain)


def test_export_is_that_of_plain_leaves_to_the_bit(plain, config, tmp_path):
    turned = quant.lay(model.param_specs(config, "float32"), dict(plain), True)
    out = [save_hf(tmp_path / name, config, params, "original", "bfloat16")
           for name, params in (("plain", plain), ("turned", turned))]
    files = [sorted(path.name for path in one.iterdir()) for one in out]
    assert files[0] == files[1]
    for name in files[0]:
        assert (out[0] / name).read_bytes() == (out[1] / name).read_bytes(), name


def both(checkpoint, **how):
    one, other = (mmx.load(checkpoint, dtype="float32", quantize="int8", turned=turned, **how)
                  for turned in (None, True))
    assert turned_ones(other.params) == int8_ones(one.params) and not turned_ones(one.params)
    assert_same(quant.turned_back(other.params), one.params)
    return one, other


def test_a_loaded_model_says_the_same(checkpoints):
    one, other = both(checkpoints["original"])
    ids = np.random.default_rng(0).integers(0, 256, (2, 9))
    assert_close(other.logits(ids), one.logits(ids), "split")
    prompts = [[5, 6, 7, 8], list(range(40))]
    wanted, got = (lm.generate(prompts, max_tokens=6, ignore_eos=True) for lm in (one, other))
    assert [result.ids for result in got] == [result.ids for result in wanted]


def test_drawn_weights_are_the_same(checkpoints):
    both(checkpoints["original"], random_weights=True)


def test_dequantised_they_are_the_same_arrays(plain, config):
    turned = quant.lay(model.param_specs(config, "float32"), dict(plain), True)
    assert_same(quant.dequantize_params(turned, "float32"),
                quant.dequantize_params(plain, "float32"))
    # Quantising what is int8 changes nothing, however it lies.
    assert_same(quant.quantize_params(turned), turned)


def chosen(monkeypatch, config, dtype="bfloat16", mesh=None, **how):
    monkeypatch.setattr(tuning, "hopper", lambda: True)
    specs = model.param_specs(config, dtype)
    places = param_shardings(specs, mesh, DECODE) if mesh else dict.fromkeys(specs)
    return {path for path in specs if quant.turns(specs[path], places[path], **how)}


def test_hopper_turns_what_its_kernels_take(monkeypatch, config):
    period = preset("period")
    every = {path for path in model.param_specs(period) if quant.contracted_axes(path)}
    assert chosen(monkeypatch, period) == every
    assert not chosen(monkeypatch, period, turned=False)
    assert not chosen(monkeypatch, period, dtype="float32")  # the kernel takes bfloat16
    assert not chosen(monkeypatch, config)  # nor matrices of no multiple of 128
    assert chosen(monkeypatch, config, turned=True)
    assert not chosen(monkeypatch, config, turned=False)


@pytest.mark.parametrize("sizes, turned", [
    ({"expert": 1}, "/"), ({"expert": 4, "tensor": 2}, "/"), ({"tensor": 8}, "/"),
    # 9,216 columns over 64 devices are 144 of each.
    ({"tensor": 64}, "/attn/")], ids=str)
def test_on_a_mesh_of_hopper_gpus_what_each_multiplies(monkeypatch, sizes, turned):
    mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    period = preset("period")
    wanted = {path for path in model.param_specs(period)
              if quant.contracted_axes(path) and turned in path}
    assert chosen(monkeypatch, period, mesh=mesh) == wanted

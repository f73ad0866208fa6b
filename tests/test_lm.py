"""The Python surface: load, logits, generate, stream, chat, save."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

import mmx
from mmx.checkpoint import save_hf
from mmx.errors import UserError
from mmx.lm import LM
from tests.engine.conftest import FORBIDDEN, Alphabet, tiny_model
from tests.tolerances import assert_close

LSL = ("lightning", "softmax", "lightning")


@pytest.fixture(scope="module")
def lm():
    return LM(*tiny_model(LSL), Alphabet())


def test_generate_returns_results_in_order_whatever_the_form(lm):
    texts = ["HELLO", "WORLD AGAIN", "X"]
    results = lm.generate(texts, max_tokens=6)
    assert [r.prompt_tokens for r in results] == [5, 11, 1]
    as_ids = lm.generate([Alphabet().encode(text) for text in texts], max_tokens=6)
    assert [r.ids for r in as_ids] == [r.ids for r in results]
    assert lm.generate(np.asarray(Alphabet().encode("X")), max_tokens=6)[0].ids == results[2].ids
    assert lm.generate([]) == []
    pieces = list(lm.stream("HELLO", max_tokens=6))
    assert "".join(pieces) == results[0].text
    events = list(lm.events("HELLO", max_tokens=6))
    assert events[-1].result.ids == results[0].ids


def test_logits_are_those_of_the_model(lm):
    ids = [[40, 41, 42], [50, 51, 52]]
    logits = lm.logits(ids)
    assert logits.shape == (2, 3, 96) and logits.dtype == np.float32
    assert_close(lm.logits(ids[0]), logits[:1], "split")
    prompt = [40, 41, 42]
    generated = lm.generate(prompt, max_tokens=8, ignore_eos=True)[0].ids
    scores = np.array(lm.logits([prompt + generated]))[0]
    scores[:, FORBIDDEN] = -np.inf
    assert scores[len(prompt) - 1:-1].argmax(-1).tolist() == generated


@pytest.mark.parametrize("call, word", [
    (lambda lm: lm.generate(""), "empty"),
    (lambda lm: lm.generate([[40], []]), "empty"),
    (lambda lm: lm.generate("A", max_token=3), "max_token"),
    (lambda lm: lm.generate("A", temperature=-1), "temperature"),
    (lambda lm: lm.generate([[96]]), "vocabulary"),
    (lambda lm: lm.generate(5), "A prompt cannot be 5"),
    (lambda lm: lm.generate(np.array(5)), "A prompt cannot be"),
    (lambda lm: lm.generate([None]), "A prompt cannot be None"),
    (lambda lm: lm.generate([[5, "a"]]), "A prompt cannot be [5, 'a']"),
    (lambda lm: list(lm.stream(5)), "A prompt cannot be 5"),
    (lambda lm: lm.logits([[96]]), "token ids"),
    (lambda lm: lm.logits([[5, 6], [7]]), "all sequences of one length"),
    (lambda lm: lm.logits([["a"]]), "whole numbers"),
    (lambda lm: LM(lm.config, lm.params).generate("A"), "tokenizer"),
    (lambda lm: LM(lm.config, lm.params).chat([{"role": "user", "content": "A"}]), "tokenizer"),
    (lambda lm: mmx.load("no/such/dir"), "no/such/dir"),
    (lambda lm: mmx.load("nano", dtype="float8"), "float8"),
    (lambda lm: mmx.load("nano", random_weights=True, quantize="int3"), "int3"),
])
def test_mistakes_are_told_in_a_sentence(lm, call, word):
    with pytest.raises(UserError) as error:
        call(lm)
    assert word in str(error.value)


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_a_saved_model_loads_to_the_same_answers(lm, layout, tmp_path):
    from mmx.checkpoint import locate

    config = lm.config.replace(vocab_size=96)
    save_hf(tmp_path / "m", config, lm.params, layout=layout, dtype="float32",
            tokenizer_dir=locate("nano"))
    loaded = mmx.load(tmp_path / "m")
    assert loaded.config.layer_types == lm.config.layer_types
    for path, value in lm.params.items():
        assert (np.asarray(loaded.params[path]) == np.asarray(value)).all(), path
    loaded.save(tmp_path / "again", layout=layout, dtype="float32")
    assert (tmp_path / "again" / "tokenizer.json").exists()


def test_importing_mmx_is_light():
    code = "import sys, mmx; sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.multidevice
def test_a_mesh_gives_the_same_answers(tmp_path):
    """Four host devices: experts over two, heads over two; key/value heads are copied at four."""
    script = textwrap.dedent("""
        import jax
        from jax.sharding import AxisType
        from mmx.engine.engine import Engine
        from mmx.engine.request import Request, SamplingParams
        from mmx.errors import UserError
        from mmx.model import param_specs
        from mmx.sharding.mesh import parse_mesh
        from mmx.sharding.rules import param_shardings
        from tests.engine.conftest import results, tiny_model

        config, params = tiny_model(("lightning", "softmax", "lightning"))
        specs = param_specs(config, "float32")
        requests = [
            Request(0, [40, 41, 42], SamplingParams(max_tokens=5)),
            Request(1, list(range(40, 60)), SamplingParams(max_tokens=5, temperature=1.0))]

        def ids(params):
            engine = Engine(config, params, slots=2, capacity=64, prefill_chunk=16)
            first = {k: r.ids for k, r in results_without_text(engine).items()}
            count = engine.compile_count
            assert first == {k: r.ids for k, r in results_without_text(engine).items()}
            assert engine.compile_count == count
            return first

        def results_without_text(engine):
            return {e.key: e.result for e in engine.run(requests) if e.result is not None}

        alone = ids(params)
        mesh = parse_mesh("expert=2, tensor=2")
        for text, word in (("tensor", "describe"), ("tensor=0", "describe"),
                           ("tensor=2,tensor=2", "describe"), ("tensor=5", "There are 4")):
            try:
                parse_mesh(text)
            except UserError as error:
                assert word in str(error)
            else:
                raise AssertionError(text)
        shardings = param_shardings(specs, mesh)
        spread = {path: jax.device_put(params[path], shardings[path]) for path in params}
        gate_up = spread["stack/0/0/moe/gate_up"]
        assert gate_up.addressable_shards[0].data.size * 4 == gate_up.size
        assert ids(spread) == alone, (alone,)
        wide = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
        assert param_shardings(specs, wide)["stack/0/1/attn/k"].is_fully_replicated
        for axes, word in ((("model",), "model"), (("expert",), "")):
            try:
                bad = jax.make_mesh((4,), axes, axis_types=(AxisType.Auto,))
                param_shardings(param_specs(config.replace(num_experts=3)), bad)
            except UserError as error:
                assert (word or "divide") in str(error)
            else:
                raise AssertionError(axes)
        print("same")
    """)
    import os

    env = {**os.environ, "JAX_PLATFORMS": "cpu",
           "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0 and done.stdout.strip() == "same", done.stderr[-3000:]

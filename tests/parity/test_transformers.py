"""Live against transformers: its own saved checkpoints, its logits, its uncached greedy tokens.

Run with `python -m pytest -m parity` and the `parity` extra.
"""

import json

import numpy as np
import pytest

from mmx.checkpoint import load_params
from mmx.config import ModelConfig
from mmx.model import param_specs
from tests import tiny
from tests.parity import cases
from tests.parity.make_goldens import GOLDENS
from tests.parity.run import run
from tests.tolerances import GREEDY_MARGIN, assert_close

pytestmark = pytest.mark.parity
ENTRIES = json.loads((GOLDENS / "transformers.json").read_text())["cases"]


@pytest.fixture(scope="module")
def torch_model():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.parity import torch_model

    return torch_model


@pytest.mark.parametrize("name", cases.CASES)
def test_saved_checkpoint_gives_the_same_logits_and_tokens(name, torch_model, tmp_path,
                                                           record_property):
    hf = cases.hf_config(name)
    weights = tiny.tensors(ModelConfig.from_hf(hf), cases.WEIGHT_SEED)
    model = torch_model.build(hf, weights)
    model.save_pretrained(tmp_path)
    config, params = load_params(tmp_path, dtype="float32")
    assert config == ModelConfig.from_hf(hf)
    assert config.rotary_dim == config.head_dim and config.decay_rule == "transformers"
    prompts = [cases.prompt(ENTRIES[name]["prompts"][str(n)]["seed"], n, config.vocab_size)
               for n in cases.LENGTHS]
    logits, greedy, margins = run(config, params, prompts, cases.NEW_TOKENS)
    for prompt, got, ids, margin in zip(prompts, logits, greedy, margins, strict=True):
        n = len(prompt)
        error = assert_close(got, torch_model.logits(model, prompt), "logits", "float32",
                             f"prompt of {n}")
        record_property(f"error_{n}", error)
        wanted, their_margins = torch_model.greedy(model, prompt, cases.NEW_TOKENS)
        print(f"{name}, prompt of {n}: logits differ by {error:.2g} of the largest, smallest "
              f"greedy margin {their_margins.min():.2g}")
        assert min(margin.min(), their_margins.min()) > GREEDY_MARGIN / 2, "a near-tie"
        assert ids.tolist() == wanted, f"prompt of {n}"


@pytest.mark.parametrize("layout", ("original", "transformers"))
def test_our_files_load_into_transformers(layout, torch_model, tmp_path):
    """Both layouts written by `save_hf` are read by that class and give the same logits."""
    from transformers import MiniMaxForCausalLM

    from mmx.checkpoint import save_hf

    hf = cases.hf_config("heads6_layers8_experts4")
    config = ModelConfig.from_hf(hf)
    weights = tiny.tensors(config, cases.WEIGHT_SEED)
    params = tiny.params(config, weights)
    save_hf(tmp_path / layout, config, params, layout=layout, dtype="float32")
    if layout == "original":  # that class reads the names, not the dialect of config.json
        (tmp_path / layout / "config.json").write_text(json.dumps(config.to_hf("minimax")))
    model = MiniMaxForCausalLM.from_pretrained(tmp_path / layout, dtype="float32").eval()
    prompt = cases.prompt(0, 257, config.vocab_size)
    got = run(config, params, [prompt], 1)[0][0]
    assert_close(got, torch_model.logits(model, prompt), "logits", "float32", layout)


def test_importer_equals_the_plain_conversion(torch_model, tmp_path):
    """What `save_pretrained` writes, through the importer, is bit-equal to reshaped weights."""
    hf = cases.hf_config("heads8_layers13_experts8")
    config = ModelConfig.from_hf(hf)
    weights = tiny.tensors(config, 1)
    torch_model.build(hf, weights).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    _, params = load_params(tmp_path, dtype="float32")
    wanted = tiny.params(config, weights)
    assert set(params) == set(wanted) == set(param_specs(config))
    for path, x in wanted.items():
        assert (np.asarray(params[path]) == np.asarray(x)).all(), path

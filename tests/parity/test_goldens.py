"""Logits and greedy tokens of transformers, from the committed goldens; needs no torch."""

import json

import numpy as np
import pytest

from mmx.config import ModelConfig
from tests import tiny
from tests.parity import cases
from tests.parity.make_goldens import GOLDENS, digest
from tests.parity.run import run
from tests.tolerances import GREEDY_MARGIN, assert_close

ENTRIES = json.loads((GOLDENS / "transformers.json").read_text())["cases"]


# The last case repeats what the others cover, in another combination; the live test has all.
@pytest.mark.parametrize("name", [
    *list(cases.CASES)[:-1], pytest.param(list(cases.CASES)[-1], marks=pytest.mark.slow)])
def test_logits_and_greedy_tokens(name, record_property):
    entry, arrays = ENTRIES[name], np.load(GOLDENS / "transformers.npz")
    assert entry["config"] == cases.hf_config(name), "cases changed; make the goldens again"
    config = ModelConfig.from_hf(entry["config"])
    weights = tiny.tensors(config, cases.WEIGHT_SEED)
    assert digest(weights) == entry["weights_sha256"], "weights changed; make the goldens again"
    prompts = [cases.prompt(entry["prompts"][str(n)]["seed"], n, config.vocab_size)
               for n in cases.LENGTHS]
    logits, greedy, margins = run(config, tiny.params(config, weights), prompts, cases.NEW_TOKENS)
    for n, got, ids, margin in zip(cases.LENGTHS, logits, greedy, margins, strict=True):
        error = assert_close(got[cases.kept_positions(n)], arrays[f"{name}/{n}"], "tiny_logits",
                             "float32", f"{name}, prompt of {n}")
        record_property(f"logits_error_{n}", error)
        assert ids.tolist() == entry["prompts"][str(n)]["greedy"], f"prompt of {n}"
        assert margin.min() > GREEDY_MARGIN / 2, f"near-tie at prompt of {n}: {margin.min():.2g}"


def test_goldens_are_small():
    assert sum(file.stat().st_size for file in GOLDENS.iterdir()) < 1 << 20

"""Matrices laid wide for a CPU give the logits of the ones they were made from."""

from functools import partial

import jax
import numpy as np
import pytest

from mmx import cache as caches
from mmx import model, quant
from mmx.config import LIGHTNING, SOFTMAX
from mmx.nn import wide
from mmx.nn.wide import Wide, widen
from tests.engine.conftest import tiny_model
from tests.tolerances import assert_close


@pytest.mark.parametrize("form", ["sliced", "dense", "grouped", "filled"])
@pytest.mark.parametrize("logits", ["last", "all"])
def test_wide_equals_plain(form, logits):
    config, params = tiny_model((LIGHTNING, SOFTMAX))
    laid = widen(params)
    assert sum(isinstance(leaf, Wide) for leaf in laid.values()) == 4
    ids = np.random.default_rng(0).integers(1, config.vocab_size, (2, 24)).astype(np.int32)
    run = jax.jit(partial(model.step, config, logits=logits, implementations={"moe": form}))
    lengths = np.array([24, 9], np.int32)
    got, want = (run(p, caches.init_cache(config, 2, 32, "float32"), ids, lengths)
                 for p in (laid, params))
    jax.tree.map(lambda a, b: assert_close(a, b, "tiny_logits"), got[1].stacks, want[1].stacks)
    for row, length in enumerate(lengths):
        a, b = (x[0][row, :length] if logits == "all" else x[0][row] for x in (got, want))
        assert_close(a, b, "tiny_logits")


def test_large_and_int8_models_are_left_alone(monkeypatch):
    config, params = tiny_model((LIGHTNING, SOFTMAX))
    int8 = quant.quantize_params(params)
    assert widen(int8) is int8
    monkeypatch.setattr(wide, "WIDE_BYTES", 1000)
    assert widen(params) is params

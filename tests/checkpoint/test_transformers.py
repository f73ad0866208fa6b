"""Checkpoints that transformers wrote load here, and those written here load there."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmx.checkpoint import convert, load_params, save_hf
from mmx.checkpoint.inspect import inspect
from mmx.model import forward
from tests.tolerances import assert_close

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A tiny random model as its own library saves it, decay tables and all; with logits."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MiniMaxConfig(
        vocab_size=97, hidden_size=48, intermediate_size=32, num_hidden_layers=5,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, num_local_experts=4,
        mlp_alpha_factor=1.7, full_attn_alpha_factor=1.6, linear_attn_alpha_factor=1.5,
        initializer_range=0.2)
    model = transformers.MiniMaxForCausalLM(config).float().eval()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder, max_shard_size="150KB")
    ids = torch.arange(0, 97)[None] * 31 % 97
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.numpy()
    return folder, ids.numpy(), logits


def test_their_checkpoint_loads_and_computes_the_same(theirs):
    folder, ids, logits = theirs
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert not inspect(folder).problems
    config, params = load_params(folder, dtype="float32")
    ours, _ = forward(config, params, jnp.asarray(ids, jnp.int32))
    assert_close(ours, logits, "logits", what="their checkpoint")


@pytest.mark.parametrize("how", ["saved", "converted"])
def test_our_checkpoint_loads_there_bit_for_bit(theirs, tmp_path, how):
    import torch
    import transformers

    folder, ids, logits = theirs
    if how == "saved":
        config, params = load_params(folder, dtype="float32")
        save_hf(tmp_path / "out", config, params, "transformers", "float32",
                max_shard_bytes=150_000)
    else:
        convert(folder, tmp_path / "mid", layout="original")
        convert(tmp_path / "mid", tmp_path / "out", layout="transformers")
    model, info = transformers.MiniMaxForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32)
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all("decay" in key or "slope" in key for key in info["missing_keys"])
    with torch.no_grad():
        again = model.eval()(torch.as_tensor(ids), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(again, logits)

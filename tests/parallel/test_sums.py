"""Sums over devices by pieces of time: where they lie, and what travels."""

import json

import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from mmx.parallel import experts, sums
from mmx.parallel.mesh_ops import MeshOps
from mmx.sharding.rules import LONG, PREFILL
from pallas_kernels import dispatch
from tests import tiny
from tests.plan.test_fit import run_plan


def pieces(axes, rules, shape, shared):
    ops = MeshOps(AbstractMesh(tuple(axes.values()), tuple(axes)), rules)
    tokens = ops.spec(shape, "batch", "time", None)
    apart = P(*(experts._without(entry, shared) for entry in tokens))
    return experts._pieces(ops, shape, tokens, apart, shared)


@pytest.mark.parametrize("axes, rules, shape, shared, wanted", [
    ({"tensor": 8}, PREFILL, (1, 4096, 64), ("tensor",), P(None, "tensor", None)),
    # The batch goes back to where its rows lie, the rest over time.
    ({"expert": 2, "tensor": 4}, PREFILL, (4, 1024, 64), ("expert", "tensor"),
     P("expert", "tensor", None)),
    ({"data": 2, "expert": 2}, PREFILL, (4, 1024, 64), ("expert",),
     P(("data", "expert"), None, None)),
    ({"sequence": 2, "expert": 4, "tensor": 2}, LONG, (1, 4096, 64), ("expert", "tensor"),
     P(None, ("sequence", "expert", "tensor"), None)),
    # A device's piece would not be one piece of what it holds.
    ({"data": 2, "expert": 2}, LONG, (1, 4096, 64), ("expert",), P(None, "data", None)),
    # Nothing to sum, and no even pieces.
    ({"sequence": 4}, LONG, (1, 4096, 64), (), P(None, "sequence", None)),
    ({"tensor": 8}, PREFILL, (1, 4100, 64), ("tensor",), P(None, None, None)),
])
def test_where_sums_lie(axes, rules, shape, shared, wanted):
    assert pieces(axes, rules, shape, shared) == wanted


def test_the_form_follows_tokens_and_platform():
    ops = MeshOps(AbstractMesh((8,), ("tensor",)), PREFILL)
    assert [sums.form(ops, tokens) for tokens in (1, 255, 256)] == ["whole", "whole", "pieces"]
    with dispatch.compiling_for("gpu"):
        assert sums.form(ops, 256) == "narrow"
    for named in sums.FORMS:
        assert sums.form(MeshOps(ops.mesh, PREFILL, {"sums": named}), 256) == named
    with pytest.raises(ValueError, match="'whole', 'pieces', 'narrow'"):
        sums.form(MeshOps(ops.mesh, PREFILL, {"sums": "some"}), 1)


@pytest.mark.gpu_aot
def test_a_prefill_over_tensor_sends_parts_and_pieces_in_bfloat16(tmp_path):
    """No sum of all tokens goes to all, and none in float32."""
    layers, T, D = 2, 2048, 256
    config = tiny.config(layers, softmax_every=2, num_heads=8, head_dim=64, hidden_size=D)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf("minimax_text_01")))
    done = run_plan(f"--model={tmp_path}", "--pod=h200:1x4", "--mesh=tensor=4", "--mode=prefill",
                    "--batch=1", f"--context={2 * T}", f"--chunk={T}", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    large = {}
    for one in json.loads(done.stdout)["collectives"]:
        if one["bytes"] >= 2 * T * D:
            large[one["kind"]] = max(one["bytes"], large.get(one["kind"], 0))
    # The chosen experts may travel with the tokens; rows of the embedding come from all devices.
    assert {"all-to-all", "all-gather"} <= large.keys()
    assert large["all-to-all"] == 2 * T * D and max(large.values()) < 1.1 * 2 * T * D

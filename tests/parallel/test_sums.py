"""Sums over devices by pieces of time: where they lie, and what travels."""

import json

import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from mmx.parallel import experts
from mmx.parallel.mesh_ops import MeshOps
from mmx.sharding.rules import LONG, PREFILL
from tests import tiny
from tests.plan.test_fit import run_plan


def pieces(axes, rules, shape, shared, **names):
    ops = MeshOps(AbstractMesh(tuple(axes.values()), tuple(axes)), rules, names)
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
    # Nothing to sum, few tokens, and no even pieces.
    ({"sequence": 4}, LONG, (1, 4096, 64), (), P(None, "sequence", None)),
    ({"tensor": 8}, PREFILL, (1, 128, 64), ("tensor",), P(None, None, None)),
    ({"tensor": 8}, PREFILL, (1, 4100, 64), ("tensor",), P(None, None, None)),
])
def test_where_sums_lie(axes, rules, shape, shared, wanted):
    assert pieces(axes, rules, shape, shared) == wanted


def test_a_choice_overrules_the_number_of_tokens():
    given = {"tensor": 8}, PREFILL
    assert pieces(*given, (1, 4096, 64), ("tensor",), sums="whole") == P(None, None, None)
    assert pieces(*given, (1, 8, 64), ("tensor",), sums="pieces") == P(None, "tensor", None)
    with pytest.raises(ValueError, match="'pieces', 'whole'"):
        pieces(*given, (1, 8, 64), ("tensor",), sums="some")


@pytest.mark.gpu_aot
def test_a_prefill_over_tensor_sends_sums_once_and_narrow(tmp_path):
    """Of each sum of attention and of experts float32 is scattered, and bfloat16 gathered."""
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
    # One all-reduce brings together the rows of the embedding, which lies apart by words.
    assert large == {"reduce-scatter": 4 * T * D, "all-gather": 2 * T * D, "all-reduce": 2 * T * D}

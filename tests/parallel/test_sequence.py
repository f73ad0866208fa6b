"""Sequence parallelism on eight simulated devices equals one device: values, states, gradients."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mmx.parallel import blocks, lasp, ring

ROOT = Path(__file__).parent.parent.parent
# Checks of the worker by name, and how many figures each compares.
GROUPS = {
    "lightning 1": 9, "lightning 2": 18, "lightning 4": 27, "lightning 4 plain": 24,
    "lightning 8": 27, "lightning 8 reversed": 18, "lightning 4 bfloat16": 18,
    "lightning 4 values": 2,
    "softmax 1": 5, "softmax 2": 10, "softmax 4": 20, "softmax 4 plain": 10, "softmax 8": 10,
    "softmax 8 reversed": 5, "softmax 4 bfloat16": 5, "softmax 4 pallas_tpu": 15,
    "softmax 4 cudnn": 15,
    "traffic": 10, "overlap": 3,
}


@pytest.fixture(scope="module")
def report():
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run([sys.executable, "-m", "tests.parallel.sequence_worker"], cwd=ROOT,
                          env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.multidevice
@pytest.mark.parametrize("group", GROUPS)
def test_equals_one_device(report, group):
    assert not {what: fault for what, fault in report[group].items() if fault}
    assert len(report[group]) == GROUPS[group]


@pytest.mark.multidevice
def test_every_group_is_read(report):
    assert set(report) == set(GROUPS)


def visits(W, T, size, balanced):
    """Key blocks visited by each rank over a whole round."""
    segments = 2 if balanced else 1
    counts = np.zeros(W, int)
    where = [blocks.positions(ring.first_tokens(jnp.int32(rank), W, T, balanced), T // segments,
                              size, blocks.NOWHERE) for rank in range(W)]
    for rank in range(W):
        for keys in where:
            for block in where[rank]:
                first, last = blocks.visible(block[None], None, keys, None)
                counts[rank] += max(int(last) - int(first), 0)
    return counts.tolist()


def test_the_future_is_not_visited():
    # One block per half-piece: 2, 4, 6, 8 of them lie at or before each rank's end.
    assert visits(4, 8, 4, balanced=False) == [1 + 2, 3 + 4, 5 + 6, 7 + 8]
    assert visits(4, 8, 4, balanced=True) == [9, 9, 9, 9]


def test_earlier_samples_and_padding_are_not_visited():
    keys = jnp.arange(16, dtype=jnp.int32).reshape(4, 4)
    sample_nBb = jnp.asarray(np.repeat([0, 0, 1, 1, 1, 1, 2, 2], 2).reshape(4, 1, 4), jnp.int32)
    seen = [tuple(int(x) for x in blocks.visible(keys[i][None], sample_nBb[i], keys, sample_nBb))
            for i in range(4)]
    assert seen == [(0, 1), (1, 2), (1, 3), (3, 4)]
    nowhere = jnp.full((1, 4), -1, jnp.int32)
    assert int(blocks.visible(nowhere, None, keys, None)[1]) == 0


@pytest.mark.parametrize("W", (1, 2, 4))
def test_zigzag_order(W):
    x = np.arange(2 * 8 * 3).reshape(2, 8, 3)
    pieces = np.split(np.asarray(ring.zigzag(x, W)), W, axis=1)
    halves = np.split(x, 2 * W, axis=1)
    for rank, piece in enumerate(pieces):
        assert (piece == np.concatenate([halves[rank], halves[2 * W - 1 - rank]], axis=1)).all()
    assert (np.asarray(ring.unzigzag(ring.zigzag(x, W), W)) == x).all()
    turned = np.moveaxis(x, 1, -1)
    assert (np.asarray(ring.zigzag(turned, W, axis=-1))
            == np.moveaxis(np.concatenate(pieces, axis=1), 1, -1)).all()


def test_zigzag_refuses_what_does_not_divide():
    with pytest.raises(ValueError, match="6 tokens are not 4 half-pieces"):
        ring.zigzag(np.zeros((1, 6)), 2)


def test_arguments_that_do_not_fit_are_refused():
    q, k = jnp.zeros((1, 3, 4, 8)), jnp.zeros((1, 3, 2, 8))
    with pytest.raises(ValueError, match="No method 'tree'.*gather, log, ring"):
        lasp.lightning_attention(q, q, q, np.ones(4), axis="sequence", method="tree")
    with pytest.raises(ValueError, match="No method 'tree'.*ring, gather"):
        ring.attention(q, k, k, axis="sequence", method="tree")
    with pytest.raises(ValueError, match="K dividing N"):
        ring.attention(q[:, :, :3], k, k, axis="sequence")
    with pytest.raises(ValueError, match="got 3 tokens"):
        ring.attention(q, k, k, axis="sequence", balanced=True)
    with pytest.raises(ValueError, match="samples_BT must have shape"):
        ring.attention(q, k, k, axis="sequence", samples_BT=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="lengths_B must have shape"):
        ring.attention(q, k, k, axis="sequence", lengths_B=jnp.zeros(2, jnp.int32))

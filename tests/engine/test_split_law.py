"""Split law: however a sequence is cut into chunks and decode steps, and whoever shares the batch,
every position gives the same logits and the same greedy token."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from mmx import cache as caches
from mmx import model
from mmx.config import LIGHTNING, SOFTMAX, hybrid_pattern
from tests.engine.conftest import tiny_model
from tests.tolerances import assert_close, bound

PATTERNS = {
    "hybrid8": hybrid_pattern(8),
    "lsl": (LIGHTNING, SOFTMAX, LIGHTNING),
    "lll": (LIGHTNING,) * 3,
    "sss": (SOFTMAX,) * 3,
}
BATCH = 3
CHUNK = 8
LONGEST = 40
CAPACITY = 64


@functools.cache
def programs(name: str):
    config, params = tiny_model(PATTERNS[name])
    forward = jax.jit(functools.partial(model.forward, config))
    step = jax.jit(functools.partial(model.step, config, logits="all"), donate_argnums=1)
    return config, params, forward, step


@functools.cache
def whole(name: str, ids: tuple[int, ...]):
    """Logits [n, V] of the sequence scored at once."""
    _, params, forward, _ = programs(name)
    ids_1T = np.zeros((1, LONGEST), np.int32)
    ids_1T[0, :len(ids)] = ids
    logits, _ = forward(params, ids_1T, lengths_B=np.asarray([len(ids)], np.int32))
    return np.asarray(logits)[0, :len(ids)]


def in_steps(name: str, sequences, cuts):
    """Logits of each sequence when row b consumes pieces of `cuts[b]` tokens, rows side by side."""
    config, params, _, step = programs(name)
    cache = caches.init_cache(config, BATCH, CAPACITY, "float32")
    queues = [list(pieces) for pieces in cuts]
    done = [0] * BATCH
    logits = [[] for _ in range(BATCH)]
    while any(queues):
        # A row with nothing to do in a wide step is inert, and so is any row that has finished.
        width = max((queue[0] for queue in queues if queue), default=1)
        T = 1 if width == 1 else CHUNK
        ids_BT, lengths_B = np.full((BATCH, T), 3, np.int32), np.zeros(BATCH, np.int32)
        for b, queue in enumerate(queues):
            if queue and queue[0] <= T:
                n = lengths_B[b] = queue.pop(0)
                ids_BT[b, :n] = sequences[b][done[b]:done[b] + n]
                done[b] += n
        out, cache = step(params, cache, ids_BT, lengths_B)
        for b, n in enumerate(lengths_B):
            logits[b].append(np.asarray(out[b, :n]))
    assert np.asarray(cache.lengths_B).tolist() == [len(s) for s in sequences]
    return [np.concatenate(rows) if rows else None for rows in logits]


def pieces(total: int):
    """Lists of piece sizes 1 … CHUNK that sum to `total`, by cutting at drawn places."""
    def cut(sizes):
        out, left = [], total
        for size in sizes:
            if left:
                out.append(min(size, left))
                left -= out[-1]
        return out + [1] * left
    return st.lists(st.integers(1, CHUNK), max_size=total).map(cut)


@st.composite
def batches(draw):
    """Up to BATCH sequences, each with its own cut; missing ones leave their row inert."""
    lengths = draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=BATCH))
    sequences = [
        tuple(draw(st.lists(st.integers(0, 95), min_size=n, max_size=n))) for n in lengths]
    cuts = [draw(pieces(n)) for n in lengths]
    empty = BATCH - len(lengths)
    places = draw(st.permutations(range(BATCH)))
    rows = [*zip(sequences, cuts, strict=True)] + [((), [])] * empty
    return [rows[place] for place in places]


@pytest.mark.parametrize("name", PATTERNS)
@hypothesis.settings(max_examples=20, deadline=None,
                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
@hypothesis.given(rows=batches())
def test_any_split_gives_the_logits_of_the_whole(name, rows):
    split = in_steps(name, [ids for ids, _ in rows], [cut for _, cut in rows])
    for (ids, cut), logits in zip(rows, split, strict=True):
        if not ids:
            continue
        expected = whole(name, ids)
        assert_close(logits, expected, "split", what=f"{name} cut {cut}")
        same_greedy_tokens(logits, expected)


def same_greedy_tokens(logits, expected):
    """Equal argmax wherever the best logit leads by more than two errors of the table's size."""
    best_two = np.sort(expected, axis=-1)[:, -2:]
    clear = best_two[:, 1] - best_two[:, 0] > 2 * bound("split") * np.abs(expected).max()
    # The comparison below must not be empty; one near-tie in a handful of tokens is no fault.
    assert np.sum(~clear) <= max(1, 0.1 * clear.size)
    assert (logits.argmax(-1) == expected.argmax(-1))[clear].all()


@pytest.mark.parametrize("cut", [(200,), (64, 64, 64, 8), (63, 1, 1, 135), (130, 70)], ids=str)
def test_splits_across_the_blocks_of_the_kernels(cut):
    """200 tokens: cuts at, just before and after the 64-token blocks of lightning attention."""
    config, params, forward, step = programs("lsl")
    ids = np.random.default_rng(0).integers(0, 96, (1, sum(cut))).astype(np.int32)
    expected = np.asarray(forward(params, ids)[0])[0]
    cache = caches.init_cache(config, 1, 256, "float32")
    logits, first = [], 0
    for size in cut:
        padded = next(width for width in (1, 64, 200) if width >= size)
        piece = np.zeros((1, padded), np.int32)
        piece[:, :size] = ids[:, first:first + size]
        out, cache = step(params, cache, piece, np.asarray([size], np.int32))
        logits.append(np.asarray(out)[0, :size])
        first += size
    logits = np.concatenate(logits)
    assert_close(logits, expected, "split")
    same_greedy_tokens(logits, expected)

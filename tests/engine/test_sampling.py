"""Token choice against a plain NumPy rendering of its rules, and against probability itself."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.engine import sampling
from mmx.engine.request import SamplingParams
from mmx.errors import UserError
from tests.tolerances import assert_close, bound

VOCAB = 23
BATCH = 3

sample = jax.jit(sampling.sample)
greedy = jax.jit(sampling.greedy)


def reference_weights(logits_V, params, prompt_ids, output_ids, forbidden_V):
    """Probabilities that the draw must follow, in float64, by sorting and counting in Python."""
    logits = logits_V.astype(np.float64).copy()
    logits[forbidden_V] = -np.inf
    for v in set(prompt_ids) | set(output_ids):
        factor = params.repetition_penalty
        logits[v] = logits[v] / factor if logits[v] > 0 else logits[v] * factor
    for v in set(output_ids):
        logits[v] -= params.frequency_penalty * output_ids.count(v) + params.presence_penalty
    if params.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    probs = np.exp((logits - logits.max()) / params.temperature)
    probs /= probs.sum()
    probs[probs < params.min_p * probs.max()] = 0
    probs /= probs.sum()  # each cut sees what the one before it left
    order = sorted(range(len(probs)), key=lambda v: -probs[v])
    if params.top_k:
        kth = probs[order[min(params.top_k, len(order)) - 1]]
        probs[probs < kth] = 0
        probs /= probs.sum()
    if params.top_p < 1:
        total, least = 0.0, 0.0
        for v in order:
            if total >= params.top_p:
                break
            total, least = total + probs[v], probs[v]
        probs[probs < least] = 0
    return probs / probs.sum()


def stack_states(params_list, prompts, outputs):
    rows = [sampling.row_state(p, ids, VOCAB) for p, ids in zip(params_list, prompts, strict=True)]
    state = jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows)
    counts = np.stack([np.bincount(np.asarray(o, int), minlength=VOCAB) for o in outputs])
    return sampling.SampleState(
        state.numbers_BP, state.top_k_B, state.seed_B2,
        np.asarray([len(o) for o in outputs], np.int32), state.prompt_BV, counts.astype(np.int32))


def gumbel(seed, index):
    key = jax.random.fold_in(jax.random.wrap_key_data(
        np.asarray([seed >> 32, seed & 0xFFFFFFFF], np.uint32), impl="threefry2x32"), index)
    return np.asarray(jax.random.gumbel(key, (VOCAB,), jnp.float32), np.float64)


ids = st.lists(st.integers(0, VOCAB - 1), max_size=6)
settings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4, VOCAB, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.35, 1e-6]),
    min_p=st.sampled_from([0.0, 0.07, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.75, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**64 - 1),
    logprobs=st.sampled_from([0, 5]),
)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.example(  # top_p counts probability left by min_p: three ids, not four
    logit_seed=11971, forbidden={0, 4}, prompts=[[]] * BATCH, outputs=[[]] * BATCH,
    rows=[SamplingParams(temperature=2.5, top_p=0.35, min_p=0.07, seed=0)] * BATCH)
@hypothesis.given(
    logit_seed=st.integers(0, 2**31), rows=st.lists(settings, min_size=BATCH, max_size=BATCH),
    prompts=st.lists(ids, min_size=BATCH, max_size=BATCH),
    outputs=st.lists(ids, min_size=BATCH, max_size=BATCH),
    forbidden=st.sets(st.integers(0, VOCAB - 1), max_size=5))
def test_matches_the_reference_row_by_row(logit_seed, rows, prompts, outputs, forbidden):
    logits_BV = np.random.default_rng(logit_seed).normal(size=(BATCH, VOCAB)).astype(np.float32) * 3
    forbidden_V = np.isin(np.arange(VOCAB), list(forbidden))
    state = stack_states(rows, prompts, outputs)
    out, after = sample(logits_BV, forbidden_V, state, np.ones(BATCH, np.int32))
    for b, params in enumerate(rows):
        weights = reference_weights(logits_BV[b], params, prompts[b], outputs[b], forbidden_V)
        chosen = int(out.ids_B[b])
        assert chosen not in forbidden
        with np.errstate(divide="ignore"):
            scores = np.log(weights)
        if params.temperature:
            scores = scores + gumbel(params.seed, len(outputs[b]))
        best = scores.max()
        slack = bound("sampling") * np.abs(scores[np.isfinite(scores)]).max()
        assert scores[chosen] >= best - slack, (params, weights)
        assert int(after.index_B[b]) == len(outputs[b]) + 1
        assert int(after.output_BV[b, chosen]) == outputs[b].count(chosen) + 1
        # The same row alone, with other settings beside it gone, gives the same id.
        alone = jax.tree.map(lambda leaf, b=b: np.repeat(leaf[b:b + 1], BATCH, 0), state)
        again, _ = sample(np.repeat(logits_BV[b:b + 1], BATCH, 0), forbidden_V, alone,
                          np.eye(BATCH, dtype=np.int32)[0])
        assert int(again.ids_B[0]) == chosen


PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "cool": SamplingParams(temperature=0.5),
    "top_k": SamplingParams(temperature=1.0, top_k=5),
    "top_p": SamplingParams(temperature=1.0, top_p=0.7),
    "min_p": SamplingParams(temperature=1.0, min_p=0.2),
    "penalties": SamplingParams(temperature=1.0, repetition_penalty=1.5, presence_penalty=0.5,
                                frequency_penalty=0.3),
    "all": SamplingParams(temperature=0.8, top_k=9, top_p=0.8, min_p=0.05,
                          repetition_penalty=1.2),
}


@functools.cache
def draw_many(draws):
    def many(logits_V, state, forbidden_V):
        def one(index):
            row = jax.tree.map(lambda leaf: leaf, state)
            row = sampling.SampleState(row.numbers_BP, row.top_k_B, row.seed_B2,
                                       index[None].astype(jnp.int32), row.prompt_BV, row.output_BV)
            out, _ = sampling.sample(logits_V[None], forbidden_V, row, jnp.ones(1, jnp.int32))
            return out.ids_B[0]
        return jax.lax.map(one, jnp.arange(draws), batch_size=500)
    return jax.jit(many)


@pytest.mark.parametrize("name", PARAMS)
def test_draws_follow_the_distribution(name):
    draws = 4000
    logits_V = np.random.default_rng(7).normal(size=VOCAB).astype(np.float32) * 1.5
    forbidden_V = np.arange(VOCAB) == int(np.argmax(logits_V))
    prompt, output = [1, 2, 3], [3, 4, 4]
    state = stack_states([PARAMS[name]], [prompt], [output])
    ids_N = np.asarray(draw_many(draws)(logits_V, state, forbidden_V))
    counts_V = np.bincount(ids_N, minlength=VOCAB)
    expected_V = draws * reference_weights(logits_V, PARAMS[name], prompt, output, forbidden_V)
    assert counts_V[expected_V == 0].sum() == 0
    # Cells are merged until each expects at least 5 draws, as the chi-square test needs.
    order = np.argsort(expected_V)[expected_V[np.argsort(expected_V)] > 0]
    cells, pending = [], np.zeros(2)
    for v in order:
        pending = pending + [counts_V[v], expected_V[v]]
        if pending[1] >= 5:
            cells.append(pending)
            pending = np.zeros(2)
    if pending[1] and cells:
        cells[-1] = cells[-1] + pending
    observed, expected = np.asarray(cells).T
    chi2 = ((observed - expected) ** 2 / expected).sum()
    freedom = len(cells) - 1
    # Wilson-Hilferty: (chi2/f)^(1/3) is close to normal; 4 sigma is one failure in 30,000.
    z = ((chi2 / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert z < 4, (chi2, freedom)


def test_the_stream_is_a_function_of_seed_and_index_alone():
    logits_BV = np.zeros((BATCH, VOCAB), np.float32)
    allowed = np.zeros(VOCAB, bool)
    params = [SamplingParams(temperature=1.0, seed=s) for s in (5, 6, 5)]
    state = stack_states(params, [[]] * 3, [[], [], []])
    drawn = []
    for active in ([1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1], [1, 1, 1]):
        out, state = sample(logits_BV, allowed, state, np.asarray(active, np.int32))
        drawn.append([int(i) if on else None for i, on in zip(out.ids_B, active, strict=True)])
    rows = [[i for i in column if i is not None] for column in zip(*drawn, strict=True)]
    assert rows[0] == rows[2]
    assert rows[0] != rows[1]
    assert len(set(rows[0])) > 1
    big = [SamplingParams(temperature=1.0, seed=s) for s in (5, 5 + 2**32, -1)]
    out, _ = sample(logits_BV, allowed, stack_states(big, [[]] * 3, [[]] * 3),
                    np.ones(BATCH, np.int32))
    noise = [gumbel(seed % 2**64, 0).argmax() for seed in (5, 5 + 2**32, -1)]
    assert out.ids_B.tolist() == noise


def test_greedy_is_argmax_without_the_forbidden():
    logits_BV = np.random.default_rng(0).normal(size=(BATCH, VOCAB)).astype(np.float32)
    best_B = logits_BV.argmax(-1)
    assert greedy(logits_BV, np.zeros(VOCAB, bool)).tolist() == best_B.tolist()
    forbidden_V = np.isin(np.arange(VOCAB), best_B)
    expected = np.where(forbidden_V, -np.inf, logits_BV).argmax(-1)
    assert greedy(logits_BV, forbidden_V).tolist() == expected.tolist()
    logits_BV[1, 4] = np.nan
    assert greedy(logits_BV, np.zeros(VOCAB, bool))[1] == -1


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_ignore_penalties_and_temperature(temperature):
    logits_BV = np.random.default_rng(3).normal(size=(BATCH, VOCAB)).astype(np.float32) * 2
    forbidden_V = np.arange(VOCAB) == 11
    params = [SamplingParams(temperature=temperature, repetition_penalty=1.7, logprobs=20)] * BATCH
    state = stack_states(params, [[1, 2]] * BATCH, [[3]] * BATCH)
    out, _ = sample(logits_BV, forbidden_V, state, np.ones(BATCH, np.int32))
    raw = np.where(forbidden_V, -np.inf, logits_BV.astype(np.float64))
    expected_BV = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    assert_close(out.logprob_B, expected_BV[np.arange(BATCH), out.ids_B], "sampling")
    order_BK = np.argsort(-expected_BV, axis=-1, kind="stable")[:, :20]
    assert out.top_ids_BK.tolist() == order_BK.tolist()
    assert_close(out.top_logprob_BK, np.take_along_axis(expected_BV, order_BK, -1), "sampling")


@pytest.mark.parametrize("field, value", [
    ("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0),
    ("top_p", 1.5), ("min_p", -1), ("top_k", -1), ("top_k", 1.5), ("repetition_penalty", 0),
    ("seed", "a"), ("seed", 2**70), ("logprobs", 21), ("stop", ("",)), ("stop_token_ids", (-3,)),
    ("presence_penalty", float("inf")), ("max_tokens", True)])
def test_a_setting_out_of_range_is_named(field, value):
    with pytest.raises(UserError) as error:
        SamplingParams(**{field: value})
    assert field in str(error.value)

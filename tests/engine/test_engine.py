"""Continuous batching: results depend on the request alone, programs are compiled once."""

import jax
import numpy as np
import pytest

from mmx import model
from mmx.engine import engine as engine_module
from mmx.engine.engine import Engine
from mmx.engine.request import Request, SamplingParams
from mmx.errors import UserError
from tests.engine.conftest import EOS, FORBIDDEN, results
from tests.tolerances import assert_close


def prompt(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(32, 96, n).tolist()


MIXED = [
    Request("greedy", prompt(5), SamplingParams(max_tokens=12)),
    Request("long", prompt(37, 1), SamplingParams(max_tokens=20)),
    Request("warm", prompt(16, 2), SamplingParams(max_tokens=15, temperature=1.0, seed=3)),
    Request("one", prompt(1, 3), SamplingParams(max_tokens=1)),
    Request("cut", prompt(9, 4), SamplingParams(
        max_tokens=10, temperature=0.7, top_k=9, top_p=0.8, min_p=0.01, seed=2**40)),
    Request("strict", prompt(20, 5), SamplingParams(
        max_tokens=14, repetition_penalty=1.4, frequency_penalty=0.5, logprobs=3)),
    Request("again", prompt(5), SamplingParams(max_tokens=7)),
    Request("warm twin", prompt(16, 2), SamplingParams(max_tokens=15, temperature=1.0, seed=3)),
]


def test_a_result_is_a_function_of_its_request(engine_of):
    together = results(engine_of(3), MIXED)
    reverse = results(engine_of(3), MIXED[::-1])
    assert set(together) == set(reverse) == {request.key for request in MIXED}
    for request in MIXED:
        key = request.key
        alone = results(engine_of(3), [request])[key]
        single = results(engine_of(1), [request])[key]
        for other in (reverse[key], alone, single):
            assert other.ids == together[key].ids, key
            assert other.text == together[key].text
            assert other.finish_reason == together[key].finish_reason
        if request.sampling.logprobs:
            assert alone.logprobs == together[key].logprobs == reverse[key].logprobs
    assert together["again"].ids == together["greedy"].ids[:7]
    assert together["warm twin"].ids == together["warm"].ids
    assert len(together["one"].ids) == 1


def test_greedy_tokens_are_those_of_the_model_without_a_cache(engine_of, tiny):
    config, params = tiny
    request = MIXED[1]
    got = results(engine_of(3), MIXED)[request.key]
    ids = [*request.prompt_ids, *got.ids]
    forward = jax.jit(lambda ids_BT: model.forward(config, params, ids_BT)[0])
    logits = np.array(forward(np.asarray([ids], np.int32)))[0]
    logits[:, FORBIDDEN] = -np.inf
    assert logits.argmax(-1)[len(request.prompt_ids) - 1:-1].tolist() == got.ids


def test_nothing_compiles_after_warm_up(engine_of):
    engines = [engine_of(1), engine_of(3)]
    counts = [engine.compile_count for engine in engines]
    compiled = []

    def listener(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: x * 2 + len(compiled))(np.arange(7.0))
        assert compiled, "the listener must see a compilation when there is one"
        compiled.clear()
        for engine in engines:
            results(engine, MIXED)
            results(engine, [Request(n, prompt(n, n), SamplingParams(max_tokens=3))
                             for n in (1, 15, 16, 17, 33, 120)])
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled
    assert [engine.compile_count for engine in engines] == counts


def test_stop_tokens_and_strings(engine_of, monkeypatch):
    engine = engine_of(3)
    base = Request("base", prompt(6, 9), SamplingParams(max_tokens=24, temperature=1.5, seed=1))

    def run(**changes):
        settings = {"max_tokens": 24, "temperature": 1.5, "seed": 1, **changes}
        requests = [Request("other", prompt(3), SamplingParams(max_tokens=30)),
                    Request("it", base.prompt_ids, SamplingParams(**settings))]
        return results(engine, requests)["it"]

    monkeypatch.setattr(engine, "eos_ids", frozenset())
    free = results(engine, [base])["base"]
    assert free.finish_reason == "length" and len(free.ids) == 24
    token = free.ids[10]
    end = free.ids.index(token) + 1
    for stopped in (run(stop_token_ids=(token,)), run(stop_token_ids=(token,), ignore_eos=True)):
        assert stopped.ids == free.ids[:end] and stopped.finish_reason == "stop"
    at = next(i for i in range(4, 20) if all(32 <= t < 96 for t in free.ids[i:i + 3]))
    text = engine.tokenizer.decode(free.ids[at:at + 3])
    stopped = run(stop=(text, "never this"))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[:free.text.index(text)]
    assert stopped.ids == free.ids[:len(stopped.ids)]
    monkeypatch.setattr(engine, "eos_ids", frozenset({token}))
    assert run().ids == free.ids[:end]
    assert run(ignore_eos=True).ids == free.ids


def test_the_end_token_of_configuration_and_tokenizer_is_known(engine_of):
    assert engine_of(1).eos_ids == {EOS}


def test_forbidden_ids_are_never_drawn(engine_of):
    engine = engine_of(3)
    assert engine.forbidden_ids == set(FORBIDDEN)
    requests = [Request(i, prompt(4, i), SamplingParams(
        max_tokens=110, temperature=50.0, seed=i, ignore_eos=True)) for i in range(3)]
    drawn = {token for result in results(engine, requests).values() for token in result.ids}
    assert not drawn & set(FORBIDDEN)
    assert len(drawn) > 80  # nearly flat: the three would be there 3 % of 330 times


def test_penalties_reach_back_to_prompt_and_output(engine_of):
    ids = prompt(12, 6)
    common = {"max_tokens": 60, "temperature": 1.0, "ignore_eos": True}
    out = results(engine_of(3), [
        Request("presence", ids, SamplingParams(presence_penalty=1e4, **common)),
        Request("repetition", ids, SamplingParams(repetition_penalty=1e6, **common)),
        Request("free", ids, SamplingParams(**common))])
    presence, repetition, free = (out[k].ids for k in ("presence", "repetition", "free"))
    assert len(set(presence)) == 60
    assert len(set(free)) < 60
    # A negative logit times 1e6 is out, a positive one over 1e6 about 0: still drawn at times.
    assert len(set(repetition)) > len(set(free))
    assert set(presence) & set(ids), "presence counts the output only"
    assert len(set(repetition) & set(ids)) < len(set(presence) & set(ids))


def test_logprobs_are_those_of_the_model(engine_of, tiny):
    config, params = tiny
    request = Request("r", prompt(11, 8), SamplingParams(
        max_tokens=9, temperature=0.9, presence_penalty=0.5, seed=4, logprobs=4, ignore_eos=True))
    result = results(engine_of(3), [MIXED[0], request, MIXED[4]])["r"]
    ids = np.asarray([[*request.prompt_ids, *result.ids]], np.int32)
    logits = np.array(jax.jit(lambda i: model.forward(config, params, i)[0])(ids)[0], np.float64)
    logits[:, FORBIDDEN] = -np.inf
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = expected[len(request.prompt_ids) - 1:-1]
    assert [entry.id for entry in result.logprobs] == result.ids
    rows = np.arange(len(result.ids))
    assert_close([e.logprob for e in result.logprobs], expected[rows, result.ids], "split")
    top = np.argsort(-expected, axis=-1, kind="stable")[:, :4]
    assert [[i for i, _ in e.top] for e in result.logprobs] == top.tolist()
    assert_close([[p for _, p in e.top] for e in result.logprobs],
                 np.take_along_axis(expected, top, -1), "split")


def test_the_cache_ends_a_request_by_length(engine_of):
    full = results(engine_of(3), [
        Request("fits", prompt(120), SamplingParams(max_tokens=50, ignore_eos=True)),
        Request("exact", prompt(128), SamplingParams(max_tokens=50, ignore_eos=True)),
        Request("small", prompt(3), SamplingParams(max_tokens=2, ignore_eos=True))])
    assert len(full["fits"].ids) == 9 and full["fits"].finish_reason == "length"
    assert len(full["exact"].ids) == 1 and full["exact"].finish_reason == "length"
    assert len(full["small"].ids) == 2


def test_a_closed_run_leaves_the_engine_usable(engine_of):
    engine = engine_of(3)
    expected = results(engine, MIXED[:2])
    running = engine.run(MIXED)
    for _ in range(5):
        next(running)
    with pytest.raises(RuntimeError):
        next(engine.run(MIXED))
    running.close()
    after = results(engine, MIXED[:2])
    assert {k: r.ids for k, r in after.items()} == {k: r.ids for k, r in expected.items()}


def test_requests_are_taken_as_slots_become_free(engine_of):
    taken = []

    def source():
        for i in range(6):
            taken.append(i)
            yield Request(i, prompt(4, i), SamplingParams(max_tokens=8, ignore_eos=True))

    finished, ahead = 0, []
    for event in engine_of(3).run(source()):
        ahead.append(len(taken) - finished)
        finished += event.result is not None
    assert finished == 6 and max(ahead) <= 4  # three slots, and one whose last token is unread


def test_growth_keeps_what_rows_hold(tiny, engine_of, monkeypatch):
    monkeypatch.setattr(engine_module, "MIN_CAPACITY", 16)
    engine = Engine(*tiny, slots=2, prefill_chunk=16)
    requests = [Request("short", prompt(5), SamplingParams(max_tokens=40)),
                Request("tiny", prompt(3), SamplingParams(max_tokens=3)),
                Request("grows", prompt(60, 1), SamplingParams(max_tokens=30))]
    expected = results(engine_of(3), requests)
    grown = {}
    for event in engine.run(requests):
        if event.result is not None:
            grown[event.key] = event.result.ids
    assert engine.capacity == 128
    assert grown == {key: result.ids for key, result in expected.items()}
    engine.warmup()
    count = engine.compile_count
    list(engine.run(requests))
    assert engine.compile_count == count


BAD = {
    "empty": ([], {}, ["empty", "at least one token"]),
    "too long": (prompt(129), {}, ["129", "128", "horten"]),
    "not an id": ([40, 96], {}, ["96", "vocabulary", "tokenizer"]),
    "negative": ([-1], {}, ["-1", "vocabulary"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_prompt_that_cannot_run_is_refused_in_a_sentence(engine_of, name):
    ids, settings, words = BAD[name]
    engine = engine_of(3)
    request = Request("bad", ids, SamplingParams(**settings))
    with pytest.raises(UserError) as error:
        engine.check(request)
    assert all(word in str(error.value) for word in words), error.value
    with pytest.raises(UserError):
        list(engine.run([MIXED[0], request]))
    assert results(engine, [MIXED[0]])["greedy"].ids


def test_a_prompt_beyond_memory_states_need_and_way_out(tiny, monkeypatch):
    monkeypatch.setattr(engine_module.memory, "available_bytes", lambda devices: 10_000_000)
    engine = Engine(*tiny, slots=4)
    engine.check(Request("fits", prompt(500), SamplingParams()))
    with pytest.raises(UserError) as error:
        engine.check(Request("long", prompt(200_000), SamplingParams()))
    text = str(error.value)
    assert "200,000 tokens" in text and "10 MB are available" in text
    assert "MB of cache" in text and "horten the prompt" in text
    with pytest.raises(UserError):
        engine.reserve(200_000)


def test_available_memory_is_that_of_this_machine():
    assert 10**6 < engine_module.memory.available_bytes() < 10**15
    assert engine_module.memory.human(1_250_000_000) == "1.25 GB"
    assert engine_module.memory.human(999) == "999 B"

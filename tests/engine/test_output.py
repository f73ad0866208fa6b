"""Text, stop conditions and chunk plans: the host's side of a request."""

import hypothesis
import hypothesis.strategies as st
import pytest

from mmx.engine.engine import plan_chunks
from mmx.engine.output import Output
from mmx.engine.request import Request, SamplingParams
from tests.engine.conftest import EOS, Alphabet

PROMPT = [65, 66]


def feed(ids, eos_ids=(EOS,), limit=None, tokenizer=None, **sampling):
    """Pushes `ids` until the request is done; returns (output, joined pieces)."""
    sampling.setdefault("max_tokens", len(ids) + 1)
    params = SamplingParams(**sampling)
    output = Output(Request("r", PROMPT, params), tokenizer or Alphabet(), eos_ids,
                    limit or params.max_tokens, 0.0)
    output.start()
    text = ""
    for token in ids:
        event = output.push(token)
        assert event.key == "r" and event.new_ids == [token]
        text += event.text_piece
        if event.result is not None:
            assert event.result is output.result
            assert event.result.text == text
            break
    return output, text


def ids_of(text):
    return Alphabet().encode(text)


def test_a_stop_string_over_token_boundaries_is_cut_out():
    output, _ = feed(ids_of("HELLO WORLD"), stop=("LO W",))
    assert output.result.text == "HEL"
    assert output.result.ids == ids_of("HELLO W")
    assert output.result.finish_reason == "stop"


def test_a_beginning_of_a_stop_string_is_held_back_then_given():
    output, text = feed(ids_of("ABAB")[:3], stop=("BAC",))
    assert output.result is None and text == "A"
    output, text = feed(ids_of("ABAB"), stop=("BAC",), max_tokens=4)
    assert text == "ABAB" and output.result.finish_reason == "length"


def test_an_end_token_gives_no_text_but_is_counted():
    output, _ = feed([72, 73, EOS, 74])
    assert output.result.text == "HI"
    assert output.result.ids == [72, 73, EOS]
    assert output.result.finish_reason == "stop"
    assert output.result.timings.output_tokens == 3
    output, _ = feed([72, EOS, 74], ignore_eos=True, max_tokens=3)
    assert output.result.ids == [72, EOS, 74]
    output, _ = feed([72, 73, 74], stop_token_ids=(73,), ignore_eos=True)
    assert (output.result.text, output.result.ids) == ("H", [72, 73])


def test_a_character_of_four_tokens_appears_whole():
    params = SamplingParams(max_tokens=6)
    output = Output(Request("r", PROMPT, params), Alphabet(), (EOS,), 6, 0.0)
    output.start()
    assert [output.push(token).text_piece for token in (65, 10, 11, 12, 13, 66)] == [
        "A", "", "", "", "🙂", "B"]
    output, _ = feed([65, 10, 11], max_tokens=3)
    assert output.result.text == "A�"


def test_without_a_tokenizer_there_are_ids_only():
    params = SamplingParams(max_tokens=2)
    output = Output(Request("r", PROMPT, params), None, (), 2, 0.0)
    output.start()
    assert output.push(4).result is None
    result = output.push(9).result
    assert (result.text, result.ids, result.prompt_tokens) == ("", [4, 9], 2)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    ids=st.lists(st.sampled_from([65, 66, 67, 10, 11, 12, 13, EOS]), min_size=1, max_size=14),
    stop=st.lists(st.text("ABC", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 14))
def test_pieces_add_up_to_the_text_before_the_stop(ids, stop, max_tokens):
    output, _ = feed(ids, stop=tuple(stop), max_tokens=max_tokens)
    tokenizer = Alphabet()
    # What a reader of the whole sequence would do, token by token.
    expected, reason, used = None, None, []
    for n, token in enumerate(ids, 1):
        used.append(token)
        text = tokenizer.decode(used if token != EOS else used[:-1])
        last = token == EOS or n == max_tokens
        shown = text if last else text.rstrip("�")
        found = min((shown.find(s) + len(s), shown.find(s)) for s in stop if s in shown) if any(
            s in shown for s in stop) else None
        if found is not None:
            expected, reason = shown[:found[1]], "stop"
        elif token == EOS:
            expected, reason = text, "stop"
        elif n == max_tokens:
            expected, reason = text, "length"
        if reason:
            break
    if reason is None:
        assert output.result is None
    else:
        result = output.result
        assert (result.text, result.finish_reason, result.ids) == (expected, reason, used)


@hypothesis.given(st.integers(1, 5000), st.sampled_from([(16,), (16, 64, 256, 512), (7, 30)]))
def test_chunk_plans_cover_the_prompt_with_little_padding(tokens, sizes):
    plan = plan_chunks(tokens, sizes)
    assert set(plan) <= set(sizes)
    assert sum(plan) - plan[-1] < tokens <= sum(plan)
    assert list(plan) == sorted(plan, reverse=True)
    assert plan == plan_chunks(tokens, sizes)


@pytest.mark.parametrize("tokens, plan", [
    (1, (16,)), (20, (64,)), (70, (64, 16)), (200, (256,)), (300, (256, 64)), (512, (512,)),
    (1100, (512, 512, 64, 16))])
def test_chunk_plans_by_example(tokens, plan):
    assert plan_chunks(tokens, (16, 64, 256, 512)) == plan

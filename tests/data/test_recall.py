"""Recall tasks: reproducible, answerable from their own context, tokenised as their text is."""

import re
from pathlib import Path

import numpy as np
import pytest

import mmx
from mmx.data.recall import (
    Haystack,
    RecallSampler,
    is_eval_number,
    needle_prompts,
    plant,
)
from mmx.errors import UserError
from mmx.text import load_tokenizer

NANO = Path(mmx.__file__).parent / "assets" / "nano"
SENTENCES = (
    "The package manager keeps a list of installed files. It removes them on request. ",
    "A server answers requests from its clients. Each request names a resource. ",
    "Options may be given in any order. Most of them have a long form, too. ",
)
DOCS = [
    "\n\n".join(SENTENCES[(i + j) % 3] * (1 + (i + j) % 4) for j in range(9)) for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(NANO)


@pytest.fixture(scope="module")
def sampler(tokenizer):
    return RecallSampler(tokenizer, [d.strip() for d in DOCS], seed=3)


def split(tokenizer, sample):
    ids, mask = sample
    first = int(mask.argmax())
    return tokenizer.decode(ids[:first].tolist()), tokenizer.decode(ids[first:].tolist())


def test_sample_depends_on_seed_and_index_only(tokenizer, sampler):
    again = RecallSampler(tokenizer, [d.strip() for d in DOCS], seed=3)
    other = RecallSampler(tokenizer, [d.strip() for d in DOCS], seed=4)
    differs = 0
    for index in (5, 0, 11, 2):
        ids, mask = sampler.sample(index, 512)
        np.testing.assert_array_equal(ids, again.sample(index, 512)[0])
        np.testing.assert_array_equal(mask, again.sample(index, 512)[1])
        differs += not np.array_equal(ids, other.sample(index, 512)[0])
    assert differs == 4


@pytest.mark.parametrize("limit", [128, 300, 2048])
def test_sizes_and_mask(tokenizer, sampler, limit):
    eos = tokenizer.eos_ids[0]
    sizes = []
    for index in range(120):
        ids, mask = sampler.sample(index, limit)
        assert ids.dtype == np.int32 and mask.dtype == bool and len(ids) == len(mask) <= limit
        # the answer is one run that ends the sample, closed by EOS
        first = int(mask.argmax())
        assert 0 < first < len(ids) and mask[first:].all() and not mask[:first].any()
        assert ids[-1] == eos
        sizes.append(len(ids))
    if limit == 2048:
        below = np.mean(np.array(sizes) < 362)  # half way from 64 to 2048 in the logarithm
        assert 0.35 < below < 0.65 and max(sizes) > 1700


def test_answer_is_in_the_context(tokenizer, sampler):
    for index in range(200):
        context, answer = split(tokenizer, sampler.sample(index, 700))
        wanted = answer.removesuffix("<end_of_sentence>").strip()
        pieces = re.split(r"(?<=[:>=]) | is | number (?=\d)", wanted)
        assert pieces[-1].rstrip(".") in context, (index, context, answer)


def test_pieces_are_tokenised_like_the_whole(tokenizer, sampler):
    for index in range(200):
        ids, mask = sampler.sample(index, 600)
        ids = ids.tolist()
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
    for form in ("plain", "chat"):
        for prompt in needle_prompts(tokenizer, DOCS, 300, [0, 0.3, 0.6, 1], 4, 1, form):
            ids = [*prompt.ids.tolist(), *prompt.answer_ids.tolist()]
            assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_training_never_draws_an_evaluation_number(tokenizer, sampler):
    planted = re.compile(r"special magic \w+ number is: (\d+)")
    seen = set()
    for index in range(300):
        ids, _ = sampler.sample(index, 512)
        seen |= set(planted.findall(tokenizer.decode(ids.tolist())))
    assert len(seen) > 50 and not any(is_eval_number(int(n)) for n in seen)
    prompts = needle_prompts(tokenizer, DOCS, 200, [0.5], 40)
    assert all(is_eval_number(int(p.answer)) for p in prompts)
    assert 0.1 < np.mean([is_eval_number(n) for n in range(10000, 30000)]) < 0.15


@pytest.mark.parametrize("form", ["plain", "chat"])
@pytest.mark.parametrize("length", [128, 2048, 8192])
def test_needle_prompts_fill_the_length_at_the_depth(tokenizer, form, length):
    depths = np.linspace(0, 1, 10)
    prompts = needle_prompts(tokenizer, DOCS, length, depths, 2, 7, form)
    assert [p.depth for p in prompts] == [d for d in depths for _ in range(2)]
    for prompt in prompts:
        size = len(prompt.ids) + len(prompt.answer_ids)
        assert length - 12 <= size <= length
        text = tokenizer.decode(prompt.ids.tolist())
        found = re.findall(r"special magic (\w+) number is: (\d+)\.", text)
        assert len(found) == 1 and found[0][1] == prompt.answer
        answer = tokenizer.decode(prompt.answer_ids.tolist())
        assert answer.strip().endswith(prompt.answer)
        if form == "plain":
            assert text.endswith(f"The special magic {found[0][0]} number is:")
        else:
            assert text.endswith("<beginning_of_sentence>ai name=assistant\n")
        if length >= 2048:
            # as deep as asked, to a paragraph's length
            at = len(tokenizer.encode(text[: text.index("The special magic")])) / length
            assert abs(at - prompt.depth) < 0.06 + 16 / length


def test_needle_prompts_repeat_and_differ_by_seed(tokenizer):
    one, two, three = (
        [p.ids.tolist() for p in needle_prompts(tokenizer, DOCS, 256, [0.4], 3, seed)]
        for seed in (1, 1, 2)
    )
    assert one == two and one != three


def test_plant_keeps_every_needle_and_the_size(tokenizer):
    stack = Haystack(tokenizer, DOCS)
    needles = [f"Needle {n} lies here." for n in range(5)]
    for seed in range(20):
        ids = plant(tokenizer, stack, np.random.default_rng(seed), needles, 400)
        text = tokenizer.decode(ids.tolist())
        assert len(ids) <= 400 and text.endswith("\n\n")
        assert all(text.count(needle) == 1 for needle in needles)


def test_haystack_of_ids_equals_haystack_of_text(tokenizer):
    by_text = Haystack(tokenizer, DOCS)
    by_ids = Haystack(tokenizer, [np.array(tokenizer.encode(d), np.uint16) for d in DOCS])
    np.testing.assert_array_equal(by_text.ids, by_ids.ids)
    ids, marks = by_text.cut(np.random.default_rng(0), 3 * len(by_text.ids))
    assert len(ids) == len(marks) == 3 * len(by_text.ids)


def test_bad_input_is_told(tokenizer, sampler):
    with pytest.raises(UserError, match="no text"):
        RecallSampler(tokenizer, [], seed=0)
    with pytest.raises(UserError, match="at least 128"):
        sampler.sample(0, 127)
    with pytest.raises(UserError, match="'plain' or 'chat'"):
        needle_prompts(tokenizer, DOCS, 128, [0.5], 1, form="poem")

"""Streamed text equals whole text, and never shows a part of a character."""

from hypothesis import given
from hypothesis import strategies as st

from mmx.text import IncrementalDecoder
from tests.text.conftest import ALPHABET

IDS = st.lists(st.integers(-1, 450), max_size=40)


def stream(tokenizer, ids, **options):
    decoder = IncrementalDecoder(tokenizer, **options)
    return [decoder.push(i) for i in ids] + [decoder.finish()]


@given(ids=IDS, skip_special=st.booleans())
def test_pieces_join_to_the_whole(any_tokenizer, ids, skip_special):
    pieces = stream(any_tokenizer, ids, skip_special=skip_special)
    assert "".join(pieces) == any_tokenizer.decode(ids, skip_special=skip_special)


@given(text=st.text(ALPHABET))
def test_valid_text_streams_without_replacement(any_tokenizer, text):
    ids = any_tokenizer.encode(text, allow_special=False)
    pieces = stream(any_tokenizer, ids)
    assert pieces[-1] == ""
    assert "".join(pieces).count("\ufffd") <= text.count("\ufffd")  # one normaliser drops it


@given(before=IDS, ids=IDS)
def test_continuing_a_prompt(any_tokenizer, before, ids):
    decoder = IncrementalDecoder(any_tokenizer)
    shown = "".join(map(decoder.push, before))
    added = "".join(stream(any_tokenizer, ids, after=before))
    assert shown + added == any_tokenizer.decode(before + ids)


def byte_ids(tokenizer, data):
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return [by_bytes[bytes([byte])] for byte in data]


def test_a_character_waits_for_its_last_byte(bpe):
    assert stream(bpe, byte_ids(bpe, "é🦊".encode())) == ["", "é", "", "", "", "🦊", ""]


def test_broken_bytes_are_replaced_as_soon_as_they_are_known(bpe):
    assert stream(bpe, byte_ids(bpe, b"\xffa\xf0\x9f")) == ["\ufffd", "a", "", "", "\ufffd"]
    assert stream(bpe, byte_ids(bpe, b"\xe4a")) == ["", "\ufffda", ""]


def test_leading_space(spm):
    ids = spm.encode("quick fox")
    assert spm.token_of(ids[0]).startswith("\u2581")
    assert "".join(stream(spm, ids)) == "quick fox"
    assert "".join(stream(spm, ids, after=spm.encode("The"))) == " quick fox"


def test_cost_per_token_does_not_grow(bpe):
    """Each id is looked up once, and no more than a part of one character is kept."""
    asked = []

    class Watched:
        special_ids = bpe.special_ids

        def token_bytes(self, token_id):
            asked.append(token_id)
            return bpe.token_bytes(token_id)

    ids = bpe.encode("The quick 快速的 fox 🦊. ") * 500
    decoder = IncrementalDecoder(Watched())
    for count, token_id in enumerate(ids, 1):
        decoder.push(token_id)
        assert len(asked) == count
        assert len(decoder._utf8.getstate()[0]) < 4

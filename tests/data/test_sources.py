"""Files to a token cache: what is read, what is refused, and that nothing is done twice."""

import gzip
import lzma

import numpy as np
import pytest

from mmx.data import sources
from mmx.errors import UserError
from tests.data.byte_tokenizer import EOS, ByteTokenizer, tokenizer_dir, write_jsonl


def build(folder, files, tokenizer=None, salt=""):
    fingerprint = sources.tokenizer_fingerprint(tokenizer_dir(folder / "tok", salt))
    return sources.tokenize(sources.expand_files(files), tokenizer or ByteTokenizer(), EOS,
                            fingerprint, folder / "cache")


def test_documents_are_tokenised_in_order_and_closed_by_eos(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["one", "  \n", "zwei ä"])
    (tmp_path / "a.txt").write_text("whole\nfile")
    cache = build(tmp_path, [str(tmp_path / "*.txt"), str(tmp_path / "b.jsonl")])
    texts = ["whole\nfile", "one", "zwei ä"]
    assert cache.num_docs == 3 and cache.tokens.dtype == np.uint16
    assert [ByteTokenizer().decode(cache.document(i)) for i in range(3)] == texts
    assert (cache.tokens[cache.ends - 1] == EOS).all()
    assert cache.num_bytes == sum(len(text.encode()) for text in texts)
    assert cache.num_tokens == cache.num_bytes + 3


@pytest.mark.parametrize("opener, suffix", [(gzip.open, ".gz"), (lzma.open, ".xz")])
def test_compressed_files_read_as_the_plain_ones(tmp_path, opener, suffix):
    plain = write_jsonl(tmp_path / "d.jsonl", ["alpha", "beta"])
    with opener(tmp_path / f"d.jsonl{suffix}", "wb") as file:
        file.write(plain.read_bytes())
    packed = build(tmp_path, str(tmp_path / f"d.jsonl{suffix}"))
    np.testing.assert_array_equal(packed.tokens, build(tmp_path, str(plain)).tokens)


def test_a_cache_is_built_once_and_named_by_content(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", ["alpha", "beta"])
    tokenizer = ByteTokenizer()
    first = build(tmp_path, str(path), tokenizer)
    again = build(tmp_path, str(path.rename(tmp_path / "moved.jsonl")), tokenizer)
    assert tokenizer.encoded == 2 and again.key == first.key
    other_tokenizer = build(tmp_path, str(tmp_path / "moved.jsonl"), tokenizer, salt="x")
    write_jsonl(tmp_path / "moved.jsonl", ["alpha", "gamma"])
    other_text = build(tmp_path, str(tmp_path / "moved.jsonl"), tokenizer)
    assert len({first.key, other_tokenizer.key, other_text.key}) == 3
    assert not [path for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")]


def test_a_failed_build_leaves_nothing(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"d\.jsonl:2 is not a training record"):
        build(tmp_path, str(tmp_path / "d.jsonl"))
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("content, words", [
    (b"not json\n", "d.jsonl:1"),
    (b'{"prompt": "x"}\n', "d.jsonl:1"),
    (b'["text"]\n', "d.jsonl:1"),
    (b'{"text": " "}\n\n', "no text"),
    (b"", "no text"),
    (b'{"text": "\xff"}\n', "UTF-8"),
], ids=["json", "key", "list", "blank", "empty", "bytes"])
def test_unusable_files_are_named(tmp_path, content, words):
    (tmp_path / "d.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=words):
        build(tmp_path, str(tmp_path / "d.jsonl"))


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"No file matches '.*nowhere\*'"):
        sources.expand_files(str(tmp_path / "nowhere*"))
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(UserError, match=r"a\.pdf"):
        sources.expand_files(str(tmp_path / "a.pdf"))
    with pytest.raises(UserError, match="names no files"):
        sources.expand_files(())
    with pytest.raises(UserError, match="holds no tokenizer"):
        sources.tokenizer_fingerprint(tmp_path)
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"some text" * 99)[:-12])
    with pytest.raises(UserError, match=r"cut\.txt\.gz"):
        build(tmp_path, str(tmp_path / "cut.txt.gz"))


def test_a_tokenizer_beyond_its_vocabulary_is_refused(tmp_path):
    class Wrong(ByteTokenizer):
        vocab_size = 100

    path = write_jsonl(tmp_path / "d.jsonl", ["zzz"])
    with pytest.raises(UserError, match="id 126"):
        build(tmp_path, str(path), Wrong())

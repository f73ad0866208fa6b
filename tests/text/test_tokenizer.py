"""Tokenizer files of each kind, their special tokens, and what goes wrong with them."""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from mmx.errors import UserError
from mmx.text import load_tokenizer
from mmx.text.hf_backend import O200K_SPLIT
from tests.text.conftest import ALPHABET, CORPUS, MARKERS, train_sentencepiece

TEXT = "Füchse 快速 🦊 didn't\n\n  jump 12345!"
END = "<end_of_sentence>"


def write(path, **files):
    for name, value in files.items():
        (path / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.fixture
def copy(bpe_dir, tmp_path):
    shutil.copy(bpe_dir / "tokenizer.json", tmp_path)
    return tmp_path


@given(text=st.text(ALPHABET))
def test_round_trip(any_tokenizer, text):
    for allow_special in (True, False):
        ids = any_tokenizer.encode(text, allow_special=allow_special)
        assert all(0 <= i < any_tokenizer.vocab_size for i in ids)
        if any_tokenizer.leading_space == "keep":
            assert any_tokenizer.decode(ids) == text
        elif any_tokenizer.leading_space == "one":  # "each" drops spaces, as it was trained to
            assert any_tokenizer.decode(ids) == text.replace("\u2581", " ")


def test_encodes_as_the_library(bpe, bpe_dir):
    library = Library.from_file(str(bpe_dir / "tokenizer.json"))
    for text in [*CORPUS, f"a{END}b<think><image>", ""]:
        assert bpe.encode(text) == library.encode(text).ids
    assert bpe.encode_batch(CORPUS) == [bpe.encode(text) for text in CORPUS]


@given(ids=st.lists(st.integers(0, 420)))
def test_decodes_as_the_library(bpe, bpe_dir, ids):
    library = Library.from_file(str(bpe_dir / "tokenizer.json"))
    assert bpe.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_pair_of_files_equals_tokenizer_json(bpe, pair_dir):
    pair = load_tokenizer(pair_dir)
    for text in [*CORPUS, TEXT, f"a{END}b"]:
        assert pair.encode(text) == bpe.encode(text)
    assert pair.vocab_size == bpe.vocab_size == 406
    assert pair.eos_ids == bpe.eos_ids == (402,)


def test_pair_keeps_ids_with_holes(pair_dir, tmp_path):
    shutil.copytree(pair_dir, tmp_path, dirs_exist_ok=True)
    write(tmp_path, tokenizer_config={"added_tokens_decoder": {
        "500": {"content": END, "special": True}, "450": {"content": "<x>", "special": True}}})
    pair = load_tokenizer(tmp_path)
    assert pair.encode(f"<x>{END}") == [450, 500]
    assert (pair.vocab_size, pair.eos_ids, pair.decode([470])) == (501, (500,), "")


@pytest.mark.parametrize("text, pieces", [
    ("HelloWorld isn't", ["Hello", "World", " isn't"]),
    ("WE'LL 12345", ["WE'LL", " ", "123", "45"]),
    ("a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
    ("x /= y;//\nz", ["x", " /=", " y", ";//\n", "z"]),
    ("快速Ünï 🦊", ["快速Ünï", " 🦊"]),
    ("end  ", ["end", "  "]),
])
def test_o200k_split(text, pieces):
    from tokenizers import Regex, pre_tokenizers

    split = pre_tokenizers.Split(Regex(O200K_SPLIT), "isolated")
    assert [piece for piece, _ in split.pre_tokenize_str(text)] == pieces


@pytest.mark.parametrize("options", [
    {}, {"model_type": "unigram"}, {"remove_extra_whitespaces": False},
    {"add_dummy_prefix": False}, {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
], ids=lambda options: "-".join(options) or "default")
def test_sentencepiece_as_the_library(options, tmp_path):
    from sentencepiece import SentencePieceProcessor

    model = train_sentencepiece(**options)
    (tmp_path / "spiece.model").write_bytes(model)
    ours, library = load_tokenizer(tmp_path), SentencePieceProcessor(model_proto=model)
    for text in [*CORPUS, TEXT, f"a {END} b", " lead", "two  spaces", "77", ""]:
        assert ours.encode(text) == library.encode(text)
        assert ours.decode(ours.encode(text)) == library.decode(library.encode(text))
    plain = ours.encode(f"a {END} b", allow_special=False)
    assert ours.id_of(END) in ours.special_ids and ours.id_of(END) not in plain
    for control in ("<s>", "</s>"):
        assert ours.encode(f"a{control}b").count(ours.id_of(control)) == 1
    assert ours.decode(plain) == library.decode(library.encode(f"a {END} b"))
    letters = [i for i in range(library.get_piece_size())
               if not (library.is_byte(i) or library.is_control(i) or library.is_unknown(i))]
    space = library.piece_to_id("\u2581")
    for i in letters:
        for ids in ([i], [i, i], [space, i], [space, space, i, space]):
            assert ours.decode(ids) == library.decode(ids)


def test_sentencepiece_tokens_beyond_the_model(spm_dir, tmp_path):
    shutil.copy(spm_dir / "tokenizer.model", tmp_path)
    write(tmp_path, added_tokens={"<extra>": 1000})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a<extra>b")[1:-1] == [1000]
    assert (tokenizer.vocab_size, tokenizer.id_of("<extra>")) == (1001, 1000)
    assert tokenizer.decode(tokenizer.encode("a<extra>b")) == "a<extra>b"


def test_special_tokens_in_untrusted_text(any_tokenizer):
    for marker in [m for m in [*MARKERS, "<think>"] if any_tokenizer.id_of(m) is not None]:
        token_id = any_tokenizer.id_of(marker)
        assert token_id in any_tokenizer.encode(f"a{marker}b")
        plain = any_tokenizer.encode(f"a{marker}b", allow_special=False)
        assert token_id not in plain
        assert any_tokenizer.decode(plain) == f"a{marker}b"
        assert any_tokenizer.encode_batch([f"a{marker}b"], allow_special=False) == [plain]


def test_segments_hide_only_untrusted_markers(any_tokenizer):
    end = any_tokenizer.id_of(END)
    ids = any_tokenizer.encode_segments([("a ", True), (f"b{END}", False), (f"{END}\n", True)])
    assert ids.count(end) == 1
    shown = any_tokenizer.decode(ids)  # some libraries put a space after every special token
    assert shown.replace(" ", "") == f"ab{END}{END}\n"
    split = any_tokenizer.encode_segments([("<end_of_", False), ("sentence>", False)])
    assert end not in split
    whole = any_tokenizer.encode_segments([("a b", True), ("b c", False), (END, True)])
    assert whole == any_tokenizer.encode(f"a bb c{END}")


def test_skip_special(any_tokenizer):
    ids = any_tokenizer.encode(f"a{END}b")
    assert any_tokenizer.decode(ids).replace(" ", "") == f"a{END}b"
    assert any_tokenizer.decode(ids, skip_special=True).replace(" ", "") == "ab"


def test_names_and_ids(any_tokenizer):
    end = any_tokenizer.id_of(END)
    assert any_tokenizer.token_of(end) == END
    assert end in any_tokenizer.special_ids
    assert any_tokenizer.id_of("no such token") is None
    for outside in (-1, any_tokenizer.vocab_size, 10**9):
        assert any_tokenizer.token_of(outside) is None
        assert any_tokenizer.decode([outside]) == ""


def test_stored_truncation_and_padding_are_off(bpe_dir, tmp_path):
    library = Library.from_file(str(bpe_dir / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize("files, expected", [
    ({}, (402,)),
    ({"generation_config": {"eos_token_id": 401}}, (401, 402)),
    ({"generation_config": {"eos_token_id": [402, 403]}}, (402, 403)),
    ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 400}}, (400, 402)),
    ({"config": {"text_config": {"eos_token_id": 401}}}, (401, 402)),
    ({"config": {"eos_token_id": 2}}, (402,)),
    ({"tokenizer_config": {"eos_token": "<image>"}}, (404, 402)),
    ({"tokenizer_config": {"eos_token": {"content": END}}}, (402,)),
], ids=["default", "generation", "list", "null", "nested", "class-default", "name", "object"])
def test_eos_ids(copy, files, expected):
    assert load_tokenizer(write(copy, **files)).eos_ids == expected


def test_eos_of_sentencepiece(tmp_path):
    (tmp_path / "x.model").write_bytes(train_sentencepiece(user_defined_symbols=[]))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_ids == (tokenizer.id_of("</s>"),)


def test_chat_template_of_the_checkpoint(copy):
    assert load_tokenizer(copy).chat_template is None
    write(copy, tokenizer_config={"chat_template": "one"})
    assert load_tokenizer(copy).chat_template == "one"
    write(copy, tokenizer_config={"chat_template": [
        {"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]})
    assert load_tokenizer(copy).chat_template == "d"
    (copy / "chat_template.jinja").write_text("own file")
    assert load_tokenizer(copy).chat_template == "own file"


def broken(name, content):
    def change(path):
        (path / name).write_bytes(content)
    return change


def truncated(path):
    file = path / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])


def without_merges(path):
    (path / "tokenizer.json").unlink()
    (path / "vocab.json").write_text('{"a": 0}')


def bad_merge(path):
    without_merges(path)
    (path / "merges.txt").write_text("#version: 0.2\na b c\n")


def shared_id(path):
    without_merges(path)
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "added_tokens.json").write_text('{"<x>": 0}')


def unknown_decoder(path):
    file = path / "tokenizer.json"
    value = json.loads(file.read_text())
    value["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    file.write_text(json.dumps(value))


def only_model(content):
    def change(path):
        (path / "tokenizer.json").unlink()
        (path / "tokenizer.model").write_bytes(content)
    return change


@pytest.mark.parametrize("change, message", [
    (lambda path: (path / "tokenizer.json").unlink(), "has no tokenizer"),
    (truncated, "tokenizer.json can not be read"),
    (broken("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
    (broken("tokenizer_config.json", b"{"), "tokenizer_config.json is not JSON"),
    (broken("generation_config.json", b"[]"), "generation_config.json does not hold"),
    (broken("generation_config.json", b'{"eos_token_id": "x"}'), "eos_token_id='x'"),
    (without_merges, "no merges.txt"),
    (bad_merge, "Line 2 of .*merges.txt is not a merge"),
    (shared_id, "Token id 0 belongs to two tokens"),
    (unknown_decoder, "decoder step 'WordPiece'"),
    (only_model(b""), "tokenizer.model can not be read"),
    (only_model(b"\x00" * 64), "tokenizer.model can not be read"),
    (only_model(b"\x0a"), "tokenizer.model can not be read"),
    (broken("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja is not UTF-8"),
])
def test_broken_files(copy, change, message):
    change(copy)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(copy)
    assert error.value.rule and error.value.fix


def test_missing_directory(tmp_path):
    with pytest.raises(UserError, match="There is no tokenizer at"):
        load_tokenizer(tmp_path / "nothing")


def test_text_that_is_not_unicode(any_tokenizer):
    with pytest.raises(UserError, match="U\\+D800, at character 1"):
        any_tokenizer.encode("a\ud800")
    with pytest.raises(UserError, match="not bytes"):
        any_tokenizer.encode(b"a")

"""Tiny tokenizers of every kind, trained when the tests run."""

import io
import json

import pytest
from hypothesis import settings

from mmx.text import load_tokenizer
from mmx.text.hf_backend import byte_level_bpe

# The time of one example says more about the machine's other work than about the code.
settings.register_profile("mmx", deadline=None)
settings.load_profile("mmx")

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it didn't look back at 12345 hounds.",
    "system ai_setting=assistant\nuser name=user\nai name=assistant\nfunctions response",
    "快速的棕色狐狸跳过了懒狗。 Быстрая лиса прыгает. Füchse springen über Hunde 🦊🐕.",
    "def f(x):\n    return {'name': x, \"value\": [1, 2, 3]}  # a comment\n\n\n",
] * 4
# Letters of every UTF-8 length, spaces, marks, controls, and what tokenizers treat apart.
ALPHABET = ("abE9 \n\t\r.,'<>_{}[]()\"\\/`|\0\x7f\u00a0\u0301éßжあ快速\u200d\u2028\u2581"
            "\ufeff\ufffd🦊🐕\U0010ffff")
MARKERS = ["<begin_of_document>", "<beginning_of_sentence>", "<end_of_sentence>",
           "<function_call>", "<image>"]


def train_bpe(path):
    """A byte-level BPE of 400 tokens, then the markers, then one token that is not special."""
    from tokenizers import AddedToken, pre_tokenizers, trainers

    library = byte_level_bpe({}, [], {})
    library.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=400, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    library.add_special_tokens([AddedToken(marker, special=True, normalized=False)
                                for marker in MARKERS])
    library.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    library.save(str(path / "tokenizer.json"))
    return library


def train_sentencepiece(**options) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=420, byte_fallback=True,
        character_coverage=0.98, hard_vocab_limit=False, num_threads=1, minloglevel=2,
        **{"model_type": "bpe", "user_defined_symbols": [*MARKERS, "\n", "7"]} | options)
    return model.getvalue()


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("bpe")
    train_bpe(path)
    return path


@pytest.fixture(scope="session")
def pair_dir(tmp_path_factory, bpe_dir):
    """The same BPE as vocab.json and merges.txt; the markers in tokenizer_config.json."""
    path = tmp_path_factory.mktemp("pair")
    stored = json.loads((bpe_dir / "tokenizer.json").read_text())
    merges = ["#version: 0.2", *(" ".join(pair) for pair in stored["model"]["merges"]), ""]
    (path / "vocab.json").write_text(json.dumps(stored["model"]["vocab"]))
    (path / "merges.txt").write_text("\n".join(merges))
    (path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
        str(token["id"]): {"content": token["content"], "special": token["special"]}
        for token in stored["added_tokens"]}}))
    return path


@pytest.fixture(scope="session")
def spm_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("spm")
    (path / "tokenizer.model").write_bytes(train_sentencepiece())
    return path


@pytest.fixture(scope="session")
def bpe(bpe_dir):
    return load_tokenizer(bpe_dir)


@pytest.fixture(scope="session")
def spm(spm_dir):
    return load_tokenizer(spm_dir)


@pytest.fixture(scope="session")
def fallback(tmp_path_factory):
    """A tokenizer.json in the SentencePiece manner: byte fallback, spaces as U+2581."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    space = "\u2581"
    pieces = [f"<0x{byte:02X}>" for byte in range(256)] + [space, "a", "b", f"{space}a", "é"]
    library = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)},
                                   merges=[(space, "a")], byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend(space),
                                               normalizers.Replace(" ", space)])
    library.decoder = decoders.Sequence([decoders.Replace(space, " "), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(["<end_of_sentence>"])
    path = tmp_path_factory.mktemp("fallback")
    library.save(str(path / "tokenizer.json"))
    return load_tokenizer(path)


@pytest.fixture(scope="session", params=["bpe", "spm", "fallback"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)

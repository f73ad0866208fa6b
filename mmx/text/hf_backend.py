"""Tokenizers of the `tokenizers` library: tokenizer.json, or vocab.json with merges.txt."""

import json
import re
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from mmx.errors import UserError
from mmx.text.detok import KEEP, STRIP_ONE

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")

# Split of the o200k family, which the MiniMax 200K vocabulary was trained with: words with their
# English contraction, numbers of at most three digits, punctuation, line ends, other white space.
_PREFIX = r"[^\r\n\p{L}\p{N}]?"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K_SPLIT = "|".join([
    f"{_PREFIX}{_UPPER}*{_LOWER}+{_CONTRACTION}",
    f"{_PREFIX}{_UPPER}+{_LOWER}*{_CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
])


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's character for each byte: printable Latin-1 as it is, the rest from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()


class HuggingFaceBackend:
    """A tokenizer of the `tokenizers` library; ByteLevel, Metaspace and byte-fallback decoders.

    declared: contents that `tokenizer_config.json` declares special besides the file itself.
    """

    def __init__(self, library, source: Path, declared: Iterable[str] = ()):
        from tokenizers import AddedToken

        self._library = library
        self._lock = threading.Lock()  # guards encode_special_tokens, a switch of the whole object
        library.no_truncation()  # a stored limit would cut long prompts in silence
        library.no_padding()
        added = library.get_added_tokens_decoder()
        declared = set(declared)
        self.special = {t.content: i for i, t in added.items()
                        if t.special or t.content in declared}
        self.atomic = {t.content: i for i, t in added.items() if t.special or t.content.strip()}
        # Only tokens that the library takes as special can be kept out of untrusted text.
        library.add_special_tokens([
            AddedToken(t.content, single_word=t.single_word, lstrip=t.lstrip, rstrip=t.rstrip,
                       normalized=t.normalized, special=True)
            for t in added.values() if not t.special and t.content.strip()])
        self._added_bytes = {i: t.content.encode() for i, t in added.items()}
        self.size = max([library.get_vocab_size(with_added_tokens=True) - 1, *added]) + 1
        self.eos_id = None
        self.leading_space, self._to_bytes = _decoder_rules(library.decoder, source)

    def _run(self, method: str, value, allow_special: bool, add_special: bool):
        with self._lock:
            self._library.encode_special_tokens = not allow_special
            return getattr(self._library, method)(value, add_special_tokens=add_special)

    def encode(self, text: str, allow_special: bool, add_special: bool) -> list[int]:
        return self._run("encode", text, allow_special, add_special).ids

    def encode_batch(self, texts: list[str], allow_special: bool, add_special: bool):
        encodings = self._run("encode_batch_fast", texts, allow_special, add_special)
        return [encoding.ids for encoding in encodings]

    def encode_plain(self, text: str, at_start: bool) -> list[int]:
        del at_start  # the library itself has no such notion between added tokens
        return self.encode(text, allow_special=False, add_special=False)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._added_bytes:
            return self._added_bytes[token_id]
        token = self.token_of(token_id)
        return b"" if token is None else self._to_bytes(token)

    def id_of(self, token: str) -> int | None:
        return self._library.token_to_id(token)

    def token_of(self, token_id: int) -> str | None:
        return self._library.id_to_token(token_id) if 0 <= token_id < self.size else None


def _byte_level(token: str) -> bytes:
    try:
        return bytes(BYTE_OF_CHAR[char] for char in token)
    except KeyError:  # a token that was not written in the byte alphabet
        return token.encode()


def _sentence_piece(token: str) -> bytes:
    byte = _BYTE_PIECE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace(SPACE, " ").encode()


def _decoder_rules(decoder, source: Path):
    """Returns (leading-space rule, token -> bytes) of a library decoder.

    Raises UserError for a decoder whose text is not a concatenation of its tokens.
    """
    if decoder is None:  # the library then joins tokens with spaces
        return STRIP_ONE, lambda token: b" " + token.encode()
    state = json.loads(decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return KEEP, _byte_level
    strip = KEEP
    for step in steps:
        kind = step["type"]
        if kind == "Metaspace" and step["replacement"] == SPACE:
            strip = KEEP if step.get("prepend_scheme", "always") == "never" else STRIP_ONE
        elif kind == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0):
            strip = STRIP_ONE
        elif not (kind in ("ByteFallback", "Fuse")
                  or kind == "Replace" and step["pattern"] == {"String": SPACE}
                  and step["content"] == " "):
            raise UserError(f"The tokenizer in {source} uses the decoder step {kind!r}.",
                            "Known are ByteLevel, Metaspace and the byte-fallback sequence.",
                            "Convert the tokenizer to one of these.")
    return strip, _sentence_piece


def byte_level_bpe(vocab: Mapping[str, int], merges: list[tuple[str, str]],
                   added: Mapping[int, str]):
    """A GPT-2-alphabet BPE with the o200k split, from the content of vocab.json and merges.txt.

    added: id -> text of the tokens outside the merges; ids may have holes.
    Raises UserError for an id that two tokens claim.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    # The library gives an added token the id that the BPE vocabulary holds for it.
    ids = {**vocab, **{text: i for i, text in added.items()}}
    if len(set(ids.values())) < len(ids):
        twice = next(i for i, text in added.items() if any(
            i == other and text != token for token, other in vocab.items()))
        raise UserError(f"Token id {twice} belongs to two tokens, one of them {added[twice]!r}.",
                        "vocab.json and the added tokens must not share an id.",
                        "Copy both files from the same checkpoint.")
    library = Tokenizer(models.BPE(vocab=ids, merges=merges))
    library.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(O200K_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(text, normalized=False, special=True)
                                for _, text in sorted(added.items())])
    return library

"""Token ids to text, one id at a time."""

import codecs
from collections.abc import Iterable

# Where the leading space that SentencePiece adds before a text is taken off again.
KEEP, STRIP_ONE, STRIP_EACH = "keep", "one", "each"


class LeadingSpace:
    """Takes the space that the tokenizer put before the text off its first bytes.

    rule: "keep" changes nothing, "one" drops one space, "each" drops one space of each piece until
    something is left (SentencePiece with remove_extra_whitespaces).
    """

    def __init__(self, rule: str = KEEP):
        self._rule = rule

    def __call__(self, piece: bytes) -> bytes:
        if self._rule == KEEP or not piece:
            return piece
        kept = piece.removeprefix(b" ")
        if self._rule == STRIP_ONE or kept:
            self._rule = KEEP
        return kept


class IncrementalDecoder:
    """Text of a growing list of ids, never cutting a UTF-8 character.

    The pieces of `push` and `finish` joined are `tokenizer.decode(ids, skip_special)` for any ids,
    with U+FFFD in place of bytes that can not become a character. Constant time per id.

    tokenizer: has `token_bytes(id) -> bytes`, and `leading_space` if it adds a space before a text.
    skip_special: special tokens give no text.
    after: ids that come before the stream, for text that continues a prompt: the pieces joined are
    then what the ids add to the text of `after`.
    """

    def __init__(self, tokenizer, skip_special: bool = False, after: Iterable[int] = ()):
        self._token_bytes = tokenizer.token_bytes
        self._special = tokenizer.special_ids if skip_special else frozenset()
        self._strip = LeadingSpace(getattr(tokenizer, "leading_space", KEEP))
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in after:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Returns the characters that this id completes, possibly none."""
        if token_id in self._special:
            return ""
        return self._utf8.decode(self._strip(self._token_bytes(token_id)))

    def finish(self) -> str:
        """Returns U+FFFD for a character that was left incomplete, else an empty text."""
        return self._utf8.decode(b"", True)

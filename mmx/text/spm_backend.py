"""SentencePiece `.model` files."""

import re
from collections.abc import Iterable, Iterator, Mapping

from mmx.text.detok import KEEP, STRIP_EACH, STRIP_ONE

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

# Bits of the model file, a protocol buffer (sentencepiece_model.proto): repeated message `pieces`
# is field 1 with its `type` in field 3; `normalizer_spec` is field 3 with add_dummy_prefix in 3.
# A later value of a field overrides an earlier one, so appending is enough to change one.
_PIECES, _PIECE_TYPE = 1, 3
_USER_DEFINED = 4
_TYPE_UNUSED = b"\x18\x05"
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class SentencePieceBackend:
    """A SentencePiece model, seen through the methods that `Tokenizer` calls.

    declared: texts that the checkpoint declares special besides the control pieces.
    added: id -> text of the tokens beyond the model's own pieces.
    """

    def __init__(self, model: bytes, declared: Iterable[str] = (),
                 added: Mapping[int, str] | None = None):
        from sentencepiece import SentencePieceProcessor

        whole = SentencePieceProcessor(model_proto=model)
        visible, untrusted = _without_visible_symbols(model)
        # Text after a special token gets no space of its own.
        inner = SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
        self._trusted = self._plain = (whole, inner)  # at the start of a text, and later
        if visible:
            self._plain = tuple(SentencePieceProcessor(model_proto=proto)
                                for proto in (untrusted, untrusted + _NO_DUMMY_PREFIX))
        self._pieces = whole
        prefix = whole.normalize("a") != inner.normalize("a")
        squeeze = whole.normalize("a  b") == whole.normalize("a b")
        self.leading_space = STRIP_EACH if squeeze else STRIP_ONE if prefix else KEEP
        self._own_size = whole.get_piece_size()
        known = {whole.id_to_piece(i): i for i in range(self._own_size)}
        self._added = {i: t for i, t in (added or {}).items() if i >= self._own_size}
        extra = {t: i for i, t in self._added.items()}
        self.size = max([self._own_size - 1, *self._added]) + 1
        controls = {t: i for t, i in known.items() if whole.is_control(i)}
        known |= extra
        self.special = controls | {t: known[t] for t in declared if t in known}
        self.atomic = self.special | {t: known[t] for t in visible} | extra
        self._unknown = whole.unk_id()
        self._unknown_bytes = whole.decode([self._unknown]).encode()
        self._bos, eos = whole.bos_id(), whole.eos_id()
        self.eos_id = eos if eos >= 0 else None
        # Control pieces and extra tokens are not found by the library itself.
        ordered = sorted(self.atomic.keys() - set(visible), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def encode(self, text: str, allow_special: bool, add_special: bool) -> list[int]:
        ids = [self._bos] if add_special and self._bos >= 0 else []
        if not allow_special:
            return ids + self.encode_plain(text, at_start=True)
        end = 0
        for match in self._split.finditer(text):
            ids += self._trusted[end > 0].encode(text[end:match.start()])
            ids.append(self.atomic[match[0]])
            end = match.end()
        return ids + self._trusted[end > 0].encode(text[end:])

    def encode_batch(self, texts: list[str], allow_special: bool, add_special: bool):
        return [self.encode(text, allow_special, add_special) for text in texts]

    def encode_plain(self, text: str, at_start: bool) -> list[int]:
        return self._plain[not at_start].encode(text)

    def token_bytes(self, token_id: int) -> bytes:
        token = self.token_of(token_id)
        if token is None:
            return b""
        if token_id == self._unknown:
            return self._unknown_bytes
        if token_id in self._added:
            return token.encode()
        if self._pieces.is_byte(token_id):
            return bytes([int(token[1:-1], 16)])
        return token.replace(SPACE, " ").encode()

    def id_of(self, token: str) -> int | None:
        token_id = self.atomic.get(token, self._pieces.piece_to_id(token))
        return token_id if self.token_of(token_id) == token else None

    def token_of(self, token_id: int) -> str | None:
        if 0 <= token_id < self._own_size:
            return self._pieces.id_to_piece(token_id)
        return self._added.get(token_id)


def _without_visible_symbols(model: bytes) -> tuple[list[str], bytes]:
    """Returns the user-defined symbols with something to see, and the model unable to emit them.

    The library matches such a symbol whole wherever its text stands, so untrusted text could forge
    one. Single characters (digits) and white space are no markers and stay.
    """
    visible, parts, copied = [], [], 0
    for number, start, end, tag in _fields(model, 0, len(model)):
        if number != _PIECES:
            continue
        fields = {n: (a, b) for n, a, b, _ in _fields(model, start, end)}
        first, last = fields.get(_PIECE_TYPE, (0, 0))
        text = model[slice(*fields.get(1, (0, 0)))].decode()
        if _varint(model, first)[0] != _USER_DEFINED or last == first or len(text) < 2 \
                or not text.replace(SPACE, " ").strip():
            continue
        visible.append(text)
        body = model[start:end] + _TYPE_UNUSED
        parts += [model[copied:tag], b"\x0a", _to_varint(len(body)), body]
        copied = end
    return visible, b"".join([*parts, model[copied:]])


def _fields(data: bytes, pos: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (field number, start and end of the value, start of the tag) of a protocol buffer."""
    while pos < stop:
        tag = pos
        key, pos = _varint(data, pos)
        start = pos
        match key & 7:
            case 0:
                _, pos = _varint(data, pos)
            case 1:
                pos += 8
            case 2:
                size, start = _varint(data, pos)
                pos = start + size
            case 5:
                pos += 4
            case kind:
                raise ValueError(f"wire type {kind} at byte {tag}")
        yield key >> 3, start, pos, tag


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
        shift += 7


def _to_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])

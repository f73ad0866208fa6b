"""A checkpoint's tokenizer, whichever of the usual files it comes in."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmx.errors import UserError
from mmx.text.detok import LeadingSpace

BEGIN_SENTENCE = "<beginning_of_sentence>"
END_SENTENCE = "<end_of_sentence>"
BEGIN_DOCUMENT = "<begin_of_document>"
_MARKERS = (BEGIN_SENTENCE, END_SENTENCE, BEGIN_DOCUMENT)

_FILES = "tokenizer.json, a SentencePiece .model file, or vocab.json with merges.txt"
_FIX = "Copy the tokenizer files of the checkpoint into its directory."


class Tokenizer:
    """Text to ids and back; made by `load_tokenizer`.

    vocab_size: highest id + 1; a model may have more rows, whose ids decode to nothing.
    eos_ids: ids that end a reply, the preferred one first.
    special_ids: ids of control tokens, the turn markers among them.
    leading_space: rule of `mmx.text.detok.LeadingSpace`.
    chat_template: the checkpoint's own jinja template, or None.
    """

    def __init__(self, backend, eos_ids: Iterable[int] = (), chat_template: str | None = None):
        self._backend = backend
        self._bytes: dict[int, bytes] = {}
        self.vocab_size: int = backend.size
        self.leading_space: str = backend.leading_space
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(eos_ids))
        self.chat_template = chat_template
        atomic = dict(backend.atomic)
        self.special_ids = frozenset(backend.special.values()) | {
            atomic[marker] for marker in _MARKERS if marker in atomic}
        self.markers: Mapping[str, int] = atomic
        ordered = sorted(filter(None, atomic), key=len, reverse=True)
        self._marker_pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def encode(self, text: str, allow_special: bool = True, add_special: bool = False) -> list[int]:
        """Returns the ids of `text`.

        allow_special: markers such as `<end_of_sentence>` in the text become their single id; pass
        False for text of another's making, which then can not forge one.
        add_special: let the tokenizer add its own begin and end tokens, if it defines any.
        Raises UserError for text with half of a surrogate pair.
        """
        return self._backend.encode(_checked(text), allow_special, add_special)

    def encode_batch(self, texts: Iterable[str], allow_special: bool = True,
                     add_special: bool = False) -> list[list[int]]:
        """Returns `encode` of each text, in parallel where the library can."""
        return self._backend.encode_batch([_checked(text) for text in texts], allow_special,
                                          add_special)

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Returns the ids of (text, trusted) segments joined, where only trusted ones hold markers.

        Equals `encode` of the joined text when no untrusted segment spells a marker; the cut
        between segments leaves no trace in the ids.
        """
        segments = [(_checked(text), trusted) for text, trusted in segments if text]
        text = "".join(piece for piece, _ in segments)
        spans, start = [], 0
        for piece, trusted in segments:
            if trusted:
                spans += [(start + a, start + b) for a, b in self.marker_spans(piece)]
            start += len(piece)
        if spans == self.marker_spans(text):
            return self._backend.encode(text, True, False)
        ids, end = [], 0
        for a, b in spans:
            ids += self._backend.encode_plain(text[end:a], at_start=end == 0)
            ids.append(self.markers[text[a:b]])
            end = b
        return ids + self._backend.encode_plain(text[end:], at_start=end == 0)

    def marker_spans(self, text: str) -> list[tuple[int, int]]:
        """Returns (start, end) of each marker that `encode` would take as one id."""
        return [match.span() for match in self._marker_pattern.finditer(text)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Returns the text of `ids`; unknown ids give nothing, broken UTF-8 gives U+FFFD."""
        skip = self.special_ids if skip_special else ()
        strip = LeadingSpace(self.leading_space)
        data = b"".join(strip(self.token_bytes(i)) for i in map(int, ids) if i not in skip)
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the UTF-8 bytes, perhaps a part of a character, that one id stands for."""
        try:
            return self._bytes[token_id]
        except KeyError:
            data = self._bytes[token_id] = self._backend.token_bytes(int(token_id))
            return data

    def id_of(self, token: str) -> int | None:
        """Returns the id of a token as the vocabulary spells it, None if there is no such token."""
        return self._backend.id_of(token)

    def token_of(self, token_id: int) -> str | None:
        """Returns the vocabulary's spelling of an id, None if it is out of range."""
        return self._backend.token_of(int(token_id))


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads the tokenizer of a checkpoint directory, or one tokenizer.json or .model file.

    Takes, in this order, tokenizer.json, a SentencePiece .model file, vocab.json with merges.txt
    (GPT-2 byte alphabet, o200k split). End-of-reply ids come from generation_config.json,
    config.json or tokenizer_config.json, with `<end_of_sentence>` always among them.
    Raises UserError if no tokenizer is there or one is broken.
    """
    path = Path(path)
    file = _find(path)
    directory = file.parent
    settings = _read_json(directory / "tokenizer_config.json")
    added = _added_tokens(directory, settings)
    declared = [text for text, special in added.values() if special]
    try:
        backend = _open(file, {i: text for i, (text, _) in added.items()}, declared)
    except UserError:
        raise
    except Exception as error:  # both libraries raise bare Exception and RuntimeError
        if file.read_bytes()[:23] == b"version https://git-lfs":
            raise UserError(f"{file} is a Git LFS pointer, not the file itself.",
                            "The tokenizer must be downloaded whole.",
                            "Run `git lfs pull` in the checkpoint's repository.") from None
        raise UserError(f"The tokenizer file {file} can not be read: {error}.",
                        f"A tokenizer is {_FILES}.", _FIX) from error
    eos_ids = _eos_ids(directory, settings, backend)
    return Tokenizer(backend, eos_ids, _chat_template(directory, settings))


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"There is no tokenizer at {path}.", f"A tokenizer is {_FILES}.",
                        "Give the directory of a checkpoint.")
    models = sorted(path.glob("*.model"), key=lambda file: (file.name != "tokenizer.model", file))
    for file in (path / "tokenizer.json", *models[:1], path / "vocab.json"):
        if file.is_file():
            return file
    raise UserError(f"The directory {path} has no tokenizer.", f"A tokenizer is {_FILES}.", _FIX)


def _open(file: Path, added: Mapping[int, str], declared: list[str]):
    if file.suffix == ".model":
        from mmx.text.spm_backend import SentencePieceBackend

        return SentencePieceBackend(file.read_bytes(), declared, added)
    from mmx.text.hf_backend import HuggingFaceBackend, byte_level_bpe

    if file.name == "vocab.json":
        vocab, merges = _vocabulary(file), _merges(file.parent / "merges.txt")
        return HuggingFaceBackend(byte_level_bpe(vocab, merges, added), file, declared)
    from tokenizers import Tokenizer as Library

    return HuggingFaceBackend(Library.from_file(str(file)), file, declared)


def _vocabulary(file: Path) -> dict[str, int]:
    vocab = _read_json(file)
    if not vocab or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise UserError(f"{file} is not a vocabulary.", "It maps each token to its id.", _FIX)
    return vocab


def _merges(file: Path) -> list[tuple[str, str]]:
    if not file.is_file():
        raise UserError(f"{file.parent} has vocab.json but no merges.txt.",
                        "A byte-level BPE consists of both.", _FIX)
    merges = []
    for number, line in enumerate(_read_text(file).split("\n"), 1):
        if not line.strip() or number == 1 and line.startswith("#version"):
            continue
        pair = tuple(line.rstrip("\r").split(" "))
        if len(pair) != 2 or not all(pair):
            raise UserError(f"Line {number} of {file} is not a merge: {line!r}.",
                            "A merge is two tokens with one space between.", _FIX)
        merges.append(pair)
    return merges


def _added_tokens(directory: Path, settings: Mapping) -> dict[int, tuple[str, bool]]:
    """Returns id -> (text, is special) of the tokens declared beside the vocabulary."""
    added = {i: (text, True) for text, i in _read_json(directory / "added_tokens.json").items()
             if isinstance(i, int)}
    declared = settings.get("added_tokens_decoder")
    for key, token in declared.items() if isinstance(declared, Mapping) else ():
        if isinstance(token, Mapping) and key.isdecimal() and isinstance(token.get("content"), str):
            added[int(key)] = token["content"], bool(token.get("special", False))
    return added


def _eos_ids(directory: Path, settings: Mapping, backend) -> list[int]:
    own = backend.atomic.get(END_SENTENCE)
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        config = _read_json(directory / name)
        text_config = config.get("text_config")
        for source in (config, text_config if isinstance(text_config, Mapping) else {}):
            ids = ids or _as_ids(source.get("eos_token_id"), directory / name)
    # The native configuration class writes 2 where nothing was set, which here is ordinary text.
    if own is not None:
        ids = [i for i in ids if i in backend.atomic.values()]
    name = settings.get("eos_token")
    name = name.get("content") if isinstance(name, Mapping) else name
    if not ids and isinstance(name, str) and (found := backend.id_of(name)) is not None:
        ids = [found]
    if own is not None and own not in ids:
        ids.append(own)
    if not ids and backend.eos_id is not None:
        ids = [backend.eos_id]
    return ids


def _as_ids(value: Any, file: Path) -> list[int]:
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int and i >= 0 for i in values):
        raise UserError(f"{file} has eos_token_id={value!r}.",
                        "It must be an id, a list of ids, or null.", "Correct the file.")
    return values


def _chat_template(directory: Path, settings: Mapping) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, Mapping)}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8: byte {error.start} can not be read.",
                        "Tokenizer files are UTF-8 text.",
                        "Copy the file anew from the checkpoint.") from None


def _read_json(file: Path) -> dict[str, Any]:
    """Returns the object in `file`, {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}.", "It must hold one JSON object.",
                        "Copy the file anew from the checkpoint.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} does not hold a JSON object.", "Its content is {\"key\": value}.",
                        "Copy the file anew from the checkpoint.")
    return value


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise UserError(f"A tokenizer takes text, not {type(text).__name__}.",
                        "A prompt is a string.", "Convert it to text first.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text holds half of a surrogate pair, U+{ord(text[error.start]):04X}, at "
            f"character {error.start}.", "Text must be valid Unicode.",
            "Write the whole character, or remove it.") from None
    return text

"""Text files to a memory-mapped token cache: read once, tokenised once, keyed by content."""

import bz2
import dataclasses
import glob
import gzip
import hashlib
import json
import lzma
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mmx.errors import UserError

CACHE_VERSION = 1
_BATCH_CHARS = 4 << 20  # text handed to one encode_batch call; bounds memory
_COMPRESSED = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_KINDS = (".txt", ".jsonl")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Documents of one source as tokens, each closed by EOS.

    tokens: [n] uint16 or uint32, memory-mapped; ends: [docs] int64, the position after each
    document's EOS; num_bytes: UTF-8 bytes of all texts; key: content hash, the folder's name.
    """

    tokens: np.ndarray
    ends: np.ndarray
    num_bytes: int
    key: str

    @property
    def num_docs(self) -> int:
        return len(self.ends)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def tokens_per_byte(self) -> float:
        return self.num_tokens / self.num_bytes

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document without its EOS."""
        start = int(self.ends[index - 1]) if index else 0
        return self.tokens[start:int(self.ends[index]) - 1]


def expand_files(patterns: Sequence[str] | str) -> tuple[Path, ...]:
    """Files named by paths or globs, sorted, each once.

    Raises UserError for a pattern without a file and for a file that is neither .txt nor .jsonl
    (optionally .gz, .xz or .bz2).
    """
    files: set[Path] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
        found = [path for path in found if path.is_file()]
        if not found:
            raise UserError(f"No file matches '{pattern}'.", "A text source names at least one "
                            "existing file or glob.", "Check the path, or gather the data first.")
        files.update(found)
    if not files:
        raise UserError("A text source names no files.", "It needs at least one path or glob.",
                        "Set its `files`.")
    for path in files:
        if _kind(path) not in _KINDS:
            raise UserError(f"'{path}' is not a text source.", "Files end in .txt or .jsonl, "
                            "optionally followed by .gz, .xz or .bz2.", "Rename or convert it.")
    return tuple(sorted(files))


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def read_documents(path: Path) -> Iterator[str]:
    """Texts of one file: the whole of a .txt, the "text" of each line of a .jsonl.

    Blank texts are passed over. Raises UserError with the line number for a broken record.
    """
    opener = _COMPRESSED.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            if _kind(path) == ".txt":
                texts: Iterator[str] = iter([file.read()])
            else:
                texts = (_record_text(path, n, line) for n, line in enumerate(file, 1))
            for text in texts:
                if text.strip():
                    yield text
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text ({error.reason} near byte {error.start}).",
                        "Sources are UTF-8.", "Convert the file, for example with iconv.") from None
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"'{path}' could not be read: {error}.", "Every named file must be whole "
                        "and readable.", "Check its permissions, or fetch it again.") from None


def _record_text(path: Path, number: int, line: str) -> str:
    if not line.strip():
        return ""
    try:
        text = json.loads(line)["text"]
        if isinstance(text, str):
            return text
    except (ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path}:{number} is not a training record.",
                    'Each line is a JSON object with a string "text".', "Mend or drop the line.")


def tokenizer_fingerprint(directory: str | os.PathLike) -> str:
    """SHA-256 over the tokenizer's own file in `directory`."""
    for name in _TOKENIZER_FILES:
        path = Path(directory) / name
        if path.is_file():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    raise UserError(f"'{directory}' holds no tokenizer.",
                    f"A tokenizer folder has {' or '.join(_TOKENIZER_FILES)}.",
                    "Point `tokenizer` at the model's folder.")


def cache_key(files: Sequence[Path], fingerprint: str, eos_id: int) -> str:
    """Names a cache by its files' bytes, the tokenizer and the separator; paths do not count."""
    digest = hashlib.sha256(f"{CACHE_VERSION}:{fingerprint}:{eos_id}".encode())
    for path in files:
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").digest()
        except OSError as error:
            raise UserError(f"'{path}' could not be read: {error.strerror}.",
                            "Every named file must be readable.", "Check permissions.") from None
        digest.update(_kind(path).encode() + content)
    return digest.hexdigest()[:24]


def open_cache(directory: str | os.PathLike) -> TokenCache:
    """Maps a finished cache folder. Raises UserError when it is incomplete."""
    directory = Path(directory)
    try:
        meta = json.loads((directory / "meta.json").read_text())
        return TokenCache(np.load(directory / "tokens.npy", mmap_mode="r"),
                          np.load(directory / "ends.npy"), meta["num_bytes"], directory.name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"The token cache '{directory}' is unreadable ({error}).",
                        "It holds meta.json, tokens.npy and ends.npy.",
                        "Delete the folder; it is built again.") from None


def tokenize(files: Sequence[Path], tokenizer, eos_id: int, fingerprint: str,
             cache_dir: str | os.PathLike,
             progress: Callable[[int, int], None] | None = None) -> TokenCache:
    """Returns the token cache of `files`, building it beside its final place when it is missing.

    Hosts that share `cache_dir` may race: the content decides the name, the first rename wins.
    progress(done, total) counts file bytes. Raises UserError when the files hold no text or the
    tokenizer yields ids beyond its own vocabulary.
    """
    final = Path(cache_dir) / cache_key(files, fingerprint, eos_id)
    if final.is_dir():
        return open_cache(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}-", dir=final.parent))
    try:
        _build(files, tokenizer, eos_id, scratch, progress)
        try:
            os.rename(scratch, final)
        except OSError:
            if not final.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return open_cache(final)


def _build(files, tokenizer, eos_id, folder, progress):
    size = max(tokenizer.vocab_size, eos_id + 1)
    dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
    ends, position, num_bytes, done = [], 0, 0, 0
    total = sum(path.stat().st_size for path in files)
    # A text that spells a special token holds its letters, not the token.
    encode = partial(tokenizer.encode_batch, allow_special=False)
    with open(folder / "tokens.npy", "wb") as out:
        _header(out, dtype, 0)
        for path in files:
            for texts in _groups(read_documents(path)):
                for text, ids in zip(texts, encode(texts), strict=True):
                    array = np.asarray([*ids, eos_id], np.int64)
                    if array.min() < 0 or array.max() >= size:
                        raise UserError(
                            f"The tokenizer gave id {int(array.max())}.",
                            f"Its vocabulary has {size} entries.", "Repair tokenizer.json.")
                    out.write(array.astype(dtype).tobytes())
                    position += len(array)
                    ends.append(position)
                    num_bytes += len(text.encode())
            done += path.stat().st_size
            if progress:
                progress(done, total)
        if not ends:
            raise UserError(f"There is no text in {', '.join(map(str, files[:3]))}.",
                            "A source needs at least one non-blank document.",
                            "Check how the files were gathered.")
        out.seek(0)
        _header(out, dtype, position)
    np.save(folder / "ends.npy", np.asarray(ends, np.int64))
    meta = {"num_bytes": num_bytes, "files": [path.name for path in files]}
    (folder / "meta.json").write_text(json.dumps(meta))


def _header(out, dtype, count):
    # numpy pads the header for the largest shape, so it can be rewritten in place.
    np.lib.format.write_array_header_1_0(
        out, {"descr": dtype.str, "fortran_order": False, "shape": (count,)})


def _groups(documents: Iterator[str]) -> Iterator[list[str]]:
    group, size = [], 0
    for text in documents:
        group.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield group
            group, size = [], 0
    if group:
        yield group

"""A tokenizer of bytes, so that data tests need no files of their own."""

import json
from pathlib import Path

EOS = 2


class ByteTokenizer:
    """Ids 4 … 259 are the bytes; counts its calls."""

    vocab_size = 260
    eos_ids = (EOS,)

    def __init__(self):
        self.encoded = 0

    def encode_batch(self, texts, allow_special: bool = True) -> list[list[int]]:
        assert not allow_special, "documents are plain text"
        self.encoded += len(texts)
        return [[byte + 4 for byte in text.encode()] for text in texts]

    def decode(self, ids) -> str:
        return bytes(i - 4 for i in ids).decode()


def tokenizer_dir(folder: Path, salt: str = "") -> Path:
    """A folder whose tokenizer.json only has a fingerprint."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps({"salt": salt}))
    return folder


def write_jsonl(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path

"""Train nano's byte-level BPE tokenizer: 4,096 ids, digits always alone.

    python launch/nano/train_tokenizer.py --data data/nano/train.jsonl --out mmx/assets/nano

Writes tokenizer.json and tokenizer_config.json. The split follows the model family's tokenizer
(optional leading sign, words by letter case with English contractions, numbers, signs, white
space) except that a number is cut into single digits, so that copying one is a walk over ids.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 4096
SPECIAL = [
    "<begin_of_document>",
    "<beginning_of_sentence>",
    "<end_of_sentence>",
    "<function_call>",
    "<image>",
    *(f"<reserved_{n}>" for n in range(5, 16)),
]
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?"
SPLIT = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_TAIL}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_TAIL}",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def texts(path: pathlib.Path, limit: int) -> Iterator[str]:
    """Texts of a JSONL file, evenly sampled so that at most `limit` bytes are read."""
    stride = max(1, -(-path.stat().st_size // limit))
    with path.open() as lines:
        for number, line in enumerate(lines):
            if number % stride == 0:
                yield json.loads(line)["text"]


def train(samples: Iterator[str]) -> Tokenizer:
    """A trained tokenizer of exactly 4,096 ids, the specials first, then the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(samples, trainer)
    return tokenizer


def main() -> None:
    """Train, check and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--limit_mb", type=int, default=60, help="text to learn from")
    args = parser.parse_args()
    tokenizer = train(texts(args.data, args.limit_mb << 20))
    if tokenizer.get_vocab_size() != VOCAB:
        raise SystemExit(f"the text gives {tokenizer.get_vocab_size()} ids, {VOCAB} are needed")
    args.out.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "unk_token": None,
        "model_max_length": 8192,
        "added_tokens_decoder": {
            str(n): {
                "content": token, "lstrip": False, "normalized": False, "rstrip": False,
                "single_word": False, "special": True,
            }
            for n, token in enumerate(SPECIAL)
        },
    }  # fmt: skip
    for name, body in (
        ("tokenizer.json", tokenizer.to_str(pretty=False)),
        ("tokenizer_config.json", json.dumps(config, indent=1) + "\n"),
    ):
        partial = args.out / (name + ".partial")
        partial.write_text(body)
        os.replace(partial, args.out / name)
    sample = list(texts(args.data, 1 << 20))
    size = sum(len(t.encode()) for t in sample)
    count = sum(len(e.ids) for e in tokenizer.encode_batch(sample))
    print(f"{tokenizer.get_vocab_size()} ids, {size / count:.3f} bytes a token on a sample")


if __name__ == "__main__":
    main()

"""Measure a model directory: held-out bits per byte beside xz, planted needles, samples.

    python launch/nano/eval.py --model mmx/assets/nano --heldout data/nano/heldout.jsonl

Prints a table and writes JSON (--json). Bits per byte count every byte: the first token of a
window is charged log2(vocabulary) bits. Needles lie at ten depths in held-out text, numbers are
ones that training never draws, answers are decoded greedily.
"""

from __future__ import annotations

import argparse
import functools
import json
import lzma
import math
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from mmx.cache import init_cache
from mmx.checkpoint import load_params
from mmx.data.recall import Haystack, needle_prompts
from mmx.errors import UserError
from mmx.model import forward, step
from mmx.sharding.absent import skip_absent_accelerators
from mmx.text import load_tokenizer

CHUNK = 512
DEPTHS = tuple(np.linspace(0.0, 1.0, 10))


@functools.partial(jax.jit, static_argnames=("config", "dtype"))
def _nats(config, params, ids_BT, lengths_B, dtype):
    """Nats float32 [B] of each row's tokens after its first."""
    logits_BTV, _ = forward(config, params, ids_BT, lengths_B=lengths_B, dtype=dtype)
    scores_BTV = jax.nn.log_softmax(logits_BTV[:, :-1].astype(jnp.float32))
    picked_BT = jnp.take_along_axis(scores_BTV, ids_BT[:, 1:, None], axis=2)[..., 0]
    valid_BT = jnp.arange(1, ids_BT.shape[1]) < lengths_B[:, None]
    return -jnp.sum(picked_BT * valid_BT, axis=1)


def bits_per_byte(config, params, tokenizer, texts, window, dtype, tokens_per_batch=32768):
    """Bits per UTF-8 byte of `texts`, read in windows of `window` tokens with nothing carried."""
    pieces = []
    for ids in tokenizer.encode_batch(texts):
        pieces += [ids[i : i + window] for i in range(0, len(ids), window)]
    buckets: dict[int, list] = {}
    for piece in pieces:
        size = next(s for s in (128, 256, 512, 1024, 2048, 4096, 8192, 1 << 20) if s >= len(piece))
        buckets.setdefault(min(size, window), []).append(piece)
    nats = len(pieces) * math.log(config.vocab_size)
    for size, group in sorted(buckets.items()):
        rows = max(1, tokens_per_batch // size)
        for first in range(0, len(group), rows):
            ids_BT = np.zeros((rows, size), np.int32)
            lengths_B = np.zeros(rows, np.int32)
            for row, piece in enumerate(group[first : first + rows]):
                ids_BT[row, : len(piece)] = piece
                lengths_B[row] = len(piece)
            got_B = np.asarray(_nats(config, params, ids_BT, lengths_B, dtype), np.float64)
            nats += float(got_B[lengths_B > 0].sum())
    return nats / math.log(2) / sum(len(t.encode()) for t in texts), sum(map(len, pieces))


@functools.partial(
    jax.jit, static_argnames=("config", "logits", "dtype"), donate_argnames=("cache",)
)
def _step(config, params, cache, ids_BT, lengths_B, logits, dtype):
    return step(config, params, cache, ids_BT, lengths_B, logits=logits, dtype=dtype)


def greedy(config, params, prompts, max_new, dtype, rows=16):
    """Greedy continuations (id lists) of prompts of any lengths, cut at the first EOS."""
    out = []
    longest = max(len(p) for p in prompts)
    capacity = -(-(longest + max_new) // CHUNK) * CHUNK
    eos = set(config.eos_token_ids)
    for first in range(0, len(prompts), rows):
        group = [np.asarray(p, np.int32) for p in prompts[first : first + rows]]
        group += [group[-1][:1]] * (rows - len(group))
        sizes_B = np.array([len(p) for p in group])
        cache = init_cache(config, rows, capacity, dtype)
        logits_BV = np.zeros((rows, config.vocab_size), np.float32)
        for start in range(0, int(sizes_B.max()), CHUNK):
            ids_BT = np.zeros((rows, CHUNK), np.int32)
            counts_B = np.clip(sizes_B - start, 0, CHUNK).astype(np.int32)
            for row, prompt in enumerate(group):
                ids_BT[row, : counts_B[row]] = prompt[start : start + CHUNK]
            got_BV, cache = _step(config, params, cache, ids_BT, counts_B, "last", dtype)
            ends_B = (counts_B > 0) & (sizes_B <= start + CHUNK)
            if ends_B.any():
                logits_BV[ends_B] = np.asarray(got_BV)[ends_B]
        new_B = logits_BV.argmax(-1)
        rows_out = [[int(i)] for i in new_B]
        ones_B = np.ones(rows, np.int32)
        for _ in range(max_new - 1):
            got_BV, cache = _step(
                config, params, cache, new_B[:, None].astype(np.int32), ones_B, "last", dtype
            )
            new_B = np.asarray(jnp.argmax(got_BV, -1))
            for row, token in enumerate(new_B):
                rows_out[row].append(int(token))
            if all(eos & set(ids) for ids in rows_out):
                break
        for ids in rows_out[: len(prompts[first : first + rows])]:
            end = next((i for i, token in enumerate(ids) if token in eos), len(ids))
            out.append(ids[:end])
    return out


def needles(config, params, tokenizer, stack, length, trials, form, seed, dtype, rows):
    """Share of right answers per depth, and the wrong ones as (depth, wanted, got)."""
    prompts = needle_prompts(tokenizer, stack, length, DEPTHS, trials, seed, form)
    budget = 14 if form == "plain" else 48
    answers = greedy(config, params, [p.ids for p in prompts], budget, dtype, rows)
    right = dict.fromkeys(DEPTHS, 0)
    wrong = []
    for prompt, ids in zip(prompts, answers, strict=True):
        text = tokenizer.decode(ids)
        found = text.rpartition("is:")[2].strip().rstrip(".").strip()
        if found == prompt.answer:
            right[prompt.depth] += 1
        else:
            wrong.append((round(prompt.depth, 2), prompt.answer, text))
    return {f"{100 * d:.0f}%": right[d] / trials for d in DEPTHS}, wrong


def sample_prompts(texts, count):
    """Opening words of held-out documents: the first 12 words of paragraphs spread over them."""
    found = []
    for text in texts[:: max(1, len(texts) // count)]:
        words = max(text.split("\n\n"), key=len).split()
        if len(words) > 24:
            found.append(" ".join(words[:12]))
    return found[:count]


def main() -> None:
    """Run the measurements that the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mmx/assets/nano")
    parser.add_argument("--heldout", type=pathlib.Path, default="data/nano/heldout.jsonl")
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--trials", type=int, default=10, help="needles per depth")
    parser.add_argument("--lengths", default="2048,8192")
    parser.add_argument("--forms", default="plain,chat")
    parser.add_argument("--windows", default="2048,8192")
    parser.add_argument("--docs", type=int, default=0, help="held-out documents scored; 0 = all")
    parser.add_argument("--samples", type=int, default=6)
    parser.add_argument("--rows", type=int, default=0, help="prompts per batch; 0 = by backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="", help="default float32 on CPU, else bfloat16")
    args = parser.parse_args()
    if not args.heldout.is_file():
        parser.error(f"there is no file {args.heldout}. It holds a document a line, as "
                     "launch/nano/gather.py writes it; --heldout names another.")
    try:
        with args.heldout.open() as lines:
            texts = [json.loads(line)["text"] for line in lines]
    except (ValueError, KeyError, TypeError):
        parser.error(f"{args.heldout} is not JSON Lines with a text in each. launch/nano/gather.py "
                     "writes such a file; --heldout names another.")
    skip_absent_accelerators()
    cpu = jax.default_backend() == "cpu"
    dtype = args.dtype or ("float32" if cpu else "bfloat16")
    rows = args.rows or (8 if cpu else 50)
    config, params = load_params(args.model, dtype=dtype)
    tokenizer = load_tokenizer(args.model)
    scored = texts[: args.docs] if args.docs else texts
    joined = "\n\n".join(scored).encode()
    report: dict = {"model": str(args.model), "dtype": dtype, "backend": jax.default_backend()}
    report["heldout"] = {
        "documents": len(scored),
        "bytes": len(joined),
        "xz9_bits_per_byte": round(8 * len(lzma.compress(joined, preset=9)) / len(joined), 4),
    }
    print(f"held-out text: {len(scored)} documents, {len(joined):,} bytes")
    print(f"  xz -9                 {report['heldout']['xz9_bits_per_byte']:.4f} bits per byte")
    for window in (int(w) for w in args.windows.split(",") if w):
        started = time.monotonic()
        bits, tokens = bits_per_byte(config, params, tokenizer, scored, window, dtype)
        report["heldout"][f"bits_per_byte_{window}"] = round(bits, 4)
        report["heldout"]["tokens"] = tokens
        took = time.monotonic() - started
        print(f"  model, window {window:5d}   {bits:.4f} bits per byte  ({took:.0f} s)", flush=True)
    stack = Haystack(tokenizer, texts)
    report["needle"] = {}
    for form in (f for f in args.forms.split(",") if f and args.trials):
        for length in (int(n) for n in args.lengths.split(",") if n):
            started = time.monotonic()
            shares, wrong = needles(
                config, params, tokenizer, stack, length, args.trials, form, args.seed, dtype, rows
            )
            mean = sum(shares.values()) / len(shares)
            report["needle"][f"{form}_{length}"] = {
                "accuracy": round(mean, 4), "by_depth": shares, "wrong": wrong[:20],
            }  # fmt: skip
            cells = " ".join(f"{100 * share:4.0f}" for share in shares.values())
            took = time.monotonic() - started
            print(f"needle {form:5s} {length:5d}  {100 * mean:5.1f} %  by depth: {cells}"
                  f"  ({took:.0f} s)", flush=True)  # fmt: skip
            for depth, wanted, got in wrong[:3]:
                print(f"    missed at {depth}: wanted {wanted}, got {got!r}")
    if args.samples:
        prompts = sample_prompts(texts, args.samples)
        continued = greedy(
            config, params, [tokenizer.encode(p) for p in prompts], 96, dtype, min(rows, 8)
        )
        report["samples"] = [
            {"prompt": p, "text": tokenizer.decode(ids)}
            for p, ids in zip(prompts, continued, strict=True)
        ]
        for sample in report["samples"]:
            print(f"\n[{sample['prompt']}]{sample['text']}")
    if args.json:
        partial = args.json.with_suffix(".partial")
        partial.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(partial, args.json)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"eval.py: {error}", file=sys.stderr)
        sys.exit(2)

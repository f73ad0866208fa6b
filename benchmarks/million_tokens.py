"""The embedded model over a million tokens: needles, speed, and memory at each length.

    python benchmarks/million_tokens.py --output=results/million [--lengths=1024,4096,...]
    python benchmarks/million_tokens.py --output=results/million --plot   # draws what was written

One sequence is read in chunks by the engine's own programs. At every length needles are planted
1,000 to 8,000 tokens before the question (nano was tried to 8,192 tokens; over all of the prompt
where that is shorter), each after the same haystack: the states before the last 8,192 tokens are
kept and every needle starts from them. Answers are greedy and must be exact. The haystack is random
slices of tests/nano/heldout_sample.txt, which the model was not trained on.

Then decode steps are timed at that length: the whole step as the engine sends it (with the host's
share), and in compiled loops of their own the seven lightning layers (projections, state, norm,
gate, output) and the one softmax layer. `rest` is the difference: experts, norms, head, dispatch.
Writes million_tokens.json and .md after every length, and .png at the end. On a GPU nearly all of
the time goes into compiling a prefill, a decode step and a softmax loop for each size of the cache
(eight layers each): the dtype is therefore settled at the first length, before the rest is
compiled, several at once; and where half of --seconds is gone, lengths before the last are left
out. In nano the softmax layer is the last, and a prompt's
chunk needs it for its last token alone, so reading is linear in length here.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mmx.bench.timing import Method, Run, Timing, in_turns, loop, looped  # noqa: E402
from mmx.cache import Cache, cache_bytes  # noqa: E402
from mmx.checkpoint import load_config, load_params, locate  # noqa: E402
from mmx.config import LIGHTNING  # noqa: E402
from mmx.data.recall import Haystack, needle_prompts  # noqa: E402
from mmx.engine.memory import available_bytes, human  # noqa: E402
from mmx.engine.steps import Steps, find_forbidden  # noqa: E402
from mmx.nn.block import Block  # noqa: E402
from mmx.nn.lightning import decay_slopes  # noqa: E402
from mmx.nn.params import Factory  # noqa: E402
from mmx.nn.tokens import Tokens  # noqa: E402
from mmx.nn.wide import widen  # noqa: E402
from mmx.parallel.ops import Ops  # noqa: E402

LENGTHS = (1024, 4096, 16384, 65536, 262144, 1048576)
REACH = 8192     # of needles, as docs/nano.md measured it
SLICE = 2048     # of the haystack's text, drawn anew
ANSWER = 14      # tokens: a space, up to seven digits, a stop
STEPS, LOOP, FEW = 16, 32, 4  # FEW: where a step of softmax attention takes long
SPARE = 256      # room for an answer, and for padding that stands beyond it


class Study:
    """One model, one sequence; `measure` is called with rising lengths."""

    def __init__(self, dtype: str, chunk: int, texts: Mapping, seed: int):
        self.config, params = load_params(locate("nano"), dtype=dtype)
        self.chunk, self.texts, self.seed = chunk, texts, seed
        self.device = jax.local_devices()[0]
        self._forbidden_V = jax.device_put(find_forbidden(params))
        self.params = widen(params) if jax.default_backend() == "cpu" else params
        self._steps = Steps(self.config, self.params, 1, dtype)
        self._hay = np.asarray(texts["hay"], np.int32)
        self._done, self._cache = 0, None
        self._lightning_loop = loop(self._lightning, LOOP)
        self._softmax_loops = {steps: loop(self._softmax, steps) for steps in (LOOP, FEW)}

    def compile(self, lengths: Sequence[int]) -> None:
        """Compiles for `lengths`, several programs at a time; no clock is to count it."""
        begin = time.perf_counter()
        for future in self._steps.compile([key for length in lengths for key in (
                ("prefill", self.chunk, self._room(length)), ("decode", 1, self._room(length)))]):
            future.result()
        print(f"compiled for {len(lengths)} lengths: {time.perf_counter() - begin:.0f} s",
              flush=True)

    def _room(self, length: int) -> int:
        return max(length + SPARE, self.chunk)

    def measure(self, length: int, method: Method) -> dict[str, Any]:
        """Reads on up to `length`, asks every needle, times steps; the record of this length."""
        tail, capacity = min(REACH, length), self._room(length)
        begin = length - tail
        if self._cache is None:
            self._cache = self._steps.init(1, capacity)
        else:
            self._cache = self._steps.grow(self._cache, capacity)
        self._read(np.zeros(0, np.int32))  # compiles, and changes nothing
        jax.block_until_ready(self._cache)
        taken = begin - self._done
        _, seconds = self._timed(self._hay[self._done:begin])
        self._done = begin
        kept = jax.tree.map(jnp.copy, _states(self._cache))
        answers, tails, prompts = [], [], self.texts["tails"][str(tail)]
        for prompt in prompts:
            self._cache = _rewound(self._cache, kept, begin)
            logits_1V, took = self._timed(np.asarray(prompt["ids"], np.int32))
            tails.append(took)
            told, wanted = self._answer(logits_1V), prompt["wanted"]
            answers.append({"back": prompt["back"], "wanted": wanted, "told": told,
                            "right": told.partition(".")[0].strip() == wanted})
        # The first was read into memory never touched before: a second reading is the fair one.
        each = float(np.median(tails[1:] or tails))
        used = self.device.memory_stats() or {}
        held = Cache(self._cache.stacks, jnp.full(1, length - STEPS, jnp.int32))
        row = {
            "tokens": length, "capacity": capacity, "needles": answers,
            "found": sum(one["right"] for one in answers), "asked": len(answers),
            "prefill_tokens": taken + len(prompts[0]["ids"]), "prefill_s": seconds + each,
            "prefill_tokens_per_s": (taken + len(prompts[0]["ids"])) / (seconds + each),
            "bytes_in_use": used.get("bytes_in_use"), "peak_bytes": used.get("peak_bytes_in_use"),
            "weight_bytes": _bytes(self.params), "state_bytes": _bytes(_states(held)),
            "kv_bytes": _bytes(held.stacks) - _bytes(_states(held)),
        } | self._decode_ms(held, length, method)
        self._cache = _rewound(self._cache, kept, begin)
        return row

    def _read(self, ids_T):
        logits_1V = None
        for first in range(0, max(len(ids_T), 1), self.chunk):
            piece = ids_T[first:first + self.chunk]
            ids_1T = np.zeros((1, self.chunk), np.int32)
            ids_1T[0, :len(piece)] = piece
            logits_1V, self._cache = self._steps.prefill(
                self._cache, ids_1T, np.asarray([len(piece)], np.int32))
        return logits_1V

    def _timed(self, ids_T):
        begin = time.perf_counter()
        logits_1V = self._read(ids_T) if len(ids_T) else None
        jax.block_until_ready((logits_1V, self._cache))
        return logits_1V, time.perf_counter() - begin

    def _answer(self, logits_1V) -> str:
        one_1, ids = jnp.ones(1, jnp.int32), []
        for _ in range(ANSWER):
            ids.append(self._steps.greedy(logits_1V, self._forbidden_V))
            logits_1V, self._cache = self._steps.decode(self._cache, ids[-1], one_1)
        return "".join(self.texts["pieces"][int(one[0])] for one in ids)

    def _decode_ms(self, cache: Cache, length: int, method: Method) -> dict[str, Any]:
        """Times of the parts of a step after `length` tokens; states run on meanwhile."""
        copy = partial(jax.tree.map, jnp.copy)
        few, last_1 = LOOP if length < 65536 else FEW, jnp.full(1, length - 1, jnp.int32)
        runs = {"lightning": lambda: looped(
                    self._lightning, copy(self._carry(cache)), LOOP, self.params,
                    program=self._lightning_loop),
                "softmax": lambda: looped(
                    self._softmax, copy(self._carry(cache, False)), few, self.params, last_1,
                    program=self._softmax_loops[few])}
        parts = {name: in_turns({name: make}, method)[name] for name, make in runs.items()}
        parts["whole"] = in_turns({"whole": lambda: self._whole(length)}, method)["whole"]
        found: dict[str, Any] = {}
        for name, timing in parts.items():
            good = isinstance(timing, Timing)
            found[f"{name}_ms"] = 1e3 * timing.median if good else None
            found[f"{name}_told"] = {"spread": timing.spread} if good else timing
        if None not in (found[f"{name}_ms"] for name in parts):
            found["rest_ms"] = found["whole_ms"] - found["lightning_ms"] - found["softmax_ms"]
        return found

    def _whole(self, length: int) -> Run:
        one_1, ids_1 = jnp.ones(1, jnp.int32), jnp.full(1, 7, jnp.int32)

        def call(count):
            for _ in range(count):
                self._cache = Cache(self._cache.stacks, jnp.full(1, length - STEPS, jnp.int32))
                for _ in range(STEPS):
                    logits_1V, self._cache = self._steps.decode(self._cache, ids_1, one_1)
                    out = self._steps.greedy(logits_1V, self._forbidden_V)
                jax.block_until_ready((out, self._cache))

        return Run(call, STEPS)

    def _carry(self, cache: Cache, lightning: bool = True):
        """The memories of one kind of layer, in layer order, and the input of the first."""
        memories = [memory for _, kind, memory in self._layers(cache)
                    if (kind == LIGHTNING) == lightning]
        x = jax.random.normal(jax.random.key(self.seed), (1, 1, self.config.hidden_size))
        return memories, x.astype(self.params["norm/weight"].dtype)

    def _layers(self, cache: Cache | None = None):
        """(path, kind, memory) of every layer of nano's one stack, which repeats nothing."""
        (stack,) = self.config.stacks
        for p, kind in enumerate(stack.pattern):
            yield f"stack/0/{p}", kind, None if cache is None else cache.stacks[0][p]

    def _attention(self, params, path: str, kind: str):
        """An attention layer over the parameters of its block."""
        make = Factory(lambda spec: jax.tree.map(lambda leaf: leaf[0], params[spec.path]),
                       "float32", f"{path}/")
        return Block(self.config, kind, make).attn

    def _lightning(self, carry, params):
        memories, x_11D = carry
        slopes_LN, new = decay_slopes(self.config), []
        tokens = _one_token(jnp.zeros(1, jnp.int32))
        layers = [(i, one) for i, one in enumerate(self._layers()) if one[1] == LIGHTNING]
        for (index, (path, kind, _)), memory in zip(layers, memories, strict=True):
            x_11D, state = self._attention(params, path, kind)(
                x_11D, jnp.asarray(slopes_LN[index]), memory["state"][0], tokens, Ops())
            new.append({"state": state[None]})
        return (new, x_11D), x_11D

    def _softmax(self, carry, params, offsets_1):
        (memories, x_11D), new = carry, []
        layers = [one for one in self._layers() if one[1] != LIGHTNING]
        for (path, kind, _), memory in zip(layers, memories, strict=True):
            x_11D, (k, v) = self._attention(params, path, kind)(
                x_11D, (memory["k"][0], memory["v"][0], offsets_1), _one_token(offsets_1), Ops())
            new.append({"k": k[None], "v": v[None]})
        return (new, x_11D), x_11D


def prepare(lengths: Sequence[int], needles: int, seed: int) -> dict[str, Any]:
    """The haystack's ids, the needles of each tail, and the text of each id; needs the tokenizer.
    """
    from mmx.text import load_tokenizer

    tokenizer = load_tokenizer(locate("nano"))
    text = (ROOT / "tests/nano/heldout_sample.txt").read_text().partition("\n----\n")[2]
    stack, rng = Haystack(tokenizer, [text]), np.random.default_rng(seed)
    size = max(max(lengths) - REACH, 0)
    cuts = [stack.cut(rng, SLICE)[0] for _ in range(-(-size // SLICE))]
    tails = {}
    for tail in {min(REACH, length) for length in lengths}:
        distances = np.linspace(tail / 8, 0.975 * tail, needles)
        prompts = needle_prompts(
            tokenizer, stack, tail, [1 - d / tail for d in distances], 1, seed)
        tails[str(tail)] = [
            {"ids": prompt.ids.tolist(), "wanted": prompt.answer, "back": int(distance)}
            for prompt, distance in zip(prompts, distances, strict=True)]
    return {"lengths": list(lengths), "seed": seed, "tails": tails,
            "hay": np.concatenate(cuts)[:size].tolist() if cuts else [],
            "pieces": [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]}


def _one_token(offsets_1) -> Tokens:
    return Tokens(offsets_1[:, None], None, None, jnp.ones(1, jnp.int32), jnp.ones((1, 1), bool),
                  offsets_1)


def _states(cache: Cache) -> list:
    return [memory for stack in cache.stacks for memory in stack if "state" in memory]


def _rewound(cache: Cache, states, tokens: int) -> Cache:
    """`cache` as it was after `tokens`: later keys and values are unseen until overwritten."""
    kept = iter(jax.tree.map(jnp.copy, states))  # a program takes what it is given
    stacks = tuple(tuple(next(kept) if "state" in memory else memory for memory in stack)
                   for stack in cache.stacks)
    return Cache(stacks, jnp.full(1, tokens, jnp.int32))


def _bytes(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    def ms(name):
        return "-" if row.get(name) is None else f"{row[name]:.3f}"

    use = "-" if row["bytes_in_use"] is None else f"{row['bytes_in_use'] / 2**20:,.1f}"
    return (f"| {row['tokens']:,} | {row['found']} of {row['asked']} | "
            f"{row['prefill_tokens_per_s']:,.0f} | {ms('whole_ms')} | {ms('lightning_ms')} | "
            f"{ms('softmax_ms')} | {ms('rest_ms')} | {use} | {row['kv_bytes'] / 2**20:,.2f} | "
            f"{row['state_bytes'] / 2**20:.3f} |")


HEAD = """| tokens | needles found | prefill, tokens/s | step, ms | lightning, ms | softmax, ms \
| rest, ms | device, MiB | keys and values, MiB | states, MiB |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"""


def draw(report: Mapping[str, Any], target: Path) -> None:
    """Two panels against length: memory, and the parts of a decode step."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = report["rows"]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    lines = ((axes[0], 2**20, (("bytes_in_use", "device, all in use", "#333333"),
                               ("kv_bytes", "keys and values, 1 layer", "#d9762b"),
                               ("weight_bytes", "weights", "#3a8f5c"),
                               ("state_bytes", "lightning states, 7 layers", "#2c6fbb"))),
             (axes[1], 1, (("whole_ms", "whole step", "#333333"),
                           ("softmax_ms", "softmax, 1 layer", "#d9762b"),
                           ("lightning_ms", "lightning, 7 layers", "#2c6fbb"))))
    for axis, unit, names in lines:
        for name, label, color in names:
            points = [(row["tokens"], row[name] / unit) for row in rows if row.get(name)]
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=color, label=label, markersize=5)
        axis.set(xscale="log", yscale="log", xlabel="tokens read (log scale)")
        axis.set_xticks([row["tokens"] for row in rows],
                        [f"{row['tokens'] // 1024:,}k" for row in rows])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.legend(frameon=False, fontsize=9)
    axes[0].set(title="Memory", ylabel="MiB (log scale)")
    axes[1].set(title="Decode step, batch 1", ylabel="ms per token (log scale)")
    figure.suptitle(f"nano on {report['device']}, {report['dtype']}", fontsize=12)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    parser.add_argument("--chunk", type=int, default=0, help="0: 8,192, on a CPU 1,024")
    parser.add_argument("--needles", type=int, default=8, help="per length")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=3, help="of every timing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=220,
                        help="after half of which lengths before the last are left out")
    parser.add_argument("--output", type=Path, required=True, help="a directory")
    parser.add_argument("--plot", action="store_true",
                        help="measure nothing: draw what the directory holds")
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--prepare", type=Path, metavar="FILE", help="write the token ids and end")
    texts.add_argument("--prepared", type=Path, metavar="FILE",
                       help="read them, where the package tokenizers is not installed")
    args = parser.parse_args(argv)
    if args.plot:
        draw(json.loads((args.output / "million_tokens.json").read_text()),
             args.output / "million_tokens.png")
        return 0
    begin, cpu = time.perf_counter(), jax.default_backend() == "cpu"
    lengths = sorted({int(one) for one in args.lengths.split(",")})
    if lengths[0] < 256 or args.needles < 1:
        parser.error("Lengths start at 256, and there is at least one needle.")
    if args.prepared:
        texts = json.loads(args.prepared.read_text())
        if not set(lengths) <= set(texts["lengths"]):
            parser.error(f"{args.prepared} was prepared for {texts['lengths']}.")
    else:
        texts = prepare(lengths, args.needles, args.seed)
    if args.prepare:
        args.prepare.write_text(json.dumps(texts))
        return 0
    chunk, method = args.chunk or (1024 if cpu else 8192), Method(args.rounds, 0.05)
    dtypes = [args.dtype] if args.dtype != "auto" else ["float32"] if cpu else [
        "bfloat16", "float32"]
    need = cache_bytes(load_config("nano"), 1, lengths[-1] + SPARE, dtypes[0])
    have = available_bytes(jax.local_devices()[:1])
    print(f"{lengths[-1]:,} tokens in {dtypes[0]} take {human(need)}; {human(have)} are free. "
          "A longer cache is made while the shorter lives, and timing holds a second copy.")
    if 3 * need > have:
        print("That does not fit. Give shorter --lengths.", file=sys.stderr)
        return 2
    args.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/million_tokens.py", *argv]),
        "device": jax.local_devices()[0].device_kind, "jax": jax.__version__, "chunk": chunk,
        "rope_theta": load_config("nano").rope_theta, "seed": args.seed, "reach": REACH}
    study, first, tried = None, None, {}
    for dtype in dtypes:  # bfloat16 if it finds at the first length what float32 does
        report["dtype"], study = dtype, Study(dtype, chunk, texts, args.seed)
        study.compile(lengths[:1])
        first = study.measure(lengths[0], method)
        tried[dtype] = first["found"]
        if first["found"] == first["asked"]:
            break
    report |= {"rows": [first], "found_at_first_length": tried, "left_out": []}

    def tell(row):
        report["seconds"] = time.perf_counter() - begin
        print(f"{line(row)} {report['seconds']:.0f} s", flush=True)
        _save(report, args.output)

    print(HEAD, flush=True)
    tell(first)
    study.compile(lengths[1:])
    for length in lengths[1:]:
        if length < lengths[-1] and time.perf_counter() - begin > args.seconds / 2:
            report["left_out"].append(length)
            continue
        report["rows"].append(study.measure(length, method))
        tell(report["rows"][-1])
    print(f"{time.perf_counter() - begin:.0f} s in all; {args.output}")
    try:
        draw(report, args.output / "million_tokens.png")
    except ImportError:
        print("No plot: matplotlib is missing. On another machine: --plot with the same --output.")
    return 0


def _save(report: Mapping[str, Any], folder: Path) -> None:
    for name, text in (("json", json.dumps(report, indent=1)),
                       ("md", "\n".join([HEAD, *map(line, report["rows"])]))):
        partial_ = folder / f".million_tokens.{name}.partial"
        partial_.write_text(text + "\n")
        os.replace(partial_, folder / f"million_tokens.{name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

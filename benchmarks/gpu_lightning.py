"""The Hopper kernels of lightning attention on a real GPU: are they right, and how fast.

    python benchmarks/gpu_lightning.py [--output=FILE.json] [--seconds=420] [--only=check,decode]

First each kernel is compared with float64 at 4 heads of 128 (lengths around a chunk's 64 rows,
slopes of layers 0, 40 and 78, packed samples, padding, with and without an incoming state); two
runs must agree to the bit, and memory that results may land in is filled with NaN before. Then
every configuration of a sweep is timed at the model's shapes. One that fails is told and left out.
`--only=splits` times sequences whole and in parts, at slopes of layers 40 and 78 of 80 (the rest of
the sweep: 40), and compares each configuration with the first of its shape, which has one part.

Method: random data; two warm-up calls, then rounds of asynchronous calls with one wait at their
end, at least 30 ms each; the median of five rounds. `share` is the byte floor (q, k, v read and o
written once; forward and backward 11 tensor passes; decode the state read and written) over the
median, at --bandwidth.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
import traceback
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from pallas_kernels.lightning_attention.mosaic_gpu import Config, forward  # noqa: E402
from pallas_kernels.lightning_attention.mosaic_gpu_backward import backward  # noqa: E402
from pallas_kernels.lightning_attention.mosaic_gpu_decode import decode  # noqa: E402
from tests.pallas_kernels.lightning_spans import expected  # noqa: E402
from tests.reference import lightning as f64  # noqa: E402
from tests.tolerances import norm_ratio  # noqa: E402

H, LIMIT = 128, 4e-3
LENGTHS, LAYERS = (1, 63, 64, 65, 255, 256, 257, 4097), (0, 40, 78)
SHAPES = {  # B, T, heads
    "1 x 8,192": (1, 8192, 64), "8 x 8,192": (8, 8192, 64), "1 x 131,072": (1, 131072, 64),
    "8 heads, 1 x 131,072": (1, 131072, 8), "1 x 1,048,576": (1, 1 << 20, 64),
}
SWEEP = (
    Config(),
    Config(queries_in_registers=True),
    Config(output_warpgroups=1),
    Config(value_splits=1),
    Config(value_splits=2, queries_in_registers=False),
)
FEW_HEADS = (Config(), Config(sequence_splits=16), Config(value_splits=1, sequence_splits=16),
             Config(output_warpgroups=1))
HALVES_AND_PARTS = (Config(sequence_splits=1), Config(value_splits=1, sequence_splits=2))
SPLITS = {  # B, T, heads: what to try, first of all in one part
    (1, 16384, 64): HALVES_AND_PARTS,
    (1, 65536, 64): HALVES_AND_PARTS,
    (1, 131072, 64): (*HALVES_AND_PARTS, Config(value_splits=2)),
    (1, 131072, 8): (Config(sequence_splits=1), Config(), *(
        Config(value_splits=columns, sequence_splits=parts)
        for columns in (1, 2) for parts in (8, 16))),
}
PACKED_SWEEP = (Config(), Config(queries_in_registers=False), Config(output_warpgroups=1))
BACKWARD_SWEEP = (Config(), Config(value_splits=1), Config(value_splits=2))



def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="also write every figure to this file")
    parser.add_argument("--seconds", type=float, default=420, help="start nothing after so long")
    parser.add_argument("--bandwidth", type=float, default=4243, help="GB/s of a device's copy")
    parser.add_argument("--only", default="check,forward,packed,backward,decode,splits")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("this measures kernels for NVIDIA GPUs; jax finds none here.")
    run = Run(args.seconds, args.bandwidth)
    started, only = time.time(), args.only.split(",")
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    for name in only:
        {"check": check, "forward": time_forward, "packed": time_packed,
         "backward": time_backward, "decode": time_decode, "splits": time_splits}[name](run)
        print(f"-- {name}: {time.time() - started:.0f} s since the start", flush=True)
    run.table()
    if args.output:
        Path(args.output).write_text(json.dumps({
            "command": " ".join(["python", *sys.argv]), "device": device.device_kind,
            "jax": jax.__version__, "bandwidth_gb_s": args.bandwidth, "checks": run.checks,
            "times": run.times, "failures": run.failures}, indent=1) + "\n")
    bad = [x for x in run.checks if not x["ok"]]
    print(f"{len(run.checks) - len(bad)} of {len(run.checks)} checks passed, "
          f"{len(run.failures)} cases failed")
    for row in bad:
        print("WRONG", row)
    sys.exit(1 if bad or run.failures else 0)


class Run:
    """What was found so far, and whether there is time for more."""

    def __init__(self, seconds, bandwidth):
        self.end, self.bandwidth = time.time() + seconds, bandwidth
        self.checks, self.times, self.failures = [], [], []

    def attempt(self, what, function):
        """Result of `function`, or None where it failed or the time is up."""
        if time.time() > self.end:
            self.failures.append({"case": what, "error": "no time left"})
            return None
        try:
            return function()
        except Exception as error:
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            print(f"FAILED {what}: {text[:200]}", flush=True)
            self.failures.append({"case": what, "error": traceback.format_exc()[-2000:]})
            return None

    def check(self, what, errors, same=True):
        worst = max(errors.values())
        ok = bool(worst <= LIMIT) and same  # NaN compares false
        self.checks.append({"case": what, "ok": ok, "bit_equal": same, **errors})
        if not ok:
            print("WRONG", what, errors, "bit-equal" if same else "runs differ", flush=True)

    def timed(self, kind, shape, config, seconds, floor_bytes):
        floor = floor_bytes / (self.bandwidth * 1e9)
        self.times.append({"kind": kind, "shape": shape, "config": short(config),
                           "ms": seconds * 1e3, "floor_ms": floor * 1e3,
                           "share": floor / seconds})
        print(f"{kind:11} {shape:22} {seconds * 1e3:9.4f} ms {floor / seconds:6.1%}  "
              f"{short(config)}", flush=True)

    def best(self, kind, shape):
        rows = [x for x in self.times if (x["kind"], x["shape"]) == (kind, shape)]
        return min(rows, key=lambda x: x["ms"], default=None)

    def table(self):
        print("\nbest of each")
        print("kind        shape                         ms    floor  share  config")
        for kind, shape in dict.fromkeys((x["kind"], x["shape"]) for x in self.times):
            row = self.best(kind, shape)
            print(f"{kind:11} {shape:22} {row['ms']:9.4f} {row['floor_ms']:8.4f} "
                  f"{row['share']:6.1%}  {row['config']}")


def short(config) -> str:
    """The fields that differ from the default; nothing of what has none."""
    if config is None:
        return "-"
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
              if getattr(config, f.name) != f.default}
    return ", ".join(f"{name}={value}" for name, value in fields.items()) or "default"


def poison(sizes):
    """Frees NaN in blocks of these sizes, which the next results are likely to get."""
    for array in jax.block_until_ready([jnp.full((n,), jnp.nan, jnp.bfloat16) for n in sizes]):
        array.delete()


def draw(B, T, N, seed):
    rng = np.random.default_rng(seed)
    tensors = [jnp.asarray(rng.standard_normal((B, T, N, H)), jnp.bfloat16) for _ in range(4)]
    return tensors, *(jnp.asarray(rng.standard_normal((B, N, H, H)), jnp.float32) for _ in "sd")


def check(run):
    N = 4
    for T in LENGTHS:
        check_length(run, 1, T, N, None, None)
    for T in (1, 65, 256, 4097):
        check_length(run, 1, T, N, 0.03, None)
    check_length(run, 2, 257, N, 0.03, (257, 128))
    for config in SWEEP[1:]:
        check_length(run, 1, 256, N, None, None, config)
    # Chunks with a boundary among chunks without, and none at all; parts that forget their begin.
    for rate in (None, 0.0, 0.004):
        check_length(run, 1, 1024, N, rate, None, Config(sequence_splits=2))
    run.attempt("decode", partial(check_decode, run))


def check_length(run, B, T, N, rate, lengths, config=None):
    """Of packed samples that begin at this `rate` of the tokens; None: not packed."""
    starts = None
    if rate is not None:
        starts = np.random.default_rng(T).random((B, T)) < rate
    samples = None if starts is None else jnp.cumsum(jnp.asarray(starts), 1, dtype=jnp.int32)
    lengths_B = None if lengths is None else jnp.asarray(lengths, jnp.int32)
    gradients = T in (1, 65, 257, 1024)
    ahead = jax.jit(partial(forward, config=config))
    back = jax.jit(partial(backward, config=config))
    for layer in LAYERS:
        tensors, state, dstate = draw(B, T, N, T + layer)
        slopes = f64.slopes(64, layer, 80)[[0, 7, 31, 63]]
        incoming = jnp.zeros_like(state) if layer == 40 else state
        case = (f"T={T} layer={layer} rate={rate} lengths={lengths} "
                f"state={incoming is state} {short(config or Config())}")
        first = jnp.asarray(slopes, jnp.float32), incoming, samples, lengths_B
        kinds = [("forward", ahead, (*tensors[:3], *first), ("out", "state"))]
        if gradients:
            kinds.append(("backward", back, (*tensors[:3], *first, tensors[3], dstate),
                          ("dq", "dk", "dv", "dstate")))
        for kind, function, arguments, names in kinds:
            run.attempt(f"{kind} {case}", partial(
                compare, run, kind, case, function, arguments, names,
                (tensors, incoming, dstate, slopes, starts, lengths)))


def compare(run, kind, case, function, arguments, names, truth):
    size = arguments[0].size
    poison([size] * 4)
    got = jax.block_until_ready(function(*arguments))
    again = function(*arguments)
    same = all(bool(jnp.array_equal(a, b)) for a, b in zip(got, again, strict=True))
    wanted = expected(kind, *truth)
    errors = {name: norm_ratio(np.asarray(a.astype(jnp.float32)), b)
              for name, a, b in zip(names, got, wanted, strict=True)}
    run.check(f"{kind} {case}", errors, same)


def check_decode(run):
    rng = np.random.default_rng(0)
    step = jax.jit(decode)
    for layer in LAYERS:
        q, k, v = (jnp.asarray(rng.standard_normal((5, 64, H)), jnp.bfloat16) for _ in "qkv")
        old = rng.standard_normal((6, 64, H, H)).astype(np.float32)
        slots = np.array([4, -1, 0, 5, 2], np.int32)
        slopes = f64.slopes(64, layer, 80)
        call = partial(step, q, k, v, jnp.asarray(slopes, jnp.float32))
        poison([q.size])
        out, new = call(jnp.asarray(old), jnp.asarray(slots))
        out2, new2 = call(jnp.asarray(old), jnp.asarray(slots))
        wanted, wanted_out = old.astype(np.float64), np.zeros(q.shape)
        for b in np.flatnonzero(slots >= 0):
            one = [np.asarray(x[b:b + 1].astype(jnp.float32), np.float64) for x in (q, k, v)]
            wanted_out[b:b + 1], wanted[slots[b]] = f64.recurrent(*one, slopes, wanted[slots[b]])
        same = bool(jnp.array_equal(out, out2)) and bool(jnp.array_equal(new, new2))
        untouched = bool((np.asarray(new)[[1, 3]] == old[[1, 3]]).all())
        run.check(f"decode layer={layer}",
                  {"out": norm_ratio(np.asarray(out.astype(jnp.float32)), wanted_out),
                   "state": norm_ratio(np.asarray(new), wanted)}, same and untouched)


def median_seconds(call, rounds=5, least=0.03):
    """Seconds of one call: `call(n)` makes n of them and waits for the last."""
    call(2)
    begin = time.perf_counter()
    call(1)
    n = max(1, min(1000, int(least / (time.perf_counter() - begin)) + 1))
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call(n)
        times.append((time.perf_counter() - begin) / n)
    return statistics.median(times)


def repeated(function, *arguments):
    def call(n):
        for _ in range(n):
            result = function(*arguments)
        jax.block_until_ready(result)

    return call


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def random_tensor(key, B, T, N, scale):
    """Normal numbers; beyond 131,072 tokens they repeat, which no memory notices."""
    period = min(T, 131072)
    x = jax.random.normal(key, (B, period, N, H), jnp.bfloat16) * jnp.bfloat16(scale)
    return jnp.tile(x, (1, T // period, 1, 1))


def model_slopes(N, layer=40):
    return jnp.asarray(f64.slopes(64, layer, 80)[:: 64 // N], jnp.float32)


def model_inputs(B, T, N, count):
    # Scaled so that sums over a slow head's window stay of order one.
    tensors = [random_tensor(key, B, T, N, 0.3)
               for key in jax.random.split(jax.random.key(T), count)]
    return jax.block_until_ready(tensors), model_slopes(N), jnp.zeros((B, N, H, H), jnp.float32)


def time_forward(run):
    for name, (B, T, N) in SHAPES.items():
        inputs = run.attempt(f"inputs of {name}", partial(model_inputs, B, T, N, 3))
        if inputs is None:
            continue
        (q, k, v), slopes, state = inputs
        sweep = SWEEP
        if N == 8:
            sweep = FEW_HEADS
        if T > 131072:  # gigabytes each: the best two of the same heads at 131,072
            known = sorted((x for x in run.times if x["shape"] == "1 x 131,072"
                            and x["kind"] == "forward"), key=lambda x: x["ms"])
            chosen = {x["config"] for x in known[:2]} or {"default"}
            sweep = [x for x in SWEEP if short(x) in chosen]
        for config in sweep:
            run.attempt(f"forward {name} {short(config)}", partial(
                one_forward, run, name, config, (q, k, v, slopes, state)))
        del q, k, v, inputs


def one_forward(run, name, config, arguments):
    function = jax.jit(partial(forward, config=config))
    seconds = median_seconds(repeated(function, *arguments))
    run.timed("forward", name, config, seconds, 4 * arguments[0].nbytes)


def time_splits(run, sweep=SPLITS, seconds=median_seconds, interpret=False):
    """`seconds` of each configuration and layer, and how far it is from the first."""
    for (B, T, N), configs in sweep.items():
        shape = f"{B} x {T:,}, {N} heads"
        inputs = run.attempt(f"inputs of {shape}", partial(model_inputs, B, T, N, 3))
        if inputs is None:
            continue
        (q, k, v), _, state = inputs
        wanted = {}
        for config in configs:
            function = partial(forward, config=config, interpret=interpret)
            if not interpret:  # its threads call jax, which must wait for them
                function = jax.jit(function)
            for layer in (40, 78):
                run.attempt(f"splits {shape} layer {layer} {short(config)}", partial(
                    one_split, run, shape, layer, config, function,
                    (q, k, v, model_slopes(N, layer), state), wanted, config is configs[0],
                    seconds))
        del q, k, v, inputs, wanted


def one_split(run, shape, layer, config, function, arguments, wanted, first, seconds):
    kind, got = f"layer {layer}", jax.block_until_ready(function(*arguments))
    if first:
        wanted[layer] = got
    else:
        same = all(bool(jnp.array_equal(a, b))
                   for a, b in zip(got, function(*arguments), strict=True))
        run.check(f"splits {shape} {kind} {short(config)}", {
            name: float(distance(a, b))
            for name, a, b in zip(("out", "state"), got, wanted[layer], strict=True)}, same)
    run.timed(kind, shape, config, seconds(repeated(function, *arguments)),
              4 * arguments[0].nbytes)


@jax.jit
def distance(actual, wanted):
    """The norm ratio, where both already lie."""
    actual, wanted = actual.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.sqrt(jnp.square(actual - wanted).sum() / jnp.square(wanted).sum())


def time_packed(run):
    for name in ("1 x 8,192", "1 x 131,072"):
        inputs = run.attempt(f"inputs of {name}", partial(model_inputs, *SHAPES[name], 4))
        for config in PACKED_SWEEP if inputs else ():
            run.attempt(f"packed {name} {short(config)}",
                        partial(one_packed, run, name, config, inputs))
        if inputs:
            run.attempt(f"packed backward {name}", partial(
                one_packed, run, name, Config(), inputs, gradients=True))


def one_packed(run, name, config, inputs, gradients=False):
    """Samples of 2,048 tokens on average, beside the same call without them."""
    (B, T, _), (tensors, slopes, state) = SHAPES[name], inputs
    starts = np.random.default_rng(0).random((B, T)) < 1 / 2048
    samples = jnp.asarray(np.cumsum(starts, 1), jnp.int32)
    function = jax.jit(partial(backward if gradients else forward, config=config))
    first, rest = (*tensors[:3], slopes, state), (tensors[3], state) if gradients else ()
    packed = median_seconds(repeated(function, *first, samples, None, *rest))
    plain = median_seconds(repeated(function, *first, None, None, *rest))
    run.timed("packed back" if gradients else "packed", name, config, packed,
              (7 if gradients else 4) * tensors[0].nbytes)
    run.times[-1]["over_unpacked"] = packed / plain
    print(f"  packed over unpacked: {packed / plain:.3f}")


def time_backward(run):
    for name in ("1 x 8,192", "8 x 8,192", "1 x 131,072"):
        B, T, N = SHAPES[name]
        inputs = run.attempt(f"inputs of {name}", partial(model_inputs, B, T, N, 4))
        if inputs is None:
            continue
        (q, k, v, dout), slopes, state = inputs
        for config in BACKWARD_SWEEP:
            run.attempt(f"backward {name} {short(config)}", partial(
                one_backward, run, name, config,
                (q, k, v, slopes, state, None, None, dout, state)))
        del q, k, v, dout, inputs


def one_backward(run, name, config, arguments):
    function = jax.jit(partial(backward, config=config))
    seconds = median_seconds(repeated(function, *arguments))
    size = arguments[0].nbytes
    run.timed("backward", name, config, seconds, 7 * size)
    ahead = run.best("forward", name)
    if ahead:
        run.timed("both", name, config, seconds + ahead["ms"] / 1e3, 11 * size)


def time_decode(run):
    for B in (1, 16, 64, 256):
        run.attempt(f"decode batch {B}", partial(one_decode, run, B))


def one_decode(run, B, N=64, steps=32):
    """Steps in a compiled loop, in a pool of twice as many states, in no order, which stays in
    place: a step is shorter than a dispatch."""
    q, k, v = (jax.random.normal(key, (B, N, H), jnp.bfloat16)
               for key in jax.random.split(jax.random.key(B), 3))
    slopes = jnp.asarray(f64.slopes(64, 40, 80), jnp.float32)[:N]
    slots = jnp.asarray(np.random.default_rng(0).permutation(2 * B)[:B], jnp.int32)

    @partial(jax.jit, donate_argnums=0)
    def loop(states):
        def step(_, carry):
            return decode(q, k, v, slopes, carry[1], slots)

        return jax.lax.fori_loop(0, steps, step, (jnp.zeros_like(q), states))

    held = [jax.random.normal(jax.random.key(0), (2 * B, N, H, H))]

    def call(n):
        for _ in range(n):
            out, held[0] = loop(held[0])
        jax.block_until_ready((out, held))

    seconds = median_seconds(call) / steps
    run.timed("decode", f"batch {B}", None, seconds, held[0].nbytes)


if __name__ == "__main__":
    main()

"""The grouped products of a prefill's experts on a Hopper GPU: are they right, and how fast.

    python benchmarks/gpu_grouped.py [--output=FILE.json] [--seconds=140] [--only=check,time]

First our kernels are compared with bfloat16 products summed in float32, one expert at a time, at
small widths (ragged and empty groups, rows beyond the groups, a stack of layers) and at the
model's; two runs must agree to the bit, and memory that results may land in holds NaN before. Then
variants are timed at 32,768, 4,096 and 8,192 rows of 32 experts, 6144 -> 9216 -> 6144, group sizes
from a Dirichlet distribution (8), beside JAX's `ragged_dot_mgpu`. One that fails is told and left
out; nothing is started after --seconds.

`--only=turns` times variants in turns instead, which the card's clock asks for, by the shapes of
`--shapes`: ROWSxPARTS, where PARTS devices hold the columns of an expert between them
(`tensor=PARTS`), with a `t` behind if the matrices lie turned and have scales, as int8 ones that
were cast do:

    python benchmarks/gpu_grouped.py --only=turns --shapes=16384x1,131072x4t --seconds=300

`--only=once` runs each product of the listed tiles once, at 32,768 and 4,096 rows, for a profiler:

    ncu --clock-control none -k regex:grouped --section SpeedOfLight --section \
      MemoryWorkloadAnalysis python benchmarks/gpu_grouped.py --only=once

Method: random data; two warm-up calls, then rounds of asynchronous calls with one wait at their
end, at least 30 ms each; the median of five rounds. TFLOP/s count the rows' own products only.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from mmx.bench import timing  # noqa: E402
from pallas_kernels.grouped_matmul import mosaic_gpu, mosaic_gpu_kernel  # noqa: E402
from pallas_kernels.grouped_matmul.mosaic_gpu_kernel import Config  # noqa: E402
from pallas_kernels.grouped_matmul.stacked import Stacked  # noqa: E402

E, D, F, LIMIT = 32, 6144, 9216, 4e-3
OURS = {"listed": None, "256 rows": Config(rows=256),
        "256 rows, x shared": Config(rows=256, cluster=2),
        "256 rows, w shared": Config(rows=256, cluster=2, shared="w"),
        "256 rows, paced": Config(rows=256, together=4, paced=True),
        "256 rows, x shared, paced": Config(rows=256, together=4, cluster=2, paced=True),
        "128 rows": Config(), "128 rows, 3 stages": Config(stages=3),
        "128 rows, w shared": Config(cluster=2, shared="w")}
TURNS = {name: config for name, config in OURS.items() if "128" not in name} | {
    "256 rows, w shared": Config(rows=256, together=4, cluster=2, shared="w"),
    "256 rows, paced, together 8": Config(rows=256, together=8, paced=True),
    "256 rows, w shared, paced": Config(rows=256, together=4, cluster=2, shared="w", paced=True)}
CORE = 2  # how many of ours are timed first, everywhere


def jax_tiles(rows, columns, steps, together=8):
    return {"block_m": rows, "block_n": columns, "block_k": 64, "max_concurrent_steps": steps,
            "grid_block_n": together}


JAXS = {32768: [jax_tiles(128, 192, 4), jax_tiles(128, 256, 3), jax_tiles(192, 128, 4)],
        4096: [jax_tiles(128, 128, 5), jax_tiles(64, 256, 4), jax_tiles(64, 192, 5),
               jax_tiles(128, 128, 6, 2)],
        8192: [jax_tiles(128, 128, 5), jax_tiles(128, 192, 4)]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="also write every figure to this file")
    parser.add_argument("--seconds", type=float, default=140, help="start nothing after so long")
    parser.add_argument("--only", default="check,time", help="of check, time; or turns, or once")
    parser.add_argument("--shapes", default="32768x1,4096x1", help="of turns [%(default)s]")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("this measures kernels for NVIDIA GPUs; jax finds none here.")
    run, device = Run(args.seconds), jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}", flush=True)
    if args.only == "once":
        once()
        return
    if args.only == "turns":
        for shape in args.shapes.split(","):
            in_turns(run, shape)
    if "check" in args.only:
        check(run)
    if "time" in args.only or "check" in args.only:
        at_width(run, "check" in args.only, "time" in args.only)
    run.table()
    if args.output:
        Path(args.output).write_text(json.dumps({
            "command": " ".join(["python", *sys.argv]), "device": device.device_kind,
            "jax": jax.__version__, "checks": run.checks, "times": run.times,
            "failures": run.failures}, indent=1) + "\n")
    bad = [x for x in run.checks if not x["ok"]]
    print(f"{len(run.checks) - len(bad)} of {len(run.checks)} checks passed, "
          f"{len(run.failures)} cases failed or left out, {run.elapsed():.0f} s")
    sys.exit(1 if bad else 0)


class Run:
    """What was found so far, and whether there is time for more."""

    def __init__(self, seconds):
        self.began, self.seconds = time.time(), seconds
        self.checks, self.times, self.failures = [], [], []

    def elapsed(self):
        return time.time() - self.began

    def attempt(self, what, function, *arguments):
        if self.elapsed() > self.seconds:
            self.failures.append({"case": what, "error": "no time left"})
            return
        try:
            function(*arguments)
        except Exception as error:
            text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"FAILED {what}: {text[:300]}", flush=True)
            self.failures.append({"case": what, "error": traceback.format_exc()[-2000:]})

    def table(self):
        for M in dict.fromkeys(x["rows"] for x in self.times):
            best = {}
            print(f"\n{M} rows: kernel, variant, ms, TFLOP/s")
            for x in sorted((x for x in self.times if x["rows"] == M),
                            key=lambda x: (x["kernel"], x["ms"])):
                best.setdefault(x["kernel"], x)
                print(f"  {x['kernel']:14} {x['variant']:34} {x['ms']:8.3f} {x['tflops']:6.0f}")
            for up, down in (("swiglu", "matmul down"), ("jax gate", "jax down")):
                if up in best and down in best:
                    both = [best[up]] * (2 if up == "jax gate" else 1) + [best[down]]
                    ms = sum(x["ms"] for x in both)
                    rate = sum(x["ms"] * x["tflops"] for x in both) / ms
                    print(f"  {up} + {down}: {rate:.0f} TFLOP/s together")


def skewed(M):
    rng = np.random.default_rng(M)
    return rng.multinomial(M, rng.dirichlet(np.full(E, 8.0))).astype(np.int32)


@partial(jax.jit, static_argnums=(1,))
def draw(key, shape, scale):
    """Normal numbers, drawn by the last two axes: one float32 copy of all would be 29 GB."""
    keys = jax.random.split(key, int(np.prod(shape[:-2])))
    one = lambda k: (jax.random.normal(k, shape[-2:]) * scale).astype(jnp.bfloat16)  # noqa: E731
    return jax.lax.map(one, keys).reshape(shape)


@jax.jit
def expected(x, w_cEDF, sizes, scale_cEF):
    """float32 [M, F], an expert at a time; zero beyond the groups."""
    ends = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]

    def one(e, out):
        y = [jnp.matmul(x, w[e], preferred_element_type=jnp.float32) * scale[e]
             for w, scale in zip(w_cEDF, scale_cEF, strict=True)]
        y = y[0] if len(y) == 1 else jax.nn.silu(y[0]) * y[1]
        return jnp.where((row >= ends[e] - sizes[e]) & (row < ends[e]), y, out)

    shape = x.shape[0], w_cEDF.shape[-1]
    return jax.lax.fori_loop(0, sizes.shape[0], one, jnp.zeros(shape, jnp.float32))


@jax.jit
def error(got, wanted, total):
    inside = jnp.arange(got.shape[0])[:, None] < total
    apart = jnp.where(inside, got.astype(jnp.float32) - wanted, 0)
    beyond = jnp.any(jnp.where(inside, 0, got) != 0)
    return jnp.linalg.norm(apart) / jnp.maximum(jnp.linalg.norm(wanted), 1e-30), beyond


def compare(run, case, config, x, weight, w_cEDF, sizes, turned=False):
    """One product for one matrix per expert, gate and up for two; turned ones have scales too."""
    parts = w_cEDF.shape[0]
    kernel = mosaic_gpu_kernel.grouped_swiglu if parts == 2 else mosaic_gpu_kernel.grouped_matmul
    scale, more = jnp.ones((*w_cEDF.shape[:2], w_cEDF.shape[-1])), {}
    if turned:
        scale = jax.random.uniform(jax.random.key(9), scale.shape, minval=0.5)
        more = {"turned": True} | ({"scale_2EF": scale} if parts == 2 else {"scale_EF": scale[0]})
        weight = Stacked(weight.whole.swapaxes(-1, -2), weight.index)
    call = jax.jit(partial(kernel, config=config, **more))
    sizes = jnp.asarray(sizes, jnp.int32)
    shape = x.shape[0], w_cEDF.shape[-1]
    for poison in [jnp.full(shape, jnp.nan, jnp.bfloat16) for _ in range(2)]:
        poison.block_until_ready().delete()
    got = call(x, weight, sizes)
    inside = jnp.arange(shape[0])[:, None] < jnp.sum(sizes)
    same = bool(jnp.all(jnp.where(inside, got == call(x, weight, sizes), True)))
    ratio, beyond = error(got, expected(x, w_cEDF, sizes, scale), jnp.sum(sizes))
    ok = float(ratio) <= LIMIT and same and (parts == 2 or not bool(beyond))
    run.checks.append({"case": case, "ok": ok, "error": float(ratio), "bit_equal": same,
                       "zero_beyond": not bool(beyond)})
    print("right" if ok else "WRONG", run.checks[-1], flush=True)


def check(run):
    small = (("ragged", 1000, (70, 0, 131, 1, 64, 129, 500, 3)), ("one group", 640, (0, 640)),
             ("nothing", 130, (0, 0)), ("few rows", 3, (1, 2)))
    for name, M, sizes in small:
        x, key = draw(jax.random.key(M), (M, 256), 1.0), jax.random.key(1)
        w = draw(key, (2, 2, len(sizes), 256, 1024), 1 / 16)
        for config_name, config in OURS.items():
            if config_name != "128 rows" and name != "ragged":
                continue
            for parts in (1, 2):
                case = f"{name}, {config_name}, {parts} products"
                whole = w if parts == 2 else w[:, 0]
                run.attempt(case, compare, run, case, config, x, Stacked(whole, jnp.int32(1)),
                            w[1, :parts], sizes)
                if config is None:
                    case += ", turned"
                    run.attempt(case, compare, run, case, config, x,
                                Stacked(whole, jnp.int32(1)), w[1, :parts], sizes, True)


def median_ms(call, *arguments, rounds=5, least=0.03):
    jax.block_until_ready([call(*arguments) for _ in range(2)])
    begin = time.perf_counter()
    jax.block_until_ready(call(*arguments))
    count = max(1, int(least / (time.perf_counter() - begin)) + 1)
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(count):
            result = call(*arguments)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begin) / count * 1e3)
    return statistics.median(times)


def at_width(run, checking, timing):
    up = draw(jax.random.key(0), (2, E, D, F), D**-0.5)
    down = draw(jax.random.key(1), (E, F, D), F**-0.5)
    if checking:
        sizes = skewed(4096)
        sizes[3], sizes[4] = 0, sizes[4] - 5
        for name in ("256 rows", "256 rows, w shared", "256 rows, paced"):
            for parts, w in ((2, up), (1, down[None])):
                x = draw(jax.random.key(2), (4096, w.shape[-2]), 1.0)
                run.attempt("width", compare, run, f"model's width, {name}, {parts} products",
                            OURS[name], x, w if parts == 2 else w[0], w, sizes)
    print(f"-- checks: {run.elapsed():.0f} s", flush=True)
    gate = up[0]
    # What matters most comes first: the time may run out.
    for M, first in ((32768, True), (4096, True), (8192, True), (4096, False), (32768, False)):
        if not timing:
            break
        sizes = jnp.asarray(skewed(M))
        x, h = (draw(jax.random.key(M), (M, width), 1.0) for width in (D, F))
        core = slice(0, CORE) if first else slice(CORE, None)
        for name, config in list(OURS.items())[core]:
            for kernel, function, flops, *arguments in (
                    ("swiglu", mosaic_gpu_kernel.grouped_swiglu, 4 * M * D * F, x, up),
                    ("matmul down", mosaic_gpu_kernel.grouped_matmul, 2 * M * D * F, h, down)):
                run.attempt(f"{M} {kernel} {name}", time_one, run, M, kernel, name,
                            partial(function, config=config), flops, *arguments, sizes)
        for tiles in JAXS[M][slice(0, 1) if first else slice(1, None)]:
            name = " ".join(str(size) for size in tiles.values())
            for kernel, *arguments in (("jax gate", x, gate), ("jax down", h, down)):
                run.attempt(f"{M} {kernel} {name}", time_one, run, M, kernel, name,
                            partial(mosaic_gpu.grouped_matmul, sizes=tiles), 2 * M * D * F,
                            *arguments, sizes)


def in_turns(run, shape):
    """Every variant is compiled first, all at once, and compared; then they are timed in turns."""
    turned = shape.endswith("t")
    M, shards = (int(number) for number in shape.rstrip("t").split("x"))
    width, sizes = F // shards, jnp.asarray(skewed(M))
    for kernel, parts, inner, columns in (("swiglu", 2, D, width), ("matmul down", 1, width, D)):
        matrix = (columns, inner) if turned else (inner, columns)
        w = draw(jax.random.key(parts), (parts, E, *matrix), inner**-0.5)
        x, more = draw(jax.random.key(M), (M, inner), 1.0), {}
        if turned:
            scale = jax.random.uniform(jax.random.key(9), (parts, E, columns), minval=0.5)
            more = {"turned": True, **({"scale_2EF": scale} if parts == 2 else
                                       {"scale_EF": scale[0]})}
        function = (mosaic_gpu_kernel.grouped_swiglu if parts == 2
                    else mosaic_gpu_kernel.grouped_matmul)
        arguments = x, w if parts == 2 else w[0], sizes
        calls = {}

        def compiled(name, config, function=function, more=more, arguments=arguments, calls=calls):
            call = jax.jit(partial(function, config=config, **more))
            calls[name] = call.lower(*arguments).compile()

        case = f"{shape} {kernel}"
        with ThreadPoolExecutor() as pool:
            for name, config in TURNS.items():
                pool.submit(run.attempt, f"{case} {name}", compiled, name, config)
        if "listed" not in calls:  # told by attempt; there is nothing to compare with
            continue
        first = calls["listed"](*arguments)
        same = {name: bool(jnp.array_equal(first, call(*arguments)))
                for name, call in calls.items()}
        run.checks.extend({"case": f"{case} {name}", "ok": equal} for name, equal in same.items())
        runs = {name: partial(timing.dispatched, calls[name], *arguments)
                for name in TURNS if name in calls}
        flops = 2 * parts * M * D * width
        for name, found in timing.in_turns(runs, timing.Method(), clock=run.elapsed,
                                           until=run.seconds).items():
            if isinstance(found, str):
                run.failures.append({"case": f"{case} {name}", "error": found})
                continue
            run.times.append({
                "rows": shape, "kernel": kernel, "variant": name, "ms": found.median * 1e3,
                "tflops": flops / found.median / 1e12, "spread": found.spread})
    print(f"-- {shape}: {run.elapsed():.0f} s", flush=True)


def once():
    up = draw(jax.random.key(0), (2, E, D, F), D**-0.5)
    down = draw(jax.random.key(1), (E, F, D), F**-0.5)
    for M in (32768, 4096):
        sizes = jnp.asarray(skewed(M))
        for kernel, w in ((mosaic_gpu_kernel.grouped_swiglu, up),
                          (mosaic_gpu_kernel.grouped_matmul, down)):
            x = draw(jax.random.key(M), (M, w.shape[-2]), 1.0)
            jax.block_until_ready(jax.jit(kernel)(x, w, sizes))


def time_one(run, M, kernel, variant, function, flops, *arguments):
    ms = median_ms(jax.jit(function), *arguments)
    run.times.append({"rows": M, "kernel": kernel, "variant": variant, "ms": ms,
                      "tflops": flops / ms / 1e9})
    print(f"{M:6} {kernel:14} {variant:34} {ms:8.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s "
          f"({run.elapsed():.0f} s)", flush=True)


if __name__ == "__main__":
    main()

"""int8 weights in a decode step on a Hopper GPU, multiplied as integers.

    python benchmarks/gpu_int8.py [--output=FILE.json] [--seconds=200] [--only=check,experts,dense]

The widths are the model's: 32 experts of 6144 x 9216, top-2, and the matrices of attention. First
the kernel for experts is compared with float32 arithmetic on the same integers, two runs must agree
to the bit, and memory that results may land in holds NaN before; then it is timed for 1, 16, 64 and
256 tokens, with variants of its settings. `dense` times one matrix each: XLA's product with int8 as
it lies elsewhere, and the kernel for integers. Floors are the bytes of the weights that are read
over the rate of a copy, measured first. A figure is of a compiled loop, as a call is shorter than
its dispatch. One that fails is told and left out; nothing is started after --seconds.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.gpu_grouped import Run, draw, median_ms  # noqa: E402
from mmx.nn.linear import project  # noqa: E402
from pallas_kernels.experts import hit_int8_mosaic_gpu, reference  # noqa: E402
from pallas_kernels.int8_product import api  # noqa: E402
from pallas_kernels.int8_product.mosaic_gpu import Config  # noqa: E402
from pallas_kernels.quantized import QuantizedTensor, TurnedTensor  # noqa: E402

E, D, F, LIMIT = 32, 6144, 9216, 4e-3
TOKENS = (1, 64, 16, 256)  # what matters most first: the time may run out
VARIANTS = {"default": Config(), "1 split": Config(splits=1), "2 splits": Config(splits=2),
            "128 columns": Config(columns=128), "3 stages": Config(stages=3),
            "4 stages": Config(stages=4), "6 stages": Config(stages=6)}
LOOP = 16  # calls in one program
MATRICES = {"qkv": (D, 24576), "gate": (D, 8192), "out": (8192, D), "k": (D, 1024)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", help="also write every figure to this file")
    parser.add_argument("--seconds", type=float, default=200, help="start nothing after so long")
    parser.add_argument("--only", default="check,experts,dense")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("this measures kernels for NVIDIA GPUs; jax finds none here.")
    run, device = Run(args.seconds), jax.devices()[0]
    block = jnp.ones(1 << 28, jnp.float32)
    rate = 2 * block.nbytes / median_ms(jax.jit(lambda x: x + 1), block) / 1e6
    del block
    print(f"{device.device_kind}, jax {jax.__version__}, copy {rate:.0f} GB/s", flush=True)
    if "check" in args.only or "experts" in args.only:
        experts(run, rate, "check" in args.only, "experts" in args.only)
    if "dense" in args.only:
        for name, (K, N) in MATRICES.items():
            run.attempt(name, dense, run, rate, name, K, N)
    if args.output:
        Path(args.output).write_text(json.dumps({
            "command": " ".join(["python", *sys.argv]), "device": device.device_kind,
            "jax": jax.__version__, "copy_gb_s": rate, "checks": run.checks, "times": run.times,
            "failures": run.failures}, indent=1) + "\n")
    for x in sorted(run.times, key=lambda x: (x["kernel"], x["tokens"], x["us"])):
        print(f"{x['kernel']:8} {x['tokens']:4} {x['variant']:22} {x['us']:8.1f} us "
              f"{x['share']:6.1%} of the floor")
    bad = [x for x in run.checks if not x["ok"]]
    print(f"{len(run.checks) - len(bad)} of {len(run.checks)} checks passed, "
          f"{len(run.failures)} cases failed or left out, {run.elapsed():.0f} s")
    sys.exit(1 if bad else 0)


@partial(jax.jit, static_argnums=(1,))
def integers(key, shape):
    keys = jax.random.split(key, int(np.prod(shape[:-2])))
    one = lambda k: jax.random.randint(k, shape[-2:], -127, 128, jnp.int8)  # noqa: E731
    return jax.lax.map(one, keys).reshape(shape)


def weight(seed, shape, axes):
    """Integers whose products with normal rows are of size 1."""
    scale = tuple(1 if i in axes else n for i, n in enumerate(shape))
    inner = np.prod([shape[i] for i in axes])
    spread = jax.random.uniform(jax.random.key(seed + 1), scale, minval=0.5, maxval=1.5)
    return QuantizedTensor(integers(jax.random.key(seed), shape), spread / (73 * inner**0.5))


def route(T):
    rng = np.random.default_rng(T)
    expert = np.stack([rng.permutation(E)[:2] for _ in range(T)])
    return (jnp.asarray(rng.dirichlet(np.ones(2), T), jnp.float32),
            jnp.asarray(expert, jnp.int32), len(np.unique(expert)))


def experts(run, rate, checking, timing):
    gate_up, down = weight(0, (2, E, D, F), (2,)), weight(2, (E, F, D), (1,))
    turned = tuple(jax.jit(TurnedTensor.of, static_argnums=1)(w, axes)
                   for w, axes in ((gate_up, (2,)), (down, (1,))))
    for T in TOKENS:
        g, (weights, expert, hit) = draw(jax.random.key(T), (T, D), 1.0), route(T)
        for name, config in VARIANTS.items():
            call = jax.jit(partial(hit_int8_mosaic_gpu.hit_experts, config=config))
            if checking and name in ("default", "1 split"):
                run.attempt(f"check {T} {name}", check, run, f"{T} tokens, {name}", call,
                            (g, weights, expert, *turned), (g, weights, expert, gate_up, down))
            if timing:
                run.attempt(f"{T} {name}", time_one, run, "experts", T, name, rate,
                            hit * 3 * D * F, call, g, weights, expert, *turned)


def check(run, case, call, arguments, plain):
    for poison in [jnp.full(plain[0].shape, jnp.nan, jnp.float32) for _ in range(2)]:
        poison.block_until_ready().delete()
    got = call(*arguments)
    same = bool(jnp.all(got == call(*arguments)))
    wanted = jax.jit(reference.experts)(*plain)
    ratio = float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))
    run.checks.append({"case": case, "ok": ratio <= LIMIT and same, "error": ratio,
                       "bit_equal": same})
    print("right" if run.checks[-1]["ok"] else "WRONG", run.checks[-1], flush=True)


def dense(run, rate, name, K, N):
    plain = weight(5, (K, N), (0,))
    turned = jax.jit(TurnedTensor.of, static_argnums=1)(plain, (0,))
    for T in TOKENS:
        x = draw(jax.random.key(T), (T, K), 1.0)
        by_xla = jax.jit(lambda x, w: project("mk,kn->mn", x, w, jnp.float32))
        by_kernel = jax.jit(partial(api.int8_product, implementation="mosaic_gpu"))
        wanted, got = by_xla(x, plain), by_kernel(x, turned)
        ratio = float(jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted))
        run.checks.append({"case": f"{name}, {T} rows", "ok": ratio <= LIMIT, "error": ratio})
        for form, call, w in (("xla", by_xla, plain), ("integers", by_kernel, turned)):
            time_one(run, name, T, form, rate, K * N, call, x, w)


def time_one(run, kernel, tokens, variant, rate, size, call, x, *rest):
    @jax.jit
    def program(x, *rest):
        def body(_, x):
            # The next call waits for this one.
            return x + (0 * jnp.sum(call(x, *rest))).astype(x.dtype)
        return jax.lax.fori_loop(0, LOOP, body, x)

    us = median_ms(program, x, *rest) * 1e3 / LOOP
    run.times.append({"kernel": kernel, "tokens": tokens, "variant": variant, "us": us,
                      "share": size / rate / 1e3 / us})


if __name__ == "__main__":
    main()

"""Runs every check of sequence parallelism on eight simulated devices; prints {case: fault}."""

import json
import os
import re
import sys
import time
from functools import cache, partial

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mmx.parallel import blocks, lasp, ring
from pallas_kernels import attention, lightning_attention, lightning_state
from pallas_kernels.attention import cudnn
from pallas_kernels.lightning_attention import state as own_state
from tests.pallas_kernels import cudnn_stand_in
from tests.tolerances import assert_close

# Several spans and blocks in a piece of six tokens, the last of them overlapping or filled up.
own_state.SPAN, blocks.QUERY_BLOCK, blocks.KEY_BLOCK = 4, 4, 5

B, T, N, K, H = 8, 48, 4, 2, 8
SLOPES = np.float32([0.0, 1e-3, 0.3, 40.0])  # no decay … none left after two tokens
LENGTHS = np.int32([48, 29, 12, 0, 48, 1, 47, 33])
# On and off the pieces' edges (multiples of 6, 12, 24), in padding, several in one piece.
STARTS = ((), (13,), (6, 12), (0,), (0, 24, 25, 47), (), (5, 6, 7, 36), (18, 30, 32, 40))
MESH = jax.make_mesh((1, 2, 4), ("one", "a", "b"), axis_types=(AxisType.Auto,) * 3)


def names(axis):
    return (axis,) if isinstance(axis, str) else axis


def island(function, axis, in_specs, out_specs):
    """`function` per device; T, B in specs stand for time over `axis`, rows over the other axes."""
    others = tuple(name for name in MESH.axis_names if name not in names(axis))
    entry = {"B": others or None, "T": axis, None: None}
    spec = [tuple(P(*(entry[letter] for letter in letters)) for letters in group)
            for group in (in_specs, out_specs)]
    return jax.shard_map(partial(function, axis=axis), mesh=MESH, in_specs=spec[0],
                         out_specs=spec[1], check_vma=False)


def draw(heads, dtype, T=T):
    """Arrays [B, T, heads, H] in turn; padding holds values like any other."""
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, T, n, H)), dtype) for n in heads]


def packed(T=T):
    starts = np.zeros((B, T), bool)
    for row, first in zip(starts, STARTS, strict=True):
        row[list(first)] = True
    return starts, np.cumsum(starts, axis=1, dtype=np.int32), LENGTHS


def with_gradients(function, count):
    """function(*arrays) -> outputs, to (outputs, gradients in the first `count` arrays)."""
    def run(arrays, weights, *rest):
        def scalar(*arrays):
            outputs = function(*arrays, *rest)
            pairs = zip(outputs, weights, strict=True)
            return sum(jnp.vdot(x.astype(jnp.float32), w) for x, w in pairs), outputs
        return jax.grad(scalar, argnums=tuple(range(count)), has_aux=True)(*arrays)[::-1]
    return run


# Lightning attention.


def lightning_arguments(dtype, T=T):
    q, k, v, weight = draw((N,) * 4, dtype, T)
    state, state_weight = np.random.default_rng(1).standard_normal((2, B, N, H, H))
    starts, _, lengths = packed(T)
    return ((q, k, v, np.float32(state)), (weight.astype(jnp.float32), np.float32(state_weight)),
            starts, lengths)


def split_lightning(axis, method, is_packed, implementation=None, gradients=True):
    def piece(q, k, v, state, starts, lengths, axis):
        marks = {"starts_BT": starts, "lengths_B": lengths} if is_packed else {}
        return lasp.lightning_attention(q, k, v, SLOPES, state, axis=axis, method=method,
                                        implementation=implementation, **marks)

    specs = ("BT", "BT", "BT", "B", "BT", "B"), ("BT", "B")
    split = island(piece, axis, *specs)
    return with_gradients(split, 4) if gradients else split


@cache
def whole_lightning(is_packed, dtype):
    def whole(q, k, v, state, starts, lengths):
        marks = {"starts_BT": starts, "lengths_B": lengths} if is_packed else {}
        return lightning_attention(q, k, v, SLOPES, state, implementation="reference", **marks)

    return jax.jit(with_gradients(whole, 4))(*lightning_arguments(dtype))


def check_lightning(axis, cases, dtype="float32"):
    """Yields (what, fault) for cases (method, is_packed), all in one program."""
    run = jax.jit(lambda *x: [split_lightning(axis, *case)(*x) for case in cases])
    got = run(*lightning_arguments(dtype))
    for (method, is_packed), ((out, state), gradients) in zip(cases, got, strict=True):
        (want_out, want_state), want_gradients = whole_lightning(is_packed, dtype)
        what = f"{method} {'packed' if is_packed else 'plain'}"
        yield f"{what} dtypes", fault_if(out.dtype != dtype or state.dtype != jnp.float32)
        yield f"{what} output", fault(out, want_out, "kernel", dtype)
        yield f"{what} state", fault(state, want_state, "state", dtype)
        copies = [np.asarray(shard.data) for shard in state.addressable_shards
                  if shard.index == state.addressable_shards[0].index]
        yield f"{what} copies", fault_if(any((x != copies[0]).any() for x in copies))
        for name, have, want in zip("qkvS", gradients, want_gradients, strict=True):
            yield f"{what} d{name}", fault(have, want, "gradient", dtype)
        if is_packed:
            padding = np.asarray(out)[np.arange(T) >= LENGTHS[:, None]]
            yield f"{what} padding", fault_if(padding.any())


def check_values(axis):
    """Without gradients nothing is kept for them: another way through the same function."""
    arrays, _, *marks = lightning_arguments("float32")
    out, state = jax.jit(split_lightning(axis, "gather", True, gradients=False))(*arrays, *marks)
    (want_out, want_state), _ = whole_lightning(True, "float32")
    yield "output", fault(out, want_out, "kernel", "float32")
    yield "state", fault(state, want_state, "state", "float32")


# Softmax attention.


def split_attention(axis, method, balanced, is_packed, implementation=None):
    W = int(np.prod([MESH.shape[name] for name in names(axis)]))

    def piece(q, k, v, samples, lengths, axis):
        marks = {"samples_BT": samples, "lengths_B": lengths} if is_packed else {}
        return (ring.attention(q, k, v, axis=axis, method=method, balanced=balanced,
                               implementation=implementation, **marks),)

    split = island(piece, axis, ("BT", "BT", "BT", "BT", "B"), ("BT",))

    def whole(q, k, v, samples, lengths):
        if not balanced:
            return split(q, k, v, samples, lengths)
        (out,) = split(*(ring.zigzag(x, W) for x in (q, k, v, samples)), lengths)
        return (ring.unzigzag(out, W),)

    return with_gradients(whole, 3)


def attention_arguments(dtype, T=T):
    q, k, v, weight = draw((N, K, K, N), dtype, T)
    _, samples, lengths = packed(T)
    return (q, k, v), (weight.astype(jnp.float32),), samples, lengths


@cache
def whole_attention(is_packed, dtype):
    def whole(q, k, v, samples, lengths):
        if not is_packed:
            return (attention(q, k, v),)
        out = attention(q, k, v, samples_BT=samples)
        return (jnp.where((jnp.arange(T) < lengths[:, None])[..., None, None], out, 0),)

    return jax.jit(with_gradients(whole, 3))(*attention_arguments(dtype))


def check_attention(axis, cases, dtype="float32"):
    """Yields (what, fault) for cases (method, balanced, is_packed[, form]), all in one program."""
    run = jax.jit(lambda *x: [split_attention(axis, *case)(*x) for case in cases])
    got = run(*attention_arguments(dtype))
    for (method, balanced, is_packed, *_), ((out,), gradients) in zip(cases, got, strict=True):
        (want_out,), want_gradients = whole_attention(is_packed, dtype)
        what = f"{method}{' balanced' * balanced} {'packed' if is_packed else 'plain'}"
        yield f"{what} dtype", fault_if(out.dtype != dtype)
        yield f"{what} output", fault(out, want_out, "kernel", dtype)
        for name, have, want in zip("qkv", gradients, want_gradients, strict=True):
            yield f"{what} d{name}", fault(have, want, "gradient", dtype)


def fault(got, wanted, kind, dtype) -> str:
    try:
        assert_close(got, wanted, kind, dtype)
    except AssertionError as error:
        return str(error)
    return ""


def fault_if(condition) -> str:
    return "wrong" if condition else ""


# Traffic, as the compiled program has it.


def traffic(function, arguments):
    """Sorted (kind, operand shapes) of the collectives in the compiled text."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    shapes = dict(re.findall(r"%?([\w.-]+) = (\(.*?\)|\S+) [\w-]+\(", text))
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    found = re.findall(rf" ({kinds})(?:-start)?\((.*?)\)[,\n]", text)
    return sorted((kind, *(shapes[name] for name in re.findall(r"%([\w.-]+)", operands)))
                  for kind, operands in found)


def check_traffic():
    """Lightning: the same at two lengths, and the messages documented. Softmax: not the same."""
    state = re.compile(rf"f32\[([18],)?{B},{N},{H},{H}\]")
    least = {"gather": {"all-gather": 1, "reduce-scatter": 1},
             "log": {"collective-permute": 2 * (3 + 1), "all-reduce": 1},
             "ring": {"collective-permute": 2 * 7, "all-reduce": 1}}
    for method, counts in least.items():
        split = split_lightning(("a", "b"), method, True, "reference")
        short, long = (traffic(split, lightning_arguments("float32", length))
                       for length in (T, 2 * T))
        yield f"{method} two lengths", "" if short == long else f"{short} and {long}"
        for kind, count in counts.items():
            seen = sum(entry[0] == kind and bool(state.match(entry[1])) for entry in short)
            # Several sums may be combined into one.
            good = seen >= count if kind == "all-reduce" else seen == count
            yield f"{method} {kind}", "" if good else f"{seen} in {short}"
    short, long = (traffic(lambda *x: split_attention("b", "gather", False, True)(*x)[0],
                           attention_arguments("float32", length)) for length in (T, 2 * T))
    yield "softmax two lengths", fault_if(not short or len(short) != len(long) or short == long)


def check_overlap():
    """States are made of a device's own tokens; the kernel runs once, from the state before them,
    and so does its gradient."""
    calls = []

    def counted(name, function):
        def run(*arrays, **marks):
            calls.append((name, len(arrays), marks.get("reverse", False)))
            return function(*arrays, **marks)
        return run

    real = lasp.kernel, lasp.own_state
    lasp.kernel = counted("kernel", lightning_attention)
    lasp.own_state = counted("state", lightning_state)
    try:
        for method in lasp.METHODS:
            calls.clear()
            jax.eval_shape(split_lightning("b", method, True), *lightning_arguments("float32"))
            own, kernel, back = ("state", 3, False), ("kernel", 5, False), ("state", 3, True)
            # The function is traced again for its gradient.
            yield method, fault_if(calls not in ([own, kernel, back], [own, kernel] * 2 + [back]))
    finally:
        lasp.kernel, lasp.own_state = real


def groups():
    lightning = [(method, True) for method in lasp.METHODS]
    softmax = [(method, balanced, True) for method in ring.METHODS
               for balanced in (False, True)]
    axes = {"1": "one", "2": ("one", "a"), "4": "b", "8": ("a", "b"), "8 reversed": ("b", "a")}
    yield "lightning 1", check_lightning(axes["1"], lightning[:1])
    yield "lightning 2", check_lightning(axes["2"], lightning[:2])
    yield "lightning 4", check_lightning(axes["4"], lightning)
    yield "lightning 4 plain", check_lightning(axes["4"], [(m, False) for m in lasp.METHODS])
    yield "lightning 8", check_lightning(axes["8"], lightning)
    yield "lightning 8 reversed", check_lightning(axes["8 reversed"], lightning[1:])
    yield "lightning 4 bfloat16", check_lightning(axes["4"], lightning[:2], "bfloat16")
    yield "lightning 4 values", check_values(axes["4"])
    yield "softmax 1", check_attention(axes["1"], softmax[1:2])
    yield "softmax 2", check_attention(axes["2"], softmax[:2])
    yield "softmax 4", check_attention(axes["4"], softmax)
    yield "softmax 4 plain", check_attention(axes["4"], [("ring", True, False),
                                                         ("gather", False, False)])
    yield "softmax 8", check_attention(axes["8"], softmax[1:3])
    yield "softmax 8 reversed", check_attention(axes["8 reversed"], softmax[1:2])
    yield "softmax 4 bfloat16", check_attention(axes["4"], softmax[1:2], "bfloat16")
    yield "softmax 4 pallas_tpu", check_attention(
        axes["4"], [("ring", False, True, "pallas_tpu"), ("ring", True, True, "pallas_tpu"),
                    ("gather", False, True, "pallas_tpu")])
    cudnn_stand_in.install(cudnn)
    yield "softmax 4 cudnn", check_attention(
        axes["4"], [("ring", False, False, "cudnn"), ("ring", True, False, "cudnn"),
                    ("gather", False, False, "cudnn")])
    yield "traffic", check_traffic()
    yield "overlap", check_overlap()


if __name__ == "__main__":
    report = {}
    for name, checks in groups():
        began = time.process_time()
        report[name] = dict(checks)
        print(f"{name}: {time.process_time() - began:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(report))

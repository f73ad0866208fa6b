"""The TPU kernels of softmax attention at the model's heads, compiled for chips not here.

Run as a module it compiles for the pod that is its argument and prints what it finds.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CHIPS = ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
N, K, H = 64, 8, 128
LONG = 131_072
CACHED = {"chunk": (1, 8192, LONG), "last": (1, 1, LONG), "decode": (32, 1, 8192),
          "odd": (2, 257, 700)}
PAGED = {"decode": (32, 1, 8192), "chunk": (1, 4096, 65_536)}
TRAINED = [("gradients", "bfloat16"), ("gradients", "float32"), ("packed", "bfloat16")]


def cached_cases():
    cases = [((case, "bfloat16"), shape) for case, shape in CACHED.items()]
    return [*cases, (("chunk", "float32"), CACHED["chunk"])]


@pytest.fixture(scope="module")
def compiled():
    found = {}
    # Programs for devices that are not here cannot be loaded from the cache of compiled ones.
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}

    def of(chip):
        if chip not in found:
            done = subprocess.run(
                [sys.executable, "-m", "tests.pallas_kernels.test_attention_aot", chip], cwd=ROOT,
                env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr[-3000:]
            found[chip] = json.loads(done.stdout.splitlines()[-1])
        return found[chip]

    return of


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", CHIPS)
def test_kernels_are_chosen_and_compile(compiled, chip):
    found = compiled(chip)
    for (case, dtype), (B, T, S) in cached_cases():
        one, width = found[f"{case} {dtype}"], 2 if dtype == "bfloat16" else 4
        assert one["kernels"] == ["cached_attention"]
        keys = 2 * B * S * K * H * width
        if case == "odd":
            continue  # the compiler lays its arrays in another way first
        rows = 16 if T == 1 else 512 if chip.startswith("v4") else 1024
        most = -(-T * N // K // rows) * keys + 6 * B * T * N * H * 4
        assert keys <= one["bytes"] < 1.05 * most
        # A cache is read where it lies.
        assert one["copies"] == [] and one["temporary"] < keys
    one, keys = found["stacked"], 2 * 32 * 8192 * K * H * 2  # one layer of four, where it lies
    assert one["kernels"] == ["cached_attention"] and one["temporary"] < keys // 64
    assert keys <= one["bytes"] < 1.05 * keys
    one = found["float8"]  # read as it lies: half the bytes of bfloat16
    assert one["kernels"] == ["cached_attention"] and one["copies"] == []
    assert one["bytes"] < 1.1 * 2 * 32 * 8192 * K * H and one["temporary"] < 2 * 32 * 8192 * K
    assert found["packed share"]["kernels"] == ["cached_attention"]
    causal = 2 * N * 2048 * 2048 * H
    for case, (B, T, S) in PAGED.items():
        one, keys = found[f"paged {case}"], 2 * B * S * K * H * 2
        assert one["kernels"] == ["ragged_paged_attention_kernel"] and one["temporary"] < 1 << 20
        passes = T // (32 if chip.startswith("v4") else 128) if T > 1 else 1
        assert keys * passes <= one["bytes"] < 1.05 * keys * passes
    assert found["splash bfloat16"]["operations"] == causal
    assert found["gradients bfloat16"]["operations"] == 4.5 * causal
    assert found["splash bfloat16"]["kernels"] == ["splash_mha_fwd_no_residuals"]
    for case, dtype in TRAINED:
        name = "_segmented" if case == "packed" else ""
        assert found[f"{case} {dtype}"]["kernels"] == [
            f"splash_mha_dkv{name}_no_residuals", f"splash_mha_dq{name}_no_residuals",
            f"splash_mha_fwd{name}_residuals"]


def main(name):
    from mmx.plan import topology

    topology.prepare_environment()
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from mmx.plan import hlo
    from mmx.plan.pods import parse_pod
    from pallas_kernels import attention, dispatch, paged_attention, partial_attention
    from pallas_kernels.grouped_matmul.stacked import Stacked

    pod = parse_pod(name)
    mesh = topology.make_mesh(pod, {"data": pod.devices})
    apart = P("data")

    def compiled(function, *shapes):
        """Each device has the arrays of `shapes`, under `shard_map` as in the model."""
        avals = [jax.ShapeDtypeStruct((pod.devices * shape[0], *shape[1:]), dtype,
                                      sharding=NamedSharding(mesh, apart))
                 for shape, dtype in shapes]
        run = jax.shard_map(function, mesh=mesh, in_specs=apart, out_specs=apart, check_vma=False)
        with dispatch.compiling_for("tpu"), \
                jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            program = jax.jit(run).lower(*avals).compile()
        text = program.as_text()
        return {"kernels": sorted({re.sub(r"\.\d+$", "", kernel) for kernel in re.findall(
                    r"%([\w.]+) = .* custom_call_target=\"tpu_custom_call\"", text)}),
                "copies": re.findall(rf"%(?:copy|transpose)\S* = \S*\[[\d,]*{LONG}[\d,]*\]", text),
                "bytes": hlo.bytes_accessed(text), "operations": hlo.dots(text),
                "temporary": program.memory_analysis().temp_size_in_bytes}

    def cached(q, k_BKSH, v_BKSH, offsets_B):
        k, v = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
        return attention(q, k, v, offsets_B=offsets_B)

    def shared(q, k_BKSH, v_BKSH, offsets_B):
        k, v = k_BKSH.swapaxes(1, 2), v_BKSH.swapaxes(1, 2)
        phase = jax.lax.axis_index("data")
        return partial_attention(q, k, v, offsets_B=offsets_B, stride=4, phase=phase)

    def stacked(q, k_RBKSH, v_RBKSH, offsets_B, layer_1):
        k, v = (Stacked(x, layer_1[0]).swapaxes(1, 2) for x in (k_RBKSH, v_RBKSH))
        return attention(q, k, v, offsets_B=offsets_B)

    def piece(q, k, v, ends_BS):
        offset_B = jnp.full(1, q.shape[1] * jax.lax.axis_index("data"))
        return partial_attention(q, k, v, offsets_B=offset_B, ends_BS=ends_BS)

    def scored(q, k, v, *samples):
        return attention(q, k, v, samples_BT=samples[0] if samples else None)

    def gradients(q, k, v, *samples):
        return jax.grad(lambda *qkv: scored(*qkv, *samples).astype(jnp.float32).sum(),
                        argnums=(0, 1, 2))(q, k, v)

    def training(T, dtype):
        return ((1, T, N, H), dtype), *[((1, T, K, H), dtype)] * 2

    report = {}
    for (case, dtype), (B, T, S) in cached_cases():
        shapes = (((B, T, N, H), dtype), *[((B, K, S, H), dtype)] * 2, ((B,), "int32"))
        report[f"{case} {dtype}"] = compiled(shared if case == "last" else cached, *shapes)
    _, T, S = CACHED["decode"]
    report["float8"] = compiled(cached, ((32, T, N, H), "bfloat16"),
                                *[((32, K, S, H), "float8_e4m3fn")] * 2, ((32,), "int32"))
    report["stacked"] = compiled(stacked, ((32, T, N, H), "bfloat16"),
                                 *[((4, 32, K, S, H), "bfloat16")] * 2, ((32,), "int32"),
                                 ((1,), "int32"))
    for case, (B, T, S) in PAGED.items():
        report[f"paged {case}"] = compiled(
            paged_attention, ((B * T, N, H), "bfloat16"), ((B * S // 64, 64, 2 * K, H), "bfloat16"),
            ((B,), "int32"), ((B, S // 64), "int32"), ((B + 1,), "int32"))
    T = 2048
    report["packed share"] = compiled(piece, *training(T, "bfloat16"), ((1, T), "int32"))
    report["splash bfloat16"] = compiled(scored, *training(T, "bfloat16"))
    for case, dtype in TRAINED:
        more = [((1, T), "int32")] if case == "packed" else []
        report[f"{case} {dtype}"] = compiled(gradients, *training(T, dtype), *more)
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])

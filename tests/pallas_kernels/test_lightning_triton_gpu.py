"""The Triton kernels of lightning attention, interpreted on a CPU and compiled for named GPUs."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from pallas_kernels import dispatch, lightning_attention, lightning_decode_slots, tuning
from pallas_kernels.lightning_attention import mosaic_gpu_decode, triton_gpu, triton_gpu_vjp
from tests.tolerances import bound

ROOT = Path(__file__).parent.parent.parent
# Bytes of shared memory that a block may have: 8.0 has more, but runs what 8.6 and 8.9 run.
SHARED_MEMORY = {"80": 101376, "86": 101376, "89": 101376, "90": 232448, "100": 232448}
QUICK = ("bfloat16/T1", "bfloat16/T65", "bfloat16/packed_lengths", "bfloat16/heads_of_128",
         "bfloat16/parts_lengths", "bfloat16/decode", "float32/T65", "float32/decode")
NAMES = (*(f"T{T}" for T in (1, 63, 64, 65, 255, 256, 257, 4097)), "heads_of_16", "heads_of_64",
         "heads_of_128", "hopper", "packed", "lengths", "packed_lengths", "parts", "parts_packed",
         "parts_lengths", "parts_packed_lengths", "parts_forget")
SLOW = [x for dtype in ("bfloat16", "float32") for x in (f"{dtype}/{name}" for name in NAMES)
        if x not in QUICK]
COMPILED = [f"{capability}/bfloat16/{case}" for capability in SHARED_MEMORY for case in (
    "forward/packed_lengths_8_heads_2x8193", "backward/packed_lengths_8_heads_2x8193")]
COMPILED += ["100/bfloat16/forward/1x8192", "100/bfloat16/backward/1x8192",
             "100/float32/backward/packed_lengths_8_heads_2x8193",
             "100/bfloat16/backward/heads_of_64_packed_lengths_2x8193"]
COMPILED += [f"{capability}/{dtype}/{case}" for capability in ("80", "90") for dtype, case in (
    *(("bfloat16", f"{kind}/1x8192") for kind in ("forward", "backward")),
    ("bfloat16", "forward/1x1"), ("bfloat16", "forward/1x4194304"),
    ("bfloat16", "forward/8_heads_1x131072"),
    *(("bfloat16", f"backward/heads_of_{H}_packed_lengths_2x8193") for H in (16, 32, 64)),
    ("bfloat16", "backward/heads_of_64_1x8192"), ("bfloat16", "decode/16"),
    ("float32", "decode/16"), ("float32", "backward/1x8192"),
    ("float32", "backward/packed_lengths_8_heads_2x8193"),
    ("float32", "backward/heads_of_64_packed_lengths_2x8193"))]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed")


def work(what, cases, timeout):
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.lightning_triton_gpu_worker", what, *cases],
        cwd=ROOT, env={**env, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])},
        capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def quick():
    return work("interpret", QUICK, 300)


@pytest.fixture(scope="module")
def slow():
    return work("interpret", SLOW, 1200)


@pytest.fixture(scope="module")
def run_here():
    return work("run", [*QUICK, *SLOW], 1200)


@pytest.fixture(scope="module")
def compiled():
    found = work("compile", COMPILED, 600)
    for case, what in found.items():
        for kernel in what["kernels"]:
            print(case, *(f"{key}={value}" for key, value in kernel.items()))
    return found


def check_errors(case, errors):
    for what, error in errors.items():
        if isinstance(error, bool):
            assert error, what
        else:
            # Tighter than the table's bound for gradients: these passes are the forward's.
            assert error <= bound("kernel", case.split("/")[0]), (what, error)


@needs_triton
@pytest.mark.parametrize("case", QUICK)
def test_interpreted_equals_float64(quick, case):
    check_errors(case, quick[case])


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_interpreted_equals_float64_at_every_shape(slow, case):
    check_errors(case, slow[case])


@needs_triton
@pytest.mark.gpu
@pytest.mark.parametrize("case", [*QUICK, *SLOW])
def test_run_on_this_gpu_equals_float64(run_here, case):
    check_errors(case, run_here[case])


@pytest.mark.gpu_aot
@needs_triton
@pytest.mark.parametrize("case", COMPILED)
def test_compiles_without_spills(compiled, case):
    capability, dtype, kind, _ = case.split("/")
    assert compiled[case]["kernels"]
    for kernel in compiled[case]["kernels"]:
        assert kernel["arch"].startswith(f"sm_{capability}")
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel
        if dtype == "bfloat16" and kind != "decode" and "heads_of_16" not in case:
            assert kernel["wide_copies"] > 0, kernel  # chunks are loaded ahead
    if kind == "decode":
        assert compiled[case]["aliased"]


@pytest.mark.gpu_aot
@needs_triton
def test_few_heads_split_the_sequence(compiled):
    def names(case):
        return [kernel["name"] for kernel in compiled[f"90/bfloat16/forward/{case}"]["kernels"]]

    assert names("1x8192") == ["lightning_walk"]
    assert names("8_heads_1x131072") == ["lightning_states", "lightning_walk"]


@pytest.mark.parametrize("multiprocessors, B, T, N, R, parts", [
    (132, 1, 8192, 64, 1, 1), (132, 8, 8192, 64, 1, 1), (132, 1, 1 << 17, 8, 1, 8),
    (108, 1, 8192, 64, 1, 3), (108, 1, 8192, 64, 2, 1), (108, 1, 8192, 8, 1, 6),
    (108, 1, 512, 1, 1, 1)], ids=str)
def test_parts_fill_the_multiprocessors(multiprocessors, B, T, N, R, parts):
    config = triton_gpu.Config(device=tuning.Nvidia(80, multiprocessors))
    assert triton_gpu._choose(config, np.dtype("bfloat16"), B, T, N, 128, R).parts == parts


def described(name, multiprocessors=108):
    """An abstract mesh of one GPU of that name."""
    device = jax.sharding.AbstractDevice(
        device_kind=name, num_cores=multiprocessors, platform="gpu")
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device))


@pytest.mark.parametrize("name, capability", [
    ("NVIDIA A100-SXM4-80GB", 80), ("NVIDIA A10G", 86), ("NVIDIA L4", 89), ("NVIDIA L40S", 89),
    ("NVIDIA H100 80GB HBM3", 90), ("NVIDIA GH200 480GB", 90), ("NVIDIA B200", 100),
    ("Tesla V100-SXM2-16GB", None), ("AMD Instinct MI300X", None)], ids=str)
def test_a_gpu_is_known_by_its_name(name, capability):
    with dispatch.compiling_for("gpu"), described(name):
        found = tuning.nvidia()
    assert found == (capability and tuning.Nvidia(capability, 108))


@pytest.mark.parametrize("kind, capability, found", [
    ("NVIDIA GeForce RTX 4090", "8.9", tuning.Nvidia(89, 128)),
    ("AMD Instinct MI300X", "gfx942", None)], ids=str)
@pytest.mark.parametrize("under_a_mesh", [True, False], ids=str)
def test_the_gpu_at_hand_says_what_it_is(monkeypatch, kind, capability, found, under_a_mesh):
    device = types.SimpleNamespace(
        device_kind=kind, compute_capability=capability, core_count=128)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    with described(kind) if under_a_mesh else contextlib.nullcontext():
        assert tuning.nvidia() == found
    with described("NVIDIA B200"):  # compiled for another machine
        assert tuning.nvidia() == tuning.Nvidia(100, 108)


@pytest.mark.parametrize("name, dtype, H, installed, form", [
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 128, True, "triton_gpu"),
    ("NVIDIA A100-SXM4-80GB", "float32", 64, True, "triton_gpu"),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 128, False, "xla"),
    ("NVIDIA A100-SXM4-80GB", "bfloat16", 96, True, "xla"),
    ("NVIDIA H200", "bfloat16", 128, True, "mosaic_gpu"),
    ("NVIDIA H200", "float32", 128, True, "xla"),
    ("NVIDIA H200", "bfloat16", 32, True, "xla"),
    ("Tesla V100-SXM2-16GB", "float32", 128, True, "xla"),
], ids=str)
def test_the_form_chosen_by_itself(monkeypatch, name, dtype, H, installed, form):
    monkeypatch.setattr(triton_gpu_vjp, "_missing", lambda: [] if installed else ["triton"])
    chosen = []
    monkeypatch.setattr(dispatch, "choose", lambda op, table, named, default, shape: (
        chosen.append(default), lambda *arguments: None)[1])
    array = jax.ShapeDtypeStruct
    x, states, slots = (array((1, 256, 2, H), dtype), array((1, 2, H, H), "float32"),
                        array((1,), "int32"))

    def both(x, states, slots):
        lightning_attention(x, x, x, np.ones(2))
        lightning_decode_slots(x[:, 0], x[:, 0], x[:, 0], np.ones(2), states, slots)

    with dispatch.compiling_for("gpu"), described(name):
        jax.eval_shape(both, x, states, slots)
    in_slots = form
    if form == "mosaic_gpu" and not mosaic_gpu_decode.AVAILABLE:
        in_slots = "xla"
    assert chosen == [form, in_slots]


@pytest.mark.parametrize("name, H, installed, message", [
    (None, 128, True, "runs on NVIDIA GPUs from Ampere on; this is a cpu"),
    ("Tesla V100-SXM2-16GB", 128, True, "compute capability 8.0 or more; this is an unknown GPU"),
    ("NVIDIA A100-SXM4-80GB", 96, True, "takes heads of 16, 32, 64, 128; got 96"),
    ("NVIDIA A100-SXM4-80GB", 128, False, "jax-triton is not here in that release. Install"),
], ids=str)
def test_where_it_does_not_run_a_sentence_says_why(monkeypatch, name, H, installed, message):
    monkeypatch.setattr(triton_gpu_vjp, "_missing", lambda: [] if installed else ["jax-triton"])
    x = np.zeros((1, 64, 2, H), np.float32)
    state = np.zeros((1, 2, H, H), np.float32)

    def attention():
        return lightning_attention(x, x, x, np.ones(2), implementation="triton_gpu")

    def slots():
        return lightning_decode_slots(x[:, 0], x[:, 0], x[:, 0], np.ones(2), state,
                                      np.zeros(1, np.int32), implementation="triton_gpu")

    target = contextlib.ExitStack()
    with target:
        if name is not None:
            target.enter_context(dispatch.compiling_for("gpu"))
            target.enter_context(described(name))
        for call in (attention, slots):
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(call)


def test_other_releases_count_as_missing(monkeypatch):
    releases = {"jax-triton": "0.4.1", "triton": "3.6.0"}
    monkeypatch.setattr(triton_gpu_vjp.metadata, "version", releases.__getitem__)
    assert triton_gpu_vjp._missing.__wrapped__() == ["jax-triton"]


@pytest.mark.parametrize("config", [dict(chunk=24), dict(columns=8)], ids=str)
def test_sizes_that_do_not_fit_are_refused(config):
    config = triton_gpu.Config(device=tuning.Nvidia(80, 108), **config)
    with pytest.raises(ValueError, match="power of two from 16"):
        triton_gpu._choose(config, np.dtype("bfloat16"), 1, 256, 2, 128, 1)

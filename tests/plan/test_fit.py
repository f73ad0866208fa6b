"""What a plan says: candidates of meshes, shares of memory, the report, refusals, exit codes."""

import dataclasses
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mmx.config import preset
from mmx.errors import UserError
from mmx.plan import fit, meshes, report, topology
from mmx.plan.hlo import Collective
from mmx.plan.pods import parse_pod
from mmx.plan.programs import Job, Memory
from mmx.plan.roofline import Estimate
from mmx.sharding.mesh import parse_axes
from tests import tiny

GIB = 2**30
CONFIGS = Path(__file__).parents[2] / "configs"
TEXT01 = preset("text01")


@pytest.mark.parametrize("pod, mode", [("v5p:2x2x4", "decode"), ("v6e:4x8", "long"),
                                       ("2*v6e:16x16", "decode"), ("h200:1x8", "prefill"),
                                       ("v5p:8x8x4", "train")])
def test_candidates_use_every_device_and_put_what_fits_first(pod, mode):
    pod = parse_pod(pod)
    found = meshes.candidates(Job(TEXT01, mode), pod)
    assert len(found) == len({one.text for one in found}) > 3
    assert all(math.prod(one.axes.values()) == pod.devices for one in found)
    limit = 0.9 * pod.chip.hbm_gib * GIB
    # At tensor=16 experts have 576 columns: a TPU copies them, which `held` does not count.
    crowded = [one.held > limit for one in found
               if pod.chip.platform == "cuda" or one.axes.get("tensor", 1) < 16]
    assert crowded == sorted(crowded) and not crowded[0]


def test_shares_add_up_to_the_model():
    job = Job(TEXT01, "decode", batch=32, context=8192)
    alone = meshes.share(job, {"tensor": 1})
    norms = 2 * 80 * 6144 * 2
    assert alone.weights == 2 * 456_089_655_296
    assert alone.states == 70 * 32 * 64 * 128 * 128 * 4
    assert alone.keys_values == 2 * 10 * 32 * 8 * 8192 * 128 * 2
    spread = meshes.share(job, {"expert": 4, "tensor": 8})
    assert alone.weights / 32 <= spread.weights <= alone.weights / 32 + 2 * norms + (1 << 28)
    assert spread.states * 32 == alone.states and spread.keys_values * 32 == alone.keys_values
    # Sixteen devices for eight heads: each holds a copy of one.
    copied = meshes.share(job, {"tensor": 16})
    assert copied.keys_values * 8 == alone.keys_values


@pytest.mark.parametrize("text", ["", "tensor", "tensor=0", "tensor=2,tensor=4"])
def test_a_mesh_in_another_form_is_refused(text):
    with pytest.raises(UserError, match="does not describe a mesh"):
        parse_axes(text)


@pytest.mark.parametrize("change", [{"mode": "serve"}, {"batch": 0}, {"context": -1},
                                    {"mode": "train", "quantize": "int8"}])
def test_a_job_out_of_range_is_refused(change):
    with pytest.raises(UserError):
        Job(TEXT01, **change)


@pytest.mark.parametrize("message, need", [
    ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
     "(105.49G) exceeds available HBM (94.75G).", int(105.49 * GIB)),
    ("RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Used 59.11G of 31.24G hbm.",
     int(59.11 * GIB)),
    ("INTERNAL: something else", None)])
def test_the_compilers_refusal_is_an_answer(message, need):
    assert fit._needed(message) == need


def a_fit(total_gib: float) -> fit.Fit:
    pod = parse_pod("v6e:4x8")
    memory = Memory(weights=26 * GIB, keys_values=GIB // 2, states=GIB // 4, optimizer=0, other=0,
                    temporaries=int((total_gib - 26.75) * GIB), total=int(total_gib * GIB))
    estimate = Estimate(0.001, 0.02, 0.004, "memory", ("compute: 1", "memory: 2"), {})
    moved = (Collective("all-reduce", ("tensor",), 2.0**20, 160, 8),
             Collective("all-gather", ("expert",), 2.0**20, 10, 4))
    return fit.Fit(Job(TEXT01), pod, {"expert": 4, "tensor": 8}, memory,
                   int(31.24 * GIB), moved, estimate, 12.0, {"hit_experts": 80},
                   {"jax": "0.10.2"})


def test_the_report_names_what_fits_and_what_travels():
    text = report.text("text01", a_fit(28.0), {"batch": 640, "context": None}, [a_fit(29.0)])
    for word in ("FITS: 28.00 of 31.24 GiB", "3.24 to spare", "not run", "weights", "26.00",
                 "largest batch that fits: 640", "largest context that fits: none",
                 "bound by memory", "estimate", "also expert=4,tensor=8: 29.00 GiB",
                 "kernels in a step: hit_experts 80 times"):
        assert word in text, word
    sent = [line.split() for line in text.splitlines() if "all-reduce" in line][0]
    assert sent == ["tensor", "all-reduce", "160", "280.00"]  # 2 · 7/8 of a MiB, 160 times
    text = report.text("text01", a_fit(40.0), {}, [])
    assert "DOES NOT FIT" in text and "8.76 too much" in text
    # 26.6 GiB of weights a chip alone: fewer rows can be enough.
    assert ("More or larger devices, --quantize=int8 or a smaller --batch or --context would need "
            "less.") in text


@pytest.mark.parametrize("job, words", [
    (Job(TEXT01, quantize="int8"), "More or larger devices or a smaller --batch or --context"),
    (Job(TEXT01, mode="train", batch=32), "More or larger devices would need less.")], ids=str)
def test_only_what_can_help_is_advised(job, words):
    one = dataclasses.replace(a_fit(40.0), job=job)
    assert f"  {words}" in report.text("text01", one, {}, [])


def test_json_has_every_part():
    found = json.loads(json.dumps(a_fit(28.0).to_json()))
    assert found["fits"] and found["note"] == "compiled, not run"
    assert found["bytes_per_device"]["weights"] == 26 * GIB
    assert found["collectives"][0]["sent_bytes"] == 280 * 2**20
    assert found["kernels"] == {"hit_experts": 80} and found["versions"] == {"jax": "0.10.2"}
    on_gpu = dataclasses.replace(a_fit(28.0), pod=parse_pod("h200:1x8"))
    assert "cuDNN" in on_gpu.to_json()["note"] and "cuDNN" in report.text("text01", on_gpu, {}, [])
    assert found["estimate"]["bound"] == "memory" and found["estimate"]["formulas"]


def test_the_largest_batch_is_confirmed_by_compiling(monkeypatch):
    tried = []

    def compile_fit(job, pod, axes):
        tried.append(job.batch)
        # More than the linear guess allows for: each sequence takes 0.1 GiB.
        return dataclasses.replace(a_fit(26.75 + 0.1 * job.batch), job=job)

    monkeypatch.setattr(fit, "compile_fit", compile_fit)
    best = fit.largest(a_fit(28.0), "batch")
    assert best % 4 == 0 and 26.75 + 0.1 * best <= 31.24 < 26.75 + 0.1 * (best + 8)
    assert tried[-1] == best


def tried(monkeypatch, total_gib: dict[str, float], count: int = 1, **job):
    """`try_meshes` over the meshes named, which need so much, and those compiled, in order."""
    compiled, job = [], Job(TEXT01, **job)

    def compile_fit(job, pod, axes):
        text = meshes.share(job, axes).text
        compiled.append(text)
        return dataclasses.replace(a_fit(total_gib[text]), job=job, axes=axes)

    monkeypatch.setattr(fit, "compile_fit", compile_fit)
    chosen = [meshes.share(job, parse_axes(text)) for text in total_gib]
    return fit.try_meshes(job, parse_pod("v6e:4x8"), chosen, count), compiled


def test_the_next_meshes_are_compiled_before_a_no(monkeypatch):
    needs = {"expert=2,tensor=16": 48.0, "expert=4,tensor=8": 28.0, "expert=8,tensor=4": 29.0}
    fits, compiled = tried(monkeypatch, needs)
    assert compiled == list(needs)[:2] and fits[0].fits and fits[0].mesh_text == compiled[1]
    assert len(tried(monkeypatch, needs, count=3)[1]) == 3


def test_a_no_names_how_many_were_tried_and_the_batch_that_divides(monkeypatch):
    needs = {"expert=2,tensor=16": 48.0, "expert=4,tensor=8": 32.0, "expert=8,tensor=4": 41.0,
             "expert=16,tensor=2": 42.0, "expert=32": 43.0, "data=2,tensor=16": 60.0}
    fits, compiled = tried(monkeypatch, needs, batch=37)
    assert len(compiled) == fit.TRIES and not fits[0].fits
    assert fits[0].mesh_text == "expert=4,tensor=8"
    text = report.text("text01", fits[0], {}, fits[1:])
    assert "None of the 5 likeliest meshes fits" in text and "--batch=40 takes 0." in text
    needs["expert=4,tensor=8"] = 33.0  # what copies take is not the cause
    assert "evenly" not in report.text("text01", tried(monkeypatch, needs, batch=37)[0][0], {}, [])
    text = report.text("text01", tried(monkeypatch, needs, batch=32)[0][0], {}, [])
    assert "evenly" not in text and "None of" not in text


@pytest.mark.parametrize("mode, batch", [("decode", 37), ("decode", 32), ("long", 37)])
def test_experts_of_ragged_columns_come_late(mode, batch):
    """A TPU copies gate and up of 576 columns (9,216 over 16), 21 GiB on a device of v6e:4x8."""
    found = [one.text for one in meshes.candidates(Job(TEXT01, mode, batch), parse_pod("v6e:4x8"))]
    assert found[0] == "expert=4,tensor=8" and "expert=2,tensor=16" not in found[:3]


@pytest.mark.parametrize("mode, batch", [("decode", 20_000), ("decode", 2**31 - 1),
                                         ("prefill", 200_000), ("train", 64)])
def test_what_is_held_is_refused_before_compiling(monkeypatch, mode, batch):
    monkeypatch.setattr(topology, "make_mesh", lambda pod, axes: None)
    monkeypatch.setattr(topology, "versions", lambda pod: {"jax": "0.10.2"})
    monkeypatch.setattr(fit, "compile_step", lambda job, mesh: pytest.fail("compiled"))
    job, pod = Job(TEXT01, mode, batch), parse_pod("v6e:4x8")
    fits = fit.try_meshes(job, pod, meshes.candidates(job, pod), waiting=pytest.fail)
    assert len(fits) == fit.TRIES and not any(one.fits for one in fits)
    memory = fits[0].memory
    assert memory.total == sum((memory.weights, memory.keys_values, memory.states,
                                memory.optimizer)) > fits[0].limit
    text = report.text("text01", fits[0], {}, fits[1:])
    assert "DOES NOT FIT" in text and "not compiled" in text and "compiled in" not in text
    assert ("optimiser moments" if mode == "train" else "keys and values") in text
    assert not fits[0].to_json()["compiled"] and "not compiled" in fits[0].to_json()["note"]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory "
                                                               "allocating 9 bytes.")])
def test_a_compiler_that_takes_all_memory_is_a_sentence(monkeypatch, error):
    def compile_step(job, mesh):
        raise error

    monkeypatch.setattr(topology, "make_mesh", lambda pod, axes: None)
    monkeypatch.setattr(topology, "versions", lambda pod: {"jax": "0.10.2"})
    monkeypatch.setattr(fit, "compile_step", compile_step)
    with pytest.raises(UserError, match="memory of this machine ran out while it compiled"):
        fit.compile_fit(Job(TEXT01), parse_pod("v6e:4x8"), {"expert": 4, "tensor": 8})


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_training_holds_float32_whatever_the_activations(dtype):
    one = meshes.share(Job(TEXT01, "train", dtype=dtype), {"tensor": 1})
    assert (one.weights, one.states) == (4 * 456_089_655_296, 8 * 456_089_655_296)


def run_plan(*arguments):
    return subprocess.run([sys.executable, "-m", "mmx", "plan", *arguments], capture_output=True,
                          text=True, check=False)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("mesh/*.gin")), ids=lambda path: path.stem)
def test_shipped_meshes_lie_on_their_pods(path):
    given = dict(re.findall(r"^(\w+\.\w+) = '(.*)'$", path.read_text(), re.MULTILINE))
    assert given["plan.mesh"] == given["batch.mesh"] == given["generate.mesh"]
    pod, axes = parse_pod(given["plan.pod"]), parse_axes(given["plan.mesh"])
    assert topology.check_axes(pod, axes) == axes
    one = meshes.share(Job(TEXT01, batch=32), axes)
    small = "small" in path.read_text()
    int8 = meshes.share(Job(TEXT01, batch=32, quantize="int8"), axes)
    assert small or min(one.held, int8.held) < 0.95 * pod.chip.hbm_gib * GIB
    assert small or "int8" in path.read_text() or one.held < 0.95 * pod.chip.hbm_gib * GIB


def test_mistakes_are_sentences():
    for arguments, word in ((["--pod=v9:4x4"], "unknown"), (["--mode=serve"], "choice"),
                            (["--pod=v6e:4x8", "--mesh=tensor=3"], "devices"),
                            (["--pod=v6e:4x8", "--mesh=model=32"], "unknown"),
                            (["--chunk=512"], "--chunk has no meaning with --mode=decode"),
                            (["--mode=train", "--chunk=512"], "belongs to prefill and long"),
                            (["--mode=long", "--moe_capacity=2"], "belongs to train"),
                            (["--context=100000000000"], "between 1 and 2147483647"),
                            (["--batch=100000000000"], "between 1 and 2147483647")):
        done = run_plan(*arguments)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr


# Rows of docs/pods.md, compiled again: arguments, exit code, most GiB that a device may need.
ROWS = [
    (["--pod=v5p:2x2x4", "--batch=32"], 0, 57.0),
    (["--pod=v6e:4x4", "--batch=16", "--quantize=int8"], 0, 29.5),
    (["--pod=v6e:4x8", "--mode=long", "--context=1048576", "--chunk=8192"], 0, 31.24),
    (["--pod=v6e:4x4", "--batch=16"], 3, math.inf),
]


@pytest.mark.tpu_aot
@pytest.mark.parametrize("arguments, code, most", ROWS)
def test_the_whole_model_on_named_pods(arguments, code, most):
    done = run_plan("--model=text01", *arguments, "--json")
    assert done.returncode == code, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["bytes_per_device"]["total"] <= most * GIB
    assert found["fits"] == (code == 0)
    if found["fits"]:
        assert found["collectives"] and found["estimate"]["step_s"] > 0


@pytest.mark.tpu_aot
def test_traffic_of_lightning_layers_does_not_grow_with_the_chunk(tmp_path):
    """States travel, tokens do not: all-gathers over the time axes keep their bytes."""
    config = tiny.config(2, softmax_every=4, num_heads=8, head_dim=128)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf("minimax_text_01")))
    moved = []
    for chunk in (1024, 4096):
        done = run_plan(f"--model={tmp_path}", "--pod=v5e:2x4", "--mode=long", "--batch=1",
                        "--mesh=sequence=8", "--context=8192", f"--chunk={chunk}", "--json")
        assert done.returncode == 0, done.stderr[-2000:]
        moved.append({(one["kind"], one["bytes"]) for one in json.loads(done.stdout)["collectives"]
                      if one["axes"] == ["sequence"] and one["kind"] == "all-gather"})
    states = 8 * 8 * 128 * 128 * 4
    assert any(size == states for _, size in moved[0]) and moved[0] & moved[1]

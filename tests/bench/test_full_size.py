"""mmx.bench.full_size on simulated devices, its parts, and launch/full_size_gpu.sh."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace as Box

import pytest

from mmx.bench import collectives, full_size
from tests.launch.launchers import ROOT, commands, example, launch

SCRIPT = "full_size_gpu.sh"


@pytest.mark.parametrize("mesh", ["tensor=4", "expert=2,tensor=2"])
def test_rows_on_four_simulated_devices(tmp_path, mesh):
    done = subprocess.run(
        [sys.executable, "-m", "mmx.bench.full_size", "--model=nano", f"--mesh={mesh}",
         "--prompts=64", "--batches=1,4", "--contexts=64,2000000", "--chunk=32", "--long=96",
         "--quantize=int8", "--seconds=200", f"--output={tmp_path}"], cwd=ROOT,
        capture_output=True, text=True, timeout=280, env={
            **os.environ, "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4"})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {(row["operation"], row["shape"]): row for row in rows}
    largest = rows.pop()
    assert largest["operation"] == "largest_context" and largest["tokens_fit"] >= 1024
    assert largest["planned_bytes"] <= full_size._FILL * full_size._CPU_LIMIT
    refused = {row["shape"]: row["error"] for row in rows if "error" in row}
    assert list(refused) == ["b1c2000000", "b4c2000000"], refused
    assert all(re.match(r"It needs [\d.]+ GiB of each device, which has 0.1", text)
               for text in refused.values()), refused
    long = found["prefill", "1x96"]
    assert long["finite"] and len(long["continued_ms"]) == 16 and long["length"] == 96 + 16
    for shape in ("b1c64", "b4c64"):
        assert found["decode", shape]["planned_bytes"] > 0 and found["decode", shape]["floor_ms"]
    assert "prefill 1x96" in (tmp_path / "details.md").read_text()


def test_what_was_refused_is_no_plan_of_a_later_peak():
    rows = [{"operation": "decode", "shape": shape, "dtype": "int8", "planned_bytes": plan,
             "peak_bytes": [plan], **more} for shape, plan, more in (
                 ("b1", 100, {}), ("b64", 300, {"error": "It needs more.", "peak_bytes": []}),
                 ("b16", 200, {}))]
    assert full_size.details(rows).splitlines()[-1].split("|")[5].strip() == "1.000"


def test_rows_come_in_order_of_weight():
    asked = full_size.arguments().parse_args(["--long=1048576"])
    shapes = [job.shape for job, _ in full_size.jobs(asked)]
    assert shapes == ["b1c1024", "b16c1024", "b64c1024", "1x8192", "1x65536", "1x1048576",
                      "b1c65536", "b16c65536", "b64c65536", "1x262144"]


def test_two_devices_keep_sixteen_layers_and_eight_all():
    def layers(*words):
        return full_size.kept(*words).num_layers

    assert layers("text01", None, 2, True) == 16 and layers("text01", None, 8, True) == 80
    assert layers("text01", None, 2, False) == layers("text01", 0, 2, True) == 80
    assert layers("nano", None, 2, True) == 8 and layers("text01", 24, 2, True) == 24
    assert full_size.chosen(full_size.kept("text01", None, 2, True), 2, "bfloat16", None) == (
        "tensor=2")


def test_out_of_memory_is_named():
    assert full_size.failure(RuntimeError("RESOURCE_EXHAUSTED: 9 GiB")).startswith("Out of memory")
    assert full_size.failure(RuntimeError("Other.")) == "Other."


def test_collectives_are_summed_by_kind_over_streams_of_devices():
    def event(name, ns):
        return Box(name=name, duration_ns=ns)

    def gpu(number, ns):
        return Box(name=f"/device:GPU:{number}", lines=[
            Box(name="Stream #13(Compute)", events=[
                event("ncclDevKernel_AllReduce_Sum_bf16", ns), event("gemm", 5e9)]),
            Box(name="XLA Ops", events=[event("all-reduce.1", 1e9)])])

    host = Box(name="/host:CPU", lines=[Box(name="Stream", events=[event("all-reduce", 1e9)])])
    assert collectives.summed([gpu(0, 1e6), gpu(1, 3e6), host]) == {"all-reduce": 2.0}
    assert collectives.summed([host]) is None
    assert collectives.kind_of("ncclDevKernel_SendRecv") == "send-receive"
    assert collectives.kind_of("psum_163_0_fusion_1") == "all-reduce"


def test_a_trace_tells_collectives_and_the_longest_programs(monkeypatch):
    events = [Box(name=f"program_{number}", duration_ns=1e3 * number) for number in range(20)]
    plane = Box(name="/device:GPU:0", lines=[Box(name="Stream #1", events=events)])
    monkeypatch.setattr(collectives.trace, "planes", lambda call: [plane])
    found = collectives.traced(lambda: None, 1)
    assert found["collectives_ms"] == {} and found["programs"]["launches"] == 20
    assert [row["kernel"] for row in found["programs"]["kernels"]] == [
        f"program_{number}" for number in range(19, 7, -1)]
    monkeypatch.setattr(collectives.trace, "planes", lambda call: [])
    assert collectives.traced(lambda: None, 1) == {"collectives_ms": None, "programs": None}


def test_script_prints_what_it_would_run():
    code, out, err = launch(SCRIPT, "--help")
    assert code == 0 and not err and "--dry-run" in out
    code, out, err = launch(SCRIPT, "--dry-run", *example(SCRIPT))
    shown = commands(out)
    assert code == 0 and not err and len(shown) == 2
    assert "--quantize=int8" in shown[1] and "--quantize=int8" not in shown[0]
    assert [int(re.search(r"kill-after=10 (\d+)", line)[1]) for line in out.splitlines()][0] <= 243


@pytest.mark.parametrize("word", ["--wings", "--minutes=0", "--only=fp8", "--mesh=8", "--output="])
def test_script_refuses_in_a_sentence(word):
    code, out, err = launch(SCRIPT, "--dry-run", word)
    assert code == 2 and not out and err.startswith(f"{SCRIPT}: ")

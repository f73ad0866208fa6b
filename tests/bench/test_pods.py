"""mmx.bench.pods on two simulated devices, its table, and launch/bench_pods_gpu.sh."""

import json
import os
import subprocess
import sys

import pytest

from mmx.bench import pods, pods_table
from tests.launch.launchers import LAUNCH, ROOT, calls, commands, example, launch, stand_in

SCRIPT = "bench_pods_gpu.sh"
WORDS = ["--model=nano", "--tokens=128", "--chunk=32", "--batch=4", "--context=64",
         "--lightning_tokens=256", "--lightning_chunk=64", "--rounds=2", "--seconds=60"]


def measured(folder, *rows, words=()):
    """Records of rows that were run one after another in one process of two devices."""
    code = f"""import sys
from mmx.bench import pods
for row in {rows!r}:
    if pods.main([row, *{[*WORDS, *words]!r}, "--output={folder}/" + row]):
        sys.exit(row)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
             "XLA_FLAGS": "--xla_force_host_platform_device_count=2"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for row in rows
            for line in (folder / row / "results.jsonl").read_text().splitlines()]


def check(rows, wanted):
    found = {(row["operation"], row["devices"]): row for row in rows if "devices" in row}
    assert not any("error" in row for row in rows), rows
    assert set(found) == {(name, devices) for name in wanted for devices in (1, 2)}
    for (name, devices), row in found.items():
        assert row["floor_ms"] and ("speedup" in row) == (devices == 2)
        if devices == 2:
            one = found[name, 1]
            assert row["speedup"] == pytest.approx(one["median_ms"] / row["median_ms"])
            assert row["floor_ms"] == pytest.approx(one["floor_ms"] / 2)
    return found


@pytest.mark.multidevice
def test_sequence_and_lightning_on_two_simulated_devices(tmp_path):
    rows = measured(tmp_path, "sequence", "lightning")
    found = check(rows, ["prefill", "lightning_forward", "lightning_layers"])
    assert found["prefill", 1]["dims"]["chunk"] == 32 and found["prefill", 2]["dims"]["chunk"] == 64
    assert found["prefill", 2]["difference"] < 1e-5
    assert found["prefill", 2]["must_reach"] == 1.85 and found["prefill", 2]["planned_bytes"] > 0
    text = pods_table.summary(tmp_path, tmp_path / "none.json")
    assert "prefill, sequence=2" in text and "of their norm" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.parametrize("quantize", ["", "int8"])
def test_experts_on_two_simulated_devices(quantize, tmp_path):
    rows = measured(tmp_path, "experts", "long", words=[f"--quantize={quantize}"])
    found = check(rows, ["decode", "prefill"])
    assert found["decode", 2]["dtype"] == ("float32/int8" if quantize else "float32")
    # Half of the rounds in each of two turns.
    assert len(found["decode", 2]["samples_ms"]) == 2 and found["decode", 2]["must_reach"] == 1.6
    assert "must_reach" not in found["prefill", 2]


def record(operation, devices, ms, **more):
    return {"bench": "pods", "geometry": "", "operation": operation, "shape": "1x8",
            "implementation": f"{devices} devices, sequence={devices}", "devices": devices,
            "device": {"kind": "H200"}, "commit": "c" * 40,
            **({"median_ms": ms} if ms else {}), **more}


def test_table_tells_bars_failures_and_memory(tmp_path):
    (tmp_path / "a").mkdir()
    rows = [record("prefill", 1, 10.0), record("prefill", 2, 5.0, speedup=2.0, must_reach=1.85),
            record("decode", 1, 10.0), record("decode", 2, 8.0, speedup=1.25, must_reach=1.6),
            record("lightning_forward", 2, None, error="Out of memory.")]
    (tmp_path / "a/results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "memory_one.json").write_text(json.dumps({"measured": {
        "decode:64": {"measured": 104 << 20}, "decode:1": {"measured": 106 << 20},
        "long:8": {"error": "It ended."}}}))
    (tmp_path / "plan.json").write_text(json.dumps({"plan": {
        name: {"bytes_per_device": {"total": 100 << 20}} for name in ("decode:64", "decode:1")}}))
    lines = pods_table.summary(tmp_path, tmp_path / "plan.json").splitlines()[3:]
    assert [line.split()[-1] for line in lines] == [
        "reached", "missed", "memory.", "reached", "missed", "ended."]
    assert "1.040" in lines[3] and "2.000" in lines[0]
    assert "no result" in pods_table.summary(tmp_path / "a/none")


def test_too_few_devices_is_a_sentence(capsys):
    assert pods.main(["sequence", "--devices=512"]) == 2
    assert "--devices=512 is out of range" in capsys.readouterr().err


def test_what_could_not_be_timed_is_said():
    assert pods.pooled([]) == "No time was left."
    assert pods.pooled("Failed.") == "Failed."
    assert pods.difference([], [[1.0]]) is None


def test_script_prints_what_it_would_run():
    code, out, err = launch(SCRIPT, "--help")
    assert code == 0 and not err and "--dry-run" in out
    code, out, err = launch(SCRIPT, "--dry-run", *example(SCRIPT))
    shown = commands(out)
    assert code == 0 and not err and len(shown) == 9
    rows = [one[one.index("-m") + 2] for one in shown[:3] + shown[7:8]]
    assert sorted(rows) == sorted(pods.ROWS) and rows[-1] == "long"
    limits = [int(one[one.index("--kill-after=10") + 1]) for one in shown[:8]]
    assert 150 <= limits[0] <= 161 and limits[-1] <= 509
    # A row begins nothing more in the last fifth of its time.
    assert f"--seconds={limits[0] * 8 // 10}" in shown[0]


def test_rows_of_memory_are_those_of_the_plan():
    code, out, _ = launch(SCRIPT, "--dry-run", "--only=memory")
    planned = json.loads((ROOT / pods_table.PLAN).read_text())["plan"]
    words = [{word.partition("=")[0]: word.partition("=")[2] for word in one}
             for one in commands(out)[:-1]]
    asked = [one["--rows"] + (f"/{one['--mesh']}" if one["--mesh"] else "") for one in words]
    assert code == 0 and len(asked) == 4 and set(asked) <= set(planned)


@pytest.mark.parametrize("word", ["--wings", "--minutes=0", "--only=fast", "--devices=1",
                                  "--output=", "--chunk=none"])
def test_script_refuses_in_a_sentence(word):
    code, out, err = launch(SCRIPT, "--dry-run", word)
    assert code == 2 and not out and err.startswith(f"{SCRIPT}: ")


def test_a_failure_does_not_end_the_rest_and_words_are_handed_on(tmp_path):
    tools = stand_in(tmp_path / "tools", "python", "sys.exit(7 * ('experts' in words))")
    code, _, err = launch(SCRIPT, f"--output={tmp_path}", "--", "--rounds=2", path=tools, env={
        "MMX_PYTHON": str(tools / "python"), "NO_STDIN": "1", "JAX_PLATFORMS": "cpu"})
    ran = [words for words, _ in calls(tools) if words[1] != "-c"]
    assert code == 7 and "experts ended with code 7" in err and len(ran) == 9
    handed_on = [("--rounds=2" in words) for words in ran]
    assert handed_on == [True] * 3 + [False] * 4 + [True, False]
    assert ran[-1][1:] == ["-m", "mmx.bench.pods_table", str(tmp_path)]


def test_what_has_no_time_left_is_named(tmp_path):
    """The script as it is 50 of its 60 seconds after its start."""
    (tmp_path / "launch").mkdir()
    for name in (SCRIPT, "common.sh", "setup_env.sh", "env.sh"):
        text = (LAUNCH / name).read_text()
        assert name != SCRIPT or "begin=$SECONDS" in text
        (tmp_path / "launch" / name).write_text(
            text.replace("begin=$SECONDS", "begin=$((SECONDS - 50))"))
    code, out, err = launch(tmp_path / "launch" / SCRIPT, "--dry-run", "--minutes=1",
                            "--only=sequence,lightning")
    assert code == 1 and "timeout" not in out
    assert [line.split()[6] for line in err.splitlines()] == ["sequence:", "lightning:"], err


@pytest.mark.gpu_aot
@pytest.mark.parametrize("row, kernels", [
    # Seven lightning layers of a piece, and the grouped products of all layers but the last.
    ("sequence", {"prefill": 23}),
    ("experts", {"prefill": 23, "decode": 16}),
    ("lightning", {"operation 2": 1, "layers 2": 7})])
def test_hopper_kernels_are_in_the_programs_of_two_gpus(row, kernels):
    pytest.importorskip("jax_cuda13_plugin")
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    done = subprocess.run([sys.executable, "-m", "tests.bench.pods_aot_worker", row], cwd=ROOT,
                          env={**env, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
                          timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    found = {name.partition(" ")[2]: one for name, one in report.items()}
    assert set(found) == set(kernels)
    for name, least in kernels.items():
        counted = sum(count for target, count in found[name]["kernels"].items()
                      if target.startswith("mosaic_gpu"))
        assert counted >= least, (name, found[name]["kernels"])
        assert found[name]["total_bytes"] < 134 * 2**30 and found[name]["exchanges"]

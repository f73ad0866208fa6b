"""What the launchers start on the hosts, run here with stand-ins for mmx, srun and scontrol."""

import json
import os
import shlex
import signal
import subprocess
import time

import pytest
import yaml

from tests.launch.launchers import AWKWARD, LAUNCH, calls, commands, environment, launch, stand_in

TPU = ["--name=mmx", "--zone=us-east5-b", "--type=v6e-32", "--nfs=10.0.0.2:/mmx"]


def _scripts(*words):
    """The scripts that a dry run of tpu_vm.sh would send to the workers."""
    code, out, err = launch("tpu_vm.sh", "--dry-run", *words)
    assert code == 0, err
    return [word.removeprefix("--command=") for words in commands(out) for word in words
            if word.startswith("--command=")]


def _on_worker(home, script):
    return subprocess.run(["bash", "-c", script], env=environment(HOME=str(home)), timeout=60,
                          capture_output=True, text=True)


def _worker(home, body):
    (home / "mmx-venv").mkdir()
    return stand_in(home / "mmx-venv" / "bin", "mmx", body)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_command_reaches_a_tpu_worker_whole(code, tmp_path):
    notes = _worker(tmp_path, "json.dump(dict(os.environ), open('env', 'w'))\n"
                              f"print('written', flush=True)\nsys.exit({code})")
    start, = _scripts("run", *TPU, "--", "batch", *AWKWARD)
    assert _on_worker(tmp_path, start).returncode == 0
    logs, = _scripts("logs", *TPU)
    done = _on_worker(tmp_path, logs)
    assert done.returncode == code and done.stdout == "written\n"
    assert [words for words, _ in calls(notes)] == [["mmx", "batch", *AWKWARD]]
    env = json.loads((tmp_path / "mmx-run" / "env").read_text())
    assert env["JAX_COMPILATION_CACHE_DIR"] == "/mnt/mmx/compiled"
    assert env["LIBTPU_INIT_ARGS"].split() == [
        "--xla_tpu_enable_async_all_to_all=true", "--xla_tpu_enable_async_ragged_all_to_all=true"]


def test_stop_ends_the_command_and_a_second_one_waits_its_turn(tmp_path):
    _worker(tmp_path, "import time\nprint('up', flush=True)\ntime.sleep(60)")
    start, = _scripts("run", *TPU, "--", "train")
    assert _on_worker(tmp_path, start).returncode == 0
    until = time.monotonic() + 30
    while not (tmp_path / "mmx-run" / "log").exists() and time.monotonic() < until:
        time.sleep(0.05)
    again = _on_worker(tmp_path, start)
    assert again.returncode == 1 and "stop it first" in again.stderr
    stop, = _scripts("stop", *TPU)
    assert _on_worker(tmp_path, stop).returncode == 0
    logs, = _scripts("logs", *TPU)
    assert _on_worker(tmp_path, logs).returncode == 143
    assert _on_worker(tmp_path, start).returncode == 0
    _on_worker(tmp_path, stop)


def test_install_is_a_script_that_bash_reads():
    for words in (["--bucket=b"], ["--source=git+https://host/mmx@v1"], []):
        flags = [flag for flag in TPU if not words or "bucket" not in words[0] or "nfs" not in flag]
        script, = _scripts("install", *flags, *words)
        assert script.startswith("set -e\n")
        assert subprocess.run(["bash", "-n", "-c", script], capture_output=True).stderr == b""


# What gcloud says to `describe`, and what the command on the worker ends with, one after another.
@pytest.mark.parametrize("ends, states, restarts, code, creates", [
    ([0], ["ACTIVE"], 0, 0, 1), ([2], ["ACTIVE"], 5, 2, 1), ([75, 75], ["ACTIVE"], 1, 75, 1),
    ([255, 0], ["ACTIVE", "SUSPENDED", "ACTIVE"], 1, 0, 2)])
def test_up_asks_again_after_a_preemption(ends, states, restarts, code, creates, tmp_path):
    tools = tmp_path / "tools"
    stand_in(tools, "git")
    stand_in(tools, "gcloud", f"""
notes = [json.loads(line)[0] for line in open({str(tools / 'calls')!r})]
def nth(values, kind):
    return values[min(sum(kind in ' '.join(note) for note in notes), len(values)) - 1]
if 'describe' in words:
    print(nth({states!r}, 'describe'))
if 'tail -n' in words[-1]:
    sys.exit(nth({ends!r}, 'tail -n'))
""")
    done = launch("tpu_vm.sh", "up", *TPU, "--spot", f"--restarts={restarts}", "--", "batch",
                  path=tools, env={"NO_STDIN": "1"})
    assert done[0] == code, done[2]
    assert sum(words[4:5] == ["create"] for words, _ in calls(tools)) == creates
    assert sum(words[4:5] == ["delete"] for words, _ in calls(tools)) == creates - 1


def _slurm(tmp_path, ends_with=0, state="RUNNING", body=None, **env):
    tools = tmp_path / "tools"
    stand_in(tools, "srun", body or (
        "import subprocess\n"
        "step = words[next(i for i, word in enumerate(words) if word == 'bash'):]\n"
        f"subprocess.run(step, check=True)\nsys.exit({ends_with})"))
    stand_in(tools, "scontrol", "print({'hostnames': 'node7\\nnode8', 'job': "
             f"'JobId=5 JobState={state} Reason=None'}}.get(words[2], ''))")
    mmx = stand_in(tmp_path / "bin", "mmx",
                   f"json.dump(dict(os.environ), open({str(tmp_path / 'env')!r}, 'w'))")
    given = {"SLURM_JOB_ID": "5", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2",
             "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_PROCID": "1", "NO_STDIN": "1",
             "MMX_BIN": str(mmx / "mmx"), "MMX_SHARED": "/shared", **env}
    return tools, given


def test_slurm_starts_one_process_per_host_that_knows_its_place(tmp_path):
    tools, env = _slurm(tmp_path)
    code, _, err = launch("slurm.sbatch", "batch", *AWKWARD, path=tools, env=env)
    assert code == 0, err
    (srun,) = [words for words, _ in calls(tools) if words[0] == "srun"]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"} <= set(srun)
    assert [words for words, _ in calls(tmp_path / "bin")] == [["mmx", "batch", *AWKWARD]]
    seen = json.loads((tmp_path / "env").read_text())
    assert seen["MMX_COORDINATOR"] == "node7:20005" and seen["MMX_PROCESSES"] == "2"
    assert seen["MMX_PROCESS_ID"] == "1"
    assert seen["JAX_COMPILATION_CACHE_DIR"] == "/shared/compiled"
    assert seen["JAX_PLATFORMS"] == "cuda,cpu"


@pytest.mark.parametrize("ends_with, restarts, state, requeued", [
    (0, 0, "RUNNING", False), (2, 0, "RUNNING", False), (3, 0, "RUNNING", False),
    (75, 0, "RUNNING", True), (137, 19, "RUNNING", True), (75, 20, "RUNNING", False),
    (143, 0, "CANCELLED", False)])
def test_slurm_requeues_after_a_loss_alone(ends_with, restarts, state, requeued, tmp_path):
    tools, env = _slurm(tmp_path, ends_with, state, SLURM_RESTART_COUNT=str(restarts))
    code, _, err = launch("slurm.sbatch", "batch", path=tools, env=env)
    assert code == ends_with
    assert (["scontrol", "requeue", "5"] in [words for words, _ in calls(tools)]) == requeued, err


@pytest.mark.parametrize("number, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_lets_the_step_save_before_the_time_is_up(number, requeued, tmp_path):
    saved = tmp_path / "saved"
    tools, env = _slurm(tmp_path, body=f"""
import signal, time
def save(*_):
    open({str(saved)!r}, 'w').close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open({str(tmp_path / 'up')!r}, 'w').close()
time.sleep(60)
""")
    given = environment(**env)
    given["PATH"] = f"{tools}:{given['PATH']}"
    job = subprocess.Popen(["bash", str(LAUNCH / "slurm.sbatch"), "train"], env=given,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 30
    while not (tmp_path / "up").exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(job.pid, number)
    assert job.wait(timeout=30) == 0 and saved.exists()
    assert (["scontrol", "requeue", "5"] in [words for words, _ in calls(tools)]) == requeued


@pytest.mark.parametrize("nodes", [1, 2])
def test_skypilot_starts_the_command_and_says_which_host_it_is(nodes, tmp_path):
    (tmp_path / "launch").symlink_to(LAUNCH)
    (tmp_path / ".venv").mkdir()
    mmx = stand_in(tmp_path / ".venv" / "bin", "mmx",
                   "json.dump(dict(os.environ), open('env', 'w'))\nsys.exit(75)")
    env = environment(SKYPILOT_NUM_NODES=str(nodes), SKYPILOT_NODE_RANK=str(nodes - 1),
                      SKYPILOT_NODE_IPS="\n".join(["10.0.0.1", "10.0.0.2"][:nodes]),
                      MMX_ARGS=f"batch {shlex.join(AWKWARD)}", NO_STDIN="1")
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    done = subprocess.run(["bash", "-c", task["run"]], env=env, cwd=tmp_path, timeout=60)
    # The code of a lost host reaches SkyPilot, which then finds another.
    assert done.returncode == 75
    assert [words for words, _ in calls(mmx)] == [["mmx", "batch", *AWKWARD]]
    seen = json.loads((tmp_path / "env").read_text())
    assert seen["JAX_COMPILATION_CACHE_DIR"] == "/shared/compiled"
    place = {name: value for name, value in seen.items()
             if name in ("MMX_COORDINATOR", "MMX_PROCESSES", "MMX_PROCESS_ID")}
    assert place == ({} if nodes == 1 else {
        "MMX_COORDINATOR": "10.0.0.1:8476", "MMX_PROCESSES": "2", "MMX_PROCESS_ID": "1"})

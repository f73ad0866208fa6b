"""launch/bench_gpu.sh as a program: lint, help, refusals, what it runs, and its time budget."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.launchers import LAUNCH, calls, commands, example, launch, stand_in

SCRIPT = "bench_gpu.sh"
# Stands in for a Python with mmx: takes all, and fails at what FAILS names.
PYTHON = ("fails = os.environ.get('FAILS', '')\n"
          "sys.exit(7 if fails and fails in ' '.join(words) else 0)")


@pytest.fixture
def tools(tmp_path):
    return stand_in(stand_in(tmp_path / "tools", "python", PYTHON), "nvidia-smi")


def run(tools, *words, **env):
    code, out, err = launch(SCRIPT, *words, path=tools,
                            env={"MMX_PYTHON": str(tools / "python"), "NO_STDIN": "1", **env})
    benches = [words for words, _ in calls(tools) if words[1:3] == ["-m", "mmx"]]
    return code, out, err, benches


def test_shellcheck_is_content():
    program = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    done = subprocess.run([program, "-x", "-P", str(LAUNCH), str(LAUNCH / SCRIPT)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_has_an_example_that_works():
    code, out, err = launch(SCRIPT, "--help")
    assert code == 0 and not err and "--dry-run" in out
    code, out, err = launch(SCRIPT, "--dry-run", *example(SCRIPT))
    assert code == 0 and out and not err


@pytest.mark.parametrize("words, says", [
    (["--wings"], "'--wings'"), (["period"], "'period'"), (["--output="], "--output is empty"),
    (["--minutes=0"], "--minutes='0'"), (["--minutes=soon"], "--minutes='soon'"),
    (["--only=kernel"], "--only='kernel'"), (["--peers=vllm"], "--peers='vllm'")])
def test_refuses_in_a_sentence(tools, words, says):
    code, out, err, benches = run(tools, *words)
    assert code == 2 and says in err and not out and len(err.splitlines()) == 1
    assert err.startswith(f"{SCRIPT}: ") and err.endswith(".\n") and not calls(tools)


def test_a_dry_run_prints_what_is_run_and_touches_nothing(tools, tmp_path):
    words = [f"--output={tmp_path}/out dir", "--peers=fla,transformers"]
    code, out, err, benches = run(tools, "--dry-run", *words)
    assert code == 0 and not err and not calls(tools)
    shown = [one for one in commands(out) if "mmx" in one]
    benches = run(tools, *words)[3]
    assert [one[one.index("-m"):] for one in shown] == [one[1:] for one in benches]
    assert [(one[4], one[-1].rpartition("/")[2]) for one in benches] == [
        ("kernels", "check"), ("kernels", "kernels"), ("kernels", "context"),
        ("period", "period"), ("decode", "decode"), ("period", "period_int8"),
        ("decode", "decode_int8")]
    assert benches[0][5:7] == ["--check", "--rounds=0"]
    assert ["--peers=fla" in one for one in benches] == [0, 1, 1, 0, 0, 0, 0]
    assert ["--peers=transformers" in one for one in benches] == [0, 0, 0, 1, 1, 0, 0]
    assert ["--quantize=int8" in one for one in benches] == [0] * 5 + [1] * 2
    assert not list(tmp_path.glob("out*"))


def test_one_failure_does_not_end_the_rest(tools):
    code, _, err, benches = run(tools, "--only=check,period,decode", FAILS="bench period")
    assert code == 7 and len(benches) == 3 and "period ended with code 7." in err
    assert calls(tools)[-1][0][1:3] == ["-m", "mmx.bench.summary"]


def test_each_may_take_its_share_of_the_time_left(tmp_path):
    code, out, err = launch(SCRIPT, "--dry-run", "--minutes=10")
    limits = [int(re.search(r"kill-after=30 (\d+)", line)[1]) for line in out.splitlines()
              if line.startswith("timeout")]
    assert code == 0 and len(limits) == 7
    assert 200 <= limits[0] <= 210 and 590 <= limits[-1] <= 600


def test_what_has_no_time_left_is_named(tmp_path):
    """The script as it is 50 of its 60 seconds after its start."""
    (tmp_path / "launch").mkdir()
    for name in (SCRIPT, "common.sh", "setup_env.sh", "env.sh"):
        text = (LAUNCH / name).read_text()
        assert name != SCRIPT or "begin=$SECONDS" in text
        (tmp_path / "launch" / name).write_text(
            text.replace("begin=$SECONDS", "begin=$((SECONDS - 50))"))
    code, out, err = launch(tmp_path / "launch" / SCRIPT, "--dry-run", "--minutes=1",
                            "--only=check,decode_int8")
    assert code == 1 and "timeout" not in out
    assert [line.split()[6] for line in err.splitlines()] == ["check:", "decode_int8:"], err


def test_python_without_mmx_is_named(tmp_path):
    tools = stand_in(tmp_path / "tools", "python", "sys.exit(1)")
    stand_in(tmp_path / "tools", "nvidia-smi", "sys.exit(0)")
    code, out, err, _ = run(tools)
    assert code == 2 and "cannot import mmx" in err and "pip install" in err


def test_without_a_driver_it_says_so(tmp_path):
    tools = stand_in(tmp_path / "tools", "python", PYTHON)
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine has a driver")
    code, _, err, benches = run(tools)
    assert code == 2 and "no nvidia-smi" in err and not benches
    assert run(tools, "--only=check", JAX_PLATFORMS="cpu")[0] == 0

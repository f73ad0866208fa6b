"""The launchers as programs: syntax, lint, help, refusals, dry runs, and what reaches the tools."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.launch.launchers import (
    AWKWARD,
    LAUNCH,
    calls,
    commands,
    environment,
    example,
    launch,
    stand_in,
)

SCRIPTS = ["common.sh", "env.sh", "gke.sh", "slurm.sbatch", "tpu_vm.sh", "xpk.sh"]
LAUNCHERS = ["gke.sh", "slurm.sbatch", "tpu_vm.sh", "xpk.sh"]
TOOLS = ["gcloud", "kubectl", "xpk", "srun", "sbatch", "scontrol", "git"]

TPU = ["--name=mmx", "--zone=us-east5-b", "--type=v6e-32"]
GKE = ["--name=mmx", "--pod=v6e:4x8", "--image=r/mmx:tpu"]
XPK = ["--cluster=c", "--zone=us-east5-b", "--name=mmx", "--type=v6e-32", "--image=r/mmx:tpu"]
MMX = ["--", "batch", "--model=/mnt/mmx/m"]


def _shellcheck(*words, **more):
    program = shutil.which("shellcheck") or str(Path(sys.executable).with_name("shellcheck"))
    return subprocess.run([program, *words], capture_output=True, text=True, **more)


@pytest.mark.parametrize("script", SCRIPTS)
def test_syntax(script):
    done = subprocess.run(["bash", "-n", str(LAUNCH / script)], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr


def test_shellcheck_is_content():
    done = _shellcheck("-x", "-P", str(LAUNCH), *(str(LAUNCH / script) for script in SCRIPTS))
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_sees_a_fault(tmp_path):
    (tmp_path / "bad.sh").write_text('#!/usr/bin/env bash\nrm -rf $1/*\n')
    assert "SC2086" in _shellcheck(str(tmp_path / "bad.sh")).stdout


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_of_skypilots_scripts(part):
    text = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())[part]
    # SkyPilot sets its variables; launch/env.sh is checked by itself.
    done = _shellcheck("--shell=bash", "--exclude=SC1091", "-", input=text)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [*LAUNCHERS, "env.sh"])
def test_help_has_an_example_that_works(script, tmp_path):
    code, out, err = launch(script, "--help")
    assert code == 0 and not err and "--dry-run" in out
    words = example(script)
    code, out, err = launch(script, "--dry-run", *words)
    assert code == 0 and out and not err


def _readme_commands():
    text = (LAUNCH / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line for line in blocks.splitlines()
            if re.search(r"launch/[a-z_]+\.(sh|sbatch) ", line)]


@pytest.mark.parametrize("line", _readme_commands())
def test_commands_of_the_readme(line):
    script, words = re.search(r"launch/([a-z_]+\.(?:sh|sbatch)) (.*)", line).groups()
    words = shlex.split(words.split(" >")[0].split(" &&")[0])
    assert launch(script, "--dry-run", *words)[::2] == (0, "")


def test_the_readme_shows_every_launcher():
    shown = " ".join(_readme_commands())
    assert all(script in shown for script in [*LAUNCHERS, "env.sh"])
    text = (LAUNCH / "README.md").read_text()
    names = [path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch", ".yaml")]
    hidden = {"common.sh", "setup_env.sh", "test.sh", "gke_jobset.yaml"}
    assert all(name in text for name in names if name not in hidden)


REFUSED = {
    "tpu_vm.sh": [
        ([], "no verb"), (["fly", *TPU], "'fly'"), (["up", *TPU], "no mmx command"),
        (["up", *TPU, "--", "fly"], "no verb 'fly'"), (["up", *TPU, "--nmae=x", *MMX], "--nmae"),
        (["up", "--name=Bad_Name", "--zone=us-east5-b", "--type=v6e-32", *MMX], "Bad_Name"),
        (["up", "--name=mmx", "--type=v6e-32", *MMX], "--zone"),
        (["up", *TPU[:2], *MMX], "--type"), (["up", *TPU[:2], "--type=v9-1", *MMX], "v9-1"),
        (["up", *TPU[:2], "--type=tpu7x-16", *MMX], "gke.sh"),
        (["up", *TPU, "--slices=0", *MMX], "--slices"), (["up", "run", *TPU, *MMX], "one verb"),
        (["up", *TPU, "--mount=/a b", *MMX], "--mount"),
        (["up", *TPU, "--nfs=host", *MMX], "--nfs"),
        (["up", *TPU, "--nfs=h:/x", "--bucket=b", *MMX], "Choose one"),
        (["up", *TPU, "--restarts=many", *MMX], "--restarts"),
    ],
    "gke.sh": [
        ([], "no verb"), (["fly", *GKE], "'fly'"), (["apply", *GKE], "no mmx command"),
        (["apply", "--name=mmx", "--pod=v6e", "--image=r/mmx:1", *MMX], "--pod"),
        (["apply", "--name=mmx", "--pod=v9:2x2", "--image=r/mmx:1", *MMX], "'v9'"),
        (["apply", "--name=mmx", "--pod=v6e:2x2x2", "--image=r/mmx:1", *MMX], "two dimensions"),
        (["apply", "--name=mmx", "--pod=v5p:4x4", "--image=r/mmx:1", *MMX], "three"),
        (["apply", "--name=mmx", "--pod=h200:2x9", "--image=r/mmx:1", *MMX], "8 GPUs"),
        (["apply", "--name=mmx", "--pod=v6e:1x2", "--image=r/mmx:1", *MMX], "whole number"),
        (["apply", "--name=mmx", "--pod=v6e:4x9", "--image=r/mmx:1", *MMX], "whole number"),
        (["apply", "--name=mmx", "--pod=v5p:2x3x4", "--image=r/mmx:1", *MMX], "whole number"),
        (["apply", "--name=mmx", "--pod=v5p:2x2x2x2", "--image=r/mmx:1", *MMX], "three"),
        (["apply", "--name=mmx", "--pod=v6e:4x4", "--image=r/mmx", *MMX], "tag"),
        (["apply", *GKE, "--claim=shared", *MMX], "--claim"),
        (["apply", *GKE, "--bucket=gs://b:/x", *MMX], "--bucket"),
        (["apply", *GKE, "--max-restarts=-1", *MMX], "--max-restarts"),
        (["apply", *GKE, "--flag", *MMX], "--flag"), (["logs", "--name=A"], "--name"),
        (["apply", *GKE, "--", "generate", "--prompt=\x07"], "control character"),
    ],
    "xpk.sh": [
        ([], "no verb"), (["fly", *XPK], "'fly'"), (["create", *XPK], "no mmx command"),
        (["create", *XPK[1:], *MMX], "--cluster"), (["list", "--cluster=c"], "--zone"),
        (["create", *XPK, "--type=a100-8", *MMX], "a100-8"),
        (["create", *XPK, "--priority=urgent", *MMX], "--priority"),
        (["create", *XPK, "--image=mmx", *MMX], "tag"), (["delete", *XPK[:2]], "--name"),
        (["create", *XPK, "--wings", *MMX], "--wings"),
    ],
    "slurm.sbatch": [
        ([], "no mmx command"), (["--nodes=2", "batch"], "--nodes"), (["fly"], "no verb 'fly'"),
        (["batch"], "no SLURM job"),
    ],
    "env.sh": [([], "unknown"), (["v3"], "'v3'"), (["cuda", "--wings"], "--wings")],
}


@pytest.mark.parametrize("script, words, says", [
    pytest.param(script, words, says, id=f"{script}-{says}")
    for script, cases in REFUSED.items() for words, says in cases])
def test_refuses_in_a_sentence(script, words, says, tmp_path):
    tools = tmp_path / "tools"
    for tool in TOOLS:
        stand_in(tools, tool)
    code, out, err = launch(script, *words, path=tools)
    assert code == 2 and says in err and not out
    assert len(err.splitlines()) == 1 and err.startswith(f"{script}: ") and err.endswith(".\n") or (
        "as in" in err)
    assert not calls(tools)


DRY = {
    "tpu_vm.sh": [
        ["up", *TPU, "--spot", "--nfs=10.0.0.2:/mmx", *MMX],
        ["up", *TPU, "--slices=2", "--bucket=b", "--iap", "--project=p", *MMX],
        ["up", *TPU, "--source=git+https://host/mmx@v1.0", "--restarts=3", *MMX],
        ["run", *TPU[:2], "--type=v5litepod-64", *MMX], ["install", *TPU[:2], "--type=v5p-32"],
        *([verb, *TPU] for verb in ("create", "wait", "logs", "stop", "status", "delete")),
    ],
    "xpk.sh": [
        ["create", *XPK, "--slices=2", "--spot", "--storage=a", "--storage=b", "--shared=/a", *MMX],
        ["create", *XPK, "--type=tpu7x-16", "--project=p", "--priority=high", *MMX],
        ["list", *XPK[:2]], ["delete", *XPK[:3]],
    ],
    "slurm.sbatch": [["batch", "--model=/m"], ["--", "train", "--run=/r"]],
}


@pytest.mark.parametrize("script, words", [
    pytest.param(script, words, id=f"{script}-{number}-{words[0]}")
    for script, cases in DRY.items() for number, words in enumerate(cases)])
def test_dry_run_prints_commands_and_touches_nothing(script, words, tmp_path):
    tools = tmp_path / "tools"
    for tool in TOOLS:
        stand_in(tools, tool)
    code, out, err = launch(script, "--dry-run", *words, path=tools)
    assert code == 0 and not err and not calls(tools)
    assert {command[0] for command in commands(out)} <= {
        "gcloud", "xpk", "srun", "git", "rm", "export"}


def test_dry_run_needs_no_tools(tmp_path):
    """It shows what would be done on a machine that can not do it."""
    for tool in ("bash", "dirname", "env"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    words = [shutil.which("bash"), str(LAUNCH / "tpu_vm.sh"), "delete", *TPU]
    env = environment(PATH=str(tmp_path))
    dry = subprocess.run([*words, "--dry-run"], env=env, capture_output=True)
    wet = subprocess.run(words, env=env, capture_output=True, text=True)
    assert dry.returncode == 0 and dry.stdout
    assert wet.returncode == 2 and "not installed" in wet.stderr


@pytest.mark.parametrize("script, words", [
    ("tpu_vm.sh", ["create", *TPU, "--spot", "--slices=2"]), ("tpu_vm.sh", ["delete", *TPU]),
    ("tpu_vm.sh", ["logs", *TPU, "--iap"]), ("xpk.sh", ["create", *XPK, "--", "batch", *AWKWARD]),
    ("xpk.sh", ["list", *XPK[:2]])])
def test_what_is_printed_is_what_is_run(script, words, tmp_path):
    tools = stand_in(stand_in(tmp_path / "tools", "gcloud"), "xpk")
    code, printed, _ = launch(script, "--dry-run", *words)
    assert code == 0 and not calls(tools)
    assert launch(script, *words, path=tools, env={"NO_STDIN": "1"})[0] == 0
    assert [words for words, _ in calls(tools)] == commands(printed)


def test_create_asks_for_what_was_said():
    (one,) = commands(launch("tpu_vm.sh", "--dry-run", "create", *TPU, "--spot", "--project=p")[1])
    assert one == ["gcloud", "compute", "tpus", "queued-resources", "create", "mmx",
                   "--zone=us-east5-b", "--project=p", "--node-id=mmx",
                   "--accelerator-type=v6e-32", "--runtime-version=v2-alpha-tpuv6e", "--spot"]
    (two,) = commands(launch("tpu_vm.sh", "--dry-run", "create", *TPU, "--slices=2")[1])
    assert "--node-count=2" in two and "--node-prefix=mmx" in two and "--spot" not in two


def test_xpk_command_is_read_back_by_a_shell():
    (words,) = commands(launch("xpk.sh", "--dry-run", "create", *XPK, "--", "batch", *AWKWARD)[1])
    (command,) = [word[len("--command="):] for word in words if word.startswith("--command=")]
    assert commands(command + "\n") == [["mmx", "batch", *AWKWARD]]
    assert "\n" not in command, "xpk puts it into a line of YAML"


@pytest.mark.parametrize("states, code, says", [
    (["WAITING_FOR_RESOURCES", "ACTIVE"], 0, "WAITING"), (["FAILED"], 1, "is FAILED"),
    (["SUSPENDED"], 1, "create it anew")])
def test_wait_ends_with_the_queue(states, code, says, tmp_path):
    tools = tmp_path / "tools"
    stand_in(tools, "gcloud", f"states = {states!r}\n"
             f"count = sum(1 for _ in open({str(tools / 'calls')!r}))\n"
             "print(states[min(count, len(states)) - 1])")
    stand_in(tools, "sleep")
    done = launch("tpu_vm.sh", "wait", *TPU, path=tools, env={"NO_STDIN": "1"})
    assert done[0] == code and says in done[2]

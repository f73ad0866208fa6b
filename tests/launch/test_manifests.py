"""Manifests against the published schemas, and what they say."""

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from mmx.plan.pods import parse_pod
from tests.launch.launchers import AWKWARD, LAUNCH, calls, commands, launch, stand_in

SCHEMAS = {path.stem: json.loads(path.read_text())
           for path in (Path(__file__).parent / "schemas").glob("*.json")}
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
BATCH = ["--", "batch", "--model=/mnt/mmx/m", "--input=/mnt/mmx/i", "--output=/mnt/mmx/o"]
PLACE = {"MMX_COORDINATOR", "MMX_PROCESSES", "MMX_PROCESS_ID"}


def validate(value, schema):
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[schema])
    jsonschema.Draft202012Validator(SCHEMAS[schema]).validate(value)


def jobset(*words, command=BATCH):
    code, out, err = launch("gke.sh", "apply", "--dry-run", "--name=mmx", "--image=r/mmx:1", *words,
                            *command)
    assert code == 0 and not err, err
    return yaml.safe_load(out)


def pod_of(manifest):
    return manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def variables(manifest):
    return {one["name"]: one.get("value", one.get("valueFrom"))
            for one in pod_of(manifest)["containers"][0]["env"]}


CASES = [
    ["--pod=v6e:4x8"], ["--pod=2*v6e:16x16", "--spot"], ["--pod=v5e:1x1"], ["--pod=v5e:8x8"],
    ["--pod=v5p:2x2x4", "--claim=shared:/mnt/mmx"], ["--pod=tpu7x:2x2x2", "--privileged"],
    ["--pod=v6e:2x4", "--chips-per-host=4"], ["--pod=h200:2x8", "--spot", "--bucket=b:/models"],
    ["--pod=h200:1x4", "--claim=a:/mnt/mmx", "--bucket=b:/models", "--service-account=reader"],
]


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_jobset_fits_the_schema(words):
    validate(jobset(*words), "jobset_v1alpha2")


@pytest.mark.parametrize("words", CASES, ids=" ".join)
def test_jobset_asks_for_the_hosts_that_the_plan_counts(words):
    manifest, pod = jobset(*words), parse_pod(words[0].removeprefix("--pod="))
    job = manifest["spec"]["replicatedJobs"][0]
    assert job["replicas"] * job["template"]["spec"]["parallelism"] == pod.hosts
    assert job["template"]["spec"]["completions"] == job["template"]["spec"]["parallelism"]
    (limit,) = pod_of(manifest)["containers"][0]["resources"]["limits"].items()
    assert limit[0] == ("nvidia.com/gpu" if pod.chip.name == "h200" else "google.com/tpu")
    assert limit[1] * pod.hosts == pod.chips


def test_a_host_of_its_own_may_hold_eight_chips():
    job = jobset("--pod=v6e:2x4")["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == 1 and container["resources"]["limits"] == {"google.com/tpu": 8}


def test_jobset_on_tpus():
    manifest = jobset("--pod=2*v6e:4x8", "--spot", "--claim=shared:/mnt/mmx")
    assert pod_of(manifest)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
        "cloud.google.com/gke-tpu-topology": "4x8", "cloud.google.com/gke-spot": "true"}
    env = variables(manifest)
    assert env["JAX_COMPILATION_CACHE_DIR"] == "/mnt/mmx/compiled"
    assert "data_parallel_all_reduce" in env["LIBTPU_INIT_ARGS"]
    assert not PLACE & set(env), "GKE tells TPU pods of each other"


def test_jobset_on_gpus_says_which_process_is_which():
    manifest = jobset("--pod=h200:2x8")
    env = variables(manifest)
    # JobSet names pods <jobset>-<job>-<job index>-<pod index>, in a domain named as itself.
    job = manifest["spec"]["replicatedJobs"][0]["name"]
    assert env["MMX_COORDINATOR"] == f"mmx-{job}-0-0.mmx:8476"
    assert env["MMX_PROCESSES"] == "2"
    assert "job-completion-index" in env["MMX_PROCESS_ID"]["fieldRef"]["fieldPath"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in pod_of(manifest)["containers"][0][
        "volumeMounts"]
    assert not PLACE & set(variables(jobset("--pod=h200:1x8")))


def test_jobset_mounts():
    manifest = jobset("--pod=v6e:4x8", "--claim=shared:/mnt/mmx", "--bucket=b:/models")
    mounts = {one["name"]: one["mountPath"]
              for one in pod_of(manifest)["containers"][0]["volumeMounts"]}
    assert mounts == {"claim": "/mnt/mmx", "bucket": "/models"}
    assert [one["name"] for one in pod_of(manifest)["volumes"]] == ["claim", "bucket"]
    annotations = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["metadata"]
    assert annotations["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_jobset_runs_as_a_user_unless_told():
    assert pod_of(jobset("--pod=v6e:4x8"))["securityContext"]["runAsNonRoot"] is True
    privileged = pod_of(jobset("--pod=v6e:4x8", "--privileged"))
    assert privileged["containers"][0]["securityContext"] == {"privileged": True}


def test_jobset_starts_again_but_not_after_a_mistake():
    spec = jobset("--pod=v6e:4x8", "--max-restarts=7")["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 7
    assert spec["failurePolicy"]["rules"][0]["action"] == "FailJobSet"
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]


def test_jobset_passes_words_whole():
    words = ["--", "generate", "--prompt=@NAME@ $(HOME) $$", *AWKWARD]
    (container,) = pod_of(jobset("--pod=v6e:4x8", command=words))["containers"]
    # Kubernetes makes one $ of two, and a variable of $(NAME) only after a single one.
    assert [word.replace("$$", "$") for word in container["args"]] == words[1:]
    assert all("$(" not in word.replace("$$", "") for word in container["args"])
    assert "command" not in container, "the image's entry point is mmx"


def test_apply_hands_over_what_the_dry_run_prints(tmp_path):
    tools = stand_in(tmp_path / "tools", "kubectl")
    words = ["apply", "--name=mmx", "--pod=v6e:4x8", "--image=r/mmx:1", "--namespace=n", *BATCH]
    assert launch("gke.sh", *words, path=tools)[0] == 0
    ((called, stdin),) = calls(tools)
    assert called == ["kubectl", "--namespace=n", "apply", "-f", "-"]
    printed = launch("gke.sh", "--dry-run", *words)[1]
    assert yaml.safe_load(stdin) == yaml.safe_load(printed)


@pytest.mark.parametrize("verb, last", [
    ("logs", "--container=mmx"), ("status", "--selector=jobset.sigs.k8s.io/jobset-name=mmx"),
    ("delete", "mmx")])
def test_other_verbs_of_gke(verb, last):
    (words,) = commands(launch("gke.sh", verb, "--dry-run", "--name=mmx")[1])
    assert words[0] == "kubectl" and words[-1] == last


def _at(value, path):
    for key in path:
        value = value[key]
    return value


_JOB = ("spec", "replicatedJobs", 0)
_POD = (*_JOB, "template", "spec", "template", "spec")
_MAIN = (*_POD, "containers", 0)


@pytest.mark.parametrize("path, key, value", [
    ((), "apiVersion", "jobset.x-k8s.io/v1"), ((), "specs", {}),
    (("metadata",), "name", "Mmx_1"), (("spec",), "replicatedJob", []),
    (("spec", "failurePolicy"), "maxRestart", 3), (("spec", "failurePolicy"), "maxRestarts", "3"),
    (("spec", "failurePolicy", "rules", 0), "action", "Fail"),
    (("spec", "failurePolicy", "rules", 0), "name", "a-b"),
    (_JOB, "parallelism", 2), ((*_JOB, "template", "spec"), "backofflimit", 0),
    ((*_JOB, "template", "spec"), "completionMode", "indexed"),
    (_POD, "restartPolicy", "Always"), (_POD, "restartPolicy", "OnFailure"),
    (_POD, "nodeselector", {}), (_POD, "nodeSelector", {"topology": 4}),
    (_MAIN, "arguments", []), (_MAIN, "args", ["a", 1]), (_MAIN, "env", [{"NAME": "x"}]),
    (_MAIN, "env", [{"name": "A", "value": 1}]),
    (_MAIN, "env", [{"name": "A", "value": "1", "valueFrom": {"fieldRef": {"fieldPath": "x"}}}]),
    ((*_MAIN, "resources"), "limit", {}),
    ((*_MAIN, "resources"), "limits", {"google.com/tpu": "four"}),
    ((*_MAIN, "volumeMounts", 0), "path", "/x"), ((*_MAIN, "volumeMounts", 0), "mountPath", "x"),
    ((*_POD, "volumes", 0), "emptyDir", {}), ((*_POD, "tolerations", 0), "effect", "NoStart"),
])
def test_jobset_schema_refuses_a_wrong_field(path, key, value):
    manifest = copy.deepcopy(_GOOD)
    _at(manifest, path)[key] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(manifest, "jobset_v1alpha2")


_GOOD = jobset("--pod=v6e:4x8", "--spot", "--claim=shared:/mnt/mmx")


def test_skypilot_fits_the_schema():
    validate(SKY, "skypilot_task")


@pytest.mark.parametrize("path, key, value", [
    ((), "node_count", 2), ((), "num_nodes", "2"), ((), "num_nodes", 0), ((), "run", ["mmx"]),
    ((), "name", "-mmx"), (("resources",), "accelerator", "H200:8"),
    (("resources",), "use_spot", 1),
    (("resources",), "use-spot", True), (("resources", "job_recovery"), "strategy", "EAGER"),
    (("resources", "job_recovery"), "max_restarts_on_error", 1),
    (("resources", "job_recovery"), "recover_on_exit_codes", [256]),
    (("envs",), "1BAD", "x"), (("envs",), "COUNT", 1),
    (("file_mounts", "/shared"), "mode", "mount"), (("file_mounts", "/shared"), "bucket", "b"),
])
def test_skypilot_schema_refuses_a_wrong_field(path, key, value):
    task = copy.deepcopy(SKY)
    _at(task, path)[key] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(task, "skypilot_task")


def test_skypilot_resumes_after_a_loss_but_not_after_a_mistake():
    from mmx.sharding.distributed import LOST

    recovery = SKY["resources"]["job_recovery"]
    assert LOST in recovery["recover_on_exit_codes"] and 2 not in recovery["recover_on_exit_codes"]
    assert SKY["resources"]["use_spot"] is True and recovery["max_restarts_on_errors"] == 0

"""The images' recipes: pinned, without root, without secrets, with mmx as entry point."""

import fnmatch
import re
import shlex

import pytest

from tests.launch.launchers import LAUNCH, ROOT

FILES = sorted((LAUNCH / "docker").glob("Dockerfile.*"))
SECRET = re.compile(r"(?i)(token|secret|passw|credential|api_?key|BEGIN [A-Z ]*PRIVATE)")
PINNED = re.compile(r"[^:@\s]+(:(?!latest$)[\w.-]*\d[\w.-]*|@sha256:[0-9a-f]{64})")


def steps(text):
    """[(instruction, rest)] without comments, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(line.split(None, 1) + [""])[:2] for line in joined.splitlines()]


def faults(text):
    """What is wrong with a Dockerfile, as sentences."""
    found, instructions = [], steps(text)
    bases = [rest.split()[0] for name, rest in instructions if name == "FROM"]
    if not bases or not all(PINNED.fullmatch(base) for base in bases):
        found.append("a base image is not pinned by a tag")
    users = [rest.strip() for name, rest in instructions if name == "USER"]
    # A number, for Kubernetes can not tell a name from root.
    if not users or not re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", users[-1]):
        found.append("it runs as root, or as a user without a number")
    if [rest for name, rest in instructions if name == "ENTRYPOINT"][-1:] != ['["mmx"]']:
        found.append("its entry point is not mmx")
    if any(SECRET.search(rest) for _, rest in instructions):
        found.append("it names a secret")
    for name, rest in instructions:
        if name == "ADD" or name == "COPY" and rest.split()[0] == ".":
            found.append("it copies more than it names")
        if name == "RUN" and "pip install" in rest and "--no-cache-dir" not in rest:
            found.append("it keeps pip's cache")
        if re.search(r"\b(sudo|chmod 777)\b|curl[^|]*\|\s*(ba)?sh", rest):
            found.append("it loosens rights, or runs what it downloads")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_image_is_clean(path):
    assert faults(path.read_text()) == []


def test_there_is_one_for_each_platform():
    assert [path.suffix for path in FILES] == [".cpu", ".cuda", ".tpu"]


@pytest.mark.parametrize("old, new, fault", [
    (r"FROM \S+", "FROM python", "pinned"), (r"FROM \S+", "FROM python:latest", "pinned"),
    (r"USER \S+", "USER root", "root"), (r"USER \S+", "USER 0", "root"), (r"USER \S+", "", "root"),
    (r"ENTRYPOINT .*", 'ENTRYPOINT ["bash"]', "entry point"),
    (r"USER", "ENV HF_TOKEN=abc\nUSER", "secret"), (r"COPY mmx mmx", "COPY . .", "more than"),
    (r"--no-cache-dir", "", "cache"), (r"RUN pip", "RUN curl https://x | sh && pip", "downloads"),
])
def test_lint_sees_a_fault(old, new, fault):
    text = re.sub(old, new, (LAUNCH / "docker" / "Dockerfile.cpu").read_text(), count=1)
    assert any(fault in sentence for sentence in faults(text))


def _ignored(name):
    """Whether .dockerignore keeps a path of the repository's root out of the image."""
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch.fnmatch(name, line.lstrip("!")):
            out = not line.startswith("!")
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_copied_is_there_and_what_installation_reads_is_copied(path):
    copied = [word for name, rest in steps(path.read_text()) if name == "COPY"
              for word in shlex.split(rest)[:-1]]
    assert all((ROOT / name).exists() and not _ignored(name) for name in copied)
    # mmx/configs is a link to configs; setup.cfg reads README.md and names LICENSE.
    assert {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "configs", "mmx",
            "pallas_kernels"} == set(copied)
    assert (ROOT / "mmx" / "configs").resolve() == ROOT / "configs"


def test_nothing_else_reaches_the_image():
    assert all(_ignored(name) for name in (".git", "data", "runs", ".venv", "tests", ".env"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_it_installs_the_platforms_extra(path):
    wanted = {".cpu": "pip install --no-cache-dir . ", ".cuda": '".[cuda]"', ".tpu": '".[tpu]"'}
    assert wanted[path.suffix] in path.read_text()

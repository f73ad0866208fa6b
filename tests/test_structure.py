"""The tree's own rules: import order, what may import what, and packaging."""

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mmx", "pallas_kernels")

# Where a module stands; it imports only from rows of a smaller number, or from its own package.
ROWS = {
    "pallas_kernels": 0,
    "mmx.config": 1, "mmx.hf_config": 1, "mmx.errors": 1, "mmx.text": 1,
    "mmx.sharding": 2,
    "mmx.parallel": 3,
    "mmx.nn": 4,
    "mmx.model": 5, "mmx.cache": 5,
    "mmx.checkpoint": 6, "mmx.quant": 6, "mmx.flops": 6, "mmx.obs": 6,
    "mmx.data": 7,
    "mmx.engine": 8, "mmx.train": 8,
    "mmx.batch": 9, "mmx.serve": 9, "mmx.eval": 9, "mmx.rl": 9,
    "mmx.plan": 10, "mmx.bench": 10,
    "mmx.lm": 11, "mmx.cli": 11, "mmx.__main__": 11, "mmx": 11,
}
# A row's own order where one module of it builds on another.
WITHIN_ROW = {
    ("mmx.config", "mmx.errors"), ("mmx.config", "mmx.hf_config"), ("mmx.hf_config", "mmx.config"),
    ("mmx.hf_config", "mmx.errors"), ("mmx.text", "mmx.errors"), ("mmx.text", "mmx.config"),
    ("mmx.model", "mmx.cache"),
    ("mmx.checkpoint", "mmx.quant"), ("mmx.checkpoint", "mmx.obs"), ("mmx.flops", "mmx.quant"),
    ("mmx.bench", "mmx.plan"),  # full size: planned memory beside what is measured
    ("mmx.cli", "mmx.lm"), ("mmx.cli", "mmx"), ("mmx", "mmx.lm"), ("mmx.__main__", "mmx.cli"),
}


def _modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


MODULES = list(_modules())


def _unit(module):
    """The longest known prefix of a module name: the thing that stands in a row."""
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (name := ".".join(parts[:length])) in ROWS:
            return name if name != "mmx" or module == "mmx" else None
    return None


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                # `from mmx import quant` names a module; `from mmx.quant import f` does not.
                full = f"{node.module}.{alias.name}"
                yield (full if full in dict(MODULES) else node.module), node.lineno


def order_faults(module, path):
    """Lines of one file that import from its own row or a later one."""
    here = _unit(module)
    faults = []
    for target, line in _imports(path):
        if target.split(".")[0] not in PACKAGES:
            continue
        there = _unit(target)
        if here == there or (here, there) in WITHIN_ROW:
            continue
        if there is None or here is None or ROWS[there] >= ROWS[here]:
            faults.append(f"{path.name}:{line}: {module} imports {target}")
    return faults


@pytest.mark.parametrize("module, path", MODULES, ids=[name for name, _ in MODULES])
def test_import_order_is_one_way(module, path):
    assert _unit(module), f"{module} has no row: give it one in {Path(__file__).name}"
    assert not order_faults(module, path)


def test_import_order_check_sees_a_fault(tmp_path):
    bad = tmp_path / "bad.py"
    bad.write_text("import mmx.engine\nfrom mmx.train import loop\n")
    assert len(order_faults("mmx.nn.bad", bad)) == 2


@pytest.mark.parametrize("library", ["gin", "absl"])
def test_text_configuration_stays_at_the_door(library):
    users = {module for module, path in MODULES
             if any(name.split(".")[0] == library for name, _ in _imports(path))}
    assert users and all(name.startswith("mmx.cli") for name in users)


def test_kernels_know_only_jax_and_numpy():
    allowed = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}
    # Optional backends are imported inside the function that needs them.
    optional = {"jax_triton", "triton"}
    used = {name.split(".")[0] for module, path in MODULES if module.startswith("pallas_kernels")
            for name, _ in _imports(path)}
    assert used <= allowed | optional


def _requirements(text):
    return {line.strip() for line in text.splitlines() if line.strip() and line[0] != "#"}


def _setup():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def _top_name(requirement):
    name = re.split(r"[\[<>=!~ ]", requirement)[0]
    return {"absl-py": "absl", "gin-config": "gin", "orbax-checkpoint": "orbax"}.get(
        name, name.replace("-", "_"))


def test_an_editable_install_puts_the_clone_on_the_path():
    """Without it `python script.py` beside a clone named mmx imports that folder, which is empty:
    setuptools' finder comes after Python's own, which takes a folder for a package."""
    directories = dict(part.split("=") for part in _setup()["options"]["package_dir"].split("\n")
                       if part)
    assert {name.strip(): where.strip() for name, where in directories.items()} == {"": "."}


def test_requirements_are_those_of_the_package():
    core = _requirements(_setup()["options"]["install_requires"])
    assert _requirements((ROOT / "requirements.txt").read_text()) == core


def test_every_import_is_declared():
    """Third-party imports at a module's top are core; those inside a function may be an extra."""
    setup = _setup()
    core = {_top_name(line) for line in _requirements(setup["options"]["install_requires"])}
    extras = {_top_name(line) for extra in setup["options.extras_require"].values()
              for line in _requirements(extra)}
    own = {*PACKAGES, *sys.stdlib_module_names}
    for module, path in MODULES:
        top = {name.split(".")[0] for node in ast.parse(path.read_text()).body
               if isinstance(node, (ast.Import, ast.ImportFrom))
               for name in ([alias.name for alias in node.names]
                            if isinstance(node, ast.Import) else [node.module])}
        anywhere = {name.split(".")[0] for name, _ in _imports(path)}
        assert top <= core | own, f"{module} needs {top - core - own}"
        assert anywhere <= core | own | extras, f"{module} needs {anywhere - core - own - extras}"


def test_every_module_imports_without_the_extras():
    """One process imports all modules while the extras' packages are made unimportable."""
    extras = _setup()["options.extras_require"]
    core = {_top_name(line) for line in _requirements(_setup()["options"]["install_requires"])}
    hidden = {_top_name(line) for extra in extras.values() for line in _requirements(extra)} - core
    assert {"torch", "transformers"} <= hidden
    names = [name for name, _ in MODULES if name != "mmx.__main__"]
    code = (f"import sys\nfor name in {sorted(hidden)!r}: sys.modules[name] = None\n"
            f"import importlib\nfor name in {names!r}: importlib.import_module(name)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "JAX_PLATFORMS": "cpu"}, timeout=300)
    assert done.returncode == 0, done.stderr


def test_no_assert_on_input():
    """User input is refused by a sentence; an `assert` ends in a traceback or is optimised away."""
    asserts = [f"{path.relative_to(ROOT)}:{node.lineno}" for module, path in MODULES
               for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assert)]
    assert not asserts


def test_shipped_configs_are_in_the_package():
    shipped = {path.relative_to(ROOT / "configs") for path in (ROOT / "configs").rglob("*.gin")}
    inside = ROOT / "mmx" / "configs"
    assert shipped and all((inside / path).is_file() for path in shipped)

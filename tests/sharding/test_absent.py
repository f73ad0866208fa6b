"""Installed drivers of accelerators that are not there: not asked, unless the user says so."""

import os
import subprocess
import sys
import types

import pytest

from mmx.sharding import absent


@pytest.fixture
def machine(monkeypatch):
    """A machine with a TPU's driver and no device, and a jax of its own; returns (jax, devices)."""
    jax = types.SimpleNamespace(config=types.SimpleNamespace(jax_platforms=None))
    jax.config.update = lambda name, value: setattr(jax.config, name, value)
    devices = []
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setitem(sys.modules, "jax", jax)
    monkeypatch.setattr(absent.glob, "glob", lambda pattern: [
        name for name in devices if name.startswith(pattern.rstrip("*"))])
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    return jax, devices


def test_without_devices_jax_takes_the_cpu(machine):
    jax, _ = machine
    absent.skip_absent_accelerators()
    assert jax.config.jax_platforms == "cpu" and "JAX_PLATFORMS" not in os.environ


def test_before_jax_is_imported_its_variable_says_so(machine, monkeypatch):
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setattr(os, "environ", {})
    absent.skip_absent_accelerators()
    assert os.environ == {"JAX_PLATFORMS": "cpu"} and "jax" not in sys.modules


@pytest.mark.parametrize("name", ["/dev/accel0", "/dev/vfio/0", "/dev/nvidia0", "/dev/dxg",
                                  "/dev/kfd"])
def test_a_device_is_asked(machine, name):
    jax, devices = machine
    devices.append(name)
    absent.skip_absent_accelerators()
    assert jax.config.jax_platforms is None


@pytest.mark.parametrize("chosen", ["tpu", "cpu,cuda"])
def test_what_the_user_chose_stays(machine, monkeypatch, chosen):
    jax, _ = machine
    monkeypatch.setenv("JAX_PLATFORMS", chosen)
    absent.skip_absent_accelerators()
    assert jax.config.jax_platforms is None and os.environ["JAX_PLATFORMS"] == chosen
    monkeypatch.delenv("JAX_PLATFORMS")
    jax.config.jax_platforms = chosen
    absent.skip_absent_accelerators()
    assert jax.config.jax_platforms == chosen


def test_without_drivers_nothing_is_set(machine, monkeypatch):
    jax, _ = machine
    monkeypatch.setattr(absent.importlib.util, "find_spec", lambda name: None)
    absent.skip_absent_accelerators()
    assert jax.config.jax_platforms is None


@pytest.mark.skipif(any(map(absent.glob.glob, absent._DEVICES)), reason="an accelerator is here")
def test_loading_a_model_says_nothing_of_absent_devices(tmp_path):
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu/__init__.py").write_text("raise ImportError('asked for its devices')\n")
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    code = "import mmx; print(mmx.load('nano').params['head/weight'].devices())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env,
                          timeout=60)
    assert done.returncode == 0 and "CpuDevice" in done.stdout and done.stderr == ""

"""JAX searches for a TPU only where there may be one."""

import importlib.util
import os
import subprocess
import sys
import types

import pytest

from dit_video.core.platform import tpu


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend that libtpu is installed and JAX not imported; return the folder of devices."""
    for name in ("pci", "dev"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tpu, "_PCI_DEVICES", tmp_path / "pci")
    monkeypatch.setattr(tpu, "_DEV", tmp_path / "dev")
    monkeypatch.setattr(tpu, "entry_points", lambda group: [])
    installed = {"libtpu": types.SimpleNamespace(), "jax_plugins": None}
    monkeypatch.setattr(tpu.importlib.util, "find_spec", installed.get)
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    for name in list(os.environ):
        if name.startswith(("TPU_", "JAX_PLATFORM", "CUDA_", "HIP_", "ROCR_", "PJRT_", "MEGASCALE_", "CLOUD_TPU_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "undone by monkeypatch")
    monkeypatch.delenv("JAX_PLATFORMS")
    return tmp_path


def platforms():
    tpu.skip_missing_tpu()
    return os.environ.get("JAX_PLATFORMS")


def attach(machine, *, vendor, device_class):
    folder = machine / "pci" / "0000:00:05.0"
    folder.mkdir()
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{device_class}\n")


def plug_in(monkeypatch, *names):
    monkeypatch.setattr(tpu, "entry_points", lambda group: [types.SimpleNamespace(name=name) for name in names])


@pytest.mark.usefixtures("machine")
def test_a_machine_without_a_tpu_has_a_cpu():
    assert platforms() == "cpu"


@pytest.mark.usefixtures("machine")
def test_nothing_happens_without_libtpu(monkeypatch):
    monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
    assert platforms() is None


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("choice", ["", "tpu,cpu", "cuda"])
def test_a_choice_stays(monkeypatch, choice):
    monkeypatch.setenv("JAX_PLATFORMS", choice)
    assert platforms() == choice


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    "name", ["TPU_ACCELERATOR_TYPE", "TPU_WORKER_ID", "CLOUD_TPU_TASK_ID", "JAX_FORCE_TPU_INIT", "JAX_PLATFORM_NAME"]
)
def test_variables_of_pods_and_users_count(monkeypatch, name):
    monkeypatch.setenv(name, "0")
    assert platforms() is None


@pytest.mark.usefixtures("machine")
def test_a_variable_that_jax_sets_without_a_tpu_does_not_count(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert platforms() == "cpu"


@pytest.mark.parametrize(
    ("vendor", "device_class", "expected"),
    [
        ("0x1ae0", "0x120000", None),  # a TPU
        ("0x1ae0", "0xff0000", None),
        ("0x1ae0", "0x020000", "cpu"),  # the network of Google's virtual machines
        ("0x1ae0", "0x010802", "cpu"),  # their disks
        ("0x8086", "0x120000", "cpu"),
    ],
)
def test_pci_devices(machine, vendor, device_class, expected):
    attach(machine, vendor=vendor, device_class=device_class)
    assert platforms() == expected


@pytest.mark.parametrize("file", ["accel0", "vfio/0"])
def test_device_files_of_tpus_count(machine, file):
    path = machine / "dev" / file
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert platforms() is None


def test_a_gpu_stays_visible(machine, monkeypatch):
    plug_in(monkeypatch, "xla_cuda12")
    (machine / "dev" / "nvidia0").touch()
    assert platforms() == "cuda,cpu"


def test_a_gpu_without_its_plugin_or_that_is_hidden_is_not_used(machine, monkeypatch):
    (machine / "dev" / "nvidia0").touch()
    assert platforms() == "cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    plug_in(monkeypatch, "xla_cuda13")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert platforms() == "cpu"


@pytest.mark.parametrize(("chosen", "count"), [(None, 2), ("", 0), ("1", 1), ("0,1", 2)])
def test_gpus_are_counted_unless_they_are_hidden(machine, monkeypatch, chosen, count):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (machine / "dev" / name).touch()
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert tpu.count_gpus() == count


@pytest.mark.usefixtures("machine")
def test_nothing_happens_with_a_plugin_of_another_kind(monkeypatch):
    plug_in(monkeypatch, "xla_cuda12", "xpu")
    assert platforms() is None


def python(code):
    """Run code in a process of its own, without the choices of this one."""
    dropped = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH")
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.skipif(tpu.has_tpu(), reason="needs a machine without a TPU")
@pytest.mark.parametrize("imports", ["import dit_video, jax", "import jax, dit_video"])
def test_nothing_of_libtpu_is_printed(imports):
    done = python(f"{imports}\nprint(jax.devices()[0].platform)")
    assert done.stdout in ("cpu\n", "gpu\n")
    assert "tpu" not in done.stderr.lower()


@pytest.mark.nightly
def test_backends_that_have_started_stay():
    python(
        "import os, jax\n"
        "jax.config.update('jax_platforms', 'cpu'); jax.devices(); jax.config.update('jax_platforms', None)\n"
        "import dit_video\n"
        "assert 'JAX_PLATFORMS' not in os.environ and not jax.config.jax_platforms"
    )


@pytest.mark.parametrize(("device", "chip"), [("0x0062", "v5p"), ("0x006f", "v6e"), ("0xffff", None)])
def test_a_chip_is_detected_by_its_device_id(machine, device, chip):
    attach(machine, vendor="0x1ae0", device_class="0xff0000")
    assert tpu.find_tpu_chip() is None  # a device without an id
    (machine / "pci" / "0000:00:05.0" / "device").write_text(f"{device}\n")
    assert tpu.find_tpu_chip() == chip

"""Selection of JAX's backends on machines that have `libtpu` but no TPU."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path

_PCI_DEVICES = Path("/sys/bus/pci/devices")
_DEV = Path("/dev")
_GOOGLE = "0x1ae0"
_PCI_STORAGE, _PCI_NETWORK = "0x01", "0x02"
_TPU_CHIPS = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e"}
"""PCI device ids of TPU chips (`jax._src.hardware_utils`)."""
_TPU_VARIABLES = ("TPU_", "CLOUD_TPU_", "MEGASCALE_", "JAX_FORCE_TPU_INIT", "JAX_PLATFORM_NAME", "PJRT_")
"""Prefixes of the environment variables with which pods and users select TPUs, or any backend."""
_UNRELATED_VARIABLES = {"TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH"}
"""Variables that JAX and libtpu set themselves, even without a TPU."""
_GPU_BACKENDS = {"xla_cuda": "cuda", "xla_rocm": "rocm"}
"""Prefixes of the names of JAX's GPU plugins, and the names of their backends."""
_GPU_DEVICES = {"cuda": ("nvidia0", "nvidiactl", "dxg"), "rocm": ("kfd", "dxg")}
_GPU_CHOICES = {
    "cuda": ("CUDA_VISIBLE_DEVICES",),
    "rocm": ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"),
}
"""Environment variables that hide GPUs if they are empty or -1."""


def skip_missing_tpu() -> None:
    """Keep JAX from searching for a TPU on a machine without one, where `libtpu` is installed for planning.

    The search prints a page of libtpu errors. Programs can be compiled for TPUs without it: see `tools/plan.py`.

    `JAX_PLATFORMS` becomes "cpu", or for example "cuda,cpu" if the plugin of a GPU is installed and the GPU is present.
    A user's choice stays. Nothing happens after JAX has started its backends, if a plugin of another kind is installed,
    or if a device or the environment suggests that there is a TPU.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    if has_tpu():
        return
    gpus = find_gpu_backends()
    jax = sys.modules.get("jax")
    if gpus is None or (jax is not None and jax.config.jax_platforms):
        return
    bridge = sys.modules.get("jax._src.xla_bridge")
    if jax is not None and (bridge is None or bridge.backends_are_initialized()):
        return
    platforms = ",".join([*gpus, "cpu"])
    os.environ["JAX_PLATFORMS"] = platforms
    if jax is not None:  # it has read its environment before
        jax.config.update("jax_platforms", platforms)


def has_tpu() -> bool:
    """Return True if a device or the environment suggests that there is a TPU.

    The device is a Google PCI device other than storage or network, which virtual machines in Google's cloud have too.
    (JAX's table of device ids would not include TPUs that are newer than this function.)
    """
    is_named = any(name.startswith(_TPU_VARIABLES) for name in os.environ.keys() - _UNRELATED_VARIABLES)
    return is_named or any(_DEV.glob("accel*")) or any(_DEV.glob("vfio/[0-9]*")) or any(_list_tpus())


def _list_tpus() -> Iterator[Path]:
    """Yield the folders of Google's PCI devices that are neither storage nor network."""
    for device in _PCI_DEVICES.glob("*"):
        try:
            is_google = (device / "vendor").read_text().strip() == _GOOGLE
            if is_google and not (device / "class").read_text().startswith((_PCI_STORAGE, _PCI_NETWORK)):
                yield device
        except OSError:  # a device that is being removed
            continue


def _read_device_id(device: Path) -> str | None:
    try:
        return (device / "device").read_text().strip()
    except OSError:
        return None


def find_tpu_chip() -> str | None:
    """Return the name of this machine's TPU chip, such as `v5p`; None if there is none, or a newer one."""
    return next((_TPU_CHIPS[each] for each in map(_read_device_id, _list_tpus()) if each in _TPU_CHIPS), None)


def find_gpu_backends() -> list[str] | None:
    """Return the backends of the GPUs that JAX can use; None if there is a plugin whose backend is not known."""
    names = {entry.name for entry in entry_points(group="jax_plugins")}
    namespace = importlib.util.find_spec("jax_plugins")
    for folder in (namespace and namespace.submodule_search_locations) or ():
        names |= {path.name for path in Path(folder).glob("[!_]*") if path.is_dir() or path.suffix == ".py"}
    usable = set()
    for name in names:
        backend = next((backend for start, backend in _GPU_BACKENDS.items() if name.startswith(start)), None)
        if backend is None:
            return None
        hidden = any(os.environ.get(variable) in ("", "-1") for variable in _GPU_CHOICES[backend])
        if not hidden and any((_DEV / device).exists() for device in _GPU_DEVICES[backend]):
            usable.add(backend)
    return sorted(usable)


def count_gpus() -> int:
    """Return the number of NVIDIA GPUs that this process may use; 0 if it cannot be told."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return len(list(_DEV.glob("nvidia[0-9]*")))
    return len([name for name in chosen.split(",") if name.strip()])

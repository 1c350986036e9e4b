"""Flags of XLA and libtpu for each platform, set before JAX first computes.

A flag that the environment already sets stays as it is, and `DIT_VIDEO_XLA_FLAGS=off` leaves all flags alone. XLA and
libtpu end a process that has an unknown flag, so flags are set only for releases that they were checked with.
"""

import os
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

from dit_video.core.platform.tpu import count_gpus, find_gpu_backends, find_tpu_chip, has_tpu

SWITCH = "DIT_VIDEO_XLA_FLAGS"
"""Environment variable that turns the flags off with the value `off`."""
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")
"""Environment variables from which XLA, libtpu and JAX's GPU client take their flags."""
_PROCESS_COUNTS = ("NUM_PROCESSES", "JAX_NUM_PROCESSES", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
"""Environment variables with the number of processes of a run."""

_YNNPACK = ("DOT", "INDIVIDUAL_DOT", "INDIVIDUAL_CONVOLUTION")
_EIGEN = {"xla_cpu_experimental_ynn_fusion_type": ",".join(f"-LIBRARY_FUSION_TYPE_{name}" for name in _YNNPACK)}
"""Flag that lets CPUs compute products and 2-D convolutions with Eigen, and leaves sums to YNNPACK.

In jaxlib 0.10.2 a transformer's step takes 1.15 times as long with YNNPACK's products, an autoencoder's 1.1 times, and
convolutions take 1.2 to 2.4 times as long; YNNPACK's sums save a transformer 6 % of its forward pass. Eigen is the
default for convolutions in 0.10.0 and 0.10.1, and for products in 0.10.0. From 0.11.0 on YNNPACK is as fast, for
convolutions up to 1.25 times. `tools/benchmark.py model --peers --explain` compares them. On two cores, in billions of
operations of a convolution per second, Eigen against YNNPACK:

| convolution | 0.10.2 | 0.11.0 | 0.11.2 | 0.12.0.1 |
|---|---|---|---|---|
| 17 frames of 128x128, 32 channels | 82, 37 | 83, 85 | 69, 86 | 69, 88 |
| 4 frames of 64x64, 64 channels | 108, 63 | 102, 102 | 95, 107 | 112, 109 |
| 2 frames of 128x128, 96 channels | 119, 90 | 106, 113 | 116, 128 | 112, 122 |
"""
CPU_FLAGS: dict[str, dict[str, str]] = {
    "0.10.0": {},
    "0.10.1": {},
    "0.10.2": _EIGEN,
    "0.11.0": {},
    "0.11.1": {},
    "0.11.2": {},
    "0.12.0": {},
    "0.12.0.1": {},
}
"""Flags for CPUs by release of jaxlib. All these releases know `GPU_FLAGS`, as starting each has shown."""

GPU_FLAGS = {
    # Collectives run while the computation that does not need them goes on; by default they wait for each other.
    # A single GPU has none.
    "xla_gpu_enable_latency_hiding_scheduler": "true",
}
"""Flags for several NVIDIA GPUs, as set in NVIDIA's own JAX images. Command buffers are on by default.

Other flags are left alone until they are measured. The flags that pipeline collectives over the iterations of a scan do
nothing in jaxlib 0.10.1 (openxla/xla issue 44228), and made training runs diverge in earlier releases (pull request
16953). `xla_gpu_enable_triton_gemm=false` saves the autotuning of products.
"""
GPU_MEMORY_FRACTION = "0.9"
"""Fraction of GPU memory that JAX reserves, 0.75 by default; NVIDIA recommends 0.8 to 0.9. Libraries need the rest."""

TPU_RELEASES = ("0.0.40", "0.0.41", "0.0.42.1", "0.0.44.1", "0.0.46.3", "0.0.48.1", "0.0.50.1")
"""Releases of libtpu, each the newest that one of JAX in the table above asks for. All compile for each chip with its
flags."""
TPU_FLAGS = {
    # Collectives are fused with the products beside them, over several steps, so that both run at once.
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
    # Gathers of the next layer's weights in the backward pass of a scan begin before this layer has ended.
    "xla_tpu_enable_ag_backward_pipelining": "true",
    # The exchange of heads and tokens in `ulysses` attention overlaps with computation.
    "xla_tpu_enable_async_all_to_all": "true",
    # Sums of gradients over slices, which are connected by the slower network, overlap with the backward pass.
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
}
"""Flags for TPUs, as in MaxText and MaxDiffusion for dense models sharded over `fsdp`, without host offloading."""
TPU_CHIP_FLAGS = {
    # Gathers of weights are fused, too. On other chips libtpu refuses this from 0.0.44 on, as results may be wrong.
    "v5e": {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true"},
    # On-chip memory that a fusion or kernel may use, which allows larger blocks than the default of 16 MiB.
    "v5p": {"xla_tpu_scoped_vmem_limit_kib": "65536"},
    "v6e": {"xla_tpu_scoped_vmem_limit_kib": "98304"},
}
"""Further flags by chip, with MaxDiffusion's and MaxText's values."""


def set_cpu_flags() -> None:
    """Set the flags for CPUs."""
    if _is_on():
        add_flags("XLA_FLAGS", CPU_FLAGS.get(get_release("jaxlib") or "", {}))


def set_accelerator_flags() -> None:
    """Set the flags for the GPUs or TPUs of this machine, if there are any."""
    if not _is_on():
        return
    if "cuda" in (find_gpu_backends() or ()):
        add_flags("XLA_FLAGS", _choose_gpu_flags(is_single=_is_single_gpu()))
        if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # the newer name of the same choice
            os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY_FRACTION)
    elif has_tpu() and get_release("libtpu") in TPU_RELEASES:
        add_flags("LIBTPU_INIT_ARGS", make_tpu_flags(find_tpu_chip()))


def make_tpu_flags(chip: str | None) -> dict[str, str]:
    """Return the flags for a chip such as `v5p`; None for an unknown one."""
    return TPU_FLAGS | TPU_CHIP_FLAGS.get(chip or "", {})


def get_compiler_options(chip: str) -> dict[str, str]:
    """Return the options for compiling a program ahead of time for a TPU in the same way as on the TPU itself."""
    return make_tpu_flags(chip) if _is_on() and get_release("libtpu") in TPU_RELEASES else {}


def get_flags() -> dict[str, str | None]:
    """Return the flags in effect, by environment variable, except flags that only write dumps."""
    return {name: _drop_dumps(os.environ.get(name)) for name in VARIABLES}


def _drop_dumps(flags: str | None) -> str | None:
    # Processes of one run may write their dumps to different folders.
    return flags and " ".join(flag for flag in flags.split() if not flag.startswith("--xla_dump"))


def list_flags(platform: str, chip: str, count: int) -> dict[str, str]:
    """Return the flags, by environment variable, that a run on so many chips has besides those that are set already."""
    if platform == "tpu":
        return {"LIBTPU_INIT_ARGS": _format_flags(get_compiler_options(chip))}
    added = _choose_gpu_flags(is_single=count == 1) if platform == "gpu" and _is_on() else {}
    return {"XLA_FLAGS": " ".join(filter(None, (get_flags()["XLA_FLAGS"], _format_flags(added))))}


def _choose_gpu_flags(*, is_single: bool) -> Mapping[str, str]:
    return GPU_FLAGS if get_release("jaxlib") in CPU_FLAGS and not is_single else {}


def _format_flags(flags: Mapping[str, str]) -> str:
    return " ".join(f"--{name}={value}" for name, value in flags.items())


def find_unchecked_release(platform: str) -> str | None:
    """Return the package and release that the flags of a platform were not checked with, if so; it has none then.

    Such a release may be slower than need be: jaxlib 0.10.2 took twice the time for convolutions without its flag.
    """
    package, releases = ("libtpu", TPU_RELEASES) if platform == "tpu" else ("jaxlib", tuple(CPU_FLAGS))
    release = get_release(package)
    return None if not _is_on() or release in (None, *releases) else f"{package} {release}"


def _is_single_gpu() -> bool:
    """Return whether this process computes on one GPU, and the environment names no other process of its run."""
    counts = [os.environ.get(name, "1") for name in _PROCESS_COUNTS]
    return count_gpus() == 1 and all(count == "1" for count in counts) and "JOB_COMPLETION_INDEX" not in os.environ


def _is_on() -> bool:
    return os.environ.get(SWITCH) != "off"


def get_release(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def add_flags(variable: str, flags: Mapping[str, str]) -> None:
    """Add flags to an environment variable, except flags that it already sets."""
    chosen = os.environ.get(variable, "").strip()
    if chosen and not chosen.startswith("-"):  # the name of a file with flags
        return
    names = {flag.lstrip("-").partition("=")[0] for flag in chosen.split()}
    if added := _format_flags({name: value for name, value in flags.items() if name not in names}):
        os.environ[variable] = " ".join(filter(None, (chosen, added)))

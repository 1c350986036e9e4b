"""Accelerators: chips with the peak rates of their makers' data sheets, and topologies of connected chips."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dit_video.core.errors import MissingError, UserError
from dit_video.core.platform.devices import Platform
from dit_video.core.platform.xla_flags import GPU_MEMORY_FRACTION

GIB, GB = 2**30, 10**9


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU chip, a GPU, or a machine's CPU; all rates are peaks, per second."""

    name: str
    kind: Literal["tpu", "gpu", "cpu"]
    flops: float
    """FLOPs per second in bfloat16, without sparsity."""
    memory: int
    """Bytes of HBM."""
    bandwidth: float
    """Bytes per second that HBM transfers."""
    link_bandwidth: float
    """Bytes per second that a ring of chips transfers, both directions together.

    For a TPU these are the two links along one axis of its torus, for a GPU all of its NVLink in one direction.
    """
    nvlink_domain: int | None = None
    """Number of GPUs that NVLink connects; None for TPUs, whose slices are fully connected."""
    network_bandwidth: float = 50e9
    """Bytes per second from a chip through the data centre's network to those of other slices or NVLink domains.

    By default through a 400 Gbit/s adapter for each GPU.
    """
    hourly_price: float | None = None
    """US dollars per chip and hour; None if unknown."""
    source: str
    device_kinds: tuple[str, ...] = ()
    """Substrings of the `device_kind` that JAX reports for these chips."""

    @property
    def usable_memory(self) -> int:
        """Return the bytes that a program can use: JAX reserves a part of a GPU's memory, and all of a TPU's."""
        return int(self.memory * float(GPU_MEMORY_FRACTION)) if self.kind == "gpu" else self.memory

    @property
    def platform(self) -> Platform:
        """Return the platform of the chip's devices."""
        return Platform(self.kind, _COMPUTE_CAPABILITIES.get(self.name))

    @property
    def price_source(self) -> str:
        return "" if self.hourly_price is None else _PRICE_SOURCES.get(self.kind, "")

    @property
    def libtpu_name(self) -> str:
        """Return the name of the chip in libtpu."""
        return "tpu7x" if self.name == "v7x" else self.name


def find_chip(device: Any) -> Chip | None:
    """Return the chip of a JAX device, or None if it is not in the table."""
    kind = device.device_kind
    # The longest matching name wins: "TPU v5 lite" also contains "TPU v5".
    matches = [(len(part), chip) for chip in CHIPS.values() for part in chip.device_kinds if part in kind]
    return max(matches, key=lambda match: match[0])[1] if matches else None


_DOCS = "docs.cloud.google.com/tpu/docs"
_BOOK = "links: jax-ml.github.io/scaling-book/tpus"
_PRICE_SOURCES = {
    "tpu": "cloud.google.com/tpu/pricing, on demand in the cheapest US region, 2025",
    "gpu": "aws.amazon.com/ec2/capacityblocks/pricing, US East, January 2025",
}
_V7X_SOURCE = f"{_DOCS}/tpu7x (1,200 GB/s of links in both directions, over the six of a torus)"
_A100_SOURCE = "NVIDIA A100 80GB SXM data sheet; network: DGX A100 with 200 Gbit/s for each GPU"
_COLUMNS = ("name", "flops", "memory", "bandwidth", "link_bandwidth", "hourly_price", "device_kinds", "source")
_TPUS: tuple[tuple[Any, ...], ...] = (
    ("v4", 275e12, 32 * GIB, 1228e9, 90e9, 3.22, ("TPU v4",), f"{_DOCS}/v4; {_BOOK}"),
    ("v5e", 197e12, 16 * GIB, 819e9, 90e9, 1.20, ("TPU v5 lite", "TPU v5e"), f"{_DOCS}/v5e; {_BOOK}"),
    ("v5p", 459e12, 95 * GIB, 2765e9, 180e9, 4.20, ("TPU v5p", "TPU v5"), f"{_DOCS}/v5p; {_BOOK}"),
    ("v6e", 918e12, 32 * GIB, 1638e9, 180e9, 2.70, ("TPU v6 lite", "TPU v6e"), f"{_DOCS}/v6e; {_BOOK}"),
    ("v7x", 2307e12, 192 * GIB, 7380e9, 200e9, None, ("TPU7x",), _V7X_SOURCE),
)
_GPUS: tuple[tuple[Any, ...], ...] = (
    ("a100", 312e12, 80 * GB, 2039e9, 300e9, None, ("A100",), _A100_SOURCE),
    # Other H100 models are slower.
    ("h100", 989e12, 80 * GB, 3350e9, 450e9, 4.92, ("H100 80GB HBM3",), "NVIDIA H100 SXM data sheet, without sparsity"),
    ("h200", 989e12, 141 * GB, 4800e9, 450e9, 5.41, ("H200", "GH200"), "NVIDIA H200 SXM data sheet, without sparsity"),
    ("b200", 2250e12, 180 * GB, 7700e9, 900e9, None, ("B200",), "NVIDIA HGX B200 data sheet, without sparsity"),
)
_COMPUTE_CAPABILITIES = {"a100": (8, 0), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}
"""Compute capabilities (developer.nvidia.com/cuda-gpus)."""
_NETWORK_BANDWIDTHS = {"a100": 25e9, "v4": 6.25e9, "v5e": 3.125e9, "v5p": 6.25e9, "v6e": 12.5e9, "v7x": 6.25e9}
"""Network bandwidths that are not 400 Gbit/s for each GPU.

v5p: 50 Gbit/s a chip; v5e and v6e: 6.4 and 25.6 Tbit/s a pod of 256 (docs.cloud.google.com/tpu/docs/v5p, v5e, v6e). For
v4 and v7x Google states none: these are the typical 25 GB/s of a host (jax-ml.github.io/scaling-book/tpus), of 4 chips.
"""


def _make_chip(row: tuple[Any, ...], kind: Literal["tpu", "gpu"]) -> Chip:
    facts = dict(zip(_COLUMNS, row, strict=True))
    network = _NETWORK_BANDWIDTHS.get(row[0], 50e9)
    return Chip(kind=kind, nvlink_domain=8 if kind == "gpu" else None, network_bandwidth=network, **facts)


CHIPS = {row[0]: _make_chip(row, "tpu") for row in _TPUS} | {row[0]: _make_chip(row, "gpu") for row in _GPUS}


@dataclass(frozen=True)
class Topology:
    """A number of connected chips."""

    chip: Chip
    shape: tuple[int, ...]
    """Shape of the torus of a TPU slice, or the number of other chips."""
    slices: int = 1
    """Number of TPU slices of this shape, which the data centre's network (DCN) connects."""

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    def __str__(self) -> str:
        shape = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return shape if self.slices == 1 else f"{shape}*{self.slices}"

    @staticmethod
    def parse(text: str, chips: Mapping[str, Chip] = CHIPS) -> "Topology":
        """Parse a topology such as `v5e:4x4`, `v5p:4x4x8*2` or `h100:16`.

        Args:
          text: Chip, shape, and for several slices of a TPU their number.
          chips: Supported chips by name.

        Raises:
          UserError: If the chip is not in the table, the shape has the wrong number of sizes, or the number of slices
            is not positive or not of TPUs.
        """
        name, _, size = text.lower().partition(":")
        chip = next((chip for chip in chips.values() if name in (chip.name, chip.libtpu_name)), None)
        if chip is None:
            raise UserError(f"chip {name!r} is not supported. Use one of {', '.join(chips)}, as in v5e:4x4 or h100:8")
        shape, star, count = size.partition("*")
        parts = shape.split("x")
        dimensions = (2 if chip.name in ("v5e", "v6e") else 3) if chip.kind == "tpu" else 1
        example = f"{name}:{ {1: '8', 2: '4x4', 3: '4x4x4'}[dimensions] }"
        if len(parts) != dimensions or not all(map(_is_positive, parts)):
            fix = f"Use a shape such as {example}"
            raise UserError(f"{text!r} is not a topology: a {name} has {dimensions} sizes. {fix}")
        if star and chip.kind != "tpu":
            rule = f"only TPUs come in slices, {name} are counted in all"
            raise UserError(f"{text!r} is not a topology: {rule}. Use their number, such as {example}")
        if star and not _is_positive(count):
            rule = "the number of slices after * is an integer of at least 1"
            raise UserError(f"{text!r} is not a topology: {rule}. Use, for two slices, {name}:{shape}*2")
        return Topology(chip, tuple(map(int, parts)), int(count) if star else 1)

    def get_devices(self) -> list[Any]:
        """Return descriptions of TPU devices from libtpu, for which programs can be compiled without the hardware.

        Raises:
          MissingError: If libtpu is not installed.
          UserError: If these chips don't come in this shape.
        """
        # libtpu queries its host and claims the chips exclusively; here there are none.
        for name, value in _NO_HARDWARE_ENV.items():
            os.environ.setdefault(name, value)
        try:
            import libtpu  # noqa: F401
        except ImportError as error:
            raise MissingError("libtpu, which compiles for TPUs, is not installed. Use pip install libtpu") from error
        from jax.experimental import topologies

        name = f"{self.chip.libtpu_name}:{'x'.join(map(str, self.shape))}"
        slices = {} if self.slices == 1 else {"num_slices": self.slices}
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **slices).devices)
        except Exception as error:
            raise UserError(f"libtpu has no topology {name}: {str(error).splitlines()[0]}") from error


def _is_positive(text: str) -> bool:
    return text.isdecimal() and int(text) > 0


_NO_HARDWARE_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}

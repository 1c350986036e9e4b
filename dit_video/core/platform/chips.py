"""Accelerators, with the peak rates of their makers' data sheets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
    device_count: int = 1
    """Number of JAX's devices in one chip."""

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
    facts |= {"nvlink_domain": 8 if kind == "gpu" else None, "device_count": 2 if row[0] == "v7x" else 1}
    return Chip(kind=kind, network_bandwidth=_NETWORK_BANDWIDTHS.get(row[0], 50e9), **facts)


CHIPS = {row[0]: _make_chip(row, "tpu") for row in _TPUS} | {row[0]: _make_chip(row, "gpu") for row in _GPUS}


def find_chip(device: Any) -> Chip | None:
    """Return the chip of a JAX device, or None if it is not in the table."""
    kind = device.device_kind
    # The longest matching name wins: "TPU v5 lite" also contains "TPU v5".
    matches = [(len(part), chip) for chip in CHIPS.values() for part in chip.device_kinds if part in kind]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def get_peak_flops(devices: Sequence[Any]) -> float | None:
    """Return the devices' total peak FLOPs per second in bfloat16, or None if one is not in the table."""
    chips = [find_chip(device) for device in devices]
    return None if None in chips else sum(chip.flops / chip.device_count for chip in chips if chip is not None)

"""Accelerators' peak rates from their makers' data sheets, and topologies such as `v5e:4x4` or `h100:16`."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dit_video.core.errors import MissingError, UserError

GIB, GB = 2**30, 10**9


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A TPU chip or a GPU; all rates are peaks, per second."""

    name: str
    kind: Literal["tpu", "gpu"]
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
    """Bytes per second from a GPU to those of other domains, by default through a 400 Gbit/s adapter for each GPU."""
    hourly_price: float | None = None
    """US dollars per chip and hour; None if unknown."""
    source: str
    price_source: str = ""
    libtpu_name: str = ""
    """Name of the chip in libtpu, if it differs from `name`."""
    device_kinds: tuple[str, ...] = ()
    """Substrings of the `device_kind` that JAX reports for these chips."""


_DOCS = "docs.cloud.google.com/tpu/docs"
_BOOK = "links: jax-ml.github.io/scaling-book/tpus"
_PRICES = "cloud.google.com/tpu/pricing, on demand in the cheapest US region, 2025"
_CAPACITY_BLOCK_PRICES = "aws.amazon.com/ec2/capacityblocks/pricing, US East, January 2025"

_make_tpu = functools.partial(Chip, kind="tpu")
_make_gpu = functools.partial(Chip, kind="gpu", nvlink_domain=8)
CHIPS = {
    chip.name: chip
    for chip in (
        _make_tpu(
            name="v4",
            flops=275e12,
            memory=32 * GIB,
            bandwidth=1228e9,
            link_bandwidth=90e9,
            hourly_price=3.22,
            source=f"{_DOCS}/v4; {_BOOK}",
            price_source=_PRICES,
            device_kinds=("TPU v4",),
        ),
        _make_tpu(
            name="v5e",
            flops=197e12,
            memory=16 * GIB,
            bandwidth=819e9,
            link_bandwidth=90e9,
            hourly_price=1.20,
            source=f"{_DOCS}/v5e; {_BOOK}",
            price_source=_PRICES,
            device_kinds=("TPU v5 lite", "TPU v5e"),
        ),
        _make_tpu(
            name="v5p",
            flops=459e12,
            memory=95 * GIB,
            bandwidth=2765e9,
            link_bandwidth=180e9,
            hourly_price=4.20,
            source=f"{_DOCS}/v5p; {_BOOK}",
            price_source=_PRICES,
            device_kinds=("TPU v5p", "TPU v5"),
        ),
        _make_tpu(
            name="v6e",
            flops=918e12,
            memory=32 * GIB,
            bandwidth=1638e9,
            link_bandwidth=180e9,
            hourly_price=2.70,
            source=f"{_DOCS}/v6e; {_BOOK}",
            price_source=_PRICES,
            device_kinds=("TPU v6 lite", "TPU v6e"),
        ),
        _make_tpu(
            name="v7x",
            flops=2307e12,
            memory=192 * GIB,
            bandwidth=7380e9,
            link_bandwidth=200e9,
            source=f"{_DOCS}/tpu7x (1,200 GB/s of links in both directions, over the six of a torus)",
            libtpu_name="tpu7x",
            device_kinds=("TPU7x",),
        ),
        _make_gpu(
            name="a100",
            flops=312e12,
            memory=80 * GB,
            bandwidth=2039e9,
            link_bandwidth=300e9,
            network_bandwidth=25e9,
            source="NVIDIA A100 80GB SXM data sheet; network: DGX A100 with 200 Gbit/s for each GPU",
            device_kinds=("A100",),
        ),
        _make_gpu(
            name="h100",
            flops=989e12,
            memory=80 * GB,
            bandwidth=3350e9,
            link_bandwidth=450e9,
            hourly_price=4.92,
            source="NVIDIA H100 SXM data sheet, without sparsity",
            price_source=_CAPACITY_BLOCK_PRICES,
            device_kinds=("H100 80GB HBM3",),  # Other H100 models are slower.
        ),
        _make_gpu(
            name="h200",
            flops=989e12,
            memory=141 * GB,
            bandwidth=4800e9,
            link_bandwidth=450e9,
            hourly_price=5.41,
            source="NVIDIA H200 SXM data sheet, without sparsity",
            price_source=_CAPACITY_BLOCK_PRICES,
            device_kinds=("H200", "GH200"),
        ),
        _make_gpu(
            name="b200",
            flops=2250e12,
            memory=180 * GB,
            bandwidth=7700e9,
            link_bandwidth=900e9,
            source="NVIDIA HGX B200 data sheet, without sparsity",
            device_kinds=("B200",),
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """A number of connected chips."""

    chip: Chip
    shape: tuple[int, ...]
    """Shape of a TPU's torus, or the number of GPUs."""

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @staticmethod
    def parse(text: str) -> "Topology":
        """Parse a topology such as `v5e:4x4`, `v5p:4x4x4` or `h100:16`.

        Raises:
          UserError: the chip is not in the table, or the shape has the wrong number of sizes.
        """
        name, _, shape = text.lower().partition(":")
        chip = next((chip for chip in CHIPS.values() if name in (chip.name, chip.libtpu_name or chip.name)), None)
        if chip is None:
            raise UserError(f"chip {name!r} is not supported. Use one of {', '.join(CHIPS)}, as in v5e:4x4 or h100:8")
        parts = shape.split("x")
        dimensions = {"gpu": 1, "tpu": 2 if chip.name in ("v5e", "v6e") else 3}[chip.kind]
        if len(parts) != dimensions or not all(part.isdecimal() and int(part) > 0 for part in parts):
            example = {1: "8", 2: "4x4", 3: "4x4x4"}[dimensions]
            fix = f"Use a shape such as {name}:{example}"
            raise UserError(f"{text!r} is not a topology: a {name} has {dimensions} sizes. {fix}")
        return Topology(chip, tuple(map(int, parts)))

    def get_devices(self) -> list[Any]:
        """Return descriptions of TPU devices from libtpu, for which programs can be compiled without the hardware.

        Raises:
          MissingError: libtpu is not installed.
          UserError: these chips don't come in this shape.
        """
        # libtpu queries its host and claims the chips exclusively; here there are none.
        for name, value in _NO_HARDWARE_ENV.items():
            os.environ.setdefault(name, value)
        try:
            import libtpu  # noqa: F401
        except ImportError as error:
            raise MissingError("libtpu, which compiles for TPUs, is not installed. Use pip install libtpu") from error
        from jax.experimental import topologies

        name = f"{self.chip.libtpu_name or self.chip.name}:{'x'.join(map(str, self.shape))}"
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        except Exception as error:
            raise UserError(f"libtpu has no topology {name}: {str(error).splitlines()[0]}") from error


_NO_HARDWARE_ENV = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def find_chip(device: Any) -> Chip | None:
    """Return the chip of a JAX device, or None if it is not in the table."""
    kind = device.device_kind
    # The longest matching name wins: "TPU v5 lite" also contains "TPU v5".
    matches = [(len(part), chip) for chip in CHIPS.values() for part in chip.device_kinds if part in kind]
    return max(matches, key=lambda match: match[0])[1] if matches else None


def get_peak_flops(devices: Sequence[Any]) -> float | None:
    """Return the devices' total peak FLOPs per second in bfloat16, or None if one is not in the table."""
    total = 0.0
    for device in devices:
        if (chip := find_chip(device)) is None:
            return None
        has_two_devices = device.device_kind in ("TPU7x", "TPU v2", "TPU v3")  # JAX reports the chip's cores
        total += chip.flops / (2 if has_two_devices else 1)
    return total

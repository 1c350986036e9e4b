"""What accelerators can do, by their makers' figures, and how many of them a name such as `v5e:4x4` or `h100:16` is."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dit_video.core.errors import MissingError, UserError

GIB, GB = 2**30, 10**9


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip (of a TPU) or one GPU. All rates are peaks, of one second."""

    name: str
    kind: Literal["tpu", "gpu"]
    flops: float
    """in bfloat16, dense"""
    memory: int
    """bytes of HBM"""
    bandwidth: float
    """bytes of HBM"""
    link: float
    """Bytes that a ring of chips passes on, both directions together: along one axis of a TPU's torus, which is the
    two links of that axis; of a GPU all of NVLink, one way."""
    domain: int | None = None
    """GPUs that NVLink joins; None for TPUs, all chips of whose slice are joined"""
    network: float = 50e9
    """bytes that leave a GPU for those of another domain, by a network adapter of 400 Gbit/s each"""
    price: float | None = None
    """of a chip for an hour, in dollars; None where none is kept here"""
    source: str
    price_source: str = ""
    topology: str = ""
    """what libtpu calls it, if otherwise"""
    devices: tuple[str, ...] = ()
    """parts of the names that JAX's devices of this kind have"""


_DOCS = "docs.cloud.google.com/tpu/docs"
_BOOK = "links: jax-ml.github.io/scaling-book/tpus"
_PRICES = "cloud.google.com/tpu/pricing, on demand in the cheapest US region, 2025"
_BLOCKS = "aws.amazon.com/ec2/capacityblocks/pricing, US East, January 2025"

CHIPS = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            kind="tpu",
            flops=275e12,
            memory=32 * GIB,
            bandwidth=1228e9,
            link=90e9,
            price=3.22,
            source=f"{_DOCS}/v4; {_BOOK}",
            price_source=_PRICES,
            devices=("TPU v4",),
        ),
        Chip(
            name="v5e",
            kind="tpu",
            flops=197e12,
            memory=16 * GIB,
            bandwidth=819e9,
            link=90e9,
            price=1.20,
            source=f"{_DOCS}/v5e; {_BOOK}",
            price_source=_PRICES,
            devices=("TPU v5 lite", "TPU v5e"),
        ),
        Chip(
            name="v5p",
            kind="tpu",
            flops=459e12,
            memory=95 * GIB,
            bandwidth=2765e9,
            link=180e9,
            price=4.20,
            source=f"{_DOCS}/v5p; {_BOOK}",
            price_source=_PRICES,
            devices=("TPU v5p", "TPU v5"),
        ),
        Chip(
            name="v6e",
            kind="tpu",
            flops=918e12,
            memory=32 * GIB,
            bandwidth=1638e9,
            link=180e9,
            price=2.70,
            source=f"{_DOCS}/v6e; {_BOOK}",
            price_source=_PRICES,
            devices=("TPU v6 lite", "TPU v6e"),
        ),
        Chip(
            name="v7x",
            kind="tpu",
            flops=2307e12,
            memory=192 * GIB,
            bandwidth=7380e9,
            link=200e9,
            source=f"{_DOCS}/tpu7x (1,200 GB/s of links in both directions, over the six of a torus)",
            topology="tpu7x",
            devices=("TPU7x",),
        ),
        Chip(
            name="a100",
            kind="gpu",
            flops=312e12,
            memory=80 * GB,
            bandwidth=2039e9,
            link=300e9,
            domain=8,
            network=25e9,
            source="NVIDIA A100 80GB SXM data sheet; network: DGX A100 with 200 Gbit/s for each GPU",
            devices=("A100",),
        ),
        Chip(
            name="h100",
            kind="gpu",
            flops=989e12,
            memory=80 * GB,
            bandwidth=3350e9,
            link=450e9,
            domain=8,
            price=4.92,
            source="NVIDIA H100 SXM data sheet, without sparsity",
            price_source=_BLOCKS,
            devices=("H100 80GB HBM3",),  # others of that name are slower
        ),
        Chip(
            name="h200",
            kind="gpu",
            flops=989e12,
            memory=141 * GB,
            bandwidth=4800e9,
            link=450e9,
            domain=8,
            price=5.41,
            source="NVIDIA H200 SXM data sheet, without sparsity",
            price_source=_BLOCKS,
            devices=("H200", "GH200"),
        ),
        Chip(
            name="b200",
            kind="gpu",
            flops=2250e12,
            memory=180 * GB,
            bandwidth=7700e9,
            link=900e9,
            domain=8,
            source="NVIDIA HGX B200 data sheet, without sparsity",
            devices=("B200",),
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """So many chips, joined."""

    chip: Chip
    shape: tuple[int, ...]
    """of a TPU's torus; of GPUs their number"""

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @staticmethod
    def parse(text: str) -> "Topology":
        """`v5e:4x4`, `v5p:4x4x4`, `h100:16`.

        Raises:
          UserError: a chip that is not in the table, or a shape that it does not come in.
        """
        name, _, shape = text.lower().partition(":")
        chip = next((chip for chip in CHIPS.values() if name in (chip.name, chip.topology or chip.name)), None)
        if chip is None:
            raise UserError(f"no chip {name!r} is known; known are {', '.join(CHIPS)}, as in v5e:4x4 or h100:8")
        parts = shape.split("x")
        wanted = {"gpu": 1, "tpu": 2 if chip.name in ("v5e", "v6e") else 3}[chip.kind]
        if len(parts) != wanted or not all(part.isdecimal() and int(part) > 0 for part in parts):
            example = {1: "8", 2: "4x4", 3: "4x4x4"}[wanted]
            raise UserError(f"{text!r} has no shape of {wanted} sizes; write {name}:{example}")
        return Topology(chip, tuple(map(int, parts)))

    def devices(self) -> list[Any]:
        """TPU devices that a program can be compiled for, with no such hardware: descriptions, by libtpu.

        Raises:
          MissingError: libtpu is not installed.
          UserError: a shape that these chips do not come in.
        """
        # libtpu asks where it runs, and for the only use of the chips; here there is none.
        for name, value in _NO_HARDWARE.items():
            os.environ.setdefault(name, value)
        try:
            import libtpu  # noqa: F401
        except ImportError as error:
            raise MissingError("libtpu is not installed, which compiles for TPUs; pip install libtpu") from error
        from jax.experimental import topologies

        name = f"{self.chip.topology or self.chip.name}:{'x'.join(map(str, self.shape))}"
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
        except Exception as error:
            raise UserError(f"libtpu knows no topology {name}: {str(error).splitlines()[0]}") from error


_NO_HARDWARE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5e-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}


def chip_of(device: Any) -> Chip | None:
    """The chip that a device of JAX is (a part of), where the table has it."""
    kind = device.device_kind
    fitting = [(len(part), chip) for chip in CHIPS.values() for part in chip.devices if part in kind]
    return max(fitting, key=lambda pair: pair[0])[1] if fitting else None


def peak_flops(devices: Sequence[Any]) -> float | None:
    """Peak operations a second, in bfloat16, of devices that run; None where they are not in the table."""
    chips = [chip_of(device) for device in devices]
    return (
        None
        if None in chips
        else sum(chip.flops / _share(device) for chip, device in zip(chips, devices, strict=True) if chip)
    )


def _share(device: Any) -> int:
    """How many devices one chip is: two of the chips that JAX sees by their cores."""
    return 2 if device.device_kind in ("TPU7x", "TPU v2", "TPU v3") else 1

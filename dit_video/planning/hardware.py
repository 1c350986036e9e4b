"""Topologies of connected chips, and their devices, which need not be present."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_video.core.errors import MissingError, UserError
from dit_video.core.platform.chips import CHIPS, Chip


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

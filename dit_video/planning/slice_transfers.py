"""Transfers between TPU slices in a program's text: the sends and receives of the data centre's network (DCN).

The compiler divides a collective over several slices into one inside each slice and a pair of `send` and `recv` to
counterparts in the others, whose attributes name the collective and its devices. Ids of devices are
`100000 * slice + index`, slices counted from 1.
"""

import re
from typing import NamedTuple

_KIND = re.compile(r'_xla_megascale_transfer_type="?(\w+)')
_SLICES = re.compile(r'_xla_megascale_target="?\{([\d,]+)\}x')
_DEVICES = re.compile(r'_xla_megascale_target="?\{(\{.*?\})\}')
_KINDS = {
    "ALL_REDUCE": "all-reduce",
    "ALL_GATHER": "all-gather",
    "ALL_TO_ALL": "all-to-all",
    "REDUCE_SCATTER": "reduce-scatter",
    "ONE_TO_ONE": "collective-permute",
}
_MAX_SLICE_DEVICES = 100_000


class SliceTransfer(NamedTuple):
    """A collective's part between slices."""

    kind: str
    """Kind of the collective, as in `hlo.COLLECTIVES`."""
    slices: list[int]
    """Slices that exchange data with each other, counted from 0."""
    bytes: float
    """Lower bound on the bytes that each device receives from other slices."""


def read_slice_transfer(attributes: str, result_bytes: int) -> SliceTransfer | None:
    """Return the transfer of a `recv` instruction; None if it doesn't receive from another slice.

    Args:
      attributes: the instruction's attributes.
      result_bytes: bytes of its result.
    """
    kind = _KIND.search(attributes)
    if kind is None:
        return None
    if named := _SLICES.search(attributes):
        slices = [int(number) - 1 for number in named[1].split(",")]
    else:
        groups = _DEVICES.search(attributes)
        numbers = re.findall(r"\d+", groups[1].split("}")[0]) if groups else []
        slices = sorted({int(number) // _MAX_SLICE_DEVICES - 1 for number in numbers})
    count = max(1, len(slices))
    # The results of a gather and of an exchange include a device's own part; that of a scatter is one of `count`.
    shares = {
        "ALL_REDUCE": 2 * (count - 1) / count,
        "ALL_GATHER": (count - 1) / count,
        "ALL_TO_ALL": (count - 1) / count,
        "REDUCE_SCATTER": count - 1,
    }
    received = result_bytes * shares.get(kind[1], 1)
    return SliceTransfer(_KINDS.get(kind[1], kind[1].lower().replace("_", "-")), slices, received)

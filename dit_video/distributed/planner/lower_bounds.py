"""The bytes that a training step cannot but move between devices, which compiled programs are held against."""

from collections.abc import Mapping, Sequence

from dit_video.distributed.mesh import ContextAttention
from dit_video.distributed.planner.estimate import Step
from dit_video.distributed.planner.hlo import Moved

_ATTENTION = ("all-to-all", "collective-permute")
"""kinds by which tokens meet over `context`; sums of gradients go over it, too"""


def least_moved(step: Step, parameters: int, mesh: Mapping[str, int], way: ContextAttention) -> dict[str, float]:
    """Bytes that a device receives at the least over `fsdp`, and over `context` for attention; axes of 1 are left out.

    - `fsdp` (arXiv 1910.02054): `(n - 1) / n` of all weights, in the dtype of products, and of their gradients once, in
      float32. Weights once for the forward and once for the backward pass; where nothing is computed again what was
      gathered is kept, and once is enough.
    - `context`, `ulysses` (arXiv 2309.14509): `(n - 1) / n` of a device's queries, keys, values and results, and as
      much for their gradients; those of a forward pass that is computed again, again.
    - `context`, `ring` (arXiv 2310.01889): keys and values of `n - 1` others in each pass, and gradients of both in
      float32.

    Args:
      step: a training step of all weights.
      parameters: of the model.
      mesh: its axes and sizes.
      way: how tokens meet.
    """
    fsdp, tensor, context = (mesh[name] for name in ("fsdp", "tensor", "context"))
    forwards = 2 if step.again else 1
    values = step.layers * step.rows * step.tokens // (mesh["data"] * fsdp * context) * step.width // tensor
    if way == "ulysses":
        attention = 4 * (forwards + 1) * (context - 1) / context * values * step.itemsize
    else:
        attention = (context - 1) * values * 2 * ((forwards + 1) * step.itemsize + 4)
    weights = (fsdp - 1) / fsdp * parameters / tensor * (forwards * step.itemsize + 4)
    return {name: bytes for name, bytes in (("fsdp", weights), ("context", attention)) if mesh[name] > 1}


def moved_over(axis: str, moved: Sequence[Moved]) -> float:
    """The bytes of a program that `least_moved` is about."""
    over = [part for part in moved if part.axes == (axis,)]
    return sum(part.bytes for part in over if axis == "fsdp" or part.kind in _ATTENTION)

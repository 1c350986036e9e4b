"""How fast a training is: tokens a second, and the share of what the devices could compute."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_video.tokens import Rows


class Meter:
    """Counts what the batches of this process hold, and what that is in a second.

    A batch is counted when it is given out, one or two steps ahead of the step that it is for.
    """

    def __init__(
        self,
        work: Callable[[Any], float] | None = None,
        *,
        peak: Callable[[Sequence[Any]], float | None] | None = None,
    ) -> None:
        """
        Args:
          work: floating-point operations of a step, by its batch of host arrays.
          peak: those that devices can do in a second, together; None of devices that aren't known.
        """
        self._work = work
        self._peak = None if peak is None else peak(jax.local_devices())
        self._tokens = self._operations = 0.0
        self._batches = 0

    def note(self, batch: Any) -> None:
        """Count a batch of host arrays, which is one process's share."""
        if not isinstance(batch, Rows):
            return
        self._batches += 1
        self._tokens += float(np.count_nonzero(batch.segments))
        if self._work is not None:
            self._operations += self._work(batch)

    def figures(self, values: Mapping[str, float]) -> dict[str, float]:
        """Of the batches since the call before, from the mean time of a step: those of all processes' batches.

        `tokens_per_second` leaves out padding. `model_flops_per_second`, of all processes, leaves out what is computed
        twice; `mfu` is its share of what the devices can do.
        """
        seconds, batches = values.get("step_seconds"), self._batches
        tokens, operations = self._tokens, self._operations
        self._tokens = self._operations = 0.0
        self._batches = 0
        if not seconds or not batches:
            return {}
        processes = jax.process_count()
        found = {"tokens_per_second": processes * tokens / batches / seconds}
        if self._work is not None:
            own = operations / batches / seconds
            found["model_flops_per_second"] = processes * own
            if self._peak is not None:
                found["mfu"] = own / self._peak
        return found

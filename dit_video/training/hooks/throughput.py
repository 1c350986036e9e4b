"""Throughput of a training run: tokens per second and model FLOPs utilization."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from dit_video.tokens import PackedBatch
from dit_video.training.hooks.hook import Hook


class ThroughputMeter(Hook):
    """Counter of the tokens and FLOPs of this process's batches, and their rates per second.

    A batch is counted when it is handed to the loop, one or two steps before the step that uses it.
    """

    def __init__(
        self,
        flops_fn: Callable[[Any], float] | None = None,
        *,
        peak_flops_fn: Callable[[Sequence[Any]], float | None] | None = None,
    ) -> None:
        """Initialize the meter.

        Args:
          flops_fn: Function from a batch of host arrays to the floating-point operations of its step.
          peak_flops_fn: Function from devices to their total peak FLOPs per second, or None for unknown devices.
        """
        self._flops_fn = flops_fn
        self._peak_flops = None if peak_flops_fn is None else peak_flops_fn(jax.local_devices())
        self._tokens = self._flops = 0.0
        self._num_batches = 0

    def add(self, batch: Any) -> None:
        """Count a batch of host arrays, which is this process's share of the global batch."""
        if not isinstance(batch, PackedBatch):
            return
        self._num_batches += 1
        self._tokens += float(np.count_nonzero(batch.segments))
        if self._flops_fn is not None:
            self._flops += self._flops_fn(batch)

    def derive(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the throughput of all processes since the previous entry, from the mean `step_seconds` in `values`.

        `tokens_per_second` excludes padding. `model_flops_per_second` excludes recomputation; `mfu` is its share of the
        devices' peak.
        """
        seconds, batches = values.get("step_seconds"), self._num_batches
        tokens, flops = self._tokens, self._flops
        self._tokens = self._flops = 0.0
        self._num_batches = 0
        if not seconds or not batches:
            return {}
        processes = jax.process_count()
        metrics = {"tokens_per_second": processes * tokens / batches / seconds}
        if self._flops_fn is not None:
            flops_per_second = flops / batches / seconds
            metrics["model_flops_per_second"] = processes * flops_per_second
            if self._peak_flops is not None:
                metrics["mfu"] = flops_per_second / self._peak_flops
        return metrics

"""Rates in a training's log: tokens per second, model FLOPs utilization, and goodput."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dit_video.distributed import RowPart
from dit_video.tokens import PackedBatch
from dit_video.training.hooks.hook import Hook
from dit_video.training.time_recorder import TimeRecorder


class ThroughputMeter(Hook):
    """Counter of the tokens and FLOPs of this process's rows, and the rates per second of all rows.

    A batch is counted when it is handed to the loop, one or two steps before the step that uses it.
    """

    def __init__(
        self,
        flops_fn: Callable[[Any], float] | None = None,
        *,
        peak_flops_fn: Callable[[Sequence[Any]], float | None] | None = None,
        mesh: Mesh | None = None,
    ) -> None:
        """Initialize the meter.

        Args:
          flops_fn: Function from a batch of host arrays to the floating-point operations of its step.
          peak_flops_fn: Function from devices to their total peak FLOPs per second, or None for unknown devices.
          mesh: Mesh on which the batches are sharded; None if this process has all rows and devices.
        """
        self._flops_fn = flops_fn
        devices = jax.local_devices() if mesh is None else list(mesh.devices.flat)
        self._peak_flops = None if peak_flops_fn is None else peak_flops_fn(devices)
        # Processes along `tensor` and `context` hold the same rows, so there are fewer parts than processes.
        self._part_count = 1 if mesh is None else RowPart.from_mesh(mesh).part_count
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
        """Return the throughput of the whole mesh since the previous entry, from the mean `step_seconds` in `values`.

        `tokens_per_second` excludes padding. `model_flops_per_second` excludes recomputation; `mfu` is its share of the
        devices' peak.
        """
        seconds, batches = values.get("step_seconds"), self._num_batches
        tokens, flops = self._tokens, self._flops
        self._tokens = self._flops = 0.0
        self._num_batches = 0
        if not seconds or not batches:
            return {}
        metrics = {"tokens_per_second": self._part_count * tokens / batches / seconds}
        if self._flops_fn is not None:
            flops_per_second = self._part_count * flops / batches / seconds
            metrics["model_flops_per_second"] = flops_per_second
            if self._peak_flops is not None:
                metrics["mfu"] = flops_per_second / self._peak_flops
        return metrics


class GoodputLog(Hook):
    """The metrics `goodput`, `badput_GROUP` and `run_seconds` of `training.goodput.compute_metrics`."""

    first_process_only = True

    def __init__(self, recorder: TimeRecorder) -> None:
        self._recorder = recorder

    def derive(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the shares of the time since the first start of the run."""
        del values
        return self._recorder.compute_metrics()

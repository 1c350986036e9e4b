"""Policy that decides which checkpoints of a run are preserved, in terms of Orbax's policies."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from dit_video.core.errors import check_at_least


@dataclass(frozen=True, kw_only=True)
class CheckpointPolicy:
    """Policy for preserving checkpoints: one that matches any of the rules is kept.

    Raises:
      UserError: A number that is too small.
    """

    newest: int = 2
    """Number of newest checkpoints to keep. Use at least 2 to have a fallback if the newest one is damaged."""
    every: int | None = None
    """Interval in steps of checkpoints that are kept forever; None for none."""
    best: int = 0
    """Number of best checkpoints by `metric` to keep."""
    metric: str = "loss"
    """Name of a logged metric, whose value is that of the last entry of the log before the checkpoint was saved."""
    better: Literal["lower", "higher"] = "lower"
    """Direction in which `metric` improves."""

    def __post_init__(self) -> None:
        check_at_least(1, newest=self.newest, every=self.every)
        check_at_least(0, best=self.best)


class OrbaxPreservationPolicy:
    """A `CheckpointPolicy` as a policy of Orbax.

    `get_metrics` returns the metrics of the checkpoint of a step, or None.
    """

    def __init__(self, keep: CheckpointPolicy, get_metrics: Callable[[int], Mapping[str, float] | None]) -> None:
        from orbax.checkpoint import checkpoint_managers as orbax  # slow import, not needed for configs

        policies: list[orbax.PreservationPolicy] = [orbax.LatestN(keep.newest)]
        if keep.every is not None:
            policies.append(orbax.EveryNSteps(keep.every))
        if keep.best:
            is_reversed = keep.better == "lower"  # Orbax keeps the last of the sorted checkpoints
            options: dict[str, Any] = {"reverse": is_reversed, "keep_checkpoints_without_metrics": False}
            policies.append(orbax.BestN(get_metric_fn=lambda metrics: metrics[keep.metric], n=keep.best, **options))
        self._policy = orbax.AnyPreservationPolicy(policies)
        self._keep = keep
        self._get_metrics = get_metrics

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Return whether to keep each of the checkpoints, which are in the order of their steps."""
        checkpoints_with_metrics = [
            SimpleNamespace(step=info.step, time=info.time, metrics=self._read_metrics(info.step))
            for info in checkpoints
        ]
        return self._policy.should_preserve(checkpoints_with_metrics, context=context)

    def _read_metrics(self, step: int) -> Mapping[str, float] | None:
        if not self._keep.best:
            return None
        metrics = self._get_metrics(step)
        value = None if metrics is None else metrics.get(self._keep.metric)
        return metrics if value is not None and math.isfinite(value) else None

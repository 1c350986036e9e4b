"""Which checkpoints of a run stay, by Orbax's own policies."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

from dit_video.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The checkpoints that stay: a checkpoint that any of the rules names.

    Raises:
      UserError: a number that is too small.
    """

    newest: int = 2
    """so many of the last; two at least, so that there is one to fall back to while another is damaged"""
    every: int | None = None
    """those whose step is a multiple of this, for ever"""
    best: int = 0
    """so many of the best by `metric`"""
    metric: str = "loss"
    """a name of the log, as it was when the checkpoint was saved; a mean over the steps since the entry before"""
    better: Literal["lower", "higher"] = "lower"

    def __post_init__(self) -> None:
        for name, least in (("newest", 1), ("best", 0)):
            if getattr(self, name) < least:
                raise UserError(f"keep {name} is at least {least}, not {getattr(self, name)}; give {least} or more")
        if self.every is not None and self.every < 1:
            raise UserError(f"keep every is at least 1, not {self.every}; leave it out to keep none for ever")


class Preservation:
    """`Keep` as a policy of Orbax, which is told the metrics by `metrics_of`: of a step, or None."""

    def __init__(self, keep: Keep, metrics_of: Callable[[int], Mapping[str, float] | None]) -> None:
        from orbax.checkpoint import checkpoint_managers as orbax  # which a config does without

        policies: list[orbax.PreservationPolicy] = [orbax.LatestN(keep.newest)]
        if keep.every is not None:
            policies.append(orbax.EveryNSteps(keep.every))
        if keep.best:
            policies.append(
                orbax.BestN(
                    get_metric_fn=lambda metrics: metrics[keep.metric],
                    reverse=keep.better == "lower",  # the best are the last
                    n=keep.best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._any = orbax.AnyPreservationPolicy(policies)
        self._keep = keep
        self._metrics_of = metrics_of

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Of the checkpoints, in the order of their steps."""
        informed = [
            SimpleNamespace(step=info.step, time=info.time, metrics=self._measured(info.step)) for info in checkpoints
        ]
        return self._any.should_preserve(informed, context=context)

    def _measured(self, step: int) -> Mapping[str, float] | None:
        if not self._keep.best:
            return None
        metrics = self._metrics_of(step)
        value = None if metrics is None else metrics.get(self._keep.metric)
        return metrics if value is not None and math.isfinite(value) else None

"""Goodput and badput of the whole run in each entry of a training's log."""

from collections.abc import Mapping

from dit_video.training.hooks.hook import Hook
from dit_video.training.time_recorder import TimeRecorder


class GoodputLog(Hook):
    """The metrics `goodput`, `badput_GROUP` and `run_seconds` of `training.goodput.compute_metrics`."""

    first_process_only = True

    def __init__(self, recorder: TimeRecorder) -> None:
        self._recorder = recorder

    def derive(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the shares of the time since the first start of the run."""
        del values
        return self._recorder.compute_metrics()

"""An experiment planned before it is paid for: its own steps, compiled for hardware that need not be there."""

from dit_video.planning.report import Plan, plan_experiment
from dit_video.planning.steps import Part
from dit_video.planning.suggest import suggest

__all__ = ["Part", "Plan", "plan_experiment", "suggest"]

"""Plans of experiments: their own steps, compiled for hardware that need not be present."""

from dit_video.planning.report import Plan, plan_experiment
from dit_video.planning.suggest import suggest

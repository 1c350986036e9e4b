"""Plans of experiments: their own steps, compiled for hardware that need not be present."""

from dit_video.planning.fit import FitResult, fit
from dit_video.planning.pipeline import PipelinePlan, fit_pipeline, plan_pipeline
from dit_video.planning.plan import Plan
from dit_video.planning.report import plan_experiment
from dit_video.planning.suggest import suggest

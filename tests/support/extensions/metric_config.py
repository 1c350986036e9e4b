"""The tiny experiment, evaluated by a metric of another package, too."""

import dataclasses
from pathlib import Path

from their_metric import MotionError

from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.metrics.reconstruction import Psnr
from dit_video.experiment.config_file import load_experiment

EVALUATION = CaptionEvaluation(trained=2, held_out=1, metrics=(Psnr(), MotionError(scale=2.0)))
EXPERIMENT = dataclasses.replace(load_experiment(Path(__file__).parents[1] / "tiny.py"), evaluation=EVALUATION)

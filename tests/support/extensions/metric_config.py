"""The tiny experiment, evaluated by a metric of another package, too."""

import dataclasses
import runpy
from pathlib import Path

from their_metric import MotionError

from dit_video.evaluation.config import CaptionEvaluation
from dit_video.evaluation.metrics.reconstruction import Psnr

TINY = runpy.run_path(str(Path(__file__).parents[1] / "tiny.py"))["EXPERIMENT"]
EVALUATION = CaptionEvaluation(trained=2, held_out=1, metrics=(Psnr(), MotionError(scale=2.0)))
EXPERIMENT = dataclasses.replace(TINY, evaluation=EVALUATION)

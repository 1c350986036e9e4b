"""Configurations of an evaluation: prompts to sample, and metrics."""

import abc
import functools
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, get_args

from dit_video.core.errors import UserError
from dit_video.evaluation.metrics.metric import Metric, MetricInput
from dit_video.evaluation.metrics.reconstruction import LinearPsnr, Psnr, Ssim
from dit_video.evaluation.requests import EvaluationClips, EvaluationRequest, make_caption_requests

RECONSTRUCTION_METRICS: tuple[Metric, ...] = (Psnr(), Ssim(), LinearPsnr())
"""Metrics of the autoencoder, for any clips."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(abc.ABC):
    """Base of the configs of an evaluation: a subclass says what is sampled, whatever the metrics are.

    Raises:
      UserError: If two metrics have a value of the same name, or one needs data that these prompts do not have.
    """

    metrics: tuple[Metric, ...] = RECONSTRUCTION_METRICS
    """Metrics to compute."""
    provides: ClassVar[frozenset[str]] = frozenset(get_args(MetricInput)) - {"scenes"}
    """Data that metrics may need."""
    example_prompt: ClassVar[str] = "a prompt"
    """Prompt in the commands that reports show."""

    def __post_init__(self):
        names = Counter(name for metric in self.metrics for name in metric.describe())
        if twice := [name for name, count in names.items() if count > 1]:
            raise UserError(f"metrics are invalid: two have a value {twice[0]!r}. Leave one out, or rename its value.")
        for metric in self.metrics:
            lacking = sorted({*metric.needs} - self.provides)
            if lacking or {*metric.needs} <= {"pipeline"}:
                rule = f"{type(self).__name__} has no {lacking[0]}" if lacking else "its needs name no examples"
                raise UserError(
                    f"metric {type(metric).__name__} is invalid: {rule}. Leave it out, or change its needs."
                )

    @abc.abstractmethod
    def make_requests(self, clips: EvaluationClips | None, seed: int, *, image: bool) -> list[EvaluationRequest]:
        """Return the requests to sample.

        Args:
          clips: Clips of the training run, if they are known.
          seed: Seed of the evaluation.
          image: True if every request needs a first frame.
        """


@dataclass(frozen=True, kw_only=True)
class CaptionEvaluation(Evaluation):
    """Evaluation on captions of training clips and held-out clips."""

    trained: int = 4
    """Number of different training captions, each sampled at its clip's size; the samples show memorisation."""
    held_out: int = 4
    """Number of different held-out captions."""

    def make_requests(self, clips: EvaluationClips | None, seed: int, *, image: bool) -> list[EvaluationRequest]:
        """Return requests for captions of the training clips, then of the held-out clips."""
        if clips is None:
            return []
        make = functools.partial(make_caption_requests, limits=clips.limits, seed=seed, use_first_frame=image)
        trained = make(clips.training, count=self.trained)
        held_out = make(clips.held_out, count=self.held_out, first_index=len(trained))
        return [each._replace(is_trained_caption=True) for each in trained] + held_out

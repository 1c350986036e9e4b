"""The evaluation that a training ends with by default: captions of its clips, and reconstructions."""

from dataclasses import dataclass

import numpy as np

from dit_video.core.errors import UserError
from dit_video.evaluation.clip_set import ClipSet
from dit_video.evaluation.metrics.metric import Metric
from dit_video.evaluation.metrics.reconstruction import LinearPsnr, Psnr, Ssim
from dit_video.evaluation.protocol import (
    EvaluationData,
    EvaluationItem,
    EvaluationProtocol,
    make_caption_item,
    make_item_seed,
)
from dit_video.sampling.pipeline import Pipeline

RECONSTRUCTION_METRICS: tuple[Metric, ...] = (Psnr(), Ssim(), LinearPsnr())
"""Metrics of the autoencoder, for any clips."""


@dataclass(frozen=True, kw_only=True)
class CaptionEvaluation(EvaluationProtocol):
    """Evaluation on captions of training clips and held-out clips."""

    name: str = "captions"
    metrics: tuple[Metric, ...] = RECONSTRUCTION_METRICS
    crf: int | None = None
    trained: int = 4
    """Number of different training captions, each sampled at its clip's size; the samples show memorisation."""
    held_out: int = 4
    """Number of different held-out captions."""
    may_only_sample = True
    provides = EvaluationProtocol.provides - {"scenes"}

    def make_items(self, pipeline: Pipeline, data: EvaluationData) -> list[EvaluationItem]:
        """Return captions of the training clips, then of the held-out clips.

        Raises:
          UserError: If no clip is known.
        """
        if data.training is None and not data.clips.names:
            raise UserError("there are no captions to sample; give clips captions, or sample prompts with sample.py")
        trained = [] if data.training is None else self._choose_captions(pipeline, data.training, self.trained)
        trained = [each._replace(is_trained_caption=True) for each in trained]
        return trained + self._choose_captions(pipeline, data.clips, self.held_out, first=len(trained))

    def _choose_captions(
        self, pipeline: Pipeline, clips: ClipSet, count: int, *, first: int = 0
    ) -> list[EvaluationItem]:
        """Return items of up to `count` different captions, spread over the clips, numbered from `first` on."""
        different: dict[str, int] = {}
        for index, caption in enumerate(clips.captions):
            if caption:
                different.setdefault(caption, index)
        positions = np.linspace(0, len(different) - 1, min(count, len(different))).round().astype(int)
        indices, size = list(different.values()), pipeline.config.size
        return [
            make_caption_item(pipeline, clips, indices[position], seed=make_item_seed(self.seed, number), size=size)
            for number, position in enumerate(positions.tolist(), first)
        ]

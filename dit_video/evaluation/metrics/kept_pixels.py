"""Fidelity of the pixels that a sample keeps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.evaluation.metrics.reconstruction import compute_limited_psnr


@dataclass(frozen=True, kw_only=True)
class KeptPixels(MeanMetric):
    """Mean PSNR of kept pixels below that of the autoencoder's own reconstruction of them."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "kept_psnr_loss"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="kept pixels below the reconstruction", unit="dB", decimals=2, is_higher_better=False, explanation="PSNR"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the loss of every sample that keeps pixels, and None for the others."""
        losses: list[float | None] = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if truth.is_known is None:
                losses.append(None)
                continue
            kept = truth.reference.frames[truth.is_known]
            best, own = (
                compute_limited_psnr(kept, other.frames[truth.is_known]) for other in (truth.reconstruction, clip)
            )
            losses.append(best - own)
        return losses

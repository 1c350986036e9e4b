"""Similarity of samples to their prompts by CLIP: CLIPSIM."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from dit_video.evaluation.feature_functions.clip import ClipEmbeddings
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription


@dataclass(frozen=True, kw_only=True)
class ClipSimilarity(MeanMetric):
    """Mean over samples of the cosine of CLIP's embeddings of their prompt and of each frame (arXiv 2104.14806)."""

    needs = ("samples", "prompts")
    name: ClassVar[str] = "clip_similarity"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="CLIPSIM",
        decimals=4,
        is_higher_better=True,
        explanation="mean cosine of CLIP's embeddings of the prompt and the frames (arXiv 2104.14806)",
    )
    embeddings: ClipEmbeddings = field(default_factory=ClipEmbeddings)
    """CLIP that embeds texts and frames."""

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the similarity of every sample."""
        parts = batch.extract(self.embeddings, "samples")
        texts = self.embeddings.open_texts()(batch.prompts)
        return [float((part @ text).mean(axis=0)) for part, text in zip(parts, texts, strict=True)]

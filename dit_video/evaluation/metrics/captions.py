"""Metrics of samples and their captions, by CLIP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float32

from dit_video.evaluation.feature_functions import ClipEmbeddings
from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MeanMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    compute_wilson_interval,
)


@dataclass(frozen=True, kw_only=True)
class ClipSimilarity(MeanMetric):
    """Mean over samples of the cosine between CLIP's embeddings of the prompt and of each frame (arXiv 2104.14806)."""

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


class EmbeddedSample(NamedTuple):
    """A sample's prompt, and the mean embedding of its frames, of length 1."""

    prompt: str
    embedding: Float32[np.ndarray, " P"]


@dataclass(frozen=True, kw_only=True)
class TextRetrieval(ExampleMetric[EmbeddedSample]):
    """Share of samples whose prompt is among the k nearest of all different prompts, by CLIP's embeddings."""

    needs = ("samples", "prompts")
    embeddings: ClipEmbeddings = field(default_factory=ClipEmbeddings)
    """CLIP that embeds texts and frames."""
    ranks: tuple[int, ...] = (1, 5)
    """Numbers of nearest prompts."""

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of each share."""
        return {
            f"recall_at_{rank}": MetricDescription(
                label=f"R@{rank}",
                unit="%",
                decimals=1,
                is_higher_better=True,
                explanation=f"samples whose prompt is among the {rank} most similar of all prompts by CLIP",
            )
            for rank in self.ranks
        }

    def measure(self, batch: MetricBatch) -> Sequence[EmbeddedSample]:
        """Return the embedding of every sample."""
        means = [frames.mean(axis=0) for frames in batch.extract(self.embeddings, "samples")]
        return [
            EmbeddedSample(prompt, mean / np.linalg.norm(mean))
            for prompt, mean in zip(batch.prompts, means, strict=True)
        ]

    def compute(self, state: tuple[EmbeddedSample, ...]) -> Mapping[str, MetricValue]:
        """Return the shares, with the number of prompts to choose from."""
        if not state:
            return {name: MetricValue(value=None, count=0) for name in self.describe()}
        prompts = list(dict.fromkeys(each.prompt for each in state))
        texts = self.embeddings.open_texts()(prompts)
        similarities = np.stack([each.embedding for each in state]) @ texts.T
        own = similarities[np.arange(len(state)), [prompts.index(each.prompt) for each in state]]
        # Equal similarities count against the sample, so that a model with a single embedding retrieves nothing.
        places = (similarities >= own[:, None]).sum(axis=1)
        note = f"of {len(prompts)} prompts; {self.embeddings.open().identity}"
        values = {}
        for rank, name in zip(self.ranks, self.describe(), strict=True):
            right = int((places <= rank).sum(axis=0))
            interval = compute_wilson_interval(right, len(state))
            values[name] = MetricValue(value=right / len(state), interval=interval, count=len(state), note=note)
        return values

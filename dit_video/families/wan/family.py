"""The family of Wan (arXiv 2503.20314), 2.1 and 2.2."""

import os
from pathlib import Path

from dit_video.families.family import Dtype, Family, PipelineParts
from dit_video.families.wan import pipeline
from dit_video.pipelines.pipeline import Pipeline
from dit_video.weights.parameter import Placement


class WanFamily(Family):
    """Wan 2.1 and 2.2: text to video and image to video, in diffusers' folders."""

    name = "wan"
    denoiser = pipeline.DENOISER
    parts = pipeline.PARTS
    pipeline_classes = pipeline.CLASSES

    def load_pipeline(
        self, folder: Path, *, text_encoder: str | os.PathLike | None, dtype: Dtype, place: Placement | None
    ) -> Pipeline:
        return pipeline.load_wan(folder, text_encoder=text_encoder, dtype=dtype, place=place)

    def read_parts(self, folder: Path) -> PipelineParts:
        return pipeline.read_parts(folder)

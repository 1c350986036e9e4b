"""The family of DiT (arXiv 2212.09748) and SiT (arXiv 2401.08740), class-conditional image models."""

import os
from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.families.dit import pipeline
from dit_video.families.family import Dtype, Family
from dit_video.pipelines.pipeline import Pipeline
from dit_video.weights.parameter import Placement


class DitFamily(Family):
    """DiT and SiT, in diffusers' folders or from their authors."""

    name = "dit"
    denoiser = pipeline.DENOISER
    parts = pipeline.PARTS
    pipeline_classes = (pipeline.CLASS,)

    def is_pipeline(self, folder: Path) -> bool:
        """Return True for a folder of diffusers, or of the authors' weights: a `transformer` next to a `vae`."""
        return super().is_pipeline(folder) or pipeline.is_authors_pipeline(folder)

    def load_pipeline(
        self, folder: Path, *, text_encoder: str | os.PathLike | None, dtype: Dtype, place: Placement | None
    ) -> Pipeline:
        if text_encoder is not None:
            raise UserError(f"{folder} is class-conditional and has no text encoder; leave out text_encoder")
        return pipeline.load_class_pipeline(folder, dtype=dtype, place=place)

"""VACE's pipelines, from diffusers' folders (`WanVACEPipeline`): Wan's with a task of their own."""

import os
from pathlib import Path

from dit_video.families.family import PipelineParts
from dit_video.families.vace.task import VaceTask
from dit_video.families.vace.transformer import VaceDenoiserFormat
from dit_video.families.wan.pipeline import WanFamily


class VaceFamily(WanFamily):
    """VACE (arXiv 2503.07598): Wan's text to video with control, masks and reference images, in diffusers' folders."""

    name = "vace"
    denoiser = VaceDenoiserFormat()
    pipeline_classes = ("WanVACEPipeline",)

    def read_parts(self, folder: Path, *, text_encoder: str | os.PathLike | None = None) -> PipelineParts:
        return super().read_parts(folder, text_encoder=text_encoder)._replace(task=VaceTask())

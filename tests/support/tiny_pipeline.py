"""A text-to-video pipeline of the tiny experiment's models, with random weights."""

from dataclasses import replace
from typing import Any

from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.tokens import Grid, PackedShape
from support import tiny
from support.random_params import make_random_params

SIZE = Grid(9, 16, 32)


def make_config(*, steps: int, **fields: Any) -> PipelineConfig:
    """Return the config of the pipeline, which samples in this many steps."""
    training = tiny.EXPERIMENT.denoiser
    return PipelineConfig(
        autoencoder=tiny.EXPERIMENT.autoencoder.model,
        backbone=training.backbone,
        text=training.text,
        process=training.objective.process,
        layout=PackedShape(tokens=24, text=96, segments=3),
        batch=2,
        sampling=replace(tiny.EXPERIMENT.sampling, steps=steps, guidance=1.5),
        fps=8.0,
        size=SIZE,
        **fields,
    )


def make_pipeline(config: PipelineConfig) -> Pipeline:
    """Return the pipeline of a config."""
    denoiser = {name: make_random_params(getattr(config, name).make) for name in ("backbone", "text")}
    return Pipeline(config, autoencoder=make_random_params(config.autoencoder.make), denoiser=denoiser)

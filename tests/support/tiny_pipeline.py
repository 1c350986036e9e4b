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
    layout = PackedShape(tokens=24, text=96, segments=3)
    return PipelineConfig(
        model=replace(tiny.EXPERIMENT.get_model(), layout=layout, fps=8.0),
        batch=2,
        sampling=replace(tiny.EXPERIMENT.sampling, steps=steps, guidance=1.5),
        size=SIZE,
        **fields,
    )


def read_captions_of_scenes(config: PipelineConfig) -> PipelineConfig:
    """Return the config of a pipeline that reads longer texts, with the same parameters."""
    encoder, layout = replace(config.model.text_encoder, max_tokens=256), replace(config.model.layout, text=512)
    return config.replace_model(text_encoder=encoder, layout=layout)


def make_pipeline(config: PipelineConfig) -> Pipeline:
    """Return the pipeline of a config."""
    return Pipeline(config, **make_params(config))


def make_params(config: PipelineConfig, seed: int = 0) -> dict[str, Any]:
    """Return random parameters of the models of a config, by the names of a pipeline's arguments."""
    model = config.model
    denoiser = {"backbone": model.backbone, "text": model.text_encoder}
    return {
        "autoencoder": make_random_params(model.autoencoder.make, seed),
        "denoiser": {name: make_random_params(part.make, seed) for name, part in denoiser.items()},
    }

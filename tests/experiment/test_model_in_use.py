"""Every field of a model's config changes its training and its sampling alike."""

import dataclasses

import numpy as np
import pytest

from dit_video.data.captions import TokenizedCaptions
from dit_video.data.latents.cache import LatentSource
from dit_video.data.latents.codec import LatentCodec
from dit_video.diffusion import Epsilon, RectifiedFlow
from dit_video.experiment import ModelConfig, Run, input_pipeline
from dit_video.experiment.denoiser import make_denoiser_loss
from dit_video.experiment.latents import make_encoding
from dit_video.models.conditioning import FrameConditioning
from dit_video.nn.partitioner import ONE_DEVICE
from dit_video.sampling import Sampling
from dit_video.sampling.pipeline_config import PipelineConfig, make_denoiser, make_model_parts
from dit_video.tokens import Grid
from support import tiny
from support.fakes import tokenize
from support.tiny_wan import write_animating_wan

MODEL = dataclasses.replace(
    tiny.EXPERIMENT.get_model(), fps=8.0, frame_conditioning=FrameConditioning(prob=0.5)
).replace_backbone(time="token", time_coordinate="seconds")

CHANGES = {
    "autoencoder": dataclasses.replace(MODEL.autoencoder, stride=Grid(2, 8, 8)),
    "backbone": MODEL.backbone.replace(width=32),
    "text_encoder": dataclasses.replace(MODEL.text_encoder, layers=2),
    "process": RectifiedFlow(shift=3.0),
    "prediction": Epsilon(),
    "layout": dataclasses.replace(MODEL.layout, tokens=16, text=64),
    "frame_conditioning": FrameConditioning(prob=0.25),
    "image_encoder": None,  # a folder that the test writes
    "fps": 4.0,
}


def see_training(run):
    """Return what the training of a run's denoiser uses of its model."""
    training, encoding = run.experiment.denoiser, make_encoding(run)
    loss = make_denoiser_loss(training, run.model, ONE_DEVICE, seed=0, empty_caption=np.zeros(1, np.int32))
    latents = LatentSource(run.folder / "latents")
    source = input_pipeline.make_latent_examples(run, latents, TokenizedCaptions(latents.all_captions, tokenize))
    rows = input_pipeline.open_rows(run, training, source, run.training_clips)(0)
    batch = next(rows)
    rows.close()
    return {
        "autoencoder": encoding.autoencoder,
        "backbone": loss.backbone,
        "text encoder": loss.text_encoder,
        "process": loss.objective.process,
        "prediction": loss.objective.prediction,
        "row": (batch.tokens.shape[1], batch.text.shape[1]),
        "frame conditioning": loss.frame_conditioning,
        "image encoder": encoding.image_identity,
        "time between tokens": float(source.table.token_dt.min()),  # that of videos
        "lead of tokens": source.table.token_lead,
        "multiple of sizes": run.limits.multiple,
    }


def see_sampling(model):
    """Return what the pipeline of a model uses of it."""
    config = PipelineConfig(model=model, batch=1, sampling=Sampling(), size=Grid(9, 16, 32))
    denoiser = make_denoiser(config, {}, tokenize, partitioner=ONE_DEVICE)
    parts = make_model_parts(config, LatentCodec(model.autoencoder, {}))
    return {
        "autoencoder": parts.codec.config,
        "backbone": denoiser.backbone,
        "text encoder": denoiser.text,
        "process": denoiser.process,
        "prediction": denoiser.prediction,
        "row": (model.row_shape.tokens, model.row_shape.text),
        "frame conditioning": parts.frame_conditioning,
        "image encoder": "" if model.image_encoder is None else parts.image_encoder.identity,
        "time between tokens": denoiser.token_dt,
        "lead of tokens": denoiser.token_lead,
        "multiple of sizes": model.size_multiple,
    }


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_a_field_changes_training_and_sampling_alike(field, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "read_autoencoder", lambda run: {})
    value = CHANGES[field]
    if field == "image_encoder":
        write_animating_wan(tmp_path)
        value = str(tmp_path)
    changed = dataclasses.replace(MODEL, **{field: value})
    assert changed != MODEL
    run = Run(folder=tiny_run, experiment=tiny.EXPERIMENT)
    before, training = (see_training(run.adapt(model=model)) for model in (MODEL, changed))
    assert before == see_sampling(MODEL)
    assert training == see_sampling(changed)
    assert training != before

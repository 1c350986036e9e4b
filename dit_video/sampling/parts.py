"""Parts of a pipeline, made from its config: the denoiser with its texts, and what generation tasks use."""

from typing import Any

from jax.sharding import Mesh

from dit_video.core.offload import Offload, streams_layers
from dit_video.data.latents.codec import LatentCodec
from dit_video.models.encoders import BatchTokenizer, Tokenizer
from dit_video.nn import get_graph_def
from dit_video.nn.parallel import Parallelism
from dit_video.sampling import Denoiser
from dit_video.sampling.pipeline_config import PipelineConfig
from dit_video.sampling.request import TaskModel


def make_denoiser(
    config: PipelineConfig,
    params: dict[str, Any],
    tokenizer: Tokenizer | BatchTokenizer,
    *,
    parallel: Parallelism,
    mesh: Mesh | None = None,
    offload: Offload | None = None,
) -> Denoiser:
    """Return a pipeline's denoiser.

    Args:
      config: the pipeline's config.
      params: parameters of its denoisers and of their text encoder, or their shapes.
      tokenizer: tokenizer or encoder of prompts.
      parallel: parallelism that the denoiser is made with.
      mesh: devices that sample together; None for one device.
      offload: weights in host memory; None for weights that stay on the devices.
    """
    return Denoiser(
        backbone=get_graph_def(config.backbone.make, parallel),
        text=get_graph_def(config.text.make),
        params=params,
        streams_layers=streams_layers(offload, "denoiser"),
        tokenizer=tokenizer,
        process=config.process,
        prediction=config.prediction,
        patch=config.backbone.patch,
        boundary=config.boundary,
        token_dt=config.token_dt,
        token_lead=config.token_lead,
        mesh=mesh,
    )


def make_task_model(config: PipelineConfig, codec: LatentCodec, *, offload: Offload | None = None) -> TaskModel:
    """Return the parts of a pipeline that generation tasks use; arguments are as for `make_denoiser`."""
    return TaskModel(
        backbone=config.backbone,
        codec=codec,
        frame_conditioning=config.frame_conditioning,
        image_encoder_folder=config.image_encoder,
        task=config.task,
        token_dt=config.token_dt,
        token_lead=config.token_lead,
        offload=offload,
    )

"""Checks of all weights in a pipeline's folder by the headers of their files, before any weight is read."""

from pathlib import Path

from dit_video.families.autoencoders import check_autoencoder_weights
from dit_video.families.denoiser_format import DenoiserFormat
from dit_video.families.family import PipelineParts
from dit_video.weights import load_clip_image_processor, read_clip_vision_config
from dit_video.weights.clip import check_clip_weights
from dit_video.weights.embedders import check_text_encoder


def check_pipeline_weights(folder: Path, parts: PipelineParts, denoiser: DenoiserFormat) -> None:
    """Check that all weights of a pipeline are there, complete, and fit its configs.

    Reading takes minutes and the text encoder is read at the first prompt, so that without this check a shard that is
    missing or cut would be noticed late.

    Args:
      folder: folder of the pipeline, with its denoiser in `transformer`, the second expert of two in `transformer_2`,
        and its autoencoder in `vae`.
      parts: its configs.
      denoiser: format of its denoisers.

    Raises:
      MissingError: files are missing, which are named.
      UserError: a file is cut, damaged or pickled, or tensors are missing, unexpected or of another shape.
    """
    for name in ("transformer",) if parts.boundary is None else ("transformer", "transformer_2"):
        denoiser.check_weights(folder / name)
    check_autoencoder_weights(folder / "vae")
    check_text_encoder(parts.text.folder)
    if parts.image_encoder is not None:
        check_clip_weights(parts.image_encoder, read_clip_vision_config(parts.image_encoder))
        load_clip_image_processor(parts.image_encoder)

"""Frozen encoders of a model, whose identities are recorded in the folder of a run."""

from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.models.encoders import FrozenTextConfig
from dit_video.models.model_config import ModelConfig
from dit_video.weights import read_clip_vision_config
from dit_video.weights.frozen_encoders import IDENTITY_FILE, check_width

TEXT_ENCODER_FILE = "text_encoder.json"
"""File with the identity of a frozen text encoder, in the folder of a run."""


def check_encoders(model: ModelConfig, folder: Path) -> None:
    """Check that the frozen encoders make tokens of the widths that the denoiser reads.

    Weights are not read. Nor is the folder of an encoder whose identity is recorded: a run continues without it.

    Args:
      model: The model.
      folder: Folder of the run.

    Raises:
      MissingError: If there is no encoder in a folder.
      UserError: If an encoder has another width.
    """
    if isinstance(model.text_encoder, FrozenTextConfig) and not (folder / TEXT_ENCODER_FILE).is_file():
        check_width(model.text_encoder)
    if model.image_encoder is None or (folder / IDENTITY_FILE).is_file():
        return
    encoder_width, width = read_clip_vision_config(model.image_encoder).width, model.backbone.image_width
    if encoder_width != width:
        raise UserError(
            f"the image encoder in {model.image_encoder} makes tokens of width {encoder_width}, the denoiser reads "
            f"{width}; set backbone image_width={encoder_width}, or name another folder"
        )

"""Frozen encoders of a model, whose identities are recorded in the folder of a run."""

from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.models.encoders import FrozenTextConfig, TextConfig, Tokenizer
from dit_video.models.model_config import ModelConfig
from dit_video.weights import read_clip_vision_config
from dit_video.weights.frozen_encoders import IDENTITY_FILE, FrozenTextEncoder, check_width, open_tokenizer

TEXT_ENCODER_FILE = "text_encoder.json"
"""File with the identity of a frozen text encoder, in the folder of a run."""


def open_text_encoder(config: TextConfig, folder: Path, *, cache: Path | None = None) -> Tokenizer | FrozenTextEncoder:
    """Return a text encoder. The identity of a frozen one is recorded in a folder, to be known without its weights."""
    return open_tokenizer(config, identity_file=folder / TEXT_ENCODER_FILE, cache=cache)


def check_encoders(model: ModelConfig, folder: Path) -> None:
    """Check the frozen encoders, until their identities are recorded; then a run continues without their folders.

    Raises:
      MissingError: If there is no encoder in a folder.
      UserError: If the encoder has another width than the config.
    """
    if isinstance(model.text_encoder, FrozenTextConfig) and not (folder / TEXT_ENCODER_FILE).is_file():
        check_width(model.text_encoder)
    check_image_encoder(model, folder / IDENTITY_FILE)


def check_image_encoder(model: ModelConfig, identity_file: Path) -> None:
    """Check that the image encoder, if there is one, makes tokens of the width that the denoiser reads.

    Its weights are not read, nor its folder once its identity is recorded.

    Raises:
      MissingError: If there is no encoder in the folder.
      UserError: If the encoder has another width.
    """
    folder, width = model.image_encoder, model.backbone.image_width
    if folder is None or identity_file.is_file():
        return
    if (encoder_width := read_clip_vision_config(folder).width) != width:
        raise UserError(
            f"the image encoder in {folder} makes tokens of width {encoder_width}, the denoiser reads {width}; set "
            f"backbone image_width={encoder_width}, or name another folder"
        )

"""Frozen encoders of an experiment, whose identities are recorded in the folder of the run."""

from pathlib import Path

from dit_video.core.errors import UserError
from dit_video.experiment.config import Experiment
from dit_video.experiment.runtime import Runtime
from dit_video.experiment.training_config import DenoiserTraining
from dit_video.models.encoders import FrozenTextConfig, Tokenizer
from dit_video.weights import read_clip_vision_config
from dit_video.weights.frozen_encoders import IDENTITY_FILE, FrozenTextEncoder, check_width, open_tokenizer

TEXT_ENCODER_FILE = "text_encoder.json"
"""File with the identity of a frozen text encoder, in the folder of a run."""


def open_text_encoder(
    experiment: Experiment, runtime: Runtime, *, cache: Path | None = None
) -> Tokenizer | FrozenTextEncoder:
    """Return the text encoder. The identity of a frozen one is recorded, to be known without its weights."""
    identity_file = runtime.folder / TEXT_ENCODER_FILE
    return open_tokenizer(experiment.denoiser.text, identity_file=identity_file, cache=cache)


def check_encoders(experiment: Experiment, runtime: Runtime) -> None:
    """Check the frozen encoders, until their identities are recorded; then a run continues without their folders.

    Raises:
      MissingError: If there is no encoder in a folder.
      UserError: If the encoder has another width than the config.
    """
    text = experiment.denoiser.text
    if isinstance(text, FrozenTextConfig) and not (runtime.folder / TEXT_ENCODER_FILE).is_file():
        check_width(text)
    check_image_encoder(experiment.denoiser, runtime.folder / IDENTITY_FILE)


def check_image_encoder(training: DenoiserTraining, identity_file: Path) -> None:
    """Check that the image encoder, if there is one, makes tokens of the width that the denoiser reads.

    Its weights are not read, nor its folder once its identity is recorded.

    Raises:
      MissingError: If there is no encoder in the folder.
      UserError: If the encoder has another width.
    """
    folder, width = training.image_encoder, training.backbone.image_width
    if folder is None or identity_file.is_file():
        return
    if (encoder_width := read_clip_vision_config(folder).width) != width:
        raise UserError(
            f"the image encoder in {folder} makes tokens of width {encoder_width}, the denoiser reads {width}; set "
            f"backbone image_width={encoder_width}, or name another folder"
        )

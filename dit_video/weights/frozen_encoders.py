"""Frozen encoders of text and images, opened from their folders; their weights are read at the first text or frame."""

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.config_json import to_json
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json, write_json
from dit_video.core.offload import Offload, streams_layers
from dit_video.models.encoders import ClassNamesConfig, Embedder, FrozenTextConfig, TextConfig, Tokenizer
from dit_video.models.features import FrameEncoder
from dit_video.models.features.clip import FeatureName
from dit_video.weights import (
    load_clip_image_processor,
    load_clip_vision,
    load_embedder,
    read_clip_vision_config,
    read_text_encoder_config,
)
from dit_video.weights.parameter import get_placement


@contextlib.contextmanager
def _explain_missing(fix: str) -> Iterator[None]:
    """Add what helps to the errors of files that are missing, as the encoder of a model may have moved."""
    try:
        yield
    except MissingError as error:
        raise MissingError(f"{error}. If the encoder has moved, use {fix}") from error


class FrozenTextEncoder:
    """A frozen text encoder, opened when the first text is embedded.

    Args:
      config: The encoder's config.
      cache: Folder of computed embeddings.
      offload: Weights in host memory; None for weights that stay on the device.
    """

    def __init__(
        self,
        config: FrozenTextConfig,
        *,
        cache: str | os.PathLike | None = None,
        offload: Offload | None = None,
    ):
        self.config, self._cache, self._offload = config, cache, offload

    @property
    def identity(self) -> str:
        """Return the identity that embeddings are stamped with; the encoder is opened unless the config has it."""
        return self.config.identity or self._embedder.identity

    @property
    def pinned_config(self) -> FrozenTextConfig:
        """Return the encoder's config with its identity."""
        return replace(self.config, identity=self.identity)

    def __call__(self, text: str) -> Float32[np.ndarray, "s E"]:
        """Return the embedding of a text: one vector for each of its tokens.

        Raises:
          UserError: If there is no such encoder, or it differs from the config's.
        """
        return self._embedder(text)

    def count_tokens(self, text: str) -> int:
        """Return the length of the embedding of a text."""
        return self._embedder.count_tokens(text)

    def encode_many(self, texts: Sequence[str]) -> list[Float32[np.ndarray, "s E"]]:
        """Return the embedding of each text; faster than one by one."""
        return self._embedder.embed_many(texts)

    @functools.cached_property
    def _embedder(self) -> Embedder:
        config = self.config
        with _explain_missing("text_encoder=FOLDER (--text-encoder FOLDER)"):
            check_width(config)
        embedder = load_embedder(
            config.folder,
            max_tokens=config.max_tokens,
            cleaned=config.cleaned,
            dtype=config.dtype,
            cache=self._cache,
            place=get_placement(self._offload),
            streams_layers=streams_layers(self._offload, "text"),
        )
        if config.identity not in ("", embedder.identity):
            raise UserError(
                f"{config.folder} holds the text encoder {embedder.identity}, {config.identity} was asked for; give "
                "the folder of that one (text_encoder=PATH)"
            )
        return embedder


def open_tokenizer(
    config: TextConfig,
    *,
    identity_file: Path | None = None,
    cache: str | os.PathLike | None = None,
    offload: Offload | None = None,
) -> Tokenizer | FrozenTextEncoder:
    """Return a tokenizer of captions to token ids or classes, or a frozen encoder of captions to embeddings.

    Args:
      config: The encoder's config.
      identity_file: File for the identity of a frozen encoder. It is written the first time; later the encoder must be
        the same, and its identity is known without reading its weights.
      cache: Folder for the embeddings of a frozen encoder.
      offload: Weights of a frozen encoder in host memory; None for weights that stay on the device.
    """
    if not isinstance(config, FrozenTextConfig):
        return config.make_tokenizer()
    if identity_file is not None and identity_file.is_file():
        return FrozenTextEncoder(
            replace(config, identity=read_json(identity_file)["identity"]), cache=cache, offload=offload
        )
    encoder = FrozenTextEncoder(config, cache=cache, offload=offload)
    if identity_file is not None:
        write_json(identity_file, {"identity": encoder.identity})
    return encoder


def check_width(config: FrozenTextConfig) -> None:
    """Check that the encoder in the folder has the config's width, without reading its weights.

    Raises:
      MissingError: If there is no encoder in the folder.
      UserError: If the encoder has another width.
    """
    width = read_text_encoder_config(config.folder).width
    if width != config.width:
        raise UserError(
            f"the text encoder in {config.folder} makes embeddings of width {width}, the config says {config.width}; "
            f"set text width={width} and backbone context_width={width}"
        )


def set_encoder_folder(config: TextConfig, folder: str | os.PathLike) -> FrozenTextConfig:
    """Return the config of a frozen text encoder in another folder.

    Raises:
      UserError: If the text encoder was trained with the denoiser, or there is none.
    """
    if isinstance(config, ClassNamesConfig):
        raise UserError(f"this model is class-conditional and has no text encoder; leave out text_encoder={folder}")
    if not isinstance(config, FrozenTextConfig):
        raise UserError(f"the text encoder was trained with the denoiser; leave out text_encoder={folder}")
    return replace(config, folder=os.path.abspath(folder))


IDENTITY_FILE = "image_encoder.json"
"""Name of the file in a run's folder that holds the identity of its image encoder."""
FEATURE: FeatureName = "penultimate"
"""Feature of a CLIP that denoisers read."""


class FrozenImageEncoder:
    """Image tokens of frames: the penultimate hidden states of a CLIP's vision tower, as in Wan's image-to-video.

    It is opened at the first frame.

    Args:
      folder: Folder of the tower, with its image settings in it or next to it, or of the pipeline that it is part of.
      identity: Identity of the tower and settings that the folder must hold; empty accepts any.
      offload: Weights in host memory; None for weights that stay on the device.
    """

    def __init__(self, folder: str | os.PathLike, *, identity: str = "", offload: Offload | None = None):
        self._folder, self._identity, self._offload = Path(folder), identity, offload

    @property
    def identity(self) -> str:
        """Return the identity that tokens are stamped with; the tower is read unless the identity was given."""
        return self._identity or self._encoder_and_identity[1]

    @functools.cached_property
    def shape(self) -> tuple[int, int]:
        """Return the number of tokens of a frame, and their width; only the tower's config is read.

        Raises:
          MissingError: If the folder does not exist, or lacks the config.
        """
        with _explain_missing("image_encoder=FOLDER (--image-encoder FOLDER)"):
            config = read_clip_vision_config(self._folder)
        return config.tokens, config.width

    def __call__(self, frames: UInt8[np.ndarray, "T H W 3"]) -> Float32[np.ndarray, "T i F"]:
        """Return the tokens of each frame.

        Raises:
          MissingError: If the folder does not exist, or lacks parts.
          UserError: If the folder holds another model, or not the same encoder as before.
        """
        return self._encoder_and_identity[0](frames)

    @functools.cached_property
    def _encoder_and_identity(self) -> tuple[FrameEncoder, str]:
        with _explain_missing("image_encoder=FOLDER (--image-encoder FOLDER)"):
            tower = load_clip_vision(self._folder, place=get_placement(self._offload))
        images = load_clip_image_processor(self._folder)
        parts = [to_json(tower.config), tower.digest, to_json(images)]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
        if self._identity not in ("", digest):
            raise UserError(
                f"{self._folder} holds the image encoder {digest}, {self._identity} was used before; put that one back"
            )
        return FrameEncoder(tower.config, tower.params, images, feature=FEATURE, batch=2), digest


def open_image_encoder(folder: str | os.PathLike, *, identity_file: Path) -> FrozenImageEncoder:
    """Open an image encoder and record its identity: later it must be the same, and is known without the weights.

    Raises:
      MissingError: If the folder does not exist, or lacks parts.
      UserError: If the folder holds another model.
    """
    if identity_file.is_file():
        return FrozenImageEncoder(folder, identity=read_json(identity_file)["identity"])
    encoder = FrozenImageEncoder(folder)
    write_json(identity_file, {"identity": encoder.identity})
    return encoder

"""From the config of a text encoder to what makes tokens of captions: opening a frozen one reads its weights."""

import functools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.core.files import read_json, write_json
from dit_video.text import ClassNamesConfig, Embedder, FrozenTextConfig, TextConfig, Tokenizer
from dit_video.weights import load_embedder, text_encoder_config


class FrozenEncoder:
    """A frozen text encoder, which is opened when the first text is embedded.

    Args:
      config: which encoder.
      cache: a folder for embeddings that were computed.
    """

    def __init__(self, config: FrozenTextConfig, *, cache: str | os.PathLike | None = None):
        self.config, self._cache = config, cache

    @property
    def identity(self) -> str:
        """What embeddings are stamped with. The encoder is opened for it if the config does not say it."""
        return self.config.identity or self._embedder.identity

    @property
    def pinned(self) -> FrozenTextConfig:
        """Its config with its identity."""
        return replace(self.config, identity=self.identity)

    def __call__(self, text: str) -> Float32[np.ndarray, "s E"]:
        """The embedding of a text: one vector for each of its tokens.

        Raises:
          UserError: there is no such encoder, or another one than the config says.
        """
        return self._embedder(text)

    def many(self, texts: Sequence[str]) -> list[Float32[np.ndarray, "s E"]]:
        """The embedding of each text; faster than one by one."""
        return self._embedder.many(texts)

    @functools.cached_property
    def _embedder(self) -> Embedder:
        config = self.config
        check_width(config)
        opened = load_embedder(
            config.folder,
            max_tokens=config.max_tokens,
            cleaned=config.cleaned,
            dtype=config.dtype,
            cache=self._cache,
        )
        if config.identity not in ("", opened.identity):
            raise UserError(
                f"{config.folder} holds the text encoder {opened.identity}, {config.identity} was asked for; give the "
                "folder of that one (text_encoder=PATH)"
            )
        return opened


def open_tokenizer(
    config: TextConfig, *, kept: Path | None = None, cache: str | os.PathLike | None = None
) -> Tokenizer | FrozenEncoder:
    """What makes token ids or classes of captions, or a frozen encoder, which makes embeddings.

    Args:
      config: of the encoder.
      kept: a file for the identity of a frozen one. It is written the first time; from then on the encoder must be the
        same, and its identity is known without reading its weights.
      cache: a folder for the embeddings of a frozen one.
    """
    if not isinstance(config, FrozenTextConfig):
        return config.tokenizer()
    if kept is not None and kept.is_file():
        return FrozenEncoder(replace(config, identity=read_json(kept)["identity"]), cache=cache)
    encoder = FrozenEncoder(config, cache=cache)
    if kept is not None:
        write_json(kept, {"identity": encoder.identity})
    return encoder


def check_width(config: FrozenTextConfig) -> None:
    """That the encoder in the folder has the config's width; its weights are not read.

    Raises:
      MissingError: no encoder there.
      UserError: it has another width.
    """
    found = text_encoder_config(config.folder).width
    if found != config.width:
        raise UserError(
            f"the text encoder in {config.folder} makes embeddings of width {found}, the config says {config.width}; "
            f"set text width={found} and dit context_width={found}"
        )


def moved(config: TextConfig, folder: str | os.PathLike) -> FrozenTextConfig:
    """The config of a frozen text encoder that lies in another folder now.

    Raises:
      UserError: the text encoder is one that was trained, or there is none.
    """
    if isinstance(config, ClassNamesConfig):
        raise UserError(f"a model of classes has no text encoder; leave {folder} away")
    if not isinstance(config, FrozenTextConfig):
        raise UserError(f"the text encoder was trained with the denoiser, it lies in no folder; leave {folder} away")
    return replace(config, folder=os.fspath(folder))

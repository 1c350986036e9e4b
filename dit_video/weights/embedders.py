"""Frozen text encoders of any kind with their tokenizers, ready to embed texts."""

import hashlib
import json
import os
from pathlib import Path

from dit_video.core.config_json import to_json
from dit_video.core.errors import MissingError, UserError
from dit_video.features import ClipTextConfig
from dit_video.text import TOKENIZER_FILES, Embedder, PretrainedTokenizer, T5Config, holds_tokenizer
from dit_video.weights.clip import TEXT_KINDS, LoadedClip, clip_text_config, load_clip_text
from dit_video.weights.folders import model_folder, transformers_config
from dit_video.weights.text_encoders import T5_KINDS, LoadedEncoder, load_text_encoder, t5_config

_PART = "text_encoder"
_WAN = 512


def load_embedder(
    folder: str | os.PathLike,
    *,
    max_tokens: int | None = None,
    cleaned: bool = False,
    dtype: str = "float32",
    cache: str | os.PathLike | None = None,
) -> Embedder:
    """An encoder and its tokenizer, ready to embed texts: a T5, a UMT5, or the text tower of a CLIP.

    Of a CLIP they are the values after the last norm; a text's last vector, the end token's, is its pooled embedding.

    Args:
      folder: a model of `transformers`, a pipeline's `text_encoder`, or the pipeline's own folder. The tokenizer
        lies in the encoder's folder, or beside it in `tokenizer` (in `tokenizer_2` for a `text_encoder_2`).
      max_tokens: a longer text is cut, with a warning; start and end tokens are included. By default the 512 of Wan,
        or the positions that a CLIP has, which are its most.
      cleaned: whether texts are cleaned first, as Wan's are (`text.clean`).
      dtype: of the matrix products and their weights, float32 or bfloat16.
      cache: a folder for embeddings, which other embedders and processes may share.

    Raises:
      MissingError: no encoder or no tokenizer there.
      UserError: a folder of another model, one that can't be read, or more tokens than the model has positions for.
    """
    folder = model_folder(folder, _PART)
    config = text_encoder_config(folder)
    most = config.positions if isinstance(config, ClipTextConfig) else None
    if max_tokens is None:
        max_tokens = most or _WAN
    if most is not None and max_tokens > most:
        raise UserError(
            f"the text encoder in {folder} has positions for {most} tokens, not for {max_tokens}; use max_tokens={most}"
        )
    # The tokenizer first: it is read in a second, the weights in minutes.
    tokenizer = PretrainedTokenizer(_tokenizer_folder(folder), max_tokens=max_tokens, cleaned=cleaned)
    encoder: LoadedEncoder | LoadedClip[ClipTextConfig]
    if isinstance(config, ClipTextConfig):
        encoder = load_clip_text(folder, dtype=dtype)
    else:
        encoder = load_text_encoder(folder, dtype=dtype)
    parts = [to_json(encoder.config), encoder.digest, tokenizer.identity, max_tokens]
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return Embedder(encoder.config, encoder.params, tokenizer, identity=identity, cache=cache)


def text_encoder_config(folder: str | os.PathLike) -> T5Config | ClipTextConfig:
    """The config of a folder's text encoder, without its weights.

    Raises:
      MissingError: no config there.
      UserError: another model, or a value that isn't known.
    """
    folder = model_folder(folder, _PART)
    kind, _ = transformers_config(folder / "config.json", "text encoders", (*T5_KINDS, *TEXT_KINDS))
    return t5_config(folder) if kind in T5_KINDS else clip_text_config(folder)


def _tokenizer_folder(encoder: Path) -> Path:
    beside = encoder.name.replace(_PART, "tokenizer") if encoder.name.startswith(_PART) else "tokenizer"
    places = (encoder, encoder.parent / beside)
    place = next(filter(holds_tokenizer, places), None)
    if place is None:
        raise MissingError(f"no {TOKENIZER_FILES} in {' or '.join(map(str, places))}; copy the model's there")
    return place

"""Frozen text encoders (T5, UMT5, CLIP) with their tokenizers, ready to embed texts."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dit_video.core.config_json import to_json
from dit_video.core.errors import MissingError, UserError
from dit_video.models.encoders import TOKENIZER_FILES, Embedder, PretrainedTokenizer, T5Config, has_tokenizer
from dit_video.models.features import ClipTextConfig
from dit_video.weights.clip import (
    CLIP_TEXT_MODEL_TYPES,
    check_clip_weights,
    load_clip_text,
    read_clip_text_config,
)
from dit_video.weights.folders import find_model_folder, read_transformers_config
from dit_video.weights.io import LoadedEncoder
from dit_video.weights.parameter import Placement, place_on_device
from dit_video.weights.text_encoders import T5_MODEL_TYPES, check_t5_weights, load_text_encoder, read_t5_config

_SUBFOLDER = "text_encoder"
_WAN_MAX_TOKENS = 512


def load_embedder(
    folder: str | os.PathLike,
    *,
    max_tokens: int | None = None,
    cleaned: bool = False,
    dtype: str = "float32",
    cache: str | os.PathLike | None = None,
    place: Placement = place_on_device,
    streams_layers: bool = False,
) -> Embedder:
    """Load a text encoder and its tokenizer: a T5, a UMT5, or the text tower of a CLIP.

    A CLIP's embeddings are the values after its last norm; the last vector, of the end token, is the pooled embedding.

    Args:
      folder: a model of `transformers`, a pipeline's `text_encoder`, or the pipeline's folder. The tokenizer is in the
        encoder's folder, or next to it in `tokenizer` (in `tokenizer_2` for a `text_encoder_2`).
      max_tokens: maximum length of a text, including start and end tokens; longer ones are cut with a warning. By
        default Wan's 512, or the number of positions of a CLIP, which is also its maximum.
      cleaned: clean texts first, as Wan does (`text.clean`).
      dtype: dtype of the matrix products and their weights, float32 or bfloat16.
      cache: folder for embeddings, which other embedders and processes may share.
      place: reads each parameter to its destination; those in host memory are copied to the device for each call.
      streams_layers: moves layers in host memory to the device one at a time.

    Raises:
      MissingError: the encoder or the tokenizer does not exist.
      UserError: the folder has another model or can't be read, or the model has fewer than `max_tokens` positions.
    """
    folder = find_model_folder(folder, _SUBFOLDER)
    config = read_text_encoder_config(folder)
    max_positions = config.positions if isinstance(config, ClipTextConfig) else None
    if max_tokens is None:
        max_tokens = max_positions or _WAN_MAX_TOKENS
    if max_positions is not None and max_tokens > max_positions:
        raise UserError(
            f"max_tokens={max_tokens} is invalid: the text encoder in {folder} has {max_positions} positions. "
            f"Use max_tokens={max_positions}"
        )
    # Errors of the tokenizer are raised first: it loads in a second, the weights in minutes.
    tokenizer = PretrainedTokenizer(find_tokenizer_folder(folder), max_tokens=max_tokens, cleaned=cleaned)
    load_encoder = load_clip_text if isinstance(config, ClipTextConfig) else load_text_encoder
    encoder: LoadedEncoder[Any] = load_encoder(folder, dtype=dtype, place=place)
    identity_parts = [to_json(encoder.config), encoder.digest, tokenizer.identity, max_tokens]
    identity = hashlib.sha256(json.dumps(identity_parts, sort_keys=True).encode()).hexdigest()[:32]
    options: dict[str, Any] = {"identity": identity, "cache": cache, "streams_layers": streams_layers}
    return Embedder(encoder.config, encoder.params, tokenizer, **options)


def read_text_encoder_config(folder: str | os.PathLike) -> T5Config | ClipTextConfig:
    """Read the config of a folder's text encoder, without its weights.

    Raises:
      MissingError: the config does not exist.
      UserError: the model type or a setting is not supported.
    """
    folder = find_model_folder(folder, _SUBFOLDER)
    path = folder / "config.json"
    kind, _ = read_transformers_config(path, "text encoders", (*T5_MODEL_TYPES, *CLIP_TEXT_MODEL_TYPES))
    return read_t5_config(folder) if kind in T5_MODEL_TYPES else read_clip_text_config(folder)


def check_text_encoder(folder: str | os.PathLike) -> None:
    """Check that a text encoder and its tokenizer are there, and that the weights fit its config, without reading them.

    `folder` and errors are those of `load_embedder`; the tokenizer's content is not checked.
    """
    folder = find_model_folder(folder, _SUBFOLDER)
    config = read_text_encoder_config(folder)
    find_tokenizer_folder(folder)
    if isinstance(config, ClipTextConfig):
        check_clip_weights(folder, config)
    else:
        check_t5_weights(folder, config)


def find_tokenizer_folder(encoder_folder: Path) -> Path:
    """Return the folder of a text encoder's tokenizer: its own, or the one next to it.

    Raises:
      MissingError: neither holds a tokenizer.
    """
    name = encoder_folder.name
    sibling = name.replace(_SUBFOLDER, "tokenizer") if name.startswith(_SUBFOLDER) else "tokenizer"
    candidates = (encoder_folder, encoder_folder.parent / sibling)
    folder = next(filter(has_tokenizer, candidates), None)
    if folder is None:
        raise MissingError(f"no {TOKENIZER_FILES} in {' or '.join(map(str, candidates))}. Copy the model's there")
    return folder

"""T5 and UMT5 encoders in folders of `transformers`, alone or within a pipeline of diffusers."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dit_video.core.config_json import to_json
from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import write_json
from dit_video.models.encoders import TOKENIZER_FILES, Embedder, PretrainedTokenizer, T5Config, has_tokenizer
from dit_video.models.features import ClipTextConfig
from dit_video.nn import get_param_shapes
from dit_video.weights.clip import CLIP_TEXT_MODEL_TYPES, check_clip_weights, load_clip_text, read_clip_text_config
from dit_video.weights.folders import TensorFolder, find_model_folder, read_transformers_config
from dit_video.weights.io import LoadedEncoder, check_tensors, read_encoder_params, write_params
from dit_video.weights.parameter import Placement, place_on_device
from dit_video.weights.tensor_map import SHARD_BYTES, TensorMap, TensorMapping

_EMBEDDING_NAMES = ("shared.weight", "encoder.embed_tokens.weight")
"""Names of the token embedding; a file has one or both."""
_IGNORED_PREFIXES = ("decoder.", "lm_head.")
"""Prefixes of the decoder's tensors in a full checkpoint, which are skipped."""
_FINAL_NORM = "encoder.final_layer_norm.weight"
_PER_LAYER = {
    "norm_attention/scale": "layer.0.layer_norm.weight",
    "query/kernel": "layer.0.SelfAttention.q.weight",
    "key/kernel": "layer.0.SelfAttention.k.weight",
    "value/kernel": "layer.0.SelfAttention.v.weight",
    "position/table": "layer.0.SelfAttention.relative_attention_bias.weight",
    "out/kernel": "layer.0.SelfAttention.o.weight",
    "norm_mlp/scale": "layer.1.layer_norm.weight",
    "gate/kernel": "layer.1.DenseReluDense.wi_0.weight",
    "up/kernel": "layer.1.DenseReluDense.wi_1.weight",
    "down/kernel": "layer.1.DenseReluDense.wo.weight",
}
"""Our names below `blocks/`, and theirs below `encoder.block.<layer>.`."""
_UNGATED_UP = "layer.1.DenseReluDense.wi.weight"
_POSITION_BIASES: dict[str, Literal["each layer", "shared"]] = {"t5": "shared", "umt5": "each layer"}
"""Position biases of the model types, their only difference."""
T5_MODEL_TYPES = tuple(_POSITION_BIASES)
_FIELDS = {
    "vocabulary": "vocab_size",
    "width": "d_model",
    "layers": "num_layers",
    "heads": "num_heads",
    "head_width": "d_kv",
    "mlp_width": "d_ff",
    "activation": "feed_forward_proj",
    "buckets": "relative_attention_num_buckets",
    "max_distance": "relative_attention_max_distance",
    "eps": "layer_norm_epsilon",
}
"""Our names of the config's fields, and theirs."""


def load_text_encoder(
    folder: str | os.PathLike, *, dtype: str = "float32", place: Placement = place_on_device
) -> LoadedEncoder[T5Config]:
    """Read the encoder of a `T5EncoderModel`, a `UMT5EncoderModel`, or a full T5 or UMT5 with its decoder.

    Tensors are read one at a time, so host memory holds little more than one of them besides the result. `dtype` is the
    dtype of the matrix products and their weights; scales and position biases are float32. (`transformers` keeps the
    MLP's second map in float32 only when it loads the others as float16, whose range is too small; bfloat16's
    suffices.) `place` reads each parameter to its destination.

    Raises:
      MissingError: If the config or the weights do not exist.
      UserError: If the model type is not supported, tensors do not fit the config, or files are pickled or damaged.
    """
    folder = find_model_folder(folder, "text_encoder")
    config = read_t5_config(folder, dtype=dtype)
    with TensorFolder(folder) as tensors:
        names, skipped = make_t5_tensor_map(tensors, config)
        shapes = get_param_shapes(config.make)
        params, digest = read_encoder_params(tensors, names, shapes, ignored=skipped, dtype=dtype, place=place)
        ignored = tuple(name for name in tensors.shapes if name.startswith(_IGNORED_PREFIXES))
    return LoadedEncoder(config, params, digest, ignored)


def check_t5_weights(folder: str | os.PathLike, config: T5Config) -> None:
    """Check by the files' headers that the weights in a folder are complete and fit a config.

    It raises as `load_text_encoder` does.
    """
    with TensorFolder(folder) as tensors:
        names, skipped = make_t5_tensor_map(tensors, config, is_compared=False)
        check_tensors(tensors, names, get_param_shapes(config.make), ignored=skipped)


def make_t5_tensor_map(
    tensors: TensorFolder, config: T5Config, *, is_compared: bool = True
) -> tuple[TensorMap, set[str]]:
    """Return the map of a folder's tensors, and the names of the tensors to skip.

    Args:
      tensors: The open folder.
      config: Config of the encoder.
      is_compared: False skips the comparison of an embedding that is stored under both names, which reads both tensors.

    Raises:
      UserError: If the embedding is stored under both names, with different values.
    """
    embedding = _find_embedding_name(tensors, is_compared=is_compared)
    decoder = {name for name in tensors.shapes if name.startswith(_IGNORED_PREFIXES)}
    return {**_map_encoder(config), "embedding": TensorMapping(embedding)}, {*decoder, *_EMBEDDING_NAMES} - {embedding}


def make_t5_export(config: T5Config) -> tuple[TensorMap, dict[str, Any]]:
    """Return the map of the tensors to write, and the content of `config.json`."""
    return {**_map_encoder(config), "embedding": TensorMapping(_EMBEDDING_NAMES[0])}, _make_their_config(config)


def read_t5_config(folder: str | os.PathLike, *, dtype: str = "float32") -> T5Config:
    """Read the config of a folder's encoder, without its weights and with the defaults of `transformers`.

    Raises:
      MissingError: If the config does not exist.
      UserError: If the model type or a setting is not supported.
    """
    path = find_model_folder(folder, "text_encoder") / "config.json"
    kind, theirs = read_transformers_config(path, "T5 encoders", T5_MODEL_TYPES)
    if theirs.feed_forward_proj not in ("gated-gelu", "relu"):
        raise UserError(f"{path} has feed_forward_proj={theirs.feed_forward_proj!r}. Supported are gated-gelu and relu")
    fields = {ours: getattr(theirs, name) for ours, name in _FIELDS.items()}
    return T5Config(**fields, position_bias=_POSITION_BIASES[kind], dtype=dtype)


def save_text_encoder(
    folder: str | os.PathLike,
    config: T5Config,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `transformers` loads as `T5EncoderModel` or `UMT5EncoderModel`, and `load_text_encoder` too.

    Args:
      folder: Destination; created if it does not exist.
      config: Config of the encoder.
      params: Its parameters.
      dtype: Dtype of all tensors in the file; None keeps theirs.
      shard_bytes: Maximum size of a file; larger ones are split, with an index.
    """
    names, document = make_t5_export(config)
    write_params(folder, "model", names, params, dtype=dtype, shard_bytes=shard_bytes)
    write_json(Path(folder) / "config.json", document)


def _map_encoder(config: T5Config) -> TensorMap:
    """Return the map of all parameters except the embedding."""
    names = {"norm/scale": TensorMapping(_FINAL_NORM)}
    per_layer = dict(_PER_LAYER)
    if config.activation == "relu":
        del per_layer["gate/kernel"]
        per_layer["up/kernel"] = _UNGATED_UP
    if config.position_bias == "shared":
        names["position/table"] = TensorMapping(f"encoder.block.0.{per_layer.pop('position/table')}")
    for path, name in per_layer.items():
        pattern = "o i -> i o" if path.endswith("kernel") else ""
        names[f"blocks/{path}"] = TensorMapping(f"encoder.block.{{}}.{name}", pattern, layers=config.layers)
    return names


def _find_embedding_name(tensors: TensorFolder, *, is_compared: bool) -> str:
    """Return the name of the token embedding in a folder.

    Raises:
      UserError: If the folder has both names, with different values.
    """
    present = [name for name in _EMBEDDING_NAMES if name in tensors.shapes]
    has_both = is_compared and len(present) == 2
    if has_both and not np.array_equal(tensors.read(present[0]), tensors.read(present[1])):
        raise UserError(f"{tensors.folder} has different values in {' and '.join(present)}, one tensor. Remove one")
    return present[0] if present else _EMBEDDING_NAMES[0]


def _make_their_config(config: T5Config) -> dict[str, Any]:
    kind = next(kind for kind, bias in _POSITION_BIASES.items() if bias == config.position_bias)
    fields = {theirs: getattr(config, ours) for ours, theirs in _FIELDS.items()}
    return {"architectures": [f"{kind.upper()}EncoderModel"], "model_type": kind, **fields}


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
      folder: A model of `transformers`, a pipeline's `text_encoder`, or the pipeline's folder. The tokenizer is in the
        encoder's folder, or next to it in `tokenizer` (in `tokenizer_2` for a `text_encoder_2`).
      max_tokens: Maximum length of a text, including start and end tokens; longer ones are cut with a warning. By
        default Wan's 512, or the number of positions of a CLIP, which is also its maximum.
      cleaned: Clean texts first, as Wan does (`text.clean`).
      dtype: Dtype of the matrix products and their weights, float32 or bfloat16.
      cache: Folder for embeddings, which other embedders and processes may share.
      place: Reads each parameter to its destination; those in host memory are copied to the device for each call.
      streams_layers: Moves layers in host memory to the device one at a time.

    Raises:
      MissingError: If the encoder or the tokenizer does not exist.
      UserError: If the folder has another model or can't be read, or the model has fewer than `max_tokens` positions.
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
      MissingError: If the config does not exist.
      UserError: If the model type or a setting is not supported.
    """
    folder = find_model_folder(folder, _SUBFOLDER)
    path = folder / "config.json"
    kind, _ = read_transformers_config(path, "text encoders", (*T5_MODEL_TYPES, *CLIP_TEXT_MODEL_TYPES))
    return read_t5_config(folder) if kind in T5_MODEL_TYPES else read_clip_text_config(folder)


def check_text_encoder(folder: str | os.PathLike) -> None:
    """Check that a text encoder and its tokenizer exist, and that the weights fit its config, without reading them.

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
      MissingError: If neither holds a tokenizer.
    """
    name = encoder_folder.name
    sibling = name.replace(_SUBFOLDER, "tokenizer") if name.startswith(_SUBFOLDER) else "tokenizer"
    candidates = (encoder_folder, encoder_folder.parent / sibling)
    folder = next(filter(has_tokenizer, candidates), None)
    if folder is None:
        raise MissingError(f"no {TOKENIZER_FILES} in {' or '.join(map(str, candidates))}. Copy the model's there")
    return folder

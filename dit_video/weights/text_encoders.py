"""T5 and UMT5 encoders from and to the folders of `transformers`, alone or within a pipeline of diffusers."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_video import tree as trees
from dit_video.configs import to_json
from dit_video.errors import MissingError, UserError
from dit_video.files import read_json, write_json
from dit_video.nn import param_shapes
from dit_video.text import Embedder, PretrainedTokenizer, T5Config, holds_tokenizer
from dit_video.weights.exchange import SHARD_BYTES, Foreign, write_foreign
from dit_video.weights.folders import TensorFolder
from dit_video.weights.safetensors import match

_EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")
"""one tensor under two names: a file has either, or both"""
_IGNORED = ("decoder.", "lm_head.")
"""a full checkpoint's other half, which nothing here is for"""
_ONCE = {"norm/scale": "encoder.final_layer_norm.weight"}
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
"""our names below `blocks/`, and theirs below `encoder.block.<layer>.`"""
_UNGATED_UP = "layer.1.DenseReluDense.wi.weight"
_BIASES: dict[str, Literal["each layer", "shared"]] = {"t5": "shared", "umt5": "each layer"}
"""what tells the model types apart"""


class LoadedEncoder(NamedTuple):
    """What a folder holds."""

    config: T5Config
    params: dict[str, Any]
    digest: str
    """of the tensors as they are stored, whatever files they lie in"""
    ignored: tuple[str, ...]
    """names of the tensors that were not read: those of the decoder, in a full checkpoint"""


def load_embedder(
    folder: str | os.PathLike,
    *,
    max_tokens: int = 512,
    dtype: str = "float32",
    cache: str | os.PathLike | None = None,
) -> Embedder:
    """An encoder and its tokenizer, ready to embed texts.

    Args:
      folder: a model of `transformers`, a pipeline's `text_encoder`, or the pipeline's own folder. The tokenizer
        lies in the encoder's folder or in `tokenizer` beside it.
      max_tokens: a longer text is cut, with a warning. Wan takes 512, the end token included.
      dtype: of the matrix products and their weights, float32 or bfloat16.
      cache: a folder for embeddings, which other embedders and processes may share.

    Raises:
      MissingError: no encoder or no tokenizer there.
      UserError: a folder of another model, or one that can't be read.
    """
    folder = _encoder_folder(Path(folder))
    places = (folder, folder.parent / "tokenizer")
    place = next(filter(holds_tokenizer, places), None)
    if place is None:
        raise MissingError(
            f"no tokenizer.json or spiece.model in {' or '.join(map(str, places))}; copy the model's there"
        )
    # The tokenizer first: it is read in a second, the weights in minutes.
    tokenizer = PretrainedTokenizer(place, max_tokens=max_tokens)
    encoder = load_text_encoder(folder, dtype=dtype)
    parts = [to_json(encoder.config), encoder.digest, tokenizer.identity, max_tokens]
    identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
    return Embedder(encoder.config, encoder.params, tokenizer, identity=identity, cache=cache)


def load_text_encoder(folder: str | os.PathLike, *, dtype: str = "float32") -> LoadedEncoder:
    """The encoder of a `T5EncoderModel`, a `UMT5EncoderModel`, or a full T5 or UMT5 with its decoder.

    Read tensor by tensor: host memory holds no more than one parameter of all layers at a time besides the result.
    `dtype` is that of the matrix products and of the weights that enter them; scales and position biases are float32.

    Raises:
      MissingError: no config or weights there.
      UserError: another model type, tensors that are not those of the config, pickles, or a damaged file.
    """
    folder = _encoder_folder(Path(folder))
    config = text_encoder_config(folder, dtype=dtype)
    shapes = param_shapes(config.make)
    names = _names(config)
    with TensorFolder(folder) as tensors:
        embedding = _embedding_name(tensors)
        names["embedding"] = [embedding]
        ignored = tuple(name for name in tensors.shapes if name.startswith(_IGNORED))
        wanted = {
            name: _their_shape(path, leaf.shape) for path, leaf in trees.flatten(shapes).items() for name in names[path]
        }
        left = {*ignored, *_EMBEDDINGS} - {embedding}
        match(folder, {name: shape for name, shape in tensors.shapes.items() if name not in left}, wanted)
        digest = hashlib.sha256()

        def read(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            stored = np.empty(leaf.shape, _stored(path, config))
            for index, name in enumerate(names[path]):
                tensor = tensors.read(name)
                _feed(digest, f"{path} {index}", tensor)
                stored[index if path.startswith("blocks/") else ...] = tensor.T if _transposed(path) else tensor
            # Waits: the host's copy is needed until it is on its device, and the next parameter's comes now.
            return jax.block_until_ready(jnp.asarray(stored))

        params = trees.map_with_path(read, shapes)
    return LoadedEncoder(config, params, digest.hexdigest(), ignored)


def text_encoder_config(folder: str | os.PathLike, *, dtype: str = "float32") -> T5Config:
    """The config of a folder's encoder, without its weights. What the file leaves out is what `transformers` takes.

    Raises:
      MissingError: no config there.
      UserError: another model type, or a value that isn't known.
    """
    path = _encoder_folder(Path(folder)) / "config.json"
    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in _BIASES:
        raise UserError(f"{path} has model_type {kind!r}; the text encoders known are {', '.join(_BIASES)}")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoConfig

    try:
        theirs = AutoConfig.for_model(**values)
    except Exception as error:  # its validation raises errors of several libraries
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is no config of a {kind} encoder ({reason}); copy or download it again") from error
    if theirs.feed_forward_proj not in ("gated-gelu", "relu"):
        raise UserError(f"{path} has feed_forward_proj {theirs.feed_forward_proj!r}; gated-gelu and relu are known")
    return T5Config(
        vocabulary=theirs.vocab_size,
        width=theirs.d_model,
        layers=theirs.num_layers,
        heads=theirs.num_heads,
        head_width=theirs.d_kv,
        mlp_width=theirs.d_ff,
        activation=theirs.feed_forward_proj,
        buckets=theirs.relative_attention_num_buckets,
        max_distance=theirs.relative_attention_max_distance,
        position_bias=_BIASES[kind],
        eps=theirs.layer_norm_epsilon,
        dtype=dtype,
    )


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
      folder: made if it isn't there.
      config: the encoder's.
      params: its parameters.
      dtype: of all tensors in the file; None writes them as they are.
      shard_bytes: what would be a larger file is split, with an index.
    """
    names = _names(config) | {"embedding": [_EMBEDDINGS[0]]}
    tensors: dict[str, np.ndarray] = {}
    for path, leaf in trees.flatten(params).items():
        array = np.asarray(leaf)
        for index, name in enumerate(names[path]):
            part = array[index if path.startswith("blocks/") else ...]
            tensors[name] = part.T if _transposed(path) else part
    same = {name: Foreign(name) for name in tensors}  # the layers are unstacked and turned above
    write_foreign(folder, "model", same, tensors, shard_bytes=shard_bytes, dtype=dtype)
    write_json(Path(folder) / "config.json", _their_config(config))


def _encoder_folder(folder: Path) -> Path:
    """The folder itself, or a pipeline's `text_encoder`."""
    inner = folder / "text_encoder"
    return inner if not (folder / "config.json").is_file() and inner.is_dir() else folder


def _names(config: T5Config) -> dict[str, list[str]]:
    """Their tensors by the path of our parameter, but for the embedding: one for each layer where ours are stacked."""
    names = {path: [name] for path, name in _ONCE.items()}
    per_layer = dict(_PER_LAYER)
    if config.activation == "relu":
        del per_layer["gate/kernel"]
        per_layer["up/kernel"] = _UNGATED_UP
    if config.position_bias == "shared":
        names["position/table"] = [f"encoder.block.0.{per_layer.pop('position/table')}"]
    for path, name in per_layer.items():
        names[f"blocks/{path}"] = [f"encoder.block.{layer}.{name}" for layer in range(config.layers)]
    return names


def _transposed(path: str) -> bool:
    """A linear map is [in, out] here and [out, in] there."""
    return path.endswith("kernel")


def _their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    shape = shape[1:] if path.startswith("blocks/") else shape
    return shape[::-1] if _transposed(path) else shape


def _stored(path: str, config: T5Config) -> np.dtype:
    return np.dtype(jnp.dtype(config.dtype) if path.endswith(("kernel", "embedding")) else np.float32)


def _embedding_name(tensors: TensorFolder) -> str:
    """The name that the token embedding has in a file.

    Raises:
      UserError: it has both names, with different values.
    """
    present = [name for name in _EMBEDDINGS if name in tensors.shapes]
    if len(present) == 2 and not np.array_equal(tensors.read(present[0]), tensors.read(present[1])):
        raise UserError(
            f"{tensors.folder} has different values in {' and '.join(present)}, which are one tensor; remove one"
        )
    return present[0] if present else _EMBEDDINGS[0]


def _feed(digest: Any, name: str, tensor: np.ndarray) -> None:
    digest.update(f"{name} {tensor.dtype} {tensor.shape} ".encode())
    digest.update(np.ascontiguousarray(tensor).view(np.uint8).data)


def _their_config(config: T5Config) -> dict[str, Any]:
    kind = next(kind for kind, bias in _BIASES.items() if bias == config.position_bias)
    return {
        "architectures": [f"{kind.upper()}EncoderModel"],
        "model_type": kind,
        "vocab_size": config.vocabulary,
        "d_model": config.width,
        "num_layers": config.layers,
        "num_heads": config.heads,
        "d_kv": config.head_width,
        "d_ff": config.mlp_width,
        "feed_forward_proj": config.activation,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.eps,
    }

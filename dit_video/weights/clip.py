"""CLIP's towers from and to the folders of `transformers`, alone, together, or within a pipeline of diffusers."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dit_video.core.errors import UserError
from dit_video.core.files import write_json
from dit_video.features.clip import ACTIVATIONS, ClipConfig, ClipTextConfig, ClipTower, ClipVisionConfig
from dit_video.nn import param_shapes
from dit_video.weights.folders import TensorFolder, model_folder, transformers_config
from dit_video.weights.io import read_encoder, write_foreign
from dit_video.weights.tensor_mapping import SHARD_BYTES, Foreign

_BOTH = "CLIPModel"
_TEXT, _VISION = ("CLIPTextModel", "CLIPTextModelWithProjection"), ("CLIPVisionModel", "CLIPVisionModelWithProjection")
_KINDS = {_BOTH: "clip"} | dict.fromkeys(_TEXT, "clip_text_model") | dict.fromkeys(_VISION, "clip_vision_model")
"""the model type of each class"""
TEXT_KINDS = ("clip", "clip_text_model")
"""the model types with a text tower"""
_TEXT_ROOT, _VISION_ROOT = "text_model.", "vision_model."
_DENSE = "o i -> i o"
_LINEAR = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_NORMS = {"norm_attention": "layer_norm1", "norm_mlp": "layer_norm2"}
"""our names below `blocks/`, and theirs below `encoder.layers.<layer>.`"""

Config = TypeVar("Config", ClipConfig, ClipTextConfig, ClipVisionConfig)


@dataclass(frozen=True, kw_only=True)
class LoadedClip(Generic[Config]):
    """What was read of a folder."""

    config: Config
    params: dict[str, Any]
    digest: str
    """of the tensors as they are stored, whatever files they lie in"""
    ignored: tuple[str, ...]
    """names of the tensors that were not read: the other tower's, and lists of positions that old folders have"""


def load_clip(folder: str | os.PathLike, *, dtype: str = "float32") -> LoadedClip[ClipConfig]:
    """Both towers of a `CLIPModel`.

    Read tensor by tensor. `dtype` is that of the matrix products and of the weights that enter them.

    Raises:
      MissingError: no config or weights there.
      UserError: another model class, tensors that are not those of the config, pickles, or a damaged file.
    """
    path, name, theirs = _open(Path(folder), [_BOTH])
    config = ClipConfig(text=_text_config(path, name, theirs, dtype), vision=_vision_config(path, name, theirs, dtype))
    return _read(path.parent, config, dtype)


def load_clip_text(folder: str | os.PathLike, *, dtype: str = "float32") -> LoadedClip[ClipTextConfig]:
    """The text tower of a `CLIPModel`, a `CLIPTextModel` or a `CLIPTextModelWithProjection`.

    `folder` may be a pipeline's, whose `text_encoder` is read; otherwise as `load_clip`.
    """
    folder = model_folder(folder, "text_encoder")
    return _read(folder, clip_text_config(folder, dtype=dtype), dtype)


def load_clip_vision(folder: str | os.PathLike, *, dtype: str = "float32") -> LoadedClip[ClipVisionConfig]:
    """The vision tower of a `CLIPModel`, a `CLIPVisionModel` or a `CLIPVisionModelWithProjection`.

    `folder` may be a pipeline's, whose `image_encoder` is read; otherwise as `load_clip`.
    """
    folder = model_folder(folder, "image_encoder")
    return _read(folder, clip_vision_config(folder, dtype=dtype), dtype)


def clip_text_config(folder: str | os.PathLike, *, dtype: str = "float32") -> ClipTextConfig:
    """The config of a folder's text tower, without its weights.

    Raises:
      MissingError: no config there.
      UserError: another model class, or a value that isn't known.
    """
    return _text_config(*_open(model_folder(folder, "text_encoder"), [_BOTH, *_TEXT]), dtype)


def clip_vision_config(folder: str | os.PathLike, *, dtype: str = "float32") -> ClipVisionConfig:
    """The config of a folder's vision tower, without its weights; raises as `clip_text_config`."""
    return _vision_config(*_open(model_folder(folder, "image_encoder"), [_BOTH, *_VISION]), dtype)


def save_clip(
    folder: str | os.PathLike,
    config: ClipConfig | ClipTextConfig | ClipVisionConfig,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a folder that `transformers` loads, and `load_clip`, `load_clip_text` or `load_clip_vision` too.

    Args:
      folder: made if it isn't there.
      config: of both towers, which are written as a `CLIPModel`, or of one, written with a projection if it has one.
      params: its parameters.
      dtype: of all tensors in the file; None writes them as they are.
      shard_bytes: what would be a larger file is split, with an index.
    """
    write_foreign(folder, "model", _names(config, nested=True), params, dtype=dtype, shard_bytes=shard_bytes)
    write_json(Path(folder) / "config.json", _their_config(config))


def _open(folder: Path, classes: Collection[str]) -> tuple[Path, str, Any]:
    """The path of a folder's config, the model's class, and the config as `transformers` reads it."""
    path = folder / "config.json"
    kind, theirs = transformers_config(path, "CLIP models", dict.fromkeys(_KINDS.values()))
    name = next(iter(theirs.architectures or ()), None)
    if not isinstance(name, str) or name not in classes or _KINDS[name] != kind:
        raise UserError(
            f"{path} is of the class {name} and model_type {kind!r}; those known here are "
            f"{', '.join(f'{known} ({_KINDS[known]!r})' for known in classes)}"
        )
    return path, name, theirs


def _text_config(path: Path, name: str, theirs: Any, dtype: str) -> ClipTextConfig:
    own = theirs.text_config if name == _BOTH else theirs
    if not isinstance(own.eos_token_id, int):
        raise UserError(f"{path} has eos_token_id {own.eos_token_id}, texts are pooled at one id; give that")
    return ClipTextConfig(
        **_tower(path, own, projection=None if name == _TEXT[0] else theirs.projection_dim, dtype=dtype),
        vocabulary=own.vocab_size,
        positions=own.max_position_embeddings,
        end_token=own.eos_token_id,
    )


def _vision_config(path: Path, name: str, theirs: Any, dtype: str) -> ClipVisionConfig:
    own = theirs.vision_config if name == _BOTH else theirs
    for field, value in (("image_size", own.image_size), ("patch_size", own.patch_size)):
        if not isinstance(value, int):
            raise UserError(f"{path} has {field} {value}; images and patches are squares here, of one number each")
    if own.num_channels != 3:
        raise UserError(f"{path} has num_channels {own.num_channels}; images are red, green and blue here: 3")
    return ClipVisionConfig(
        **_tower(path, own, projection=None if name == _VISION[0] else theirs.projection_dim, dtype=dtype),
        size=own.image_size,
        patch=own.patch_size,
    )


def _tower(path: Path, own: Any, *, projection: int | None, dtype: str) -> dict[str, Any]:
    if own.hidden_act not in ACTIVATIONS:
        raise UserError(f"{path} has hidden_act {own.hidden_act!r}; {' and '.join(ACTIVATIONS)} are known")
    return {
        "width": own.hidden_size,
        "layers": own.num_hidden_layers,
        "heads": own.num_attention_heads,
        "mlp_width": own.intermediate_size,
        "activation": own.hidden_act,
        "eps": own.layer_norm_eps,
        "projection": projection,
        "dtype": dtype,
    }


def _read(folder: Path, config: Config, dtype: str) -> LoadedClip[Config]:
    with TensorFolder(folder) as tensors:
        # A tower saved alone has its root in the names or not, by the version that wrote it.
        nested = any(name.startswith((_TEXT_ROOT, _VISION_ROOT)) for name in tensors.shapes)
        unread = [name for name in tensors.shapes if _unread(name, config)]
        params, digest = read_encoder(
            tensors,
            _names(config, nested=nested),
            param_shapes(config.make),
            ignored=unread,
            dtype=dtype,
        )
    return LoadedClip(config=config, params=params, digest=digest, ignored=tuple(unread))


def _unread(name: str, config: ClipConfig | ClipTextConfig | ClipVisionConfig) -> bool:
    """Whether a tensor is of no use to what is read."""
    if name.endswith("embeddings.position_ids"):  # 0, 1, 2, …
        return True
    text, vision = (_TEXT_ROOT, "text_projection."), (_VISION_ROOT, "visual_projection.")
    if isinstance(config, ClipTextConfig):
        return name.startswith((*vision, "logit_scale"))
    return isinstance(config, ClipVisionConfig) and name.startswith((*text, "logit_scale"))


def _names(config: ClipConfig | ClipTextConfig | ClipVisionConfig, *, nested: bool) -> dict[str, Foreign]:
    """Where each parameter lies; `nested` tells whether a tower's names start with its root."""
    if isinstance(config, ClipConfig):
        names: dict[str, Foreign] = {"logit_scale": Foreign("logit_scale")}
        for part, tower in (("text", config.text), ("vision", config.vision)):
            names |= {f"{part}/{path}": foreign for path, foreign in _names(tower, nested=nested).items()}
        return names
    if isinstance(config, ClipTextConfig):
        root = _TEXT_ROOT if nested else ""
        names = _norm("norm", f"{root}final_layer_norm")
        names["embedding"] = Foreign(f"{root}embeddings.token_embedding.weight")
        projection = "text_projection.weight"
    else:
        root = _VISION_ROOT if nested else ""
        names = _norm("norm_in", f"{root}pre_layrnorm") | _norm("norm_pooled", f"{root}post_layernorm")
        names["whole"] = Foreign(f"{root}embeddings.class_embedding")
        names["patch_kernel"] = Foreign(f"{root}embeddings.patch_embedding.weight", "o i h w -> h w i o")
        projection = "visual_projection.weight"
    names["position"] = Foreign(f"{root}embeddings.position_embedding.weight")
    names |= _layers(f"{root}encoder.layers.{{}}", config.layers)
    return names if config.projection is None else names | {"projection/kernel": Foreign(projection, _DENSE)}


def _norm(ours: str, theirs: str) -> dict[str, Foreign]:
    return {f"{ours}/scale": Foreign(f"{theirs}.weight"), f"{ours}/shift": Foreign(f"{theirs}.bias")}


def _layers(theirs: str, layers: int) -> dict[str, Foreign]:
    names: dict[str, Foreign] = {}
    for ours, name in _LINEAR.items():
        names[f"blocks/{ours}/kernel"] = Foreign(f"{theirs}.{name}.weight", _DENSE, layers=layers)
        names[f"blocks/{ours}/bias"] = Foreign(f"{theirs}.{name}.bias", layers=layers)
    for ours, name in _NORMS.items():
        names[f"blocks/{ours}/scale"] = Foreign(f"{theirs}.{name}.weight", layers=layers)
        names[f"blocks/{ours}/shift"] = Foreign(f"{theirs}.{name}.bias", layers=layers)
    return names


def _their_config(config: ClipConfig | ClipTextConfig | ClipVisionConfig) -> dict[str, Any]:
    if isinstance(config, ClipConfig):
        return {
            "architectures": [_BOTH],
            "model_type": _KINDS[_BOTH],
            "projection_dim": config.text.projection,
            "text_config": _their_tower(config.text),
            "vision_config": _their_tower(config.vision),
        }
    classes = _TEXT if isinstance(config, ClipTextConfig) else _VISION
    return {"architectures": [classes[config.projection is not None]], **_their_tower(config)}


def _their_tower(config: ClipTower) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp_width,
        "hidden_act": config.activation,
        "layer_norm_eps": config.eps,
    }
    if config.projection is not None:
        fields["projection_dim"] = config.projection
    if isinstance(config, ClipTextConfig):
        fields |= {"model_type": _KINDS[_TEXT[0]], "vocab_size": config.vocabulary}
        return fields | {"max_position_embeddings": config.positions, "eos_token_id": config.end_token}
    assert isinstance(config, ClipVisionConfig)
    return fields | {"model_type": _KINDS[_VISION[0]], "image_size": config.size, "patch_size": config.patch}

"""CLIP's towers in folders of `transformers`, alone, together, or within a pipeline of diffusers."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import read_json, write_json
from dit_video.models.features.clip import (
    ACTIVATIONS,
    ClipConfig,
    ClipImageProcessor,
    ClipTextConfig,
    ClipTowerConfig,
    ClipVisionConfig,
)
from dit_video.nn import get_param_shapes
from dit_video.weights.folders import (
    DENSE,
    TensorFolder,
    find_model_folder,
    map_linear,
    map_scale_and_shift,
    read_transformers_config,
)
from dit_video.weights.io import LoadedEncoder, check_tensors, read_encoder_params, write_params
from dit_video.weights.parameter import Placement, place_on_device
from dit_video.weights.tensor_map import SHARD_BYTES, TensorMap, TensorMapping

_FILE, _PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
"""Files of an image processor alone, and of one that was saved with a tokenizer."""
_SUBFOLDERS = ("image_processor", "feature_extractor")
"""Names of the image processor's folder in pipelines."""
_CLASSES = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_BICUBIC = 3
_DEFAULTS: dict[str, Any] = {
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": _BICUBIC,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(ClipImageProcessor().mean),
    "image_std": list(ClipImageProcessor().std),
}


def load_clip_image_processor(folder: str | os.PathLike) -> ClipImageProcessor:
    """Read the image preprocessing from a folder, a pipeline's folder, or next to a pipeline's `image_encoder`.

    Raises:
      MissingError: If there is no config of an image processor.
      UserError: If the class of the image processor or one of its settings is not supported.
    """
    path = _find_file(Path(folder))
    values = read_json(path)
    if isinstance(values, dict) and path.name == _PROCESSOR_FILE:
        values = values.get("image_processor")
    if not isinstance(values, dict):
        raise UserError(f"{path} has no settings of an image processor. Copy or download it again")
    name = values.get("image_processor_type") or values.get("feature_extractor_type")
    if name not in _CLASSES:
        raise UserError(f"{path} has an image processor of class {name}. Supported classes are {', '.join(_CLASSES)}")
    settings = {key: default if values.get(key) is None else values[key] for key, default in _DEFAULTS.items()}
    factor = settings["rescale_factor"]
    if not settings["do_rescale"] or not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
        raise UserError(f"{path} has do_rescale={settings['do_rescale']}, rescale_factor={factor}. Supported is 1/255")
    if settings["do_resize"] and settings["resample"] != _BICUBIC:
        raise UserError(f"{path} has resample={settings['resample']}. Only {_BICUBIC} (bicubic) is supported")
    normalized = settings["do_normalize"]
    return ClipImageProcessor(
        resize=_parse_resize(path, settings["size"]) if settings["do_resize"] else None,
        crop=_parse_crop(path, settings["crop_size"]) if settings["do_center_crop"] else None,
        mean=_parse_rgb(path, settings["image_mean"]) if normalized else (0.0, 0.0, 0.0),
        std=_parse_rgb(path, settings["image_std"]) if normalized else (1.0, 1.0, 1.0),
    )


def save_clip_image_processor(folder: str | os.PathLike, images: ClipImageProcessor) -> None:
    """Write `preprocessor_config.json`; the inverse of `load_clip_images`."""
    values: dict[str, Any] = {
        "image_processor_type": _CLASSES[0],
        **_DEFAULTS,
        "do_resize": images.resize is not None,
        "do_center_crop": images.crop is not None,
        "image_mean": list(images.mean),
        "image_std": list(images.std),
    }
    if isinstance(images.resize, tuple):
        values["size"] = dict(zip(("height", "width"), images.resize, strict=True))
    elif images.resize is not None:
        values["size"] = {"shortest_edge": images.resize}
    if images.crop is not None:
        values["crop_size"] = dict(zip(("height", "width"), images.crop, strict=True))
    write_json(Path(folder) / _FILE, values)


def _find_file(folder: Path) -> Path:
    places = [folder, *(folder / part for part in _SUBFOLDERS), *(folder.parent / part for part in _SUBFOLDERS)]
    paths = [place / file for place in places for file in (_FILE, _PROCESSOR_FILE)]
    processor_file = next((path for path in paths if path.is_file()), None)
    if processor_file is None:
        raise MissingError(
            f"{folder} has no {_FILE}, nor has {' or '.join(_SUBFOLDERS)} in or next to it. Copy it there"
        )
    return processor_file


def _parse_resize(path: Path, size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):  # Older versions have the size of the shorter side.
        return size
    if isinstance(size, Mapping) and {key for key, value in size.items() if value is not None} == {"shortest_edge"}:
        return int(size["shortest_edge"])
    return _parse_height_width(path, "size", size)


def _parse_crop(path: Path, size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else _parse_height_width(path, "crop_size", size)


def _parse_height_width(path: Path, name: str, size: Any) -> tuple[int, int]:
    if isinstance(size, Mapping) and {key for key, value in size.items() if value is not None} == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    raise UserError(f"{path} has {name}={size}. Supported are height and width and, for size, shortest_edge")


def _parse_rgb(path: Path, values: Any) -> tuple[float, float, float]:
    if not isinstance(values, list) or len(values) != 3 or not all(isinstance(value, int | float) for value in values):
        raise UserError(
            f"{path} has the mean or standard deviation {values}. Use a number each for red, green and blue"
        )
    return float(values[0]), float(values[1]), float(values[2])


_CLIP_CLASS = "CLIPModel"
_TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")
_VISION_CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection")
_MODEL_TYPES = (
    {_CLIP_CLASS: "clip"}
    | dict.fromkeys(_TEXT_CLASSES, "clip_text_model")
    | dict.fromkeys(_VISION_CLASSES, "clip_vision_model")
)
"""Model type of each model class."""
CLIP_TEXT_MODEL_TYPES = ("clip", "clip_text_model")
"""Model types with a text tower."""
_TEXT_ROOT, _VISION_ROOT = "text_model.", "vision_model."
_LINEAR = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
_NORMS = {"norm_attention": "layer_norm1", "norm_mlp": "layer_norm2"}
"""Our names below `blocks/`, and theirs below `encoder.layers.<layer>.`."""
_TOWER_FIELDS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "eps": "layer_norm_eps",
}
_TEXT_FIELDS = {"vocabulary": "vocab_size", "positions": "max_position_embeddings", "end_token": "eos_token_id"}
_VISION_FIELDS = {"size": "image_size", "patch": "patch_size"}
"""Our names and theirs for the config fields that both towers have, and for those that only one has."""

AnyClipConfig = ClipConfig | ClipTextConfig | ClipVisionConfig


def load_clip(folder: str | os.PathLike, *, dtype: str = "float32") -> LoadedEncoder[ClipConfig]:
    """Read both towers of a `CLIPModel`.

    Tensors are read one at a time. `dtype` is the dtype of the matrix products and their weights.

    Raises:
      MissingError: If the config or the weights do not exist.
      UserError: If the model class is not supported, tensors do not fit the config, or files are pickled or damaged.
    """
    path, name, theirs = _read_config(Path(folder), [_CLIP_CLASS])
    text = _parse_text_config(path, name, theirs, dtype)
    config = ClipConfig(text=text, vision=_parse_vision_config(path, name, theirs, dtype))
    return _read(path.parent, config, dtype)


def load_clip_text(
    folder: str | os.PathLike, *, dtype: str = "float32", place: Placement = place_on_device
) -> LoadedEncoder[ClipTextConfig]:
    """Read the text tower of a `CLIPModel`, a `CLIPTextModel` or a `CLIPTextModelWithProjection`.

    `folder` may be a pipeline's, whose `text_encoder` is read; otherwise as `load_clip`.
    """
    folder = find_model_folder(folder, "text_encoder")
    return _read(folder, read_clip_text_config(folder, dtype=dtype), dtype, place)


def load_clip_vision(
    folder: str | os.PathLike, *, dtype: str = "float32", place: Placement = place_on_device
) -> LoadedEncoder[ClipVisionConfig]:
    """Read the vision tower of a `CLIPModel`, a `CLIPVisionModel` or a `CLIPVisionModelWithProjection`.

    `folder` may be a pipeline's, whose `image_encoder` is read; otherwise as `load_clip`.
    """
    folder = find_model_folder(folder, "image_encoder")
    return _read(folder, read_clip_vision_config(folder, dtype=dtype), dtype, place)


def read_clip_text_config(folder: str | os.PathLike, *, dtype: str = "float32") -> ClipTextConfig:
    """Read the config of a folder's text tower, without its weights.

    Raises:
      MissingError: If the config does not exist.
      UserError: If the model class or a setting is not supported.
    """
    folder = find_model_folder(folder, "text_encoder")
    return _parse_text_config(*_read_config(folder, [_CLIP_CLASS, *_TEXT_CLASSES]), dtype)


def read_clip_vision_config(folder: str | os.PathLike, *, dtype: str = "float32") -> ClipVisionConfig:
    """Read the config of a folder's vision tower, without its weights; raises as `read_clip_text_config` does."""
    folder = find_model_folder(folder, "image_encoder")
    return _parse_vision_config(*_read_config(folder, [_CLIP_CLASS, *_VISION_CLASSES]), dtype)


def check_clip_weights(folder: str | os.PathLike, config: AnyClipConfig) -> None:
    """Check by the files' headers that the weights in a folder are complete and fit a config.

    It raises as `load_clip` does.
    """
    with TensorFolder(folder) as tensors:
        names, ignored = _map_tensors(tensors, config)
        check_tensors(tensors, names, get_param_shapes(config.make), ignored=ignored)


def save_clip(
    folder: str | os.PathLike, config: AnyClipConfig, params: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a folder that `transformers` loads, and `load_clip`, `load_clip_text` or `load_clip_vision` too.

    Args:
      folder: Destination; created if it does not exist.
      config: Config of both towers, written as a `CLIPModel`, or of one, written with a projection if it has one.
      params: Its parameters.
      shard_bytes: Maximum size of a file; larger ones are split, with an index.
    """
    write_params(folder, "model", _make_tensor_map(config, nested=True), params, shard_bytes=shard_bytes)
    write_json(Path(folder) / "config.json", _make_their_config(config))


def _read_config(folder: Path, classes: Collection[str]) -> tuple[Path, str, Any]:
    """Return the path of a folder's config, the model class, and the config as `transformers` reads it."""
    path = folder / "config.json"
    kind, theirs = read_transformers_config(path, "CLIP models", dict.fromkeys(_MODEL_TYPES.values()))
    name = next(iter(theirs.architectures or ()), None)
    if not isinstance(name, str) or name not in classes or _MODEL_TYPES[name] != kind:
        raise UserError(
            f"{path} has the class {name} and model_type={kind!r}. Supported are "
            f"{', '.join(f'{supported} ({_MODEL_TYPES[supported]!r})' for supported in classes)}"
        )
    return path, name, theirs


def _parse_text_config(path: Path, name: str, theirs: Any, dtype: str) -> ClipTextConfig:
    tower = theirs.text_config if name == _CLIP_CLASS else theirs
    if not isinstance(tower.eos_token_id, int):
        raise UserError(f"{path} has eos_token_id={tower.eos_token_id}, but pooling needs a single token id. Use one")
    projection = None if name == _TEXT_CLASSES[0] else theirs.projection_dim
    return ClipTextConfig(**_parse_tower(path, tower, _TEXT_FIELDS), projection=projection, dtype=dtype)


def _parse_vision_config(path: Path, name: str, theirs: Any, dtype: str) -> ClipVisionConfig:
    tower = theirs.vision_config if name == _CLIP_CLASS else theirs
    for field, value in (("image_size", tower.image_size), ("patch_size", tower.patch_size)):
        if not isinstance(value, int):
            raise UserError(f"{path} has {field}={value}. Only squares, given by one integer, are supported")
    if tower.num_channels != 3:
        raise UserError(f"{path} has num_channels={tower.num_channels}. Only RGB images, num_channels=3, are supported")
    projection = None if name == _VISION_CLASSES[0] else theirs.projection_dim
    return ClipVisionConfig(**_parse_tower(path, tower, _VISION_FIELDS), projection=projection, dtype=dtype)


def _parse_tower(path: Path, tower: Any, own_fields: Mapping[str, str]) -> dict[str, Any]:
    if tower.hidden_act not in ACTIVATIONS:
        raise UserError(f"{path} has hidden_act={tower.hidden_act!r}. Supported are {' and '.join(ACTIVATIONS)}")
    return {ours: getattr(tower, theirs) for ours, theirs in (*_TOWER_FIELDS.items(), *own_fields.items())}


def _read(folder: Path, config: Any, dtype: str, place: Placement = place_on_device) -> LoadedEncoder[Any]:
    with TensorFolder(folder) as tensors:
        names, ignored = _map_tensors(tensors, config)
        shapes = get_param_shapes(config.make)
        params, digest = read_encoder_params(tensors, names, shapes, ignored=ignored, dtype=dtype, place=place)
    return LoadedEncoder(config, params, digest, tuple(ignored))


def _map_tensors(tensors: TensorFolder, config: AnyClipConfig) -> tuple[TensorMap, list[str]]:
    """Return the map of a folder's tensors, and the names of the tensors to skip."""
    # Whether names in a tower that was saved alone start with the root depends on the version that wrote it.
    nested = any(name.startswith((_TEXT_ROOT, _VISION_ROOT)) for name in tensors.shapes)
    return _make_tensor_map(config, nested=nested), [name for name in tensors.shapes if _is_ignored(name, config)]


def _is_ignored(name: str, config: AnyClipConfig) -> bool:
    """Return True if a tensor is not to be read."""
    if name.endswith("embeddings.position_ids"):  # 0, 1, 2, …
        return True
    text, vision = (_TEXT_ROOT, "text_projection."), (_VISION_ROOT, "visual_projection.")
    if isinstance(config, ClipTextConfig):
        return name.startswith((*vision, "logit_scale"))
    return isinstance(config, ClipVisionConfig) and name.startswith((*text, "logit_scale"))


def _make_tensor_map(config: AnyClipConfig, *, nested: bool) -> dict[str, TensorMapping]:
    """Return the tensor map of a config; `nested` if the names of a single tower start with its root."""
    if isinstance(config, ClipConfig):
        names: dict[str, TensorMapping] = {"logit_scale": TensorMapping("logit_scale")}
        for part, tower in (("text", config.text), ("vision", config.vision)):
            names |= {f"{part}/{path}": foreign for path, foreign in _make_tensor_map(tower, nested=nested).items()}
        return names
    if isinstance(config, ClipTextConfig):
        root = _TEXT_ROOT if nested else ""
        names = map_scale_and_shift("norm", f"{root}final_layer_norm")
        names["embedding"] = TensorMapping(f"{root}embeddings.token_embedding.weight")
        projection = "text_projection.weight"
    else:
        root = _VISION_ROOT if nested else ""
        names = map_scale_and_shift("norm_in", f"{root}pre_layrnorm")
        names |= map_scale_and_shift("norm_pooled", f"{root}post_layernorm")
        names["whole"] = TensorMapping(f"{root}embeddings.class_embedding")
        names["patch_kernel"] = TensorMapping(f"{root}embeddings.patch_embedding.weight", "o i h w -> h w i o")
        projection = "visual_projection.weight"
    names["position"] = TensorMapping(f"{root}embeddings.position_embedding.weight")
    layer = f"{root}encoder.layers.{{}}"
    linear = {f"blocks/{ours}": f"{layer}.{theirs}" for ours, theirs in _LINEAR.items()}
    names |= map_linear(linear, layers=config.layers)
    for ours, theirs in _NORMS.items():
        names |= map_scale_and_shift(f"blocks/{ours}", f"{layer}.{theirs}", layers=config.layers)
    return names if config.projection is None else names | {"projection/kernel": TensorMapping(projection, DENSE)}


def _make_their_config(config: AnyClipConfig) -> dict[str, Any]:
    if isinstance(config, ClipConfig):
        return {
            "architectures": [_CLIP_CLASS],
            "model_type": _MODEL_TYPES[_CLIP_CLASS],
            "projection_dim": config.text.projection,
            "text_config": _make_their_tower(config.text),
            "vision_config": _make_their_tower(config.vision),
        }
    classes = _TEXT_CLASSES if isinstance(config, ClipTextConfig) else _VISION_CLASSES
    return {"architectures": [classes[config.projection is not None]], **_make_their_tower(config)}


def _make_their_tower(config: ClipTowerConfig) -> dict[str, Any]:
    is_text = isinstance(config, ClipTextConfig)
    fields = {theirs: getattr(config, ours) for ours, theirs in _TOWER_FIELDS.items()}
    if config.projection is not None:
        fields["projection_dim"] = config.projection
    fields["model_type"] = _MODEL_TYPES[_TEXT_CLASSES[0] if is_text else _VISION_CLASSES[0]]
    own_fields = _TEXT_FIELDS if is_text else _VISION_FIELDS
    return fields | {theirs: getattr(config, ours) for ours, theirs in own_fields.items()}

"""Conversion of models between file layouts, tensor by tensor.

Denoisers have the layout of diffusers, their authors' layout or the native one (`native_format`). Text encoders have
the layout of `transformers` or the native one. Autoencoders have the layout of diffusers or the native one; they are
small and converted in memory.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from dit_video.core.errors import MissingError, UserError
from dit_video.core.files import write_json
from dit_video.families.autoencoders import EXTERNAL_CLASSES as AUTOENCODERS
from dit_video.families.autoencoders import load_autoencoder, save_autoencoder
from dit_video.families.denoiser_format import FileLayout, open_files
from dit_video.families.denoisers import find_format, get_lora_modules, list_formats, read_denoiser_config
from dit_video.models.backbones.protocol import BackboneConfig
from dit_video.models.encoders import T5Config
from dit_video.nn import get_param_shapes
from dit_video.sampling.pipeline_config import CONFIG, read_pipeline_config
from dit_video.weights import folders, io, streaming
from dit_video.weights.folders import TensorFolder
from dit_video.weights.lora import add_module_prefix, get_native_modules, is_lora_file, load_lora, save_lora
from dit_video.weights.streaming import FileMap, FolderSource, ParamsSource
from dit_video.weights.tensor_map import SHARD_BYTES
from dit_video.weights.text_encoders import T5_MODEL_TYPES, make_t5_export, make_t5_tensor_map, read_t5_config

TargetLayout = Literal["diffusers", "authors", "dit_video"]


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    layout: TargetLayout,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a model's folder in another layout.

    Args:
      source: A folder with a `config.json`, or a file of a denoiser's authors.
      destination: A folder that does not exist or is empty.
      layout: Layout to write: `diffusers` (for a text encoder, the layout of `transformers`), `authors` for the model
        authors' layout, or `dit_video` for the native one.
      dtype: Dtype that floating tensors are cast to; None keeps the source's.
      shard_bytes: Maximum size of a file; larger ones are split, with an index.

    Raises:
      MissingError: If files of the source are missing.
      UserError: If the class is not supported (the supported ones are listed), the layout can't express the model, the
        weights do not fit, or the destination is not empty.
    """
    source, destination = Path(source), Path(destination)
    check_destination(destination)
    if is_lora_file(source):
        raise UserError(f"{source} is an adapter, whose names depend on its model. Name it: --model (convert_lora)")
    document = {} if source.is_file() else folders.read_document(source)
    kind, formats = str(document.get("_class_name") or document.get("model_type")), list_formats()
    if document:
        denoisers = [name for each in formats for name in each.layouts]
        supported = (*denoisers, *AUTOENCODERS, *T5_MODEL_TYPES, io.NATIVE_CLASS)
        folders.check_class(source, kind, supported)
    config = io.read_native_config(source, document) if kind == io.NATIVE_CLASS else None
    if kind in AUTOENCODERS or (config is not None and not isinstance(config, BackboneConfig | T5Config)):
        _convert_autoencoder(source, destination, document, layout, dtype, shard_bytes)
        return
    if kind in T5_MODEL_TYPES:
        opening = _open_text_encoder(source)
    else:
        opening = open_files(formats, source, config_class=BackboneConfig | T5Config)
    with opening as (config, parameters):
        _write(destination, config, parameters, layout, dtype, shard_bytes)


def convert_native_denoiser(
    file: Path,
    prefix: str,
    config: BackboneConfig,
    destination: str | os.PathLike,
    *,
    layout: TargetLayout,
    dtype: Any = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Convert the denoiser in a pipeline's file whose names begin with `prefix`, such as `backbone/`.

    The other arguments and the errors are those of `convert`.
    """
    destination = Path(destination)
    check_destination(destination)
    shapes = get_param_shapes(config.make)
    with TensorFolder(file.parent, stem=file.stem) as tensors:
        others = [name for name in tensors.shapes if not name.startswith(prefix)]
        source = FolderSource(tensors, FileMap.from_params(shapes, prefix), shapes, ignored=others)
        _write(destination, config, source, layout, dtype, shard_bytes)


def convert_lora(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    model: str | os.PathLike,
    *,
    layout: TargetLayout,
    dtype: Any = None,
) -> None:
    """Rename the tensors of a LoRA adapter to diffusers' (PEFT) names, the authors' (ComfyUI) or native ones.

    Args:
      source: A safetensors file, or a folder of PEFT or diffusers.
      destination: File to write.
      model: Folder of the transformer that the adapter changes, of its pipeline, or of a run; only a config is read.
      layout: Whose names to write.
      dtype: Dtype that factors are cast to; None keeps theirs.

    Raises:
      MissingError: If a file does not exist.
      UserError: If the destination exists or is no `.safetensors` file, the adapter belongs to another model, no family
        has LoRA files for the model, or the layout has no names for the adapter's full differences.
    """
    destination = Path(destination)
    if destination.suffix != ".safetensors" or destination.resolve().exists():
        raise UserError(f"{destination} exists or is no .safetensors file. Use a file that does not exist")
    config = _read_adapted_config(Path(model))
    primary_layout: FileLayout = "authors" if layout == "authors" else "diffusers"
    if not (modules := get_lora_modules(config, primary_layout=primary_layout)):
        raise UserError(f"{model} holds a {type(config).__name__}, whose family has no LoRA files; name another model")
    shapes = {"backbone": get_param_shapes(config.make)}
    theirs = add_module_prefix(modules, "backbone")
    lora = load_lora(source, shapes, get_native_modules(shapes) | theirs, dtype=None)
    written = get_native_modules(shapes) if layout == "dit_video" else theirs
    save_lora(destination, lora, written, style="comfyui" if layout == "authors" else "diffusers", dtype=dtype)


def _read_adapted_config(model: Path) -> BackboneConfig:
    """Read the config of the denoiser in its own folder or file, a pipeline's or a run's.

    Raises:
      MissingError: If there is none.
    """
    folder = folders.find_model_folder(model, "transformer")
    if folder.is_file() or (folder / "config.json").is_file():
        return read_denoiser_config(folder)
    own = next((each for each in (model, model / "pipeline") if (each / CONFIG).is_file()), None)
    if own is None:
        rule = f"it has neither config.json of a transformer nor {CONFIG} of a pipeline or a run"
        raise MissingError(f"model={model} is invalid: {rule}. Use the folder of the model that the adapter changes")
    return read_pipeline_config(own).model.backbone


def check_destination(folder: Path) -> None:
    """Raise UserError if a destination exists and is not an empty folder."""
    resolved = folder.resolve()  # otherwise new/../old does not exist until new is made
    if resolved.exists() and not (resolved.is_dir() and not any(resolved.iterdir())):
        raise UserError(f"{folder} exists and is not empty. Use a folder that does not exist")


@contextlib.contextmanager
def _open_text_encoder(folder: Path) -> Iterator[tuple[Any, FolderSource]]:
    config = read_t5_config(folder)
    with TensorFolder(folder, stem="model") as tensors:
        tensor_map, ignored = make_t5_tensor_map(tensors, config)
        shapes = get_param_shapes(config.make)
        yield config, FolderSource(tensors, FileMap.from_tensor_map(tensor_map), shapes, ignored=ignored)


def _write(folder: Path, config: Any, source: FolderSource, layout: TargetLayout, dtype: Any, shard_bytes: int) -> None:
    """Write a denoiser or a text encoder."""
    if layout == "dit_video":
        io.write_native(folder, config, source, dtype=dtype, shard_bytes=shard_bytes)
        return
    if isinstance(config, T5Config):
        if layout == "authors":
            raise UserError("text encoders have no authors' layout. Use diffusers (that of transformers) or dit_video")
        tensor_map, document = make_t5_export(config)
        file_map, stem = FileMap.from_tensor_map(tensor_map), "model"
    else:
        if (denoiser_format := find_format(config)) is None:
            raise UserError(f"no family has files for a {type(config).__name__}. Use dit_video")
        document = denoiser_format.make_document(config, layout)
        file_map, stem = denoiser_format.make_file_map(config, layout), folders.STEM
    shapes = get_param_shapes(config.make)
    streaming.write(folder, stem, source, file_map, shapes, dtype=dtype, shard_bytes=shard_bytes)
    write_json(folder / "config.json", document)


def _convert_autoencoder(
    folder: Path, destination: Path, document: dict[str, Any], layout: TargetLayout, dtype: Any, shard_bytes: int
) -> None:
    """Convert an autoencoder between diffusers' and the native layout."""
    if layout == "authors":
        raise UserError("the authors' layout of autoencoders is not supported. Use diffusers or dit_video")
    if document["_class_name"] == io.NATIVE_CLASS:
        config = io.read_native_config(folder, document)
        params = io.read_native(folder, config, dtype_fn=lambda path: None)
    else:
        config, params = load_autoencoder(folder)
    if dtype is not None:
        # The latents' normalisation keeps its precision, as diffusers stores it in the settings.
        normalizer = params["normalizer"]
        shapes = get_param_shapes(config.make)
        params = streaming.read(ParamsSource(params), shapes, dtype_fn=lambda path: dtype)
        params["normalizer"] = normalizer
    if layout == "dit_video":
        io.write_native(destination, config, ParamsSource(params), shard_bytes=shard_bytes)
    else:
        save_autoencoder(destination, config, params, shard_bytes=shard_bytes)

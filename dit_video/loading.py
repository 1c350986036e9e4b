"""Loading of a pipeline from a folder, or from a name on the Hugging Face hub."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dit_video.core.errors import MissingError, UserError, check_devices
from dit_video.core.offload import Layers, Offload, Stages
from dit_video.core.storage import convert_storage_errors, is_remote, restore_address, to_storage_path
from dit_video.distributed import Parallelism
from dit_video.families.denoisers import get_lora_modules
from dit_video.families.family import DEFAULT_DTYPE, INDEX, Dtype, LoadOptions
from dit_video.families.registry import check_folder, find_family, list_families, make_unknown_error
from dit_video.nn import Backend
from dit_video.sampling.loading import load_pipeline
from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.pipeline_config import (
    CONFIG,
    RUN_CONFIG,
    PipelineConfig,
    is_pipeline_folder,
    read_pipeline_config,
)
from dit_video.weights import read_clip_vision_config
from dit_video.weights.frozen_encoders import set_encoder_folder
from dit_video.weights.parameter import Placement

_HUB_ENDINGS = ("json", "safetensors", "model")
"""Endings of the files that are downloaded from the hub."""


def load(
    path: str | Path,
    *,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    dtype: Dtype | None = None,
    text_dtype: Dtype | None = None,
    offload: Offload | Literal["auto"] | None = "auto",
    place: Placement | None = None,
    parallel: Parallelism | None = None,
    attention: Backend | None = None,
    step: int | None = None,
    ema: float | int | None = None,
    sigma_rel: float | None = None,
) -> Pipeline:
    """Load the pipeline of a run folder, a pipeline folder, or a folder of open weights.

    An unfinished run gives the averaged weights of its newest checkpoint; its clips are not needed, and nothing is
    trained. `step` names another checkpoint, of a finished run, too. Each model of a run of several has a run in its
    folder, `RUN/MODEL`; the run itself gives the models that it joins.

    Args:
      path: A folder; or the name of one on the Hugging Face hub, such as `Wan-AI/Wan2.1-T2V-1.3B-Diffusers`, which is
        downloaded once into the cache of `huggingface_hub`.
      text_encoder: Folder of the model's frozen text encoder, if it has moved.
      image_encoder: Folder of the model's image encoder, if it has moved.
      dtype: Open weights only: dtype of the denoiser's matrix products and of their weights, bfloat16 by default. All
        other weights, and the autoencoder, are in float32.
      text_dtype: Open weights only: dtype of the text encoder; by default the denoiser's.
      offload: `Stages()` or `Layers()` for weights in host memory that are copied to the devices when they are used;
        None for weights that stay on the devices. By default, on one GPU or TPU, `Stages()` for open weights and for
        models with two experts, or `Layers()` of parts whose weights do not fit on the device; None for other models
        and elsewhere.
      place: Open weights only: function that places each parameter, given its path: `backbone/…`, `low_noise/…` of a
        second expert, `autoencoder/…`; for devices `lambda path, parameter: parameter.to_device(SHARDING)`.
      parallel: Devices that sample together, such as `Parallelism(data=1, context=4)`; None for one device. The
        denoiser's weights are sharded as in training, and clips, branches of guidance, tokens and heads are divided
        among the devices. In a run of several processes all of them load and sample.
      attention: Backend of attention, by name or as its settings, instead of the model's own; `auto` takes the best one
        for the devices.
      step: Runs only: step of the checkpoint, of joined models that of the last one; None for the finished pipeline, or
        the newest checkpoint.
      ema: Runs only: decay of another average that the run keeps, at that checkpoint or the newest; 0 for the weights
        without an average.
      sigma_rel: Runs only: relative width of an average that is reconstructed from the run's snapshots.

    Raises:
      MissingError: If the folder does not exist here or on the hub or lacks parts, or if there is no checkpoint of this
        step.
      UserError: If the folder has no pipeline, or one of another version or of an unknown class, if the text encoder is
        not frozen or there is no image encoder, if the hub cannot be reached, if `parallel` does not fit the devices or
        the denoiser, if the denoiser does not support the attention or the devices lack its kernels, if a run of
        several models does not join them, or if the weights do not fit into the memory of the device or of the machine,
        which is said before any is read.
    """
    check_devices()
    folder = find_folder(path)
    if place is not None and (parallel is not None or isinstance(offload, Stages | Layers)):
        raise UserError("place is invalid beside parallel or offload, which place the weights. Use one of them.")
    if (family := find_family(folder)) is not None:
        options = LoadOptions(
            text_encoder=text_encoder,
            dtype=dtype or DEFAULT_DTYPE,
            text_dtype=text_dtype,
            place=place,
            parallel=parallel,
            offload=offload,
        )
        pipeline = _set_image_encoder(family.load_pipeline(folder, options), image_encoder)
        return pipeline if attention is None else pipeline.with_attention(attention)
    inner = next(filter(is_pipeline_folder, (folder, folder / "pipeline")), None)
    is_run = (folder / RUN_CONFIG).is_file()
    if inner is None and not is_run:
        raise make_unknown_error(folder)
    if not (dtype is None and text_dtype is None and place is None):
        raise UserError(f"dtype, text_dtype and place are for open weights; {folder} has no {INDEX}, leave them out")
    chosen = [name for name, value in {"step": step, "ema": ema, "sigma_rel": sigma_rel}.items() if value is not None]
    if chosen and not is_run:
        raise UserError(f"{folder} is not a run and has one set of weights; leave out {' and '.join(chosen)}")
    if inner is not None and not chosen:
        pipeline = load_pipeline(
            inner,
            text_encoder=text_encoder,
            get_lora_modules=get_lora_modules,
            parallel=parallel,
            attention=attention,
            offload=offload,
            run_folder=folder,
        )
        return _set_image_encoder(pipeline, image_encoder)
    # Imported here: sampling a finished pipeline needs nothing of what training imports.
    from dit_video.experiment.run import Run
    from dit_video.experiment.several_models import find_join, open_sampled_run

    run = Run.open(folder)
    if (join := find_join(run.experiment)) is not None:

        def load_model(name: str) -> Pipeline:
            options: dict[str, Any] = {"parallel": parallel, "attention": attention, "offload": offload}
            if name == join.last:
                options |= {"text_encoder": text_encoder, "image_encoder": image_encoder}
                options |= {"step": step, "ema": ema, "sigma_rel": sigma_rel}
            return load(folder / name, **options)

        return join.join(load_model)
    run = open_sampled_run(run)
    if attention is not None:
        run = replace(run, experiment=run.experiment.replace_backbone(attention=attention))
    pipeline = run.newest_pipeline(step=step, ema=ema, sigma_rel=sigma_rel, parallel=parallel, offload=offload)
    pipeline = _set_image_encoder(pipeline, image_encoder)
    return pipeline if text_encoder is None else pipeline.with_text_encoder(text_encoder)


def _set_image_encoder(pipeline: Pipeline, folder: str | Path | None) -> Pipeline:
    return pipeline if folder is None else pipeline.replace(config=_move_image_encoder(pipeline.config, folder))


def _move_image_encoder(config: PipelineConfig, folder: str | Path) -> PipelineConfig:
    """Return the config with the image encoder in another folder.

    Raises:
      MissingError: If the folder has none.
      UserError: If the model has none, or one of another width.
    """
    if config.model.image_encoder is None:
        raise UserError(f"image_encoder={folder} is invalid: this model has no image encoder. Leave it out.")
    width, own_width = read_clip_vision_config(folder).width, config.model.backbone.image_width
    if width != own_width:
        rule = f"it makes tokens of width {width}, the denoiser reads {own_width}"
        raise UserError(f"image_encoder={folder} is invalid: {rule}. Use the image encoder of its training.")
    return config.replace_model(image_encoder=os.path.abspath(folder))


def _read_joined_config(folder: Path) -> PipelineConfig | None:
    """Return the config of an unfinished run that joins several models; None for another folder."""
    from dit_video.experiment.checkpoints import find_sampled_model

    if "/" not in find_sampled_model(folder):
        return None
    from dit_video.experiment.run import Run
    from dit_video.experiment.several_models import find_join

    join = find_join(Run.open(folder).experiment)
    last = None if join is None else read_config(folder / join.last)
    return None if join is None or last is None else join.join_config(last)


def find_folder(path: str | Path) -> Path:
    """Return a folder, or the local copy of one at an address or on the Hugging Face hub, downloading it if needed.

    Raises:
      MissingError: If the folder does not exist here or on the hub, or cannot be downloaded.
      UserError: If it is a file, or the pipeline on the hub is of an unknown class.
    """
    if is_remote(address := restore_address(path)):
        return _fetch(address)
    folder = Path(path)
    # A name on the hub has two parts, and the first is not a folder here.
    if not folder.parent.exists() and re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)):
        folder = _download(str(path))
    check_folder(folder)
    return folder


def _fetch(address: str) -> Path:
    """Return the local copy of a run at an address, or of one that is nested in it."""
    from dit_video.experiment.remote_folder import MANIFEST, RemoteFolder, get_local_copy

    place: Any = to_storage_path(address)
    with convert_storage_errors(address):
        run = next((each for each in (place, *place.parents) if (each / MANIFEST).exists()), None)
        if run is None:
            raise MissingError(f"no such run: {address} has no {MANIFEST}. Download other folders, and name the copy.")
    folder = RemoteFolder(run, get_local_copy(run, purpose="read"))
    folder.fetch()
    nested = folder.local / place.path.removeprefix(run.path).strip("/")
    if not nested.is_dir():
        raise MissingError(f"no such run: {address}")
    return nested


def _download(name: str) -> Path:
    """Return the local copy of a folder on the hub, downloading it if needed.

    Raises:
      MissingError: If the folder cannot be downloaded, or has nothing in the layout of diffusers.
      UserError: If the pipeline is of an unknown class.
    """
    from huggingface_hub import snapshot_download  # Imported here: local folders need no hub.

    def download(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))

    try:
        # The index first: a pipeline of an unknown class is refused before gigabytes are downloaded.
        family = find_family(download(INDEX))
        families = list_families() if family is None else (family,)
        parts = {part for each in families for part in each.parts}
        folder = download(INDEX, *sorted(f"{part}/*.{ending}" for part in parts for ending in _HUB_ENDINGS))
        if not folder.is_dir() or not any(folder.iterdir()):
            rule = "its repository on the Hugging Face hub has no files in the layout of diffusers"
            raise MissingError(f"no such pipeline: {name}; {rule}. Use a repository that has, such as {name}-Diffusers")
        return folder
    except UserError:
        raise
    except Exception as error:  # of several libraries: no network, no such name, no permission, no room
        reason = " ".join(str(error).split()) or type(error).__name__
        raise MissingError(
            f"no such folder: {name}; nor could it be downloaded from the Hugging Face hub ({reason[:200]}): check the "
            f"name and the network, or download it elsewhere (hf download {name}) and name the folder"
        ) from error


def read_config(
    folder: str | Path,
    *,
    text_encoder: str | Path | None = None,
    image_encoder: str | Path | None = None,
    dtype: Dtype | None = None,
    text_dtype: Dtype | None = None,
) -> PipelineConfig | None:
    """Return the config of the pipeline that `dit_video.load` would load; its arguments have the same meaning here.

    It is None for a folder without a config: a run whose clips are not known yet, or a mistake, about which
    `dit_video.load` says more.

    Raises:
      MissingError: If a folder of open weights lacks parts.
      UserError: If the folder is of an unknown class or has unsupported settings, if the text encoder is not frozen, or
        if there is no image encoder.
    """
    folder = Path(folder)
    config: PipelineConfig | None
    if (family := find_family(folder)) is not None:
        options = LoadOptions(text_encoder=text_encoder, dtype=dtype or DEFAULT_DTYPE, text_dtype=text_dtype)
        config = family.make_config(folder, options)
    else:
        inner = next((each for each in (folder, folder / "pipeline") if (each / CONFIG).is_file()), None)
        config = _read_joined_config(folder) if inner is None else read_pipeline_config(inner)
        if config is not None and text_encoder is not None:
            moved = set_encoder_folder(config.model.text_encoder, text_encoder)
            config = config.replace_model(text_encoder=moved)
    return config if config is None or image_encoder is None else _move_image_encoder(config, image_encoder)
